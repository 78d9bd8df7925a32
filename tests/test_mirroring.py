"""Mirrors of an engine: what was derived, dropped and restored has every byte that it had."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TINY, idle, same_shapes, tiny_engine
from test_loop import submit

from sparsex_jax import Pin, ReuseConfig, SamplingParams
from sparsex_jax.device.signals import signals_for
from sparsex_jax.eval.footprint import footprint, store_bytes
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.reuse.schedule import written_depth
from sparsex_jax.scheduler import warmup

ASKED = ("key_mass", "kv_deviation", "probe_mass", "probe_last")
FEW = SamplingParams(max_new_tokens=4)
METHODS = {
    "sparse": ReuseConfig("sparsex", boundary_layer=0, recompute_ratio=0.1, overflow_tokens=2),
    "hybrid": ReuseConfig("sparsex", boundary_layer=1, recompute_ratio=0.1, overflow_tokens=2),
    "blocks": ReuseConfig("sparsex", boundary_layer=0, recompute_ratio=0.1, pool_tokens=16, second_boundary=3),
    "naive": ReuseConfig("naive"),
    "epic": ReuseConfig("epic"),
    "cacheblend": ReuseConfig("cacheblend"),
    "qcfuse": ReuseConfig("qcfuse", recompute_ratio=0.2),
    "prophetkv": ReuseConfig("prophetkv", recompute_ratio=0.2),
}


@pytest.fixture(scope="module", autouse=True)
def few_signals():
    """Stores with mirrors have prefills of their own, which compile sooner with the signals that are asked for."""

    def those_asked(names, mirrors):
        found = signals_for(names, mirrors)
        return {name: found[name] for name in found if name in ASKED or not mirrors}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.device.runner.signals_for", those_asked)
        yield


def tokens_of(seed, length):
    return np.random.default_rng(seed).integers(1, TINY.vocab_size, length).astype(np.int32)


def agent(number, shared, seed=0):
    """A prompt of one agent: something of its own, what all read, and its question."""
    before, behind = tokens_of(100 * seed + number, 10 + 3 * number), tokens_of(500 + 100 * seed + number, 5)
    return np.concatenate([before, shared, behind])


def rows_of(engine, node, page):
    """All bytes of a node's tokens, as a page of the store has them."""
    return np.asarray(engine.runner.store[:, page])[..., : node.length, :].tobytes()


def drop_spares(engine):
    """Evict every page that a derived one can restore, and overwrite it. Returns what nodes had there."""
    cache, spares = engine.cache, np.flatnonzero(engine.cache._pool.spare).tolist()
    assert engine.stats()["spare"] == len(spares)
    had = {cache.tree[page]: rows_of(engine, cache.tree[page], page) for page in spares}
    cache._evict(spares)
    engine.runner.store = engine.runner.store.at[:, jnp.array(spares)].set(jnp.nan)
    return had


def restored_alike(engine, had):
    """How many of these nodes are in the store again. They have what they had."""
    restored = [node for node in had if len(node.pages) > 1]
    assert all(rows_of(engine, node, node.pages[0]) == had[node] for node in restored)
    return len(restored)


def dropped_and_restored(engine, method):
    shared, asked = tokens_of(1, 160), [agent(number, tokens_of(1, 160)) for number in range(3)]
    assert len(shared) == 160
    answers = [engine.generate(prompt, FEW, reuse=method) for prompt in asked]
    had = drop_spares(engine)
    engine.cache.check([])
    for prompt, answer in zip(asked[1:], answers[1:], strict=True):
        engine.generate(np.concatenate([prompt, answer.token_ids, [7, 8]]).astype(np.int32), FEW, reuse=method)
    assert restored_alike(engine, had) == engine.stats()["restored_pages"] >= 10
    assert idle(engine)


DEFAULT = ["sparse", "hybrid", "cacheblend"]


