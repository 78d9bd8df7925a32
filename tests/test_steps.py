"""The compiled steps never copy the store, and few programs serve any mix of lengths."""

from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, sharded_tiny

from sparsex_jax import Engine, InvalidRequestError, ReuseConfig, SamplingParams, SparseX
from sparsex_jax.cache import Segment
from sparsex_jax.device.decode import decode
from sparsex_jax.device.packed import packed
from sparsex_jax.device.prefill import align, embed_rows, prefill, top_rows
from sparsex_jax.device.signals import BUILT_IN, SIGNALS, Probe, signal, signals_for
from sparsex_jax.device.state import BatchSlot, decode_state
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.reuse.methods import METHODS
from sparsex_jax.reuse.plan import Budget, Copies
from sparsex_jax.reuse.planner import RequestPlan, Shapes, plan_copies, plan_prefill
from sparsex_jax.reuse.prompt import PromptMap, TokenKind

pytestmark = pytest.mark.usefixtures("every_signal")


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def big_store(request) -> Engine:
    """A store far larger than everything else: 64 MB against a model of 50,000 parameters."""
    return Engine.from_config(TINY, mesh=make_mesh(request.param), store_tokens=1 << 17, page_size=64)


def hybrid_plan(engine):
    kind = np.full(300, TokenKind.FRESH, np.uint8)
    kind[50:250] = TokenKind.REUSED
    prompt = PromptMap(np.zeros(300, np.int32), kind)
    phases = SparseX(boundary_layer=1).phases(prompt, TINY.num_layers)
    request = RequestPlan(prompt, phases, range(5))
    return plan_prefill([request], engine.runner.shapes, TINY.num_layers, tuple(SIGNALS))


def memory_of(step, store, *args, **static):
    """Memory analysis of a step compiled with the store donated, and the store's share on one device."""
    leaves, tree = jax.tree.flatten(args)

    def flat(store, *leaves):
        params, *rest = jax.tree.unflatten(tree, leaves)
        return unwrap(step)(*([] if params is None else [params]), store, *rest, **static)

    compiled = jax.jit(flat, donate_argnums=0).lower(store, *leaves).compile()
    return compiled.memory_analysis(), sum(each.addressable_shards[0].data.nbytes for each in jax.tree.leaves(store))


def assert_no_copy(memory, share):
    assert memory.alias_size_in_bytes >= share  # the store given is the store that comes back
    assert memory.temp_size_in_bytes < share / 10


def test_prefill_does_not_copy_the_store(big_store):
    runner = big_store.runner
    plan, rows = hybrid_plan(big_store)
    state = embed_rows(runner.params, rows, decoder=runner.decoder, requests=len(plan.page_tables))
    static = {"decoder": runner.decoder, "signals": tuple(SIGNALS.values()), "chunk": 128}
    about = plan, state, jnp.int32(TINY.num_layers), jnp.bool(False)
    assert_no_copy(*memory_of(prefill, runner.store, runner.params, *about, **static))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_prefill_may_rest_between_any_two_layers(devices):
    engine = sharded_tiny(devices)
    rng = np.random.default_rng(devices)
    document = rng.integers(0, 97, 80)
    engine.remember(document)
    prompt = np.array([*rng.integers(0, 97, 30), *document, *rng.integers(0, 97, 10)])  # in the bucket of the document
    whole = engine.prefill(prompt, keep=False).logits
    programs, advance = prefill._cache_size(), engine.runner.advance
    engine.runner.advance = lambda run, _: [advance(run, layers) for layers in (1, 2, 9)]
    in_parts = engine.prefill(prompt, keep=False).logits
    np.testing.assert_array_equal(in_parts, whole)
    assert prefill._cache_size() == programs


@pytest.mark.slow
def test_every_method_runs_on_one_program_a_bucket(tiny):
    engine = tiny
    prefill.clear_cache()
    rng = np.random.default_rng(0)
    document = rng.integers(0, 97, 300)
    engine.remember(document)  # in chunks of 128 rows, which is the bucket that is compiled then
    before = prefill._cache_size()
    for name in [*rng.permutation(sorted(METHODS)), *rng.permutation(sorted(METHODS))]:
        for length in (20, 100, 300):
            prompt = np.array([*rng.integers(0, 97, 10), *document[:length], 1, 2])
            engine.prefill(prompt, reuse=ReuseConfig(str(name)), keep=False)
    assert prefill._cache_size() - before == len(engine.runner.shapes.buckets) - 2  # the largest is for longer ones


def test_a_signal_of_ones_own_is_in_the_prefills_that_ask_for_it_only():
    with pytest.raises(InvalidRequestError, match="'key_mass' is a signal of this package"):
        signal("key_mass")
    signal("own")(lambda boundary, store: (store, boundary.given))
    try:
        assert list(signals_for(["own", None, "unknown"])) == [*BUILT_IN, "own"]
        assert signals_for([None]) == BUILT_IN
    finally:
        del SIGNALS["own"]


@pytest.mark.parametrize("power", [0, -2, 3])
def test_a_probe_sums_powers_of_two_only(power):
    with pytest.raises(InvalidRequestError, match=f"power={power} must be a power of two"):
        Probe(power)


