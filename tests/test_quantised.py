"""Quantised weights: each kind against its own dequantised floats, checkpoints in codes, and what they take."""

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from sparsex_jax import Engine, EngineConfig
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.checkpoints.gguf_blocks import take_apart
from sparsex_jax.checkpoints.scheme import read_scheme
from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import InvalidRequestError, UnsupportedModelError
from sparsex_jax.model.digest import kinds, weights_digest
from sparsex_jax.model.matrices import quantise_params, quantise_stack, random_quantised
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import describe, random_params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels import api as kernels
from sparsex_kernels import quantised
from sparsex_kernels.quantised import KINDS, Mixed, Quantised, lookup, pack, turned, unpack

dequantise = jax.jit(quantised.dequantise, static_argnums=1)  # one program is compiled sooner than many operations
quantise = jax.jit(quantised.quantise, static_argnums=1)
GOLDEN = Path(__file__).parent / "golden"
MODEL = ModelConfig(
    vocab_size=160,
    hidden_size=256,
    num_layers=2,
    num_q_heads=16,
    num_kv_heads=8,
    head_dim=32,
    intermediate_size=512,
    max_position=512,
)
SMALL = {"store_tokens": 1024, "page_size": 16, "max_num_seqs": 2, "chunk_rows": 32}
PROMPT = list(range(1, 61))

# Bytes of a block's halves that are floats, so that random bytes make finite weights.
HALVES = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q4_1": [0, 2], "Q5_1": [0, 2]}


def blocks(encoding, rows, inputs, seed=0):
    """Random bytes in an encoding, whose weights are of the size of a model's."""
    size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding]]
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 256, (rows, inputs // size, block_bytes), dtype=np.uint8)
    top = (
        0.1 / KINDS[encoding.lower()].zero if KINDS[encoding.lower()].zero else 0.1 / 2 ** KINDS[encoding.lower()].bits
    )
    top /= 64 if encoding.endswith("_K") else 1
    for at in HALVES.get(encoding, [0]):
        scales = rng.uniform(top / 8, top, (*out.shape[:2], 1)).astype(np.float16)
        out[..., at : at + 2] = scales.view(np.uint8)
    return out


def slow(*cases):
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


def on_device(stored):
    return Quantised(**{name: jnp.asarray(part).T for name, part in stored.parts.items()}, kind=stored.kind)


def floats(params, dtype="float32"):
    """The same parameters with dequantised floats."""

    def whole(leaf):
        if isinstance(leaf, Mixed):
            parts = [part if isinstance(part, jax.Array) else dequantise(part, dtype) for part in leaf.parts]
            return jnp.stack([parts[part][place] for part, place in leaf.places])
        return dequantise(leaf, dtype) if isinstance(leaf, Quantised) else leaf

    return jax.tree.map(whole, params, is_leaf=lambda leaf: isinstance(leaf, Quantised | Mixed))


def nbytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


# Kinds --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "bits"), [(128, 4), (256, 1)])
def test_packed_codes_come_back(group, bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (2, 512, 3), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(codes), group, bits), group, bits), codes)


# The largest error: half a step of the code, as a share of the largest weight of a block, and what scales lose.
@pytest.mark.parametrize(
    ("kind", "error"),
    [("fp8", 1 / 28), ("int8", 0.51 / 127), ("q8_0", 0.55 / 127), ("q6_k", 1.2 / 32), ("q4_k", 2.2 / 15)],
)
def test_rounding_is_bounded(kind, error):
    weights = np.random.default_rng(0).normal(size=(2, 512, 8)).astype(np.float32)
    weights[0, :, 0] = 0
    made = quantise(jnp.asarray(weights), kind)
    assert np.abs(dequantise(made, "float32") - weights).max() <= error * np.abs(weights).max()
    np.testing.assert_array_equal(dequantise(made, "float32")[0, :, 0], 0)
    again = quantise(dequantise(made, "float32"), kind)
    np.testing.assert_allclose(dequantise(again, "float32"), dequantise(made, "float32"), atol=error * 5)


