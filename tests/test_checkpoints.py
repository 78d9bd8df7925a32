"""Checkpoints: every format gives the same model, and errors name what is missing."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from texts import TEXTS
from tokenizers import Tokenizer, models

from sparsex_jax.checkpoints import EMBEDDED_MODELS, convert, gguf_file, open_checkpoint, save_checkpoint
from sparsex_jax.checkpoints.base import check_vocabulary
from sparsex_jax.checkpoints.gguf_config import read_config
from sparsex_jax.checkpoints.gguf_file import GGUFModel
from sparsex_jax.config import ModelConfig, config_dir, named_config
from sparsex_jax.errors import InvalidRequestError, UnknownModelError, UnsupportedModelError
from sparsex_jax.eval import lexicon
from sparsex_jax.model.sharding import TENSOR_AXIS, make_mesh
from sparsex_jax.model.weights import abstract_params, describe, num_parameters

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3_text")
EMBEDDED = "smollm2-135m-instruct"

# Millions of parameters, as published or as the published weights' shapes add up to.
PUBLISHED = {
    "llama-2-7b": 6738.4,
    "llama-3.1-8b": 8030.3,
    "llama-3.2-1b": 1235.8,
    "llama-3.3-70b": 70553.7,
    "gemma-3-270m": 268.1,
    "gemma-3-1b": 999.9,
    "phi-3-mini-4k": 3821.1,
    "phi-4-mini": 3836.0,
    "mistral-7b-v0.3": 7248.0,
    "qwen2.5-0.5b": 494.0,
    "qwen2.5-7b": 7615.6,
    "qwen3-0.6b": 596.0,
    "qwen3-8b": 8190.7,
    "qwen3-32b": 32762.1,
    "qwen3-30b-a3b": 30532.1,
    "smollm2-135m": 134.5,
    "smollm2-360m": 361.8,
    "smollm2-1.7b": 1711.4,
}


@pytest.fixture(scope="module")
def embedded():
    return open_checkpoint(EMBEDDED)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


def assert_equal(got, expected):
    """Check that two trees have the same structure, shapes, dtypes and values."""
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)


# Published configurations


def test_every_named_configuration_is_checked():
    assert {path.stem for path in (config_dir() / "models").glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_configuration_has_the_published_size(name):
    assert num_parameters(named_config(name)) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.05)


def test_named_configurations_keep_what_shapes_do_not_show():
    llama, mistral, qwen2, qwen3 = map(named_config, ("llama-3.1-8b", "mistral-7b-v0.3", "qwen2.5-0.5b", "qwen3-0.6b"))
    assert (llama.rope_factors[0], llama.rope_factors[-1], llama.rope_theta) == (1.0, 8.0, 500000.0)
    assert (mistral.max_position, mistral.rope_factors) == (32768, None)
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.max_position) == (True, False, 32768)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    gemma, phi = map(named_config, ("gemma-3-1b", "phi-3-mini-4k"))
    assert [layer for layer, window in enumerate(gemma.windows) if window is None] == [5, 11, 17, 23]
    assert (gemma.rope_theta, gemma.rope_local_theta, gemma.windows[0]) == (1e6, 1e4, 512)
    assert (phi.windows, phi.rotary_dim, phi.rope_long_factors) == ((2047,) * 32, None, None)
    phi = named_config("phi-4-mini")
    assert (set(phi.windows), phi.rotary_dim, phi.rope_original_length, phi.max_position) == ({None}, 96, 4096, 131072)
    assert (set(phi.rope_factors), phi.rope_long_factors[-1]) == ({1.0}, 47.77)
    assert phi.rope_attention_factor == pytest.approx(1.190238)


# The embedded model


def test_embedded_configuration_is_the_published_one(embedded):
    published = dataclasses.replace(named_config("smollm2-135m"), eos_token_ids=(2,))
    stored_eps = embedded.config.rms_norm_eps  # float32 in the file
    assert stored_eps == pytest.approx(published.rms_norm_eps)
    assert embedded.config == dataclasses.replace(published, rms_norm_eps=stored_eps)


def test_embedded_weights_fill_the_description(embedded, mesh):
    params = embedded.load_params("bfloat16", mesh)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda w: w.shape, describe(embedded.config))
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.bfloat16
        assert 0 < float(jnp.abs(leaf).max()) < np.inf


@pytest.mark.parametrize("text", TEXTS)
def test_embedded_tokenizer_round_trips(embedded, text):
    tokens = embedded.tokenizer.encode(text)
    assert embedded.tokenizer.decode(tokens) == text
    assert max(tokens, default=0) < embedded.config.vocab_size


# The published vocabulary lacks the bytes of these control characters and of the unassigned planes 4 to 11.
IN_VOCABULARY = st.characters(
    exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF
)


@settings(deadline=None, max_examples=100)
@given(text=st.text(IN_VOCABULARY))
def test_embedded_tokenizer_round_trips_any_text(embedded, text):
    assert embedded.tokenizer.decode(embedded.tokenizer.encode(text)) == text


def test_embedded_tokenizer_splits_text_as_in_the_models_training(embedded):
    tokenizer = embedded.tokenizer
    assert tokenizer.tokenize("the 2024 report") == ["the", "Ġ", "2", "0", "2", "4", "Ġreport"]
    assert tokenizer.encode("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    assert tokenizer.decode([1, *tokenizer.encode("hi"), 2], skip_special_tokens=True) == "hi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_embedded_chat_template(embedded):
    messages = [{"role": "user", "content": "Hi"}]
    prompt = embedded.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# Hugging Face directories


def stored_tensors(name):
    return {key: value for file in (GOLDEN / name).glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS[:4])
def test_directory_loads_in_the_decoders_shapes(name, mesh):
    checkpoint = open_checkpoint(GOLDEN / name)
    params, stored, dim = checkpoint.load_params("float32", mesh), stored_tensors(name), checkpoint.config.head_dim
    layers, prefix = params.layers, "model.layers.2."
    q, k, o = (stored[f"{prefix}self_attn.{which}_proj.weight"] for which in "qko")
    np.testing.assert_array_equal(layers.wq[2, :, 3, 5], q[3 * dim + 5])
    np.testing.assert_array_equal(layers.wk[2, :, 1, 4], k[1 * dim + 4])
    np.testing.assert_array_equal(layers.wo[2, 3, 5], o[:, 3 * dim + 5])
    np.testing.assert_array_equal(layers.w_down[2], stored[f"{prefix}mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(layers.mlp_norm[2], stored[f"{prefix}post_attention_layernorm.weight"])
    np.testing.assert_array_equal(params.embed, stored["model.embed_tokens.weight"])


def test_directory_loads_what_only_some_models_have(mesh):
    llama, qwen2, qwen3 = (open_checkpoint(GOLDEN / name).load_params("float32", mesh) for name in MODELS[:3])
    bias, norm = "model.layers.1.self_attn.k_proj.bias", "model.layers.1.self_attn.q_norm.weight"
    assert llama.lm_head is None
    np.testing.assert_array_equal(qwen2.lm_head, stored_tensors("qwen2")["lm_head.weight"].T)
    np.testing.assert_array_equal(qwen2.layers.bk[1].reshape(-1), stored_tensors("qwen2")[bias])
    np.testing.assert_array_equal(qwen3.layers.q_norm[1], stored_tensors("qwen3")[norm].astype(np.float32))


def test_bfloat16_weights_stay_as_they_are(mesh):
    stored = stored_tensors("mistral")["model.embed_tokens.weight"]
    assert stored.dtype == ml_dtypes.bfloat16
    loaded = open_checkpoint(GOLDEN / "mistral").load_params("bfloat16", mesh).embed
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded, stored)


def test_directory_without_tokenizer_has_none():
    assert open_checkpoint(str(GOLDEN / "llama")).tokenizer is None


def test_end_tokens_of_the_generation_config_count(tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2, 7]}))
    assert open_checkpoint(folder).config.eos_token_ids == (2, 9, 7)


# GGUF files, written from the same models


def permute(rows, heads):
    """How llama.cpp stores the Q and K rows of its `llama` architecture."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, name, architecture, split=0, **fields):
    """The model of `tests/golden/{name}` as llama.cpp's converter would write it, tensor names included."""
    config = open_checkpoint(GOLDEN / name).config
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position // (4 if "rope.scaling.type" in fields else 1))  # yarn's factor
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_q_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(2)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.experts_per_token)
        writer.add_expert_feed_forward_length(config.intermediate_size)
    for key, value in fields.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    for tensor, array in gguf_tensors(name, architecture, config):
        writer.add_tensor(tensor, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_experts_together(stored):
    """One tensor for all experts of a layer, with the name that llama.cpp's converter gives it."""
    out, experts = {}, {}
    for key, array in stored.items():
        layer, _, rest = key.partition(".experts.")
        if not rest:
            out[key] = array
            continue
        number, name, _ = rest.split(".")
        kind = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(name, name)
        layer = layer.replace("block_sparse_moe", "mlp")
        experts.setdefault(f"{layer}.experts.{kind}.weight", {})[int(number)] = array
    return out | {key: np.stack([each[n] for n in range(len(each))]) for key, each in experts.items()}


def gguf_tensors(name, architecture, config):
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_layers)
    heads = {"q_proj": config.num_q_heads, "k_proj": config.num_kv_heads}
    for key, array in with_experts_together(stored_tensors(name)).items():
        if architecture == "gemma3" and "norm" in key:
            array = 1 + array.astype(np.float32)
        projection = key.split(".")[-2]
        if architecture == "llama" and projection in heads:
            array = permute(array, heads[projection])
        yield names.get_name(key, try_suffixes=(".weight", ".bias")), array
    if architecture == "phi3":
        yield "rope_factors_short.weight", np.array(config.rope_factors)
        yield "rope_factors_long.weight", np.array(config.rope_long_factors)
    elif config.rope_factors and architecture == "llama":
        yield "rope_freqs.weight", np.array(config.rope_factors)