@pytest.mark.parametrize(
    "name", [*DEFAULT, *(pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in DEFAULT)]
)
def test_what_was_dropped_is_restored_without_a_byte_that_differs(name):
    dropped_and_restored(tiny_engine(mirrors=True), METHODS[name])


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_in_16_and_in_8_bits(name, kv_dtype):
    device = dataclasses.replace(CONFIG, dtype="bfloat16", kv_dtype=kv_dtype)
    params = random_params(TINY, "bfloat16", make_mesh())
    dropped_and_restored(same_shapes(TINY, params, device, mirrors=True), METHODS[name])


def test_only_what_was_computed_is_kept(monkeypatch):
    """Patch rows are the rows that were computed of the pages that are derived, and no others."""
    engine, depths = tiny_engine(mirrors=True), []

    def noted(*args):
        depths.append(written_depth(*args))
        return depths[-1]

    monkeypatch.setattr("sparsex_jax.scheduler.mirroring.written_depth", noted)
    shared = tokens_of(1, 160)
    engine.generate(agent(0, shared), FEW, reuse=METHODS["hybrid"])
    made = engine.generate(agent(1, shared), FEW, reuse=METHODS["hybrid"])
    (depth,), pool = depths, engine.cache._pool
    assert len(depth) == made.report.prompt_tokens
    assert (depth == 4).sum() == made.report.fresh_tokens + made.report.recomputed_tokens
    assert set(depth) == {2, 4}  # the boundary's layer is written by its signal
    rows = 0
    for page, derived in pool.derived.items():
        node = engine.cache.tree[page]
        own = np.append(depth, np.full(8, 4))[node.start : node.start + node.length]  # then the answer
        assert np.array_equal(derived.depth, own)
        rows += int(own.sum())
    assert rows == engine.stats()["patch_rows"] > 0


def test_a_copy_of_layer_0_is_as_good_as_its_rows():
    """Where reused tokens keep what was copied there, so that mirrors need not, the same tokens are recomputed."""
    shared, logits, active = tokens_of(1, 160), [], []
    for mirrors in (False, True):
        engine = tiny_engine(mirrors=mirrors)
        engine.generate(agent(0, shared), FEW, reuse=METHODS["sparse"])
        answer = engine.prefill(agent(1, shared), reuse=METHODS["sparse"])
        logits.append(answer.logits)
        active.append(answer.report.active)
    assert np.array_equal(*active)
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_segments_come_from_mirrors_as_they_came_from_pages():
    """Whether the pages of a mirror are still there changes no bit of what is copied from it."""
    shared, answers, rows = tokens_of(1, 160), [], []
    for drops in (False, True):
        engine = tiny_engine(mirrors=True)
        engine.generate(shared, FEW, reuse=METHODS["naive"], namespace="other")
        for number in (1, 2):
            engine.generate(agent(number, shared), FEW, reuse=METHODS["hybrid"])
        if drops:
            drop_spares(engine)
        answers.append(engine.prefill(agent(5, shared, seed=1), reuse=METHODS["hybrid"], keep=False).logits)
        with engine.prefilled(agent(5, shared, seed=1), reuse=METHODS["hybrid"]) as prefilled:
            rows.append(np.asarray(engine.runner.store[:, jnp.array(prefilled.pages)]))
        assert prefilled.report.reused_tokens > 100
    assert np.array_equal(*answers)
    assert rows[0][..., :-16, :].tobytes() == rows[1][..., :-16, :].tobytes()


class Rounds:
    """Agents that take turns: each adds what all others are told as well, and goes on with all that it was told."""

    def __init__(self, engine, number, reuse):
        self.engine, self.reuse = engine, reuse
        self.contexts = [tokens_of(900 + each, 8 + each) for each in range(number)]

    def play(self, number, length):
        """One round, in which all are told the same. Returns the share of their contexts that was found in place."""
        news, found, had = tokens_of(50 + number, length), 0, 0
        for each, context in enumerate(self.contexts):
            prompt = np.concatenate([context, news, tokens_of(2000 + 10 * number + each, 3)])
            answer = self.engine.generate(prompt, dataclasses.replace(FEW, ignore_eos=True), reuse=self.reuse)
            found += answer.report.prefix_tokens + answer.report.approximate_prefix_tokens
            had += len(context) - 1  # the last token of an answer was no input
            self.contexts[each] = np.concatenate([prompt, answer.token_ids]).astype(np.int32)
        return found / had

    def num_kept(self):
        """How many agents' contexts can be found whole, up to the page that each ends in."""
        found = [self.engine.cache.tree.prefix(each.tobytes(), "default", lambda _: True) for each in self.contexts]
        return sum(one.num_tokens >= len(each) - 16 for one, each in zip(found, self.contexts, strict=True))


