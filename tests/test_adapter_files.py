"""Adapters in PEFT's format: what is read equals the merged weights, and everything else is refused by its name."""

import dataclasses
import json
import random
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from adapter_files import SAVED, random_tensors, write, write_adapter
from conftest import TINY
from hub import Repository, files_of
from safetensors.numpy import load_file, save_file
from test_malformed import GOLDEN, REFUSALS, SEEDS, mutated
from test_names import hub  # noqa: F401 (a fixture)

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.checkpoints.adapters import read_adapter
from sparsex_jax.errors import UnknownModelError, UnsupportedModelError
from sparsex_jax.model.adapters import TARGETS
from sparsex_jax.model.sharding import make_mesh

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
NAME = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"


def changed(tensors, changes):
    """Tensors with some replaced, or left out where there is None."""
    return {name: each for name, each in (tensors | changes).items() if each is not None}


def differences(model, tensors, scale, target):
    """What adding scale B A to the weights of a directory changes in the weights as they are loaded."""
    stored = load_file(model / "model.safetensors")
    stored = {name: each.astype(np.float32) for name, each in stored.items()}
    merged = dict(stored)
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            merged[f"{module}.weight"] = stored[f"{module}.weight"] + scale * tensors[name.replace("_A", "_B")] @ a
    found = []
    for number, weights in enumerate((stored, merged)):
        folder = target / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((model / "config.json").read_text())
        save_file(weights, folder / "model.safetensors")
        found.append(open_checkpoint(folder).load_params("float32", make_mesh()).layers)
    return {
        name: np.asarray(getattr(found[1], name)) - np.asarray(getattr(found[0], name))
        for name in TARGETS
        if getattr(found[0], name) is not None
    }


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ALL),
        ("phi3", FUSED),
        pytest.param("gemma3_text", ALL, marks=pytest.mark.slow),
        pytest.param("mixtral", ALL[:4], marks=pytest.mark.slow),
    ],
)
def test_what_is_read_is_what_merging_adds(family, kinds, tmp_path):
    """Fused modules are split, and rotated rows are in the order of the model's own."""
    config = open_checkpoint(GOLDEN / family).config
    tensors = random_tensors(config, kinds)
    adapter = read_adapter(write(tmp_path / "adapter", tensors, target_modules=kinds), config)
    expected = differences(GOLDEN / family, tensors, 8 / 4, tmp_path)
    assert adapter.rank == 4
    assert set(adapter.pairs) == set(TARGETS if len(kinds) > 4 or family == "phi3" else TARGETS[:4])
    for name, (a, b) in adapter.pairs.items():
        added = (a @ b).reshape(expected[name].shape)
        np.testing.assert_allclose(added, expected[name], atol=1e-5)


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({"lora_alpha": 8}, 8 / 4),
        ({"lora_alpha": 2.5}, 2.5 / 4),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 2),
        ({"alpha_pattern": {"q_proj": 12, "layers.0.self_attn.q_proj": 100}}, 12 / 4),  # the first that fits
        ({"alpha_pattern": {r"layers\.[0-3]\.self_attn\.q_proj": 1, "proj": 5}}, 1 / 4),
        ({"alpha_pattern": {"q_pro": 12, "v_proj": 3}}, 8 / 4),
    ],
)
def test_the_scale_is_in_b(said, scale, tmp_path):
    tensors = random_tensors(TINY)
    adapter = read_adapter(write(tmp_path, tensors, **said), TINY)
    for layer in range(TINY.num_layers):
        np.testing.assert_array_equal(adapter.pairs["wq"].a[layer], tensors[NAME.format(layer, "q", "A")].T)
        expected = np.float32(scale) * tensors[NAME.format(layer, "q", "B")].T
        np.testing.assert_array_equal(adapter.pairs["wq"].b[layer], expected)