GEMMA3_FIELDS = {
    "attention.sliding_window": 10,
    "attention.sliding_window_pattern": [True, False, True],
    "rope.freq_base_swa": 100.0,
    "rope.scaling.factor": 8.0,
    "final_logit_softcapping": 5.0,
}
PHI3_FIELDS = {
    "attention.sliding_window": 20,
    "rope.dimension_count": 12,
    "rope.scaling.original_context_length": 32,
    "rope.scaling.attn_factor": (1 + np.log(4) / np.log(32)) ** 0.5,
}


@pytest.mark.parametrize(
    ("name", "architecture", "fields"),
    [
        ("llama", "llama", {}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {}),
        ("mistral", "llama", {}),
        ("mistral_window", "llama", {"attention.sliding_window": 12}),
        ("qwen2_yarn", "qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}),
        ("gemma3_text", "gemma3", GEMMA3_FIELDS),
        ("phi3", "phi3", PHI3_FIELDS),
        ("mixtral", "llama", {}),
        ("olmoe", "olmoe", {}),
        ("qwen3_moe", "qwen3moe", {}),
    ],
)
def test_gguf_equals_the_directory_it_was_made_of(name, architecture, fields, tmp_path, mesh):
    ours, expected = (
        open_checkpoint(write_gguf(tmp_path / "m.gguf", name, architecture, **fields)),
        open_checkpoint(GOLDEN / name),
    )
    rounded = dict.fromkeys(("rms_norm_eps", "rope_attention_factor"), 1.0)  # float32 in the file
    rounded |= dict.fromkeys(("rope_factors", "rope_long_factors"))
    same, stated = (dataclasses.replace(one.config, **rounded) for one in (ours, expected))
    if architecture == "gemma3":  # llama.cpp knows the scale of scores by the size of the model
        assert (same.query_scalar, stated.query_scalar) == (24, 20)
        stated = dataclasses.replace(stated, query_scalar=24)
    if name == "qwen2_yarn":  # windows of some layers are no part of its files
        stated = dataclasses.replace(stated, layer_windows=None)
    assert same == stated
    assert ours.config.rms_norm_eps == pytest.approx(expected.config.rms_norm_eps)
    assert ours.config.rope_attention_factor == pytest.approx(expected.config.rope_attention_factor)
    for field in ("rope_factors", "rope_long_factors"):
        assert (getattr(ours.config, field) or ()) == pytest.approx(getattr(expected.config, field) or ())
    assert_equal(ours.load_params("float32", mesh), expected.load_params("float32", mesh))


@pytest.mark.parametrize(
    ("fields", "factors"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, (4.0,) * 8),
        ({"rope.scaling.factor": 4.0}, (4.0,) * 8),
        ({"rope.scale_linear": 4.0}, (4.0,) * 8),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_gguf_rotary_scaling_by_its_old_and_new_names(fields, factors, tmp_path):
    path = write_gguf(tmp_path / "scaled.gguf", "qwen2", "qwen2", **fields)
    assert open_checkpoint(path).config.rope_factors == factors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope.scaling.type": "yarn"}, r"no rope\.scaling\.factor"),
        ({"rope.dimension_count": 8}, "partial rotation"),
        ({"expert_count": 8}, "expert_used_count"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_shared_count": 1}, "expert_shared_count=1"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_gating_func": 2}, "expert_gating_func=2"),
    ],
)
def test_gguf_with_unsupported_features_is_refused(fields, message, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", "qwen2", **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(path)


def test_gguf_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"'gemma2' is not supported; supported: .*llama, .*olmoe"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("size", [0, 3, 100, 1000, -1000])
def test_damaged_gguf_is_refused(size, tmp_path, mesh):
    whole = write_gguf(tmp_path / "whole.gguf", "qwen2", "qwen2")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole.read_bytes()[:size])
    with pytest.raises(UnsupportedModelError, match=r"broken\.gguf"):
        open_checkpoint(broken).load_params("float32", mesh)