def keeps(pages, told, reuse, mirrors):
    """The share of contexts that ten agents find in their third round, and how many are kept, in a store for four.

    Args:
      pages: what the contexts of four are in then.
      told: how many tokens all are told first.
    """
    rounds = Rounds(tiny_engine(store_tokens=pages * 16, mirrors=mirrors), 10, reuse)
    hits = [rounds.play(number, told if number == 0 else 48) for number in range(3)]
    assert idle(rounds.engine)
    assert 4 * max(map(len, rounds.contexts)) >= (pages - 4) * 16
    return hits[2], rounds.num_kept()


def test_a_store_of_four_agents_keeps_four():
    hits, kept = keeps(112, 336, METHODS["sparse"], mirrors=False)
    assert hits <= 0.5
    assert kept <= 4


@pytest.mark.parametrize(
    ("pages", "told", "name"), [(112, 336, "sparse"), pytest.param(92, 256, "epic", marks=pytest.mark.slow)]
)
def test_a_store_of_four_agents_keeps_ten_with_mirrors(pages, told, name):
    hits, kept = keeps(pages, told, METHODS[name], mirrors=True)
    assert hits >= 0.95
    assert kept == 10


def test_what_cannot_be_packed_stays_as_it_is(monkeypatch):
    engine, shared = tiny_engine(mirrors=True), tokens_of(1, 160)
    engine.generate(agent(0, shared), FEW, reuse=METHODS["hybrid"])
    monkeypatch.setattr(engine.runner, "pack", lambda _: 1 / 0)
    engine.generate(agent(1, shared), FEW, reuse=METHODS["hybrid"])
    assert engine.stats()["derived"] == engine.stats()["base"] == 0
    assert idle(engine)


def test_nothing_is_derived_of_what_is_exact_or_pinned():
    engine, shared = tiny_engine(mirrors=True), tokens_of(1, 160)
    engine.generate(agent(0, shared), FEW, reuse=METHODS["hybrid"])
    engine.generate(agent(1, shared), FEW, reuse=METHODS["hybrid"], pin=Pin(ttl_s=60))
    engine.generate(agent(2, shared), FEW, reuse=ReuseConfig("full"))
    engine.generate(agent(3, shared), FEW, reuse=METHODS["hybrid"], keep=False)
    assert engine.stats()["derived"] == 0
    assert idle(engine)


def test_excerpts_are_exact_so_nothing_of_them_is_derived():
    engine, texts = tiny_engine(mirrors=True), [tokens_of(10 + number, 40) for number in range(3)]
    for text in texts:
        engine.remember(text)
    excerpt = ReuseConfig("excerpt", piece_tokens=16, coverage=0.5)
    for number in range(2):
        answer = engine.generate(np.concatenate([tokens_of(20 + number, 9), *texts, [5, 6]]), FEW, reuse=excerpt)
        assert answer.report.omitted_tokens > 0
    assert engine.stats()["derived"] == 0
    assert idle(engine)


def test_a_mirror_whose_rows_are_not_finite_is_withdrawn():
    engine, shared = tiny_engine(mirrors=True), tokens_of(1, 160)
    for number in range(2):
        engine.generate(agent(number, shared), FEW, reuse=METHODS["hybrid"])
    drop_spares(engine)
    base = next(iter(engine.cache._pool.derived.values())).bases[0]
    engine.runner.store = engine.runner.store.at[:, base].set(jnp.nan)
    answer = engine.generate(agent(1, shared), FEW, reuse=METHODS["hybrid"])
    assert answer.token_ids == tiny_engine().generate(agent(1, shared), FEW, reuse=ReuseConfig("full")).token_ids
    assert not any(base in derived.bases for derived in engine.cache._pool.derived.values())
    assert idle(engine)