@pytest.mark.parametrize("encoding", ["Q6_K", *slow("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K")])
def test_blocks_are_the_weights_that_llama_cpp_reads(encoding):
    stored = blocks(encoding, 6, 512)
    expected = gguf.dequantize(stored.reshape(6, -1), gguf.GGMLQuantizationType[encoding])
    held = on_device(take_apart(encoding, stored))
    np.testing.assert_allclose(dequantise(held, "float32").T, expected, rtol=1e-6, atol=1e-9)
    assert held.shape == (512, 6)
    assert held.nbytes <= 1.05 * stored.nbytes
    np.testing.assert_array_equal(lookup(held, jnp.array([3, 1])), dequantise(held, "float32").T[jnp.array([3, 1])])


@pytest.mark.parametrize("kind", ["q4_k", *slow("fp8", "int8", "q8_0", "q6_k")])
def test_products_are_those_of_dequantised_weights(kind):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [quantise(0.1 * jax.random.normal(key, (3, 256, 64)), kind) for key in keys[:2]]
    x = jax.random.normal(keys[2], (5, 256))
    plain = [dequantise(weight, "float32") for weight in weights]

    @jax.jit
    def products(x, weights, layer):
        return *kernels.linear(x, weights, layer), kernels.gated_linear(x, *weights, layer)

    close(products(x, weights, jnp.int32(2)), products(x, plain, 2))
    half = jax.jit(kernels.linear)(x.astype(jnp.bfloat16), weights, 0)
    assert half[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(half[0]), kernels.linear(x, plain, 0)[0], atol=0.1)


@pytest.mark.parametrize("kind", ["int8", *slow("fp8")])
def test_products_do_not_depend_on_the_order_of_codes(kind):
    """Where no kernel reads squares that are turned around, XLA multiplies them: gates with gelu, and other GPUs."""
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [quantise(0.1 * jax.random.normal(key, (2, 256, 128)), kind) for key in keys[:2]]
    x = jax.random.normal(keys[2], (5, 256))
    gated = jax.jit(functools.partial(kernels.gated_linear, activation="gelu_tanh", implementation="xla"))
    np.testing.assert_array_equal(gated(x, *map(turned, weights), 1), gated(x, *weights, 1))


def test_products_of_several_kinds():
    """Queries, keys and values of different kinds, one of them with a kind for each layer."""
    dense = 0.1 * jax.random.normal(jax.random.key(0), (3, 256, 64))
    mixed = Mixed((quantise(dense[:2], "q4_k"), dense[2:]), ((0, 1), (1, 0), (0, 0)))
    plain = jnp.stack([dequantise(mixed.parts[0], "float32")[1], dense[2], dequantise(mixed.parts[0], "float32")[0]])
    x, eight = jax.random.normal(jax.random.key(1), (5, 256)), quantise(dense, "int8")
    assert mixed.shape == plain.shape

    @jax.jit
    def products(x, mixed, eight, layer):
        return *kernels.linear(x, [mixed, eight, dense, mixed], layer), kernels.gated_linear(x, mixed, eight, layer)

    for layer in range(3):
        close(products(x, mixed, eight, layer), products(x, plain, dequantise(eight, "float32"), layer))


def test_what_is_added_comes_to_products_of_all_kinds():
    """Also where a layer's matrix is elsewhere in its stack, and what is added is not."""
    keys = jax.random.split(jax.random.key(0), 4)
    dense = 0.1 * jax.random.normal(keys[0], (3, 256, 64))
    mixed = Mixed((quantise(dense[:2], "int8"), dense[2:]), ((0, 1), (1, 0), (0, 0)))
    x, eight = jax.random.normal(keys[1], (5, 256)), quantise(dense, "int8")
    more = kernels.Added(jax.random.normal(keys[2], (5, 16)), jax.random.normal(keys[3], (3, 16, 64)))
    plus = more.inputs @ more.stack[2]
    one, two = kernels.linear(x, [mixed, eight], 2)
    close(kernels.linear(x, [mixed, eight], 2, added=[more, None]), (one + plus, two))
    close(kernels.linear(x, [eight, eight], 2, added=[None, more]), (two, two + plus))
    close(kernels.gated_linear(x, mixed, eight, 2, added=[more, None]), jax.nn.silu(one + plus) * two)
    close(kernels.gated_linear(x, eight, eight, 2, added=[None, more]), jax.nn.silu(two) * (two + plus))


