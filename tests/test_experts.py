"""Mixtures of experts: their products, meshes, and what checkpoints say of them. `test_families.py` has the logits of
transformers and the identities of reuse."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from kernel_cases import relative_error
from safetensors.numpy import load_file, save_file

import sparsex_kernels.api as kernels
from sparsex_jax import Engine, InvalidRequestError, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.checkpoints import convert, open_checkpoint
from sparsex_jax.config import EngineConfig
from sparsex_jax.device.decode import DecodeState, forward
from sparsex_jax.device.state import sampling_arrays
from sparsex_jax.errors import UnsupportedModelError
from sparsex_jax.eval.flops import _Layers
from sparsex_jax.model.decoder import Decoder
from sparsex_jax.model.experts import ExpertStacks, Routing, route, run_experts
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.backend import Backend
from sparsex_kernels.grouped_linear import make_tiles, rows_a_tile

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("mixtral", "olmoe", "qwen3_moe")
MODEL = dataclasses.replace(
    TINY, num_layers=2, num_experts=8, experts_per_token=3, intermediate_size=16, wide_qk_norm=True
)
CONFIG = EngineConfig(store_tokens=1024, page_size=16, max_num_seqs=1, max_prefill_seqs=1, chunk_rows=64)
FULL = ReuseConfig("full")
PROMPT = np.random.default_rng(0).integers(1, 97, 40).astype(np.int32)


# Products


@pytest.mark.parametrize(("members", "rows"), [(1, 8), (40, 8), (1500, 32)])  # the last are sorted
def test_tiles_hold_each_member_once_among_its_group(members, rows):
    group = np.random.default_rng(members).integers(-1, 7, members)  # of 6: some members have none
    tiles = jax.tree.map(np.asarray, make_tiles(jnp.asarray(group), 6, rows))
    assert len(tiles.members) == rows * len(tiles.groups)
    here = (group >= 0) & (group < 6)
    np.testing.assert_array_equal(tiles.places >= 0, here)
    places = tiles.places[here]
    assert len(set(places.tolist())) == here.sum()
    np.testing.assert_array_equal(tiles.members[places], np.flatnonzero(here))
    np.testing.assert_array_equal(tiles.groups[places // rows], group[here])
    used = sum(-(-(group == n).sum() // rows) for n in range(6))
    assert (tiles.groups[:used] >= 0).all()
    assert (tiles.groups[used:] == -1).all()
    assert (np.diff(tiles.groups[:used]) >= 0).all()


def test_as_many_tiles_as_can_be_needed():
    spread = make_tiles(jnp.arange(6), 6, 8)
    assert (np.asarray(spread.groups) == np.arange(6)).all()
    assert (np.asarray(make_tiles(jnp.full(6, 9), 6, 8).groups) == -1).all()  # of no group: none is used
    assert [rows_a_tile(n, 128) for n in (8, 64, 3000, 1 << 20)] == [8, 8, 32, 128]


def products(implementation, members, groups, rows, inputs, width, dtype):
    """The products of members of a group, plain and gated, and what they should be."""
    rng = np.random.default_rng(members)
    group = jnp.asarray(rng.integers(-1, groups + 1, members)).at[0].set(groups - 1)
    tiles = make_tiles(group, groups, rows)
    x = jnp.asarray(rng.normal(size=(members, inputs)), dtype)
    weights, up = (jnp.asarray(rng.normal(size=(2, groups, inputs, width)) * inputs**-0.5, dtype) for _ in range(2))
    laid = x[tiles.members]
    plain = jax.jit(functools.partial(kernels.grouped_linear, implementation=implementation))
    gated = jax.jit(functools.partial(kernels.gated_grouped_linear, implementation=implementation))
    found = plain(laid, weights, jnp.int32(1), tiles.groups), gated(laid, weights, up, jnp.int32(1), tiles.groups)
    here = np.flatnonzero(tiles.places >= 0)
    one, two = (
        np.stack([np.asarray(x[m], np.float64) @ np.asarray(w[1, group[m]], np.float64) for m in here])
        for w in (weights, up)
    )
    places = tiles.places[here]
    return [out[places] for out in found], [one, one / (1 + np.exp(-one)) * two]


@pytest.mark.parametrize("implementation", ["reference", "xla", "ragged"])
def test_products_of_groups(implementation):
    found, expected = products(implementation, 50, 6, 8, 32, 24, "float32")
    for out, exact in zip(found, expected, strict=True):
        assert relative_error(out, exact) < 1e-5


@pytest.mark.parametrize(
    ("members", "rows", "width"),
    [
        pytest.param(20, 8, 64, id="few rows"),
        pytest.param(70, 64, 128, id="a warpgroup", marks=pytest.mark.slow),
        pytest.param(300, 128, 192, id="two warpgroups", marks=pytest.mark.slow),
    ],
)
def test_products_of_groups_on_hopper(members, rows, width):
    """In Mosaic GPU's interpreter."""
    found, expected = products("hopper", members, 3, rows, 64, width, "bfloat16")
    for out, exact in zip(found, expected, strict=True):
        assert relative_error(out, exact) < 8e-3


