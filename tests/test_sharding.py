"""Tensor parallelism on virtual devices: the results of one device, and the share of the store on each."""

import jax
import numpy as np
import pytest
from conftest import CONFIG, TINY, sharded_tiny
from dense import Dense

from sparsex_jax import Engine, InvalidRequestError, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.model.sharding import make_mesh, spec

MODEL = ModelConfig(
    vocab_size=120,  # divides by 2 and 8; the table's fallback to replication is tested below
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_q_heads=16,
    num_kv_heads=8,
    head_dim=8,
    max_position=512,
)
METHODS = {
    "full": ReuseConfig(method="full"),
    "prefix": ReuseConfig(method="prefix"),
    "naive": ReuseConfig(method="naive"),
    "sparsex": ReuseConfig(boundary_layer=1, recompute_ratio=0.2, overflow_tokens=2),
    "sparsex, l*=0": ReuseConfig(boundary_layer=0, recompute_ratio=0.2, overflow_tokens=2),
}


def engine(tensor_parallel: int, model: ModelConfig = MODEL) -> Engine:
    return Engine.from_config(
        model, mesh=make_mesh(tensor_parallel), store_tokens=1024, page_size=16, max_num_seqs=2, chunk_rows=32
    )


def run_all(one: Engine) -> dict[str, tuple[np.ndarray, list[int], float]]:
    rng = np.random.default_rng(5)
    documents = [rng.integers(0, 97, 50).tolist() for _ in range(2)]
    prompt = [*rng.integers(0, 97, 11).tolist(), *documents[1], 3, *documents[0], *rng.integers(0, 97, 9).tolist()]
    for document in documents:
        one.remember(document, frozen=True)
    out = {}
    for name, reuse in METHODS.items():
        generation = one.generate(prompt, SamplingParams(max_new_tokens=8), reuse=reuse, keep=False)
        logits = one.prefill(prompt, reuse=reuse, keep=False).logits
        out[name] = logits, generation.token_ids, generation.report.computed_fraction
    return out


# A head of keys for each device, or for each two; and where there are 8, a vocabulary that divides.
MESHES = pytest.mark.parametrize(
    ("make", "tensor_parallel"), [(sharded_tiny, 2), (sharded_tiny, 4), pytest.param(engine, 8, marks=pytest.mark.slow)]
)


@MESHES
def test_every_method_gives_the_logits_and_tokens_of_one_device(make, tensor_parallel):
    single = run_all(make(1))
    for name, (logits, tokens, fraction) in run_all(make(tensor_parallel)).items():
        np.testing.assert_allclose(logits, single[name][0], atol=2e-5, err_msg=name)
        assert (tokens, fraction) == (single[name][1], single[name][2]), name


@MESHES
def test_each_device_holds_its_share_of_the_store_only(make, tensor_parallel):
    one = make(tensor_parallel)
    one.generate(list(range(40)), SamplingParams(max_new_tokens=4))  # the steps must keep it so
    shards = one.runner.store.addressable_shards
    assert {shard.device for shard in shards} == set(jax.devices()[:tensor_parallel])
    assert all(shard.data.nbytes * tensor_parallel == one.runner.store.nbytes for shard in shards)
    weights = one.runner.params.layers.w_gate.addressable_shards
    assert all(shard.data.nbytes * tensor_parallel == one.runner.params.layers.w_gate.nbytes for shard in weights)


@pytest.mark.slow
def test_a_vocabulary_that_does_not_divide_is_replicated():
    model = ModelConfig(**{**MODEL.__dict__, "vocab_size": 121})
    one = engine(2, model)
    assert one.runner.params.embed.sharding.is_fully_replicated
    logits = one.prefill(list(range(100))).logits
    np.testing.assert_allclose(logits, engine(1, model).prefill(list(range(100))).logits, atol=2e-5)


def test_an_axis_that_the_rules_do_not_list_is_an_error():
    with pytest.raises(ValueError, match="columns, which the sharding rules do not list"):
        spec(("layers", "columns", "embed"))


def test_heads_that_do_not_divide_are_refused():
    model = ModelConfig(**{**MODEL.__dict__, "num_kv_heads": 3, "num_q_heads": 24})
    said = "num_kv_heads=3 does not divide over the mesh's tensor=8, nor that over them"
    with pytest.raises(InvalidRequestError, match=said):
        engine(8, model)


def test_a_mesh_without_a_tensor_axis_is_refused():
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.raises(InvalidRequestError, match="it needs one named 'tensor'"):
        Engine.from_config(MODEL, mesh=mesh)


@pytest.mark.slow
def test_other_axes_of_a_mesh_hold_copies():
    """The vocabulary is divided too."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))  # with explicit axis types, as jax makes it by default
    one = Engine.from_config(MODEL, mesh=mesh, store_tokens=1024, page_size=16, max_num_seqs=2, chunk_rows=32)
    logits, _ = Dense(MODEL, jax.device_get(one.runner.params)).full(np.arange(60))
    np.testing.assert_allclose(one.prefill(list(range(60))).logits, logits[-1], atol=2e-5)
    assert not one.runner.params.embed.sharding.is_fully_replicated
    assert {shard.data.nbytes * 2 for shard in one.runner.store.addressable_shards} == {one.runner.store.nbytes}


@pytest.mark.slow
def test_tiers_bring_back_what_each_device_had():
    """A prefix, and segments that come while the first layers run."""
    documents = list(np.random.default_rng(0).integers(1, 97, (6, 317)).astype(np.int32))
    asked = np.concatenate([[5, 6, 7], documents[1][:160], documents[0][:160], [8, 9]]).astype(np.int32)
    late, prefix = ReuseConfig(boundary_layer=2, recompute_ratio=0.3, only_if_faster=False), ReuseConfig("prefix")
    options = vars(CONFIG) | {"store_tokens": 66 * 16, "host_store_bytes": 1 << 26}
    tiered = Engine.from_config(TINY, mesh=make_mesh(2), **options)
    for document in documents:
        tiered.generate(document, SamplingParams(max_new_tokens=2), reuse=prefix)
    tiered.loop.settle()
    found = [tiered.prefill(asked, reuse=late, keep=False), tiered.prefill(documents[2], reuse=prefix)]
    alone = Engine.from_config(TINY, **vars(CONFIG))
    for document in documents[:3]:
        alone.generate(document, SamplingParams(max_new_tokens=2), reuse=prefix)
    expected = [alone.prefill(asked, reuse=late, keep=False), alone.prefill(documents[2], reuse=prefix)]
    for one, other in zip(found, expected, strict=True):
        assert one.report.restored_tokens > 0
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