@pytest.mark.parametrize("implementation", ["xla", *slow("reference")])
def test_experts_in_codes(implementation):
    dense = 0.1 * jax.random.normal(jax.random.key(0), (2, 3, 256, 64))
    made = [quantise(dense, kind) for kind in ("fp8", "q4_k")]
    plain = [dequantise(each, "float32") for each in made]
    x, groups = jax.random.normal(jax.random.key(1), (24, 256)), jnp.array([0, 2, -1])
    run = {"implementation": implementation}
    mixed = Mixed((made[0][1:], plain[1][:1]), ((1, 0), (0, 0)))  # its layer 1 is layer 0 of the second

    @jax.jit
    def products(first, second, third):
        gated = kernels.gated_grouped_linear(x, first, second, 1, groups, **run)
        return gated[:16], *(kernels.grouped_linear(x, each, 1, groups, **run)[:16] for each in (first, third))

    close(products(*made, mixed), products(*plain, jnp.stack([plain[1][0], plain[0][1]])))


def close(found, expected, atol=1e-4):
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=atol), found, expected)


@pytest.mark.slow
def test_products_over_a_mesh_are_those_of_one_device():
    """Over columns and over inputs, of which each device has less than a block of the scales."""
    weight = describe(MODEL).layers
    x, rows = jax.random.normal(jax.random.key(0), (8, 512)), Rows(*(jnp.arange(8) for _ in range(3)), jnp.arange(8))
    found = []
    for devices in (1, 8):
        mesh = make_mesh(devices)
        stack = {
            name: quantise_stack(name, getattr(weight, name), array, "fp8", mesh)
            for name, array in (("wo", dense(0, 512, 256)), ("w_up", dense(1, 256, 512)))
        }
        product = jax.jit(functools.partial(Ops.on(mesh).linear, over_inputs=True))(x, [stack["wo"]], 1, rows)[0]
        found.append(
            (
                product,
                jax.jit(functools.partial(Ops.on(mesh).linear, over_inputs=False))(
                    x[:, :256], [stack["w_up"]], 1, rows
                )[0],
            )
        )
    close(*found)


def dense(seed, inputs, outputs):
    return 0.1 * jax.random.normal(jax.random.key(seed), (2, inputs, outputs))


# Engines ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), [("fp8", 8), ("int8", 2), ("q4_k", 2)])
def test_shards_compute_what_one_device_does(kind, devices):
    one, wide = (random_quantised(MODEL, "float32", make_mesh(number), kind) for number in (1, devices))
    config = EngineConfig(**SMALL)
    logits = Engine(MODEL, one, config=config).prefill(PROMPT).logits
    shared = Engine(MODEL, wide, config=config, mesh=make_mesh(devices)).prefill(PROMPT).logits
    np.testing.assert_allclose(shared, logits, atol=2e-4)
    shards = wide.layers.wo.codes.addressable_shards
    assert all(shard.data.nbytes * devices == wide.layers.wo.codes.nbytes for shard in shards)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "int8", "q4_k"])
def test_logits_are_those_of_dequantised_weights(kind):
    params, config = random_quantised(MODEL, "float32", make_mesh(), kind), EngineConfig(**SMALL)
    logits = Engine(MODEL, params, config=config).prefill(PROMPT).logits
    expected = Engine(MODEL, floats(params), config=config).prefill(PROMPT).logits
    np.testing.assert_allclose(logits, expected, atol=2e-4)