def test_decode_does_not_copy_the_store(big_store):
    runner = big_store.runner
    slot = BatchSlot(range(300), [1], SamplingParams(), pages=range(5))
    state = decode_state([slot], runner.shapes.max_pages, TINY.vocab_size)
    assert_no_copy(*memory_of(decode, runner.store, runner.params, state, decoder=runner.decoder, steps=16))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_no_step_copies_a_store_that_adapters_share(devices):
    """Nor what stands beside KV for them, which is 48 MB."""
    config = {"store_tokens": 1 << 17, "max_adapters": 3, "max_adapter_rank": 8, "share_adapters": True}
    engine = Engine.from_config(TINY, mesh=make_mesh(devices), page_size=64, **config)
    runner = engine.runner
    plan, rows = hybrid_plan(engine)
    state = embed_rows(runner.params, rows, decoder=runner.decoder, requests=len(plan.page_tables))
    static = {"decoder": runner.decoder, "signals": tuple(SIGNALS.values()), "chunk": 128}
    about = plan, state, jnp.int32(TINY.num_layers), jnp.bool(False)
    assert_no_copy(*memory_of(prefill, runner.store, runner.params, *about, **static))
    slot = BatchSlot(range(300), [1], SamplingParams(), pages=range(5))
    state = decode_state([slot], runner.shapes.max_pages, TINY.vocab_size, adapters=True)
    assert_no_copy(*memory_of(decode, runner.store, runner.params, state, decoder=runner.decoder, steps=16))
    copies = packed(Copies(*[np.zeros(512, np.int32)] * 3))
    layers = jnp.int32(0), jnp.int32(runner.model.num_layers)
    assert_no_copy(*memory_of(align, runner.store, None, copies, layers, decoder=runner.decoder))


def test_alignment_does_not_copy_the_store(big_store):
    runner = big_store.runner
    copies = packed(Copies(*[np.zeros(512, np.int32)] * 3))
    layers = jnp.int32(0), jnp.int32(runner.model.num_layers)
    assert_no_copy(*memory_of(align, runner.store, None, copies, layers, decoder=runner.decoder))


def test_few_programs_serve_any_mix_of_lengths(tiny):
    rng = np.random.default_rng(0)
    document = rng.integers(0, 97, 300)
    tiny.remember(document)
    before = prefill._cache_size(), align._cache_size(), decode._cache_size()
    for _ in range(40):
        cut = np.sort(rng.integers(0, 300, 2))
        prompt = [*rng.integers(0, 97, rng.integers(1, 300)), *document[slice(*cut)], 1]
        boundary = int(rng.integers(0, 5))
        reuse = ReuseConfig(boundary_layer=boundary, recompute_ratio=rng.random())
        tiny.generate(np.array(prompt), SamplingParams(max_new_tokens=2), reuse=reuse, keep=False)
    after = prefill._cache_size(), align._cache_size(), decode._cache_size()
    buckets = len(tiny.runner.shapes.buckets)
    # A prefill and an alignment for each bucket, and one decode for one request.
    assert all(np.subtract(after, before) <= [buckets, buckets, 1])


def test_buckets_are_few():
    assert Shapes.of(8192, 8, 64, 128).buckets == (
        (64, 64),
        (512, 128),
        (2048, 128),
        (8192, 128),
    )


def fixed(least) -> Budget:
    """Budgets without a coverage."""
    return Budget(jnp.array(least), jnp.zeros(len(least)), jnp.array(least))


def test_top_rows_takes_the_best_candidates_of_each_request():
    rng = np.random.default_rng(1)
    request = np.sort(rng.integers(0, 3, 50))
    scores, candidates = rng.integers(0, 6, 50).astype(np.float32), rng.random(50) < 0.7
    budget = np.array([4, 0, 100, 7])
    chosen = np.asarray(top_rows(*map(jnp.asarray, (scores, candidates, request, np.arange(50))), fixed(budget)))
    for r in range(3):
        own = np.flatnonzero(candidates & (request == r))
        expected = own[np.argsort(-scores[own], kind="stable")[: budget[r]]]
        np.testing.assert_array_equal(np.flatnonzero(chosen & (request == r)), np.sort(expected))


def test_top_rows_finishes_the_blocks_that_it_begins():
    scores = np.array([2, 2, 2, 5, 5, 1, 1, 1, 1, 9], np.float32)
    block = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    candidates, group = np.arange(10) != 1, np.array([0] * 9 + [1])

    def chosen(budget):
        args = map(jnp.asarray, (scores, candidates, group, block))
        return np.flatnonzero(top_rows(*args, fixed([budget, 0]))).tolist()

    assert chosen(0) == []
    assert chosen(1) == chosen(2) == [3, 4]
    assert chosen(3) == chosen(4) == [0, 2, 3, 4]
    assert chosen(5) == [0, 2, 3, 4, 5, 6, 7, 8]


def test_more_copies_than_a_plan_has_rows_run_in_several_calls():
    shapes = Shapes.of(max_context=128, max_requests=4, page_size=16, chunk=8)
    runs = [(Segment(0, n, 5, np.arange(n), exact=False), range(8)) for n in (100, 28, 100)]
    parts = list(plan_copies(runs, shapes, page_size=16))
    assert [int((part.target >= 0).sum()) for part in parts] == [128, 100]
    assert all(len(part.source) == 128 for part in parts)
    assert list(plan_copies([], shapes, page_size=16)) == []