def test_smaller_ranks_and_layers_without_an_adapter_are_zeros(tmp_path):
    tensors = random_tensors(TINY)
    wide = random_tensors(TINY, rank=6, seed=1)
    wide = {name: each for name, each in wide.items() if ".layers.2." in name and "q_proj" in name}
    without = {name: None for name in tensors if ".layers.1." in name or ".layers.3." in name}
    said = {"rank_pattern": {"2.self_attn.q_proj": 6}, "layers_to_transform": [0, 2], "use_rslora": True}
    adapter = read_adapter(write(tmp_path, changed(tensors, without | wide), **said), TINY)
    assert adapter.rank == 6
    (a, b), values = adapter.pairs["wq"], adapter.pairs["wv"]
    assert (a.shape, values.a.shape) == ((4, 32, 6), (4, 32, 4))
    assert not a[[1, 3]].any()
    assert not b[[1, 3]].any()
    assert not a[0, :, 4:].any()
    assert not b[0, 4:].any()
    np.testing.assert_array_equal(b[2], np.float32(8 / 6**0.5) * wide[NAME.format(2, "q", "B")].T)
    np.testing.assert_array_equal(b[0, :4], np.float32(8 / 2) * tensors[NAME.format(0, "q", "B")].T)


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (ALL, {"target_modules": "all-linear"}),
        (ALL, {"target_modules": "All-Linear"}),
        (FUSED, {"target_modules": "all-linear"}),
        (FUSED, {"target_modules": [*ALL, *FUSED]}),  # those that there are
        (ALL[:3], {"target_modules": r".*\.[qkv]_proj"}),
        (ALL[:2], {"target_modules": ALL, "exclude_modules": r".*(v_proj|o_proj|mlp\..*)"}),
        (ALL[:4], {"target_modules": ALL, "exclude_modules": ALL[4:]}),
        (ALL[:2], {"target_modules": ALL[:2], "layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"}),
        (ALL[:2], {"target_modules": ALL[:2], "layers_to_transform": [], "layers_pattern": []}),
        (  # a whole name counts in any layer
            ALL[:1],
            {"target_modules": ["q_proj", "model.layers.3.self_attn.q_proj"], "layers_to_transform": [0, 1, 2]},
        ),
    ],
)
def test_modules_are_selected_as_peft_does(kinds, said, tmp_path):
    assert read_adapter(write(tmp_path, random_tensors(TINY, kinds), **said), TINY).rank == 4


@pytest.mark.parametrize("model", ["model.", "language_model.model.", "model.language_model."])
def test_adapters_of_models_that_see_pictures_are_read(model, tmp_path):
    pattern = rf"{re.escape(model)}layers\.\d+\.self_attn\.(q|v)_proj"
    adapter = read_adapter(write(tmp_path, random_tensors(TINY, model=model), target_modules=pattern), TINY)
    assert set(adapter.pairs) == {"wq", "wv"}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_weights_of_other_floats_become_float32(dtype, tmp_path):
    tensors = {name: each.astype(dtype) for name, each in random_tensors(TINY).items()}
    pair = read_adapter(write(tmp_path, tensors), TINY).pairs["wv"]
    assert pair.a.dtype == pair.b.dtype == np.float32
    np.testing.assert_array_equal(pair.a[1], tensors[NAME.format(1, "v", "A")].T.astype(np.float32))