@pytest.mark.slow
def test_weights_are_counted_in_digests_and_bytes():
    dense = random_params(MODEL, "bfloat16", make_mesh())
    made = quantise_params(MODEL, dense, "fp8", make_mesh())
    rest = sum(leaf.nbytes for leaf in (dense.embed, dense.lm_head) if leaf is not None)
    assert nbytes(made) - rest < 0.53 * (nbytes(dense) - rest)
    assert kinds(dense) == []
    assert ".layers.wq fp8" in kinds(made)
    other = dataclasses.replace(made.layers.wk, kind="int8")
    also = dataclasses.replace(made, layers=made.layers.replace(wk=other))
    assert len({weights_digest(each) for each in (dense, made, also)}) == 3
    weight = quantise(jax.random.normal(jax.random.key(0), (2, 256, 128)), "int8")
    both = [weights_digest(dense.replace(embed=each)) for each in (weight, turned(weight))]
    assert both[0] == both[1]  # the order of codes is not part of it


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ("float32", "none")),
        ({"dtype": "fp8"}, ("float32", "fp8")),
        ({"dtype": "bfloat16", "quantization": "int8"}, ("bfloat16", "int8")),
        ({"quantization": "stored"}, ("float32", "stored")),
    ],
)
def test_what_the_configuration_says(options, found):
    config = EngineConfig(**options).resolved("cpu")
    assert (config.dtype, config.quantization) == found
    assert EngineConfig(**options).resolved("gpu", in_numbers=True).quantization == (found[1] if options else "stored")
    assert EngineConfig(**options).resolved("gpu").quantization == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "gptq"}, "quantization='gptq' must be one of auto, none, stored, fp8, int8"),
        ({"dtype": "fp8", "quantization": "int8"}, "dtype='fp8' and quantization='int8' are two"),
        ({"dtype": "fp4"}, "dtype='fp4' must be one of"),
    ],
)
def test_what_it_may_not_say(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        EngineConfig(**options)


# Checkpoints --------------------------------------------------------------------------------------------------------


def published(tmp_path, name, **config):
    """A golden model as Qwen3-FP8 is published: squares with inverse scales, and floats beside them."""
    folder = shutil.copytree(GOLDEN / name, tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 24]}
    raw["quantization_config"] = said | config
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {key: array for file in folder.glob("*.safetensors") for key, array in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    out, whole = {}, {}
    for key, array in tensors.items():
        if array.ndim != 2 or not key.startswith("model.layers") or key.endswith("mlp.gate.weight"):
            out[key] = whole[key] = array
            continue
        codes, scales, whole[key] = rounded(array.astype(np.float32), said | config)
        out |= {key: codes, key + ("_scale_inv" if "weight_block_size" in said | config else "_scale"): scales}
    write(folder / "model.safetensors", out)
    return folder, whole


def rounded(array, said):
    """Codes, scales and floats of a matrix `[outputs, inputs]`."""
    rows, columns = said["weight_block_size"] or (1, array.shape[1])
    padded = np.zeros((-(-array.shape[0] // rows) * rows, -(-array.shape[1] // columns) * columns), np.float32)
    padded[: array.shape[0], : array.shape[1]] = array
    split = padded.reshape(len(padded) // rows, rows, -1, columns)
    largest, dtype = (127, np.int8) if said.get("format") == "int-quantized" else (448, ml_dtypes.float8_e4m3fn)
    scales = np.maximum(np.abs(split).max((1, 3)) / largest, 1e-9).astype(np.float32)
    codes = (split / scales[:, None, :, None]).astype(dtype)
    whole = (codes.astype(np.float32) * scales[:, None, :, None]).reshape(padded.shape)
    here = slice(array.shape[0]), slice(array.shape[1])
    return np.ascontiguousarray(codes.reshape(padded.shape)[here]), scales, whole[here]


DTYPES = {"float8_e4m3fn": "F8_E4M3", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}


def write(path, tensors):
    """A safetensors file, of dtypes that its library does not write from NumPy."""
    header, parts, at = {}, [], 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape)}
        header[name]["data_offsets"] = [at, at + len(data)]
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


@pytest.mark.parametrize("name", ["qwen3_moe", *slow("qwen3", "phi3")])
def test_fp8_as_it_is_published(name, tmp_path):
    folder, whole = published(tmp_path, name)
    checkpoint = open_checkpoint(folder)
    held = checkpoint.load_params("float32", make_mesh(), "stored")
    plain = checkpoint.load_params("float32", make_mesh())
    assert any(leaf.dtype == jnp.float8_e4m3fn for leaf in jax.tree.leaves(held))
    assert jax.tree.structure(plain) == jax.tree.structure(
        open_checkpoint(GOLDEN / name).load_params("float32", make_mesh())
    )
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-6), floats(held), plain
    )
    key = "model.layers.1.self_attn.o_proj.weight"
    np.testing.assert_allclose(plain.layers.wo[1].reshape(-1, plain.embed.shape[1]).T, whole[key], rtol=1e-6)


@pytest.mark.parametrize("numbers", ["int", *slow("float")])
def test_codes_with_a_scale_for_each_output(numbers, tmp_path):
    groups = {"group_0": {"weights": {"num_bits": 8, "type": numbers, "strategy": "channel", "symmetric": True}}}
    about = {"quant_method": "compressed-tensors", "format": f"{numbers}-quantized", "config_groups": groups}
    folder, whole = published(tmp_path, "qwen3", weight_block_size=None, **about)
    held = open_checkpoint(folder).load_params("float32", make_mesh(), "stored").layers.w_up
    assert held.scaled_by_output
    assert held.kind == ("int8" if numbers == "int" else "fp8")
    np.testing.assert_allclose(dequantise(held, "float32")[1].T, whole["model.layers.1.mlp.up_proj.weight"], rtol=1e-6)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised weights .quantization_config.quant_method='gptq'"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
        ({"activation_scheme": "static"}, "activation_scheme='static' is not supported"),
        ({"weight_block_size": [16]}, "weight_block_size=.16. must be two"),
        ({"weight_block_size": [True, 24]}, "weight_block_size=.True, 24. must be two"),
        ({"weight_block_size": [8, 24]}, "of shape .* has scales of shape"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "format='pack-quantized' is not supported",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(said, message, tmp_path):
    folder, _ = published(tmp_path, "qwen3")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=message):
        open_checkpoint(folder)


WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 24]}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"weights": "x"}, "must be objects whose weights is an object or null"),
        ({"weights": WEIGHTS, "input_activations": "x"}, "whose input_activations is an object or null"),
        ({"weights": WEIGHTS, "output_activations": {"dynamic": False}}, "has fixed scales of activations"),
        ({"weights": WEIGHTS | {"num_bits": 4}}, "has weights.num_bits=4, which is not supported; supported: 8"),
        ({"weights": WEIGHTS | {"symmetric": False}}, "has weights.symmetric=False"),
        ({"weights": WEIGHTS | {"strategy": ["block"]}}, "has weights.strategy=.'block'., which is not supported"),
        ({"weights": WEIGHTS | {"block_structure": [16]}}, "has block_structure=.16., which must be two integers > 0"),
        ({"weights": WEIGHTS | {"block_structure": [16, 0]}}, "has block_structure=.16, 0., which must be two"),
        ({"weights": WEIGHTS | {"block_structure": None}}, "has block_structure=None, which must be two"),
        ({"weights": WEIGHTS | {"block_structure": "16x"}}, "has block_structure=.16, 0., which must be two"),
    ],
)
def test_groups_that_are_wrong_are_refused_by_name(group, message, tmp_path):
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    with pytest.raises(UnsupportedModelError, match=message):
        read_scheme(tmp_path, {"quantization_config": said})