def test_a_model_that_also_sees_pictures_is_read_as_its_text_model(tmp_path, mesh):
    """`gemma3`, with the names of old files and of new ones."""
    raw = json.loads((GOLDEN / "gemma3_text" / "config.json").read_text())
    expected = open_checkpoint(GOLDEN / "gemma3_text")
    for number, prefix in enumerate(("language_model.model.", "model.language_model.")):
        folder = tmp_path / str(number)
        folder.mkdir()
        outer = {"model_type": "gemma3", "text_config": raw, "vision_config": {}}
        (folder / "config.json").write_text(json.dumps(outer))
        tensors = {prefix + key.removeprefix("model."): array for key, array in stored_tensors("gemma3_text").items()}
        tensors["vision_tower.embedding.weight"] = np.ones((2, 2), np.float32)
        save_file(tensors, folder / "model.safetensors")
        found = open_checkpoint(folder)
        assert found.config == expected.config
        assert_equal(found.load_params("bfloat16", mesh), expected.load_params("bfloat16", mesh))


def test_norms_that_add_one_stay_float32(mesh):
    params = open_checkpoint(GOLDEN / "gemma3_text").load_params("bfloat16", mesh)
    assert {params.layers.q_norm.dtype, params.final_norm.dtype} == {jnp.dtype("float32")}
    assert params.embed.dtype == jnp.bfloat16