@pytest.mark.parametrize("rows", [8, 128])
def test_the_hopper_kernel_is_lowered_for_a_gpu(rows):
    """For the shapes of Qwen3-30B-A3B, by the passes that run where there is no GPU."""
    shape, groups = jax.ShapeDtypeStruct, 1024 // rows
    inputs, x = shape((1024, 2048), jnp.bfloat16), shape((1024, 768), jnp.bfloat16)
    up, down = (shape((2, 128, *size), jnp.bfloat16) for size in ((2048, 768), (768, 2048)))
    on = {"backend": Backend("gpu", "9.0"), "implementation": "hopper"}
    number, tiles = shape((), jnp.int32), shape((groups,), jnp.int32)
    for operation, args in (
        (kernels.gated_grouped_linear, (inputs, up, up)),
        (kernels.grouped_linear, (x, down)),
    ):
        traced = jax.jit(functools.partial(operation, **on)).trace(*args, number, tiles)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_what_the_kernel_cannot_do_is_refused():
    with pytest.raises(NotImplementedError, match="tiles of 4 rows"):
        products("hopper", 20, 3, 4, 64, 64, "bfloat16")
    with pytest.raises(NotImplementedError, match="weights of 24 columns"):
        products("hopper", 20, 3, 8, 64, 24, "bfloat16")


def stacks_of(experts, hidden=16, width=8):
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    return ExpertStacks(*(jax.random.normal(key, (2, experts, *size)) for key, size in zip(keys, shapes, strict=True)))


def test_a_sequence_that_ended_takes_no_experts_from_those_behind_it():
    """In a decode step its row is padding between the others."""
    mesh, scores = make_mesh(), []
    for position in ([0, 0, 0], [0, -1, 0]):
        state = DecodeState(
            token=jnp.array([3, 5, 7]),
            position=jnp.array(position),
            remaining=jnp.full(3, 9),
            stops=jnp.full((3, 1), -1),
            page_tables=jnp.arange(3)[:, None],
            sampling=sampling_arrays([], 3, MODEL.vocab_size),
        )
        store = jnp.zeros((2, 3, 2, MODEL.num_kv_heads, 16, MODEL.head_dim))
        step = forward(random_params(MODEL, "float32", mesh), store, state, decoder=Decoder(MODEL, Ops.on(mesh)))
        scores.append(step[1][jnp.array([0, 2])])
    np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-5)


def test_padding_goes_through_no_expert_and_other_experts_are_not_read():
    """Rows that are padding, and weights of experts that no row has chosen, hold NaN."""
    stacks, hidden = stacks_of(6), jax.random.normal(jax.random.key(0), (5, 16)).at[3:].set(jnp.nan)
    routing = Routing(jnp.array([[1, 4], [4, 1], [1, 3], [0, 2], [5, 0]]), jnp.full((5, 2), 0.5).at[3:].set(jnp.nan))
    poisoned = jax.tree.map(lambda stack: stack.at[:, jnp.array([0, 2, 5])].set(jnp.nan).at[0].set(jnp.nan), stacks)
    run = jax.jit(functools.partial(run_experts, first=0, num_experts=6, backend=Backend("cpu")))
    out = run(hidden, routing, poisoned, jnp.int32(1), jnp.int32(3))
    for row in range(3):
        gates = [hidden[row] @ stacks.gate[1, n] for n in routing.experts[row]]
        ups = [hidden[row] @ stacks.up[1, n] for n in routing.experts[row]]
        parts = zip(gates, ups, routing.experts[row], strict=True)
        expected = sum(0.5 * (jax.nn.silu(gate) * up) @ stacks.down[1, n] for gate, up, n in parts)
        np.testing.assert_allclose(out[row], expected, rtol=1e-4)
    assert not np.asarray(out[3:]).any()