def test_a_square_may_be_said_as_a_text(tmp_path):
    groups = {"group_0": {"weights": WEIGHTS | {"block_structure": "128x64"}}}
    said = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
    assert read_scheme(tmp_path, {"quantization_config": said}).block == (128, 64)


def test_codes_without_scales_are_refused(tmp_path):
    folder, _ = published(tmp_path, "qwen3")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"1.mlp.up_proj.weight_scale_inv", b"1.mlp.up_proj.weight_scale_xxx"))
    with pytest.raises(UnsupportedModelError, match=r"1\.mlp\.up_proj\.weight of shape .* has no scales"):
        open_checkpoint(folder)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("quantization", ["none", "stored"])
def test_scales_that_are_no_numbers_are_refused(quantization, wrong, tmp_path):
    folder, _ = published(tmp_path, "qwen3")
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[begin : begin + 4] = np.float32(wrong).tobytes()
    file.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=f"{name} has scales that are no finite numbers"):
        open_checkpoint(folder).load_params("float32", make_mesh(), quantization)


def gguf_model(path, encodings):
    """A Llama whose weights are random blocks; `encodings` gives that of a tensor by its name."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"block_count": 2, "embedding_length": 512, "feed_forward_length": 512, "context_length": 256}
    for name, value in sizes.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_uint32("llama.attention.head_count", 8)
    writer.add_uint32("llama.attention.head_count_kv", 4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(96)])
    matrices = {
        "attn_q": 512,
        "attn_k": 256,
        "attn_v": 256,
        "attn_output": 512,
        "ffn_gate": 512,
        "ffn_up": 512,
        "ffn_down": 512,
    }
    tensors = {"token_embd": 96} | {
        f"blk.{layer}.{name}": size for layer in range(2) for name, size in matrices.items()
    }
    for number, (name, size) in enumerate(tensors.items()):
        kind = gguf.GGMLQuantizationType[encodings(name)]
        writer.add_tensor(f"{name}.weight", blocks(kind.name, size, 512, number).reshape(size, -1), raw_dtype=kind)
    for name in ("output_norm", *(f"blk.{layer}.{norm}_norm" for layer in range(2) for norm in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.ones(512, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def encoding_of(name):
    """As llama.cpp's Q4_K_M, which gives some layers more bits."""
    if name in ("blk.1.attn_v", "blk.0.ffn_down", "token_embd"):
        return "Q6_K"
    return "Q8_0" if name.endswith("attn_k") else "Q4_K"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 4])