# What does not belong together


def with_tokenizer(folder, size):
    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(size)}, unk_token="t0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return open_checkpoint(folder)


@pytest.mark.parametrize("rows", [129, 1000])
def test_a_tokenizer_of_another_model_is_refused(rows, tmp_path):
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    assert len(with_tokenizer(folder, 128).tokenizer) == len(with_tokenizer(folder, 100).tokenizer) + 28 == 128
    if rows > 128:
        with pytest.raises(UnsupportedModelError, match=f"token ids up to {rows - 1}, and the embedding 128 rows"):
            _ = with_tokenizer(folder, rows).tokenizer


def test_a_tokenizer_that_is_far_too_small_is_refused():
    few = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 31999})
    config = dataclasses.replace(named_config("qwen2.5-0.5b"), vocab_size=151936)
    with pytest.raises(UnsupportedModelError, match="token ids up to 31999, and the embedding 151936 rows"):
        check_vocabulary(Path("model"), few, config)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="holds an adapter"):
        open_checkpoint(folder)


def test_an_index_beside_a_single_file_is_ambiguous(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen2", tmp_path / "model")
    shutil.copy(GOLDEN / "llama" / "model.safetensors", folder)
    with pytest.raises(UnsupportedModelError, match=r"names other files; nothing says which are the model's weights"):
        open_checkpoint(folder)


@pytest.mark.parametrize("lost", [1, 5000])
def test_a_truncated_gguf_file_is_refused_when_it_is_opened(lost, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", "qwen2")
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(UnsupportedModelError, match=r"tensor .* ends at byte \d+, and the file at \d+: it is not"):
        open_checkpoint(path)


@pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_tensors_are_read_in_parts_as_the_gguf_package_reads_them(encoding, monkeypatch):
    monkeypatch.setattr(gguf_file, "_ELEMENTS_AT_ONCE", 64)
    kind = gguf.GGMLQuantizationType[encoding]
    stored = gguf.quantize(np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32), kind)
    got = gguf_file._dequantised(np.ascontiguousarray(stored).view(np.uint8).ravel(), kind)
    np.testing.assert_array_equal(got.astype(np.float32), gguf.dequantize(stored, kind).ravel())


# GGUF models in parts


@pytest.fixture
def parts(tmp_path):
    """Qwen2, whose head is in the last part, of three."""
    write_gguf(tmp_path / "m.gguf", "qwen2", "qwen2", split=13)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in found] == [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return found


@pytest.mark.parametrize("opened", [0, 1, 2, "directory"])
def test_parts_are_read_together_whichever_is_named(opened, parts, mesh):
    checkpoint = open_checkpoint(parts[0].parent if opened == "directory" else parts[opened])
    assert not checkpoint.config.tied_embeddings
    expected = open_checkpoint(GOLDEN / "qwen2")
    assert_equal(checkpoint.load_params("float32", mesh), expected.load_params("float32", mesh))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_part_is_named(lost, parts):
    parts[lost].unlink()
    for part in set(parts) - {parts[lost]}:
        with pytest.raises(UnknownModelError, match=parts[lost].name):
            open_checkpoint(part)


def test_parts_that_do_not_belong_together_are_refused(parts, tmp_path):
    (tmp_path / "other.gguf").write_bytes(parts[0].read_bytes())
    with pytest.raises(UnsupportedModelError, match=r"split\.count=3 is not what the file's name says"):
        open_checkpoint(tmp_path / "other.gguf")
    with pytest.raises(UnknownModelError, match=r"2 models; name one of them: m-00001-of-00003\.gguf, other\.gguf"):
        open_checkpoint(tmp_path)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(UnsupportedModelError, match=r"00002-of-00003\.gguf: split\.no=2"):
        open_checkpoint(parts[0])


def test_a_directory_with_one_gguf_file_is_that_model(tmp_path):
    path = write_gguf(tmp_path / "m.GGUF", "qwen2", "qwen2")
    shutil.copy(GOLDEN / "qwen2" / "config.json", tmp_path)  # without weights
    assert open_checkpoint(tmp_path).config == open_checkpoint(path).config


# Rotary positions


def with_rotary(**fields):
    raw = json.loads((GOLDEN / "mistral" / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        raw.pop(name, None)
    return ModelConfig.from_hf(raw | fields)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "theta", "divisor"),
    [
        ({}, 1e4, None),
        ({"rope_theta": None, "rope_scaling": None, "rope_parameters": None}, 1e4, None),
        ({"rope_theta": 5, "rope_scaling": {"type": "linear", "factor": 4}}, 5.0, 4.0),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}}, 1e4, 4.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_parameters": {"rope_type": None, "factor": None, "rope_theta": None}}, 1e4, None),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
            *(1e4, 2.0),
        ),
    ],
)
def test_rotary_positions_by_old_and_new_names(fields, theta, divisor):
    config = with_rotary(**fields)
    assert config.rope_theta == theta
    assert config.rope_factors == (divisor if divisor is None else (divisor,) * (config.head_dim // 2))


def test_llama3_takes_the_original_length_from_where_it_stands():
    length = with_rotary().max_position
    inside = with_rotary(rope_scaling=LLAMA3 | {"original_max_position_embeddings": length})
    assert with_rotary(rope_scaling=LLAMA3) == inside  # as transformers has it
    assert with_rotary(rope_scaling=LLAMA3, original_max_position_embeddings=length) == inside
    assert with_rotary(rope_scaling=LLAMA3, original_max_position_embeddings=length // 8) != inside


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(
            ({section: {"rope_type": kind, "factor": 4.0}}, f"rope_type='{kind}' is not supported")
            for section in ("rope_scaling", "rope_parameters")
            for kind in ("su", "mrope")
        ),
        ({"rope_scaling": {"type": "yarn", "factor": -4.0}}, "factor=-4.0 must be a finite number above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate=1 must be true or false"),
        ({"rope_scaling": {"type": "dynamic"}}, "has no factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, r"short_factor=\[1.0\] must be a list of 8"),
        ({"rope_scaling": LONGROPE | {"long_factor": [0.0] * 8}}, "long_factor=.* finite numbers above 0"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}}, "differs from type='linear'"),
        ({"rope_scaling": {"factor": 4.0}}, "factor=4.0 has no rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0 must be a finite number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "has no factor"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0 must be above"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "has no low_freq_factor"),
        ({"rope_theta": "1e4"}, "rope_theta='1e4' must be a finite number"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta=20000.0 differs"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "full_attention=.* all layers rotate alike"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters and rope_scaling differ",
        ),
    ],
)
def test_rotary_positions_that_are_not_computed_are_refused(fields, said):
    with pytest.raises(UnsupportedModelError, match=said):
        with_rotary(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "longrope"),
        ({"rope.scaling.type": "linear"}, r"no rope\.scaling\.factor"),
        ({"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.2}, r"attn_factor=1\.2"),
        ({"rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 1.0}, "yarn_ext_factor"),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, r"differs from rope\.scale_linear=2\.0"),
        ({"rope.scaling.factor": -4.0}, "must be a finite number above 0"),
        ({"attention.causal": False}, "attention.causal=False"),
    ],
)
def test_gguf_scalings_that_are_not_computed_are_refused(fields, said, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", "qwen2", **fields)
    with pytest.raises(UnsupportedModelError, match=said):
        open_checkpoint(path)


def test_gguf_scalings_that_change_nothing_are_read(tmp_path):
    fields = {"rope.scaling.attn_factor": 1.0, "rope.scaling.original_context_length": 64}
    path = write_gguf(tmp_path / "m.gguf", "qwen2", "qwen2", **{"rope.scaling.factor": 4.0} | fields)
    assert open_checkpoint(path).config.rope_factors == (4.0,) * 8


def test_stored_divisors_and_a_factor_multiply(tmp_path):
    plain, scaled = (
        open_checkpoint(write_gguf(tmp_path / f"{len(fields)}.gguf", "llama", "llama", **fields)).config.rope_factors
        for fields in ({}, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0})
    )
    assert scaled == pytest.approx([2 * factor for factor in plain])


def test_fields_of_each_layer_count_where_all_agree(tmp_path):
    heads, layers = (getattr(open_checkpoint(GOLDEN / "qwen2").config, name) for name in ("num_kv_heads", "num_layers"))
    alike, unlike = [heads] * layers, [heads] * (layers - 1) + [1]
    path = write_gguf(tmp_path / "m.gguf", "qwen2", "qwen2")
    expected = open_checkpoint(path).config
    for values in (alike, unlike):
        model = GGUFModel(path)
        model.metadata["qwen2.attention.head_count_kv"] = values
        if values is alike:
            assert read_config(model) == expected
        else:
            with pytest.raises(UnsupportedModelError, match=r"attention\.head_count_kv=\[.*must be an integer"):
                read_config(model)


# Converted checkpoints


@pytest.mark.parametrize("name", MODELS)
def test_converted_checkpoint_equals_its_source(name, tmp_path, mesh):
    convert(GOLDEN / name, tmp_path / "out", "float32", mesh)
    source, converted = open_checkpoint(GOLDEN / name), open_checkpoint(tmp_path / "out")
    assert converted.config == source.config
    assert converted.tokenizer is None
    assert_equal(converted.load_params("float32", mesh), source.load_params("float32", mesh))


def test_converted_checkpoint_is_restored_into_another_dtype_and_mesh(tmp_path, mesh):
    source = open_checkpoint(GOLDEN / "qwen3")
    convert(GOLDEN / "qwen3", tmp_path / "out", "float32", mesh)
    wide = make_mesh(min(2, jax.device_count()))
    params = open_checkpoint(tmp_path / "out").load_params("bfloat16", wide)
    assert_equal(params, source.load_params("bfloat16", mesh))
    wanted = abstract_params(source.config, "bfloat16", wide)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, wanted)
    assert params.layers.wq.sharding.mesh.shape[TENSOR_AXIS] == wide.size


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_were_written_as_dictionaries_load(name, tmp_path, mesh):
    import orbax.checkpoint as ocp

    convert(GOLDEN / name, tmp_path / "out", "float32", mesh)
    params = open_checkpoint(GOLDEN / name).load_params("float32", mesh)
    layers = {field: array for field, array in vars(params.layers).items() if array is not None}
    named = {"embed": params.embed, "layers": layers, "final_norm": params.final_norm}
    if params.lm_head is not None:
        named["lm_head"] = params.lm_head
    shutil.rmtree(tmp_path / "out" / "params")
    with ocp.StandardCheckpointer() as checkpointer:  # as every earlier version wrote them
        checkpointer.save(tmp_path / "out" / "params", named)
    assert_equal(open_checkpoint(tmp_path / "out").load_params("float32", mesh), params)


def test_tokenizer_survives_conversion(embedded, tmp_path, mesh):
    small = open_checkpoint(GOLDEN / "llama")
    save_checkpoint(tmp_path / "out", small.config, small.load_params("float32", mesh), embedded.tokenizer)
    tokenizer = open_checkpoint(tmp_path / "out").tokenizer
    assert [tokenizer.encode(text) for text in TEXTS] == [embedded.tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert tokenizer.chat_template == embedded.tokenizer.chat_template
    assert tokenizer.eos_token_id == 2


def test_nothing_is_overwritten(tmp_path, mesh):
    (tmp_path / "note").write_text("mine")
    for target in (tmp_path, tmp_path / "note"):
        with pytest.raises(InvalidRequestError, match="nothing is overwritten"):
            convert(GOLDEN / "llama", target, "float32", mesh)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("dtype", ["int8", "fp8", "float31", "auto", ""])
def test_a_conversion_is_to_floating_point(tmp_path, mesh, dtype):
    with pytest.raises(InvalidRequestError, match=f"dtype='{dtype}' must be one of float32, bfloat16, float16"):
        convert(GOLDEN / "llama", tmp_path / "out", dtype, mesh)
    assert not any(tmp_path.iterdir())


def test_a_conversion_to_below_a_file_is_refused_before_weights_are_read(tmp_path, mesh):
    (tmp_path / "note").touch()
    with pytest.raises(InvalidRequestError, match=r"cannot be made in '.*note': Not a directory"):
        convert("no such model", tmp_path / "note" / "a" / "b", "float32", mesh)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no directory like it")
def test_a_conversion_to_where_nobody_can_write_is_refused_before_weights_are_read(mesh):
    """Its permissions say that root can."""
    with pytest.raises(InvalidRequestError, match="target='/proc/new' cannot be made in '/proc': No such file"):
        convert("no such model", "/proc/new", "float32", mesh)


def test_failed_conversion_leaves_nothing(tmp_path, mesh):
    class Broken:
        def save_pretrained(self, path):
            raise OSError("disk full")

    source = open_checkpoint(GOLDEN / "llama")
    with pytest.raises(InvalidRequestError, match="out' cannot be written: disk full"):
        save_checkpoint(tmp_path / "out", source.config, source.load_params("float32", mesh), Broken())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["config.json", "params"])
def test_half_written_conversion_is_refused(lost, tmp_path, mesh):
    out = tmp_path / "out"
    convert(GOLDEN / "llama", out, "float32", mesh)
    shutil.rmtree(out / lost) if (out / lost).is_dir() else (out / lost).unlink()
    with pytest.raises(UnknownModelError, match=f"has no {lost}.*conversion"):
        open_checkpoint(out)


def test_conversion_of_a_newer_version_is_refused(tmp_path, mesh):
    convert(GOLDEN / "llama", tmp_path / "out", "float32", mesh)
    path = tmp_path / "out" / "config.json"
    record = json.loads(path.read_text())
    record["config"]["num_shared_experts"] = 8
    path.write_text(json.dumps(record))
    with pytest.raises(UnsupportedModelError, match="num_shared_experts"):
        open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": None}, "has no num_layers"),
        ({"num_layers": "4"}, "num_layers='4' must be an integer"),
        ({"hidden_size": 32}, r"embed is stored as \(128, 64\); the configuration needs \(128, 32\)"),
        ({"tied_embeddings": False}, "lm_head is stored as None"),
        ({"qk_norm": True}, "k_norm is stored as None"),
        ({"rope_factors": [1.0]}, r"rope_factors=\(1\.0,\) must have"),
        ({"rope_theta": "x"}, "rope_theta='x' must be a finite number"),
    ],
)
def test_a_conversion_whose_configuration_was_changed_is_refused(change, said, tmp_path, mesh):
    convert(GOLDEN / "llama", tmp_path / "out", "float32", mesh)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({"format": "sparsex-jax", "config": json.loads(path.read_text())["config"] | change}))
    with pytest.raises(UnsupportedModelError, match=said):
        open_checkpoint(tmp_path / "out").load_params("float32", mesh)