def test_a_digest_is_of_all_that_is_computed_with_and_of_nothing_else(tmp_path):
    tensors = random_tensors(TINY)
    digests = [
        read_adapter(write(tmp_path / str(number), each, **said), TINY).digest
        for number, (each, said) in enumerate(
            [
                (tensors, {}),
                (tensors, {"base_model_name_or_path": "another", "lora_dropout": 0, "revision": "main"}),
                (tensors, {"lora_alpha": 9}),
                (tensors, {"alora_invocation_tokens": [5, 6]}),
                (tensors, {"alora_invocation_tokens": [56]}),
                (changed(tensors, {NAME.format(3, "v", "B"): -tensors[NAME.format(3, "v", "B")]}), {}),
            ]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5


def test_an_activated_adapter_has_its_invocation(tmp_path):
    assert read_adapter(write_adapter(tmp_path, TINY, alora_invocation_tokens=[5, 96]), TINY).invocation == (5, 96)
    assert read_adapter(write_adapter(tmp_path, TINY, alora_invocation_tokens=None), TINY).invocation == ()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported; supported: LORA"),
        ({"peft_type": None}, "peft_type=None is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported; supported: none"),
        ({"use_dora": True}, "use_dora=True is not supported: DoRA"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=[3] is not supported: embeddings"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters=['experts.down_proj']"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' may change the model's own"),
        ({"init_lora_weights": "loftq"}, "supported: true, false, gaussian"),
        ({"invocation_string": "<answer>"}, "invocation_string='<answer>' is not supported: the field is not known"),
        ({"r": 0}, "r=0 must be an integer from 1"),
        ({"r": None}, "has no r, which is needed"),
        ({"r": 5}, "the rank in adapter_config.json need (5, 32)"),
        ({"rank_pattern": {"v_proj": 2}}, "need (2, 32)"),
        ({"rank_pattern": {"v_proj": "2"}}, "rank_pattern: v_proj='2' must be an integer"),
        ({"rank_pattern": {"v_proj)": 4}}, "rank_pattern={'v_proj)': 4} has no regular expression"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be a finite number above 0"),
        ({"lora_alpha": 10**400}, "too large"),
        ({"lora_alpha": 1e39}, "has NaN or infinities"),
        ({"use_rslora": "yes"}, "use_rslora='yes' must be true or false"),
        ({"target_modules": None}, "target_modules=None must be a list"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj"]}, "has no tensors of model.layers.0.self_attn.k_proj"),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "selects lm_head; adapters are read for modules of"),
        ({"target_modules": r".*(q_proj|v_proj|embed_tokens)"}, "selects model.embed_tokens"),
        ({"target_modules": ["q_proj"]}, "layers.0.self_attn.v_proj: adapter_config.json does not select them"),
        ({"target_modules": "[qv]_proj"}, "does not select them"),  # a pattern is for the whole name
        ({"layers_to_transform": [0, 1, 2, 4]}, "must be layers of the model, from 0 to 3"),
        ({"layers_to_transform": [0, 1]}, "layers.2.self_attn.q_proj: adapter_config.json does not select them"),
        ({"layers_to_transform": [0], "target_modules": "all-linear"}, "needs a list of names as target_modules"),
        ({"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "blocks"}, "does not select them"),
        ({"alora_invocation_tokens": [97]}, "alora_invocation_tokens=[97] must be a list of token ids from 0 to 96"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens=[] must be a list of token ids"),  # PEFT: never acts
    ],
)
def test_a_configuration_that_would_change_answers_is_refused(said, message, tmp_path):
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        read_adapter(write_adapter(tmp_path, TINY, **said), TINY)


Q = random_tensors(TINY)[NAME.format(0, "q", "A")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({NAME.format(0, "q", "A"): None}, "has no tensor '" + NAME.format(0, "q", "A")),
        ({NAME.format(0, "q", "A"): Q.T}, "is stored as (32, 4); the model and the rank"),
        ({NAME.format(0, "q", "A"): Q[:, :31]}, "is stored as (4, 31); the model and the rank"),
        ({NAME.format(0, "q", "A"): Q.astype(np.int8)}, "has elements of type I8"),
        ({NAME.format(0, "q", "A"): Q * np.nan}, "model.layers.0.self_attn.q_proj has NaN or infinities"),
        ({NAME.format(0, "q", "B"): np.full((32, 4), -np.inf, np.float32)}, "q_proj has NaN or infinities"),
        (
            {NAME.format(4, "q", "A"): Q, NAME.format(4, "q", "B"): Q.T},
            "model.layers.4.self_attn.q_proj: the model has no such module in its layers 0 to 3",
        ),
        ({NAME.format(0, "q", "A").replace("A.weight", "magnitude_vector"): Q[0]}, "tensors that are not read: base_"),
        ({NAME.format(0, "q", "B").replace("weight", "bias"): Q[0]}, "lora_B.bias"),
        ({"base_model.model.lm_head.lora_A.weight": Q}, "base_model.model.lm_head.lora_A.weight. Read are"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": Q}, "lora_embedding_A"),
        ({"base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight": Q}, "experts.1.up_proj"),
        ({"base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight": Q}, "layers.00"),
        (random_tensors(TINY, ["qkv_proj"]), "q_proj: the model has no such module"),  # fused and apart
        (random_tensors(TINY, model="model.language_model."), "the model has no such module"),  # two models
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(changes, message, tmp_path):
    folder = write(tmp_path, changed(random_tensors(TINY), changes))
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        read_adapter(folder, TINY)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder = write_adapter(tmp_path, dataclasses.replace(TINY, hidden_size=64))
    with pytest.raises(UnsupportedModelError, match=r"q_proj.lora_A.weight is stored as \(4, 64\)"):
        read_adapter(folder, TINY)


def test_a_model_with_experts_has_no_modules_of_an_mlp(tmp_path):
    config = open_checkpoint(GOLDEN / "qwen3_moe").config
    folder = write(tmp_path, random_tensors(config, ["q_proj", "gate_proj"]), target_modules=["q_proj", "gate_proj"])
    with pytest.raises(UnsupportedModelError, match=r"not read: .*mlp\.gate_proj.*layers: self_attn\.q_proj"):
        read_adapter(folder, config)


def test_a_base_of_another_name_is_told(tmp_path, caplog):
    folder = write_adapter(tmp_path, TINY, base_model_name_or_path="/models/Tiny/")
    read_adapter(folder, TINY, base="me/tiny")
    assert not caplog.records
    read_adapter(folder, TINY, base="me/large")
    assert "was trained for '/models/Tiny/'; it is used with 'me/large'" in caplog.text


def test_files_that_are_missing_or_damaged_are_refused_by_name(tmp_path):
    folder = write_adapter(tmp_path / "adapter", TINY)
    with pytest.raises(UnknownModelError, match="no directory of an adapter, nor a name on the hub"):
        read_adapter(tmp_path / "nowhere", TINY)
    with pytest.raises(UnknownModelError, match="is no directory of an adapter"):
        read_adapter(folder / "adapter_config.json", TINY)
    with pytest.raises(UnknownModelError, match="is an adapter; open the model that it was trained for"):
        open_checkpoint(folder)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"version https://git-lfs.github.com/spec/v1\n"):
        weights.write_bytes(content)
        with pytest.raises(UnsupportedModelError, match=r"adapter_model\.safetensors"):
            read_adapter(folder, TINY)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedModelError, match="a pickle, which can run any program"):
        read_adapter(folder, TINY)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UnknownModelError, match=r"has no adapter_model\.safetensors"):
        read_adapter(folder, TINY)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UnknownModelError, match=r"has no adapter_config\.json"):
        read_adapter(folder, TINY)


def test_two_files_of_a_repository_are_fetched(hub, tmp_path):  # noqa: F811
    files = files_of(write_adapter(tmp_path / "adapter", TINY)) | {"README.md": b"", "optimizer.pt": b"", "x.bin": b""}
    hub.repositories["Me/Adapter"] = Repository(files)
    fetched = read_adapter("Me/Adapter@main", TINY)
    assert sorted(hub.fetched) == ["adapter_config.json", "adapter_model.safetensors"]
    assert fetched.digest == read_adapter(tmp_path / "adapter", TINY).digest
    with pytest.raises(UnknownModelError, match=r"Me/Nothing has no adapter_config\.json, adapter_model\.saf"):
        read_adapter("Me/Nothing", TINY)
    with pytest.raises(UnknownModelError, match="Me/Adapter, and not a model of a quantisation"):
        read_adapter("Me/Adapter:q4_0", TINY)
    with pytest.raises(UnknownModelError, match="no such model on"):
        read_adapter("Me/Missing", TINY)


RICH = SAVED | {
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["k_proj"],
    "rank_pattern": {"x_proj": 3},
    "alpha_pattern": {"v_proj": 3},
    "layers_to_transform": [0, 1, 2, 3],
    "layers_pattern": ["layers"],
    "alora_invocation_tokens": [1, 2],
}


@pytest.mark.parametrize("seeds", SEEDS)
def test_mutated_configurations_are_read_or_refused(seeds, tmp_path):
    folder = write_adapter(tmp_path, TINY, **RICH)
    read_adapter(folder, TINY)
    for seed in seeds:
        (folder / "adapter_config.json").write_text(json.dumps(mutated(RICH, random.Random(seed))))
        try:
            adapter = read_adapter(folder, TINY)
        except REFUSALS:
            continue
        assert all(np.isfinite(part).all() for part in jax.tree.leaves(dict(adapter.pairs)))


@pytest.mark.parametrize("seeds", SEEDS)
def test_mutated_bytes_of_the_weights_are_read_or_refused(seeds, tmp_path):
    folder = write_adapter(tmp_path, TINY)
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for seed in seeds:
        rng = random.Random(seed)
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_adapter(folder, TINY)
        except REFUSALS:
            continue