def test_gguf_in_its_blocks_is_gguf_dequantised(devices, tmp_path):
    path, mesh = gguf_model(tmp_path / "m.gguf", encoding_of), make_mesh(devices)
    checkpoint = open_checkpoint(path)
    held, plain = (checkpoint.load_params("float32", mesh, how) for how in ("stored", "none"))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one.reshape(other.shape), other, rtol=1e-5, atol=1e-7),
        floats(held.layers),
        plain.layers,
    )
    np.testing.assert_allclose(dequantise(held.embed, "float32").T, plain.embed, rtol=1e-5, atol=1e-7)
    assert isinstance(held.layers.w_down, Mixed)
    if devices == 1:
        assert nbytes(held) <= 1.05 * path.stat().st_size
        config = EngineConfig(**SMALL)
        found, expected = (
            Engine(checkpoint.config, each, config=config).prefill(PROMPT).logits for each in (held, plain)
        )
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_gguf_becomes_fp8(tmp_path):
    checkpoint = open_checkpoint(gguf_model(tmp_path / "m.gguf", encoding_of))
    made, plain = (checkpoint.load_params("float32", make_mesh(), how) for how in ("fp8", "none"))
    assert made.layers.w_up.kind == "fp8"
    np.testing.assert_allclose(
        dequantise(made.layers.w_up, "float32"), plain.layers.w_up, atol=np.abs(plain.layers.w_up).max() / 28
    )
    np.testing.assert_array_equal(made.embed, plain.embed)


@pytest.mark.models
def test_a_file_of_1_5b_takes_little_more_than_its_size():
    path = Path(os.environ["SPARSEX_MODELS"]) / "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
    params = open_checkpoint(path).load_params("bfloat16", make_mesh(), "stored")
    assert nbytes(params) < min(1.05 * path.stat().st_size, 1.3e9)