def test_probabilities_are_taken_in_float32():
    """In bfloat16 the two experts would be alike, and the first would win."""
    hidden, router = jnp.ones((1, 2), jnp.bfloat16), jnp.array([[256, 256], [0.5, 0.75]], jnp.bfloat16)
    routing = route(hidden, router, dataclasses.replace(MODEL, num_experts=2, experts_per_token=1))
    assert (routing.experts[0, 0], routing.weights.dtype) == (1, jnp.float32)
    assert float(routing.weights[0, 0]) == pytest.approx(1 / (1 + np.exp(-0.25)))


# The model


MESH_MODEL = dataclasses.replace(MODEL, num_q_heads=4, num_kv_heads=4)


def test_each_device_computes_the_rows_of_its_own_experts():
    stacks, hidden = stacks_of(8), jax.random.normal(jax.random.key(0), (20, 16))
    routing = Routing(jax.random.randint(jax.random.key(1), (20, 3), 0, 8), jnp.full((20, 3), 1 / 3))
    rows = Rows(*jnp.zeros((4, 20), jnp.int32).at[1, 15:].set(-1))
    both = [Ops.on(make_mesh(devices)) for devices in (1, 4)]
    found = [jax.jit(ops.experts)(hidden, routing, stacks, 1, rows) for ops in both]
    np.testing.assert_allclose(*found, atol=1e-5)
    assert not np.asarray(found[1][15:]).any()


@pytest.mark.slow
def test_a_mesh_divides_the_experts_and_gives_the_answer_of_one_device():
    answers = []
    for number in (1, 4):
        one = Engine.from_config(MESH_MODEL, mesh=make_mesh(number), **vars(CONFIG))
        stack = one.runner.params.layers.expert_down
        assert {shard.data.shape[1] for shard in stack.addressable_shards} == {8 // number}
        answers.append(one.generate(PROMPT, SamplingParams(max_new_tokens=4), reuse=FULL))
        answers.append(one.prefill(PROMPT, reuse=FULL, keep=False).logits)
    assert answers[0].token_ids == answers[2].token_ids
    np.testing.assert_allclose(answers[1], answers[3], atol=2e-5)


def test_experts_that_do_not_divide_are_refused():
    model = dataclasses.replace(MESH_MODEL, num_experts=6)
    with pytest.raises(InvalidRequestError, match="num_experts=6 does not divide over the mesh's tensor=4"):
        Engine.from_config(model, mesh=make_mesh(4), **vars(CONFIG))


def test_operations_of_the_chosen_experts_count():
    dense, experts = _Layers(TINY), _Layers(dataclasses.replace(TINY, num_experts=8, experts_per_token=3))
    mlp = 2 * 3 * TINY.hidden_size * TINY.intermediate_size
    assert experts.token - dense.token == 2 * mlp + 2 * TINY.hidden_size * 8


# Configurations and checkpoints


def raw_config(name, **changes):
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def test_configurations_of_the_families():
    found = {name: ModelConfig.from_hf(raw_config(name)) for name in FAMILIES}
    numbers = {name: (c.num_experts, c.experts_per_token, c.normalise_top_k) for name, c in found.items()}
    assert numbers == {"mixtral": (4, 2, True), "olmoe": (6, 2, False), "qwen3_moe": (8, 3, True)}
    assert {name: (c.qk_norm, c.wide_qk_norm) for name, c in found.items()} == {
        "mixtral": (False, False),
        "olmoe": (False, True),
        "qwen3_moe": (True, False),
    }
    assert (found["mixtral"].rope_theta, found["qwen3_moe"].intermediate_size) == (1e6, 16)
    old = {name: value for name, value in raw_config("mixtral").items() if name != "rope_parameters"}
    assert ModelConfig.from_hf(old).rope_theta == 1e6  # transformers' default for the family
    assert set(ModelConfig.from_hf(raw_config("mixtral", sliding_window=64)).windows) == {64}
    both = raw_config("qwen3_moe", num_experts=8)  # the older name beside the newer one
    assert ModelConfig.from_hf(both) == found["qwen3_moe"]


def test_layers_without_any_expert_are_a_dense_model():
    for change in ({"decoder_sparse_step": 3}, {"mlp_only_layers": [0, 1]}):
        config = ModelConfig.from_hf(raw_config("qwen3_moe", **change))
        assert (config.num_experts, config.intermediate_size) == (None, 96)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers=.* 1 of 2 layers have experts; all must have them"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2 .* 1 of 2 layers have experts"),
        ("qwen3_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers=.* must be a list"),
        ("qwen3_moe", {"num_experts": 9}, "num_experts=9 differs from num_local_experts=8"),
        ("qwen3_moe", {"num_local_experts": None}, "has no num_experts"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "has no moe_intermediate_size"),
        ("mixtral", {"num_experts_per_tok": 5}, "experts_per_token=5 must be at most num_experts=4"),
        ("olmoe", {"norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ("olmoe", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(name, changes, says):
    with pytest.raises(UnsupportedModelError, match=says):
        ModelConfig.from_hf(raw_config(name, **changes))


def test_experts_need_their_number():
    with pytest.raises(UnsupportedModelError, match="need num_experts"):
        dataclasses.replace(TINY, experts_per_token=2)


def stored(name):
    return {key: array for file in (GOLDEN / name).glob("*.safetensors") for key, array in load_file(file).items()}


def write(folder, name, tensors, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_config(name, **changes)))
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, folder / "model.safetensors")
    return folder