def test_a_conversion_whose_weights_are_damaged_is_refused(tmp_path, mesh):
    convert(GOLDEN / "llama", tmp_path / "out", "float32", mesh)
    for file in (tmp_path / "out" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UnsupportedModelError, match="params cannot be read"):
        open_checkpoint(tmp_path / "out").load_params("float32", mesh)


# What is said when something is missing


def copy_of(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


@pytest.mark.parametrize("source", ["no-such-model", "/no/such/dir", "missing.gguf"])
def test_error_for_an_unknown_source_lists_what_was_looked_for(source):
    with pytest.raises(UnknownModelError) as caught:
        open_checkpoint(source)
    for part in (source, *EMBEDDED_MODELS, ".gguf", "directory"):
        assert part in str(caught.value)


@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00003.safetensors"])
def test_error_names_a_missing_file(lost, tmp_path):
    folder = copy_of("qwen2", tmp_path)
    (folder / lost).unlink()
    with pytest.raises(UnknownModelError, match=lost):
        open_checkpoint(folder)


def test_directory_without_weights_is_refused(tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match=r"no model\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "has no text_config"),
        ({"model_type": "gemma2"}, "model_type='gemma2' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"quantization_config": {}}, "quantised weights .quantization_config"),
        ({"compression_config": {"format": "int-quantized"}}, "compression_config"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be an integer"),
        ({"vocab_size": 0}, "vocab_size=0 must be an integer from 1"),
        ({"num_key_value_heads": [2, 2]}, r"num_key_value_heads=\[2, 2\]"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True must be a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
        ({"hidden_act": None}, "hidden_act=None"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4, "factor": 4.0}}, "mrope"),
    ],
)
def test_unsupported_directory_is_refused(changes, message, tmp_path):
    folder = copy_of("llama", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tie_word_embeddings": False}, r"lm_head\.weight"), ({"hidden_size": 32}, r"embed_tokens\.weight is stored")],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(changes, message, tmp_path, mesh):
    folder = copy_of("llama", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(folder).load_params("float32", mesh)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_error_names_a_damaged_file(file, tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / file).write_bytes(b"{broken")
    with pytest.raises(UnsupportedModelError, match=file):
        open_checkpoint(folder)


def test_ruler_tiny_comes_with_the_vocabulary_of_the_tasks():
    checkpoint = open_checkpoint("ruler-tiny")
    vocabulary = lexicon.vocabulary()
    assert checkpoint.tokenizer.get_vocab() == vocabulary
    assert checkpoint.config.vocab_size >= len(vocabulary)
    assert checkpoint.config.eos_token_ids == (vocabulary["<eos>"],)
    assert sum(file.stat().st_size for file in (config_dir() / "ruler-tiny").iterdir()) < 32e6


# What a checkpoint says twice, and what nobody would read -------------------------------------------------------


def rewritten(name, tmp_path, change):
    """A copy of a golden directory whose tensors were changed."""
    folder, tensors = copy_of(name, tmp_path), dict(stored_tensors(name))
    change(tensors)
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "extra",
    ["model.layers.0.self_attn.o_proj.bias", "model.layers.1.self_attn.q_norm.weight", "model.norm.weight_scale"],
)
def test_tensors_that_would_not_be_read_are_refused(extra, tmp_path):
    folder = rewritten("llama", tmp_path, lambda tensors: tensors.update({extra: np.ones(4, np.float32)}))
    with pytest.raises(UnsupportedModelError, match=rf"not read: {extra}"):
        open_checkpoint(folder)


def test_rotary_tables_of_old_files_are_left_out(tmp_path):
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    open_checkpoint(rewritten("llama", tmp_path, lambda tensors: tensors.update(table)))


def test_gguf_tensors_that_would_not_be_read_are_refused(tmp_path, monkeypatch):
    known = gguf_tensors
    monkeypatch.setitem(
        globals(), "gguf_tensors", lambda *args: [*known(*args), ("blk.0.attn_output.bias", np.ones(4, np.float32))]
    )
    path = write_gguf(tmp_path / "m.gguf", "llama", "llama")
    with pytest.raises(UnsupportedModelError, match=r"not read: blk\.0\.attn_output\.bias"):
        open_checkpoint(path)


@pytest.mark.parametrize("own", [True, False])
def test_a_stored_head_counts_where_it_differs_from_the_embeddings(own, tmp_path, mesh):
    embed = stored_tensors("llama")["model.embed_tokens.weight"]
    head = embed + own
    folder = rewritten("llama", tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.tied_embeddings is not own
    params = checkpoint.load_params("float32", mesh)
    assert (params.lm_head is not None) is own
    if own:
        np.testing.assert_array_equal(params.lm_head, head.T)


def test_a_transposed_matrix_is_refused(tmp_path, mesh):
    def transposed(tensors):
        name = "model.layers.0.mlp.gate_proj.weight"
        tensors[name] = tensors[name].T

    with pytest.raises(UnsupportedModelError, match=r"gate_proj\.weight is stored as"):
        open_checkpoint(rewritten("llama", tmp_path, transposed)).load_params("float32", mesh)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json"])
def test_a_directory_that_says_it_is_quantised_elsewhere_is_refused(name, tmp_path):
    folder = copy_of("llama", tmp_path)
    (folder / name).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=f"quantised weights .{name}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.int8])
def test_weights_that_are_no_plain_floats_are_refused(dtype, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = rewritten("llama", tmp_path, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    with pytest.raises(UnsupportedModelError, match=f"{name} has elements of type"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda index: index.pop("weight_map"), "has no weight_map"),
        (lambda index: index.update(weight_map=[]), "weight_map=.* must be an object"),
        (lambda index: index["weight_map"].update({"model.norm.weight": "../x.safetensors"}), "no file's name"),
        (lambda index: index["weight_map"].update({"model.norm.weight": 3}), "says 3 of model.norm.weight"),
        (
            lambda index: index["weight_map"].update({"model.embed_tokens.weight": "model-00003-of-00003.safetensors"}),
            "model.embed_tokens.weight is not in model-00003-of-00003.safetensors",
        ),
        (lambda index: index["weight_map"].update({"more": "model-00001-of-00003.safetensors"}), "more is not in"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(change, said, tmp_path):
    folder = copy_of("qwen2", tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match=said):
        open_checkpoint(folder)


def test_shapes_are_compared_as_shapes(tmp_path, mesh):
    """A matrix of the right size that is neither `[out, in]` nor `[in, out]`."""
    name = "model.layers.0.self_attn.q_proj.weight"

    def reshaped(tensors):
        tensors[name] = tensors[name].reshape(16, -1)

    with pytest.raises(UnsupportedModelError, match=r"q_proj\.weight is stored as \(16, \d+\)"):
        open_checkpoint(rewritten("llama", tmp_path, reshaped)).load_params("float32", mesh)


def test_files_beside_model_safetensors_do_not_count(tmp_path, mesh):
    folder = copy_of("llama", tmp_path)
    other = {key: value + 1 for key, value in stored_tensors("llama").items()}
    save_file(other, folder / "zz.safetensors")
    assert_equal(
        open_checkpoint(folder).load_params("float32", mesh),
        open_checkpoint(GOLDEN / "llama").load_params("float32", mesh),
    )
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"a\.safetensors and zz\.safetensors .* both have the tensor"):
        open_checkpoint(folder)