def test_mirrors_go_to_host_memory_whether_their_pages_are_there_or_not(monkeypatch):
    monkeypatch.setattr("sparsex_jax.scheduler.tiers.MOST_MOVING", 0)  # nothing goes yet
    engine, shared = tiny_engine(mirrors=True, host_store_bytes=1 << 24), tokens_of(1, 160)
    for number in range(2):
        engine.generate(agent(number, shared), FEW, reuse=METHODS["hybrid"])
    had = drop_spares(engine)
    assert had
    monkeypatch.undo()
    engine.loop.settle()
    assert restored_alike(engine, had) > 0
    assert engine.admission.tiers.stats().host_blocks >= 2
    engine.cache.clear()
    again = engine.generate(agent(1, shared), FEW, reuse=METHODS["hybrid"])
    assert again.report.restored_tokens > 100
    assert idle(engine)


def test_the_warm_up_leaves_nothing_behind():
    engine = tiny_engine(mirrors=True)
    steps = [step for step in warmup.steps(engine.loop) if getattr(step, "func", None) is warmup._mirror]
    assert len(steps) == len(engine.runner.shapes.buckets)
    steps[1]()
    assert engine.stats()["free"] == engine.stats()["pages"]


def test_what_was_preempted_becomes_the_mirror_that_it_would_have_been():
    shared, sampling, stored = tokens_of(1, 160), SamplingParams(max_new_tokens=40, ignore_eos=True), []
    for preempts in (False, True):
        engine = tiny_engine(mirrors=True)
        engine.generate(agent(0, shared), FEW, reuse=METHODS["sparse"])
        heard = submit(engine.loop, agent(1, shared), sampling, reuse=METHODS["sparse"])
        while engine.loop.step():
            if preempts and heard.tokens and engine.loop.policy.preemptions == 0:
                engine.loop.policy._preempt(engine.loop.policy.running[0])
        assert engine.loop.policy.preemptions == preempts
        stats = engine.stats()
        stored.append((heard.tokens, stats["derived"], stats["patch_rows"], stats["spare"]))
        had = drop_spares(engine)
        engine.generate(np.array([*agent(1, shared), *heard.tokens, 7, 8]), FEW, reuse=METHODS["sparse"])
        assert restored_alike(engine, had) >= 8
        assert idle(engine)
    assert stored[0] == stored[1]


def test_what_contexts_take_is_what_the_store_cannot_give_up():
    """The first context is the donor; the second and third are mirrors of it; nothing else is stored."""
    engine, shared, contexts = tiny_engine(mirrors=True), tokens_of(1, 160), []
    for number in range(3):
        prompt = agent(number, shared)
        answer = engine.generate(prompt, FEW, reuse=METHODS["sparse"])
        contexts.append(np.append(prompt, answer.token_ids)[:-1].astype(np.int32))
    stats, cache, page_bytes = engine.stats(), engine.cache, 10**6
    held = footprint(cache, contexts, "default", page_bytes)
    tables = sum(5 * 8 * len(rows) + 8 * len(rows.bases) for rows in cache._pool.derived.values())
    assert held.together == store_bytes(cache, page_bytes)
    assert held.together == (stats["pages"] - stats["free"] - stats["spare"]) * page_bytes + tables
    assert held.found == 1
    assert held.dense == sum(-(-len(each) // 16) for each in contexts) * page_bytes
    assert len(held.mirrors) == 2
    prefixes = [cache.tree.prefix(each.tobytes(), "default", lambda _: True) for each in contexts[1:]]
    nodes = [[*prefix.nodes, prefix.tail] for prefix in prefixes]
    stays = sum(node.derived is None for own in nodes for node in own)
    columns = stats["patch_rows"] / TINY.num_layers  # this method computes a token in all layers, or in none
    own = sum(share * len(own) for share, own in zip(held.mirrors, nodes, strict=True))
    assert own * page_bytes == pytest.approx((stays + columns / 16) * page_bytes + tables)