def fused(tensors):
    """As transformers 5 writes them where it does not write the original format."""
    out, experts = {}, {}
    for key, array in tensors.items():
        key = key.replace("block_sparse_moe", "mlp")
        layer, _, rest = key.partition(".experts.")
        if rest:
            number, kind, _ = rest.split(".")
            experts.setdefault(layer, {})[int(number), {"w1": "gate_proj", "w3": "up_proj"}.get(kind, kind)] = array
        else:
            out[key] = array
    for layer, parts in experts.items():
        numbers = range(1 + max(number for number, _ in parts))
        down = "down_proj" if (0, "down_proj") in parts else "w2"
        both = [np.concatenate([parts[n, "gate_proj"], parts[n, "up_proj"]]) for n in numbers]
        out[f"{layer}.experts.gate_up_proj"] = np.stack(both)
        out[f"{layer}.experts.down_proj"] = np.stack([parts[n, down] for n in numbers])
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_of_a_directory_is_the_same_model(name, tmp_path):
    mesh = make_mesh()
    expected = open_checkpoint(GOLDEN / name).load_params("float32", mesh)
    found = open_checkpoint(write(tmp_path / "fused", name, fused(stored(name)))).load_params("float32", mesh)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    up = next(
        array
        for key, array in stored(name).items()
        if ".1." in key and key.endswith(("2.up_proj.weight", "2.w3.weight"))
    )
    np.testing.assert_array_equal(expected.layers.expert_up[1, 2], up.T.astype(np.float32))


def test_a_converted_checkpoint_keeps_its_experts(tmp_path):
    convert(GOLDEN / "olmoe", tmp_path / "converted", "float32", make_mesh())
    one, other = open_checkpoint(tmp_path / "converted"), open_checkpoint(GOLDEN / "olmoe")
    assert one.config == other.config
    loaded = (checkpoint.load_params("float32", make_mesh()).layers.expert_gate for checkpoint in (one, other))
    np.testing.assert_array_equal(*loaded)


def test_experts_that_are_missing_left_over_or_of_another_shape_are_named(tmp_path):
    tensors, mesh = stored("mixtral"), make_mesh()
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    without = write(tmp_path / "without", "mixtral", {key: each for key, each in tensors.items() if key != name})
    with pytest.raises(UnsupportedModelError, match=rf"has no tensor '{name}'"):
        open_checkpoint(without).load_params("float32", mesh)
    short = write(tmp_path / "short", "mixtral", tensors | {name: tensors[name][:, :8]})
    with pytest.raises(
        UnsupportedModelError, match=rf"{name} is stored as \(64, 8\); the configuration needs \(64, 16\)"
    ):
        open_checkpoint(short).load_params("float32", mesh)
    with pytest.raises(UnsupportedModelError, match=r"not read: .*experts\.3\.w1"):
        open_checkpoint(write(tmp_path / "more", "mixtral", tensors, num_local_experts=3))
    odd = fused(tensors)
    odd["model.layers.0.mlp.experts.gate_up_proj"] = odd["model.layers.0.mlp.experts.gate_up_proj"][:, :31]
    with pytest.raises(UnsupportedModelError, match=r"not read: model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        open_checkpoint(write(tmp_path / "odd", "mixtral", odd))
