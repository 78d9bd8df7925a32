"""A mesh of more devices than KV heads: each head is on several, and everything else is as on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapting import DEVICE, dense_of, greedy, make_adapter
from conftest import CONFIG, TINY, sharded_tiny, tiny_params

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.model.digest import weights_digest
from sparsex_jax.model.kv_copies import with_kv_copies, without_kv_copies
from sparsex_jax.model.matrices import random_quantised
from sparsex_jax.model.sharding import kv_copies, make_mesh, on_mesh
from sparsex_jax.model.weights import abstract_params, describe, random_params
from sparsex_kernels.quantised import Mixed, Quantised, dequantise, quantise, turned

EVERYTHING = dataclasses.replace(TINY, qkv_bias=True, wide_qk_norm=True, num_layers=2)


def test_each_head_is_on_as_many_devices_as_there_are_for_it():
    found = {
        size: (kv_copies(TINY, make_mesh(size)), on_mesh(TINY, make_mesh(size)).num_kv_heads) for size in (1, 2, 4)
    }
    assert found == {1: (1, 2), 2: (1, 2), 4: (2, 4)}
    assert on_mesh(TINY, make_mesh(2)) is TINY


def test_weights_of_keys_and_values_are_there_several_times_and_no_others():
    mesh = make_mesh(4)
    given = random_params(EVERYTHING, "float32", mesh)
    made = with_kv_copies(given, EVERYTHING, mesh)
    wanted = abstract_params(on_mesh(EVERYTHING, mesh), "float32", mesh)
    for one, like in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        assert one.shape == like.shape
        assert one.sharding.is_equivalent_to(like.sharding, one.ndim)
    for name, axis in (("wk", 2), ("wv", 2), ("bk", 1), ("bv", 1), ("wide_k_norm", 1)):
        one, two = np.asarray(getattr(given.layers, name)), np.asarray(getattr(made.layers, name))
        np.testing.assert_array_equal(two, one.repeat(2, axis), err_msg=name)
        assert {shard.data.nbytes * 4 for shard in getattr(made.layers, name).addressable_shards} == {two.nbytes}
    assert made.layers.wq is given.layers.wq
    back = without_kv_copies(made, EVERYTHING, mesh)
    assert weights_digest(back) == weights_digest(given) != weights_digest(made)


MODEL = dataclasses.replace(TINY, num_layers=2, hidden_size=256, num_q_heads=8, num_kv_heads=2, head_dim=64)


@pytest.mark.parametrize(
    ("head_dim", "blocks", "turns"),
    [pytest.param(64, 1, True, marks=pytest.mark.slow), (64, 128, False), (128, 2, True)],
)
def test_codes_are_there_several_times(head_dim, blocks, turns):
    """With a scale for each output, or for blocks of them that belong to two heads; also where a square does."""
    model, mesh = dataclasses.replace(MODEL, head_dim=head_dim), make_mesh(4)
    outputs = 2 * head_dim
    codes = quantise(jax.random.normal(jax.random.key(0), (2, 128, outputs)), "int8")
    codes = dataclasses.replace(codes, scales=codes.scales[..., : outputs // blocks])
    codes = turned(codes) if turns else codes
    floats = jax.random.normal(jax.random.key(1), (1, 128, outputs))
    mixed = Mixed((jax.tree.map(lambda part: part[:1], codes), floats), ((1, 0), (0, 0)))
    layers = describe(model).layers.replace(wk=codes, wv=mixed)
    made = with_kv_copies(describe(model).replace(layers=layers), model, mesh).layers

    def by_head(x, heads):
        return np.asarray(x).reshape(*x.shape[:-1], heads, head_dim)

    def same(found, given):
        np.testing.assert_array_equal(by_head(found, 4), by_head(given, 2).repeat(2, axis=-2))

    same(dequantise(made.wk, jnp.float32), dequantise(codes, jnp.float32))
    same(dequantise(made.wv.parts[0], jnp.float32), dequantise(codes[:1], jnp.float32))
    same(made.wv.parts[1], floats)
    assert isinstance(made.wk, Quantised)
    assert made.wk.turned == (turns and head_dim == 128)
    assert all(part.sharding.spec[-1] == "tensor" for part in jax.tree.leaves((made.wk, made.wv)))


# Engines ------------------------------------------------------------------------------------------------------------

PROMPT = np.random.default_rng(2).integers(1, 97, 90).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["isolated", "shared"])
def test_adapters_add_to_each_copy(shared):
    adapter = make_adapter(3, targets=("wq", "wv", "w_up") if shared else ("wq", "wk", "wv", "wo"))
    config = dataclasses.replace(DEVICE, share_adapters=shared)
    engine = Engine.from_config(TINY, mesh=make_mesh(4), **vars(config))
    engine.load_adapter("one", adapter)
    for name, weights in (("one", adapter), (None, None)):
        logits, tokens = greedy(dense_of(weights), PROMPT, 4)
        np.testing.assert_allclose(engine.prefill(PROMPT, adapter=name).logits, logits, atol=1e-4)
        assert engine.generate(PROMPT, SamplingParams(max_new_tokens=4), adapter=name).token_ids == tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "q4_k"])
def test_codes_on_more_devices_than_heads(kind):
    model, logits = dataclasses.replace(MODEL, intermediate_size=1024), []
    for size in (1, 4):
        mesh = make_mesh(size)
        params = random_quantised(model, "float32", mesh, kind)
        logits.append(Engine(model, params, config=CONFIG, mesh=mesh).prefill(PROMPT).logits)
    np.testing.assert_allclose(*logits, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 4), (4, 1), (4, 2)])
def test_another_mesh_finds_what_one_left_on_disk(first, then, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsex_jax.device.restorer._WORTH", 1e9)  # a busy machine would rather compute than load
    options = vars(CONFIG) | {"host_store_bytes": 1 << 24, "disk_store": str(tmp_path / "kv")}
    options |= {"disk_store_bytes": 1 << 26}
    logits = []
    for size in (first, then):
        engine = Engine.from_config(TINY, mesh=make_mesh(size), **options)
        prefill = engine.prefill(PROMPT, reuse=ReuseConfig("prefix"))
        engine.loop.settle()
        engine.close()
        logits.append(prefill.logits)
    assert prefill.report.restored_tokens >= 64
    np.testing.assert_allclose(*logits, atol=1e-4)


@pytest.mark.slow
def test_weights_that_are_given_stay_as_they_are():
    params = tiny_params()
    before = weights_digest(params)
    engine = sharded_tiny(4)
    assert engine.model.num_kv_heads == 2
    assert engine.runner.params.layers.wk.shape[2] == 4
    assert weights_digest(params) == before
