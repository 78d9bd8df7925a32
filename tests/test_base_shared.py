"""Adapters that share K and V0, and each run through all that they have not seen for their own part of values."""

import contextlib
import dataclasses
import typing

import ml_dtypes
import numpy as np
import pytest
from adapting import LATER, ONE, SHARED, TWO, dense_of, merged, sharing_engine
from conftest import TINY, idle, run, tiny_params
from dense import Dense, _norm, stored_kv
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import Engine, EngineConfig, InvalidRequestError, ReuseConfig, SamplingParams, StoreFullError
from sparsex_jax.reuse.adapters import SHARING
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.schedule import Phase
from sparsex_jax.scheduler.chunks import stages
from sparsex_jax.serving.schemas import Sharing

WEIGHTS = {"one": ONE, "two": TWO, "later": LATER}
TEXT = np.random.default_rng(3).integers(1, 89, 300).astype(np.int32)
BASE = {"sharing": "base_shared"}


@pytest.fixture
def engine():
    return trio()


def trio(**changes):
    engine = sharing_engine(**changes)
    engine.load_adapter("later", LATER)
    return engine


class Agent(Dense):
    """The reference: an adapter runs through a whole text, over those K and V0 that there are, with its own Y.

    Y of a token depends on what is stored up to there and on the adapter alone. So it does not matter when the adapter
    ran through it, and running through all of it gives what was kept.

    Args:
      rounded: what the store makes of K and V0.
    """

    def __init__(self, weights, rounded=np.asarray):
        super().__init__(TINY, merged(weights))
        self.plain, self.part, self.rounded = Dense(TINY, tiny_params()), weights.pairs["wv"], rounded

    def run(self, tokens, stored):
        """The last logits, and K and V0 [tokens, heads, head_dim] of each layer. `own_y` has Y of each layer then.

        Args:
          stored: K and V0 of the first tokens, a pair for each layer.
        """
        hidden, places, kept, self.own_y = self.embedded(tokens), np.arange(len(tokens)), [], []
        for layer, there in enumerate(stored):
            q, keys, _ = self.qkv(layer, hidden, places)
            w = self.plain.layers[layer]
            x = _norm(hidden, w["attn_norm"], TINY.rms_norm_eps)
            new = self.rounded(keys), self.rounded(np.einsum("th,hnd->tnd", x, w["wv"]))
            keys, base = (np.concatenate([old, own[len(old) :]]) for old, own in zip(there, new, strict=True))
            self.own_y.append(x @ self.part.a[layer].astype(np.float64))
            own_part = self.own_y[-1] @ self.part.b[layer].astype(np.float64)
            kept.append((keys, base))
            hidden = self.finish_layer(layer, hidden, q, keys, base + own_part.reshape(base.shape), places)
        return self.logits(hidden)[-1], kept


AGENTS = {name: Agent(weights) for name, weights in WEIGHTS.items()}
NOTHING = [(np.zeros((0, TINY.num_kv_heads, TINY.head_dim)),) * 2] * TINY.num_layers


def test_who_comes_later_has_its_own_part_of_what_others_wrote(engine):
    prompt = TEXT[:60]
    first = engine.prefill(prompt[:40], adapter="one", **BASE)
    assert first.report.to_dict()["sharing"] == {"mode": "base_shared", "cross_adapter_tokens": 0, "unseen_tokens": 0}
    np.testing.assert_allclose(first.logits, dense_of(ONE).full(prompt[:40])[0][-1], atol=1e-3)
    out = engine.prefill(prompt, adapter="two", **BASE)  # two pages that it shares, and half of one that it copies
    report = out.report
    assert (report.prefix_tokens, report.approximate_prefix_tokens, report.fresh_tokens) == (0, 40, 20)
    assert (report.sharing.cross_adapter_tokens, report.sharing.unseen_tokens) == (40, 40)
    assert (report.computed_fraction, report.boundary_layer) == (1.0, TINY.num_layers)
    _, stored = AGENTS["one"].run(prompt[:40], NOTHING)
    np.testing.assert_allclose(out.logits, AGENTS["two"].run(prompt, stored)[0], atol=1e-3)
    again = engine.prefill(prompt, adapter="two", **BASE)
    assert (again.report.approximate_prefix_tokens, again.report.sharing.unseen_tokens) == (59, 0)
    assert again.report.computed_fraction == 1 / 60
    np.testing.assert_allclose(again.logits, out.logits, atol=1e-4)
    assert idle(engine)


def test_nothing_but_its_own_columns_is_written(engine):
    engine.prefill(TEXT[:48], adapter="one", **BASE)
    (pages,) = ([node.pages[0] for node in engine.cache.tree.live_nodes()],)
    slots = np.concatenate([np.arange(16 * page, 16 * page + 16) for page in pages])
    before = stored_kv(engine, slots), np.asarray(engine.runner.store.low_rank)[:, pages]
    with engine.prefilled(TEXT[:60], adapter="two", **BASE) as held:
        assert set(pages) <= set(held.pages)
        assert held.report.sharing.unseen_tokens == 48
        assert engine.stats()["tokens"] == 48  # of both
    after = stored_kv(engine, slots), np.asarray(engine.runner.store.low_rank)[:, pages]
    np.testing.assert_array_equal(before[0], after[0])
    changed = (before[1] != after[1]).any(axis=(0, 1, 2)).reshape(3, -1).any(axis=1)  # by slot, of 8 columns each
    assert changed.tolist() == [False, True, False]
    assert (
        engine.prefill(TEXT[:60], adapter="two", **BASE).report.sharing.unseen_tokens == 0
    )  # kept or not, it is there
    assert engine.prefill(TEXT[:60], adapter="later", **BASE).report.sharing.unseen_tokens == 59
    for mode in ("isolated", "pre_lr", "rebase"):
        report = engine.prefill(TEXT[:60], adapter="one", sharing=mode, reuse=ReuseConfig("prefix"), keep=False).report
        assert report.fresh_tokens == 60
    assert engine.prefill(TEXT[:60], keep=False).report.fresh_tokens == 60


def test_chunks_are_of_unseen_tokens_first():
    kind = np.array([*[TokenKind.APPROXIMATE] * 6, *[TokenKind.FRESH] * 3], np.uint8)
    prompt, unseen = PromptMap(np.arange(9, dtype=np.int32), kind), np.isin(np.arange(9), [0, 1, 4, 5])
    plan = RequestPlan(prompt, (Phase(0, prompt.computed),), [7, 8]).running_through(unseen)
    parts = stages(plan, prompt.tokens, 3)
    assert [np.flatnonzero(part.phases[0].forced).tolist() for part in parts] == [[0, 1, 4], [5, 6, 7], [8]]
    assert [len(part.prompt) for part in parts] == [5, 8, 9]
    assert [np.flatnonzero(part.unseen).tolist() for part in parts] == [[0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5]]
    assert plan.running_through(np.zeros(9, bool)) is plan


# Whatever comes ---------------------------------------------------------------------------------------------

TURNS = st.lists(
    st.tuples(st.sampled_from(list(WEIGHTS)), st.integers(1, 40), st.integers(1, 20)), min_size=2, max_size=7
)


@pytest.mark.slow
@given(TURNS, st.sampled_from([20, 512]))
@settings(max_examples=25)
def test_agents_who_take_turns_on_a_trajectory(turns, prefill_tokens):
    """Each reads K and V0 as they were written, and its own Y, however the turns fall on pages and chunks."""
    engine, said, stored, seen = trio(prefill_tokens=prefill_tokens), TEXT[:0], NOTHING, dict.fromkeys(WEIGHTS, 0)
    for number, (name, new, answer) in enumerate(turns):
        said = np.append(said, TEXT[40 * number :][:new]).astype(np.int32)
        sampling = SamplingParams(max_new_tokens=answer, ignore_eos=True)
        (out,) = engine.generate_batch([said], sampling, adapter=name, return_logits=True, **BASE)
        there, report = len(stored[0][0]), out.report
        assert report.approximate_prefix_tokens == min(there, len(said) - 1)
        unseen = report.sharing.unseen_tokens
        assert there - seen[name] <= unseen + 1 <= there - min(seen[name] // 16 * 16, there) + 1
        assert report.computed_fraction == pytest.approx((unseen + report.fresh_tokens) / len(said))
        logits, _ = AGENTS[name].run(said, stored)
        np.testing.assert_allclose(out.logits, logits, atol=1e-3)
        assert out.token_ids[0] == int(logits.argmax())
        said = np.append(said, out.token_ids).astype(np.int32)
        stored, seen[name] = AGENTS[name].run(said[:-1], stored)[1], len(said) - 1
        engine.admission.check_books()
        assert idle(engine)


PIECES = [TEXT[at : at + length] for at, length in ((0, 20), (50, 33), (100, 48), (150, 7))]
ASKED = st.tuples(
    st.sampled_from(list(WEIGHTS)),
    st.lists(st.sampled_from(range(len(PIECES))), min_size=1, max_size=3),
    st.integers(1, 30),
    st.booleans(),
)
STEPS = st.one_of(st.lists(ASKED, min_size=1, max_size=4), st.sampled_from(["remember", "forget", "load", "cancel"]))


@pytest.mark.slow
@given(st.lists(STEPS, min_size=3, max_size=8))
@settings(max_examples=40)
def test_whatever_comes_what_is_seen_is_ones_own(steps):
    """In few pages, with several at once: of what an adapter is said to have seen, Y is what this adapter has over the
    K and V0 that are stored up to there."""
    engine = trio(store_tokens=20 * 16, decode_steps=4)
    for step in steps:
        match step:
            case "remember":
                remember(engine)
            case "forget":
                for entry in engine.entries():
                    engine.forget(entry.handle)
            case "load":
                engine.unload_adapter("later")
                engine.load_adapter("later", LATER)
            case "cancel":
                cancelled(engine)
            case _:
                ask(engine, step)
        engine.admission.check_books()
        assert idle(engine)
        check_seen(engine)


def ask(engine, batch):
    names, pieces, lengths, keeps = zip(*batch, strict=True)
    prompts = [np.concatenate([PIECES[number] for number in each]) for each in pieces]
    sampling = [SamplingParams(max_new_tokens=each, ignore_eos=True) for each in lengths]
    engine.generate_batch(prompts, sampling, adapter=names, keep=keeps[0], **BASE)


def remember(engine):
    with contextlib.suppress(StoreFullError):
        engine.remember(PIECES[2], adapter="two", **BASE)


def cancelled(engine):
    """A request that is given up when it has its first tokens."""
    tickets = []
    asked = {"adapter": "one", "listener": lambda event: tickets[0].cancel(), **BASE}
    tickets.append(engine.loop.submit(np.concatenate(PIECES[:2]), SamplingParams(max_new_tokens=40), **asked))
    run(engine.loop)


def check_seen(engine):
    """Walk the tree from its roots, with the K and V0 that are stored up to each node."""
    numbers = {engine.adapters[name].number: name for name in WEIGHTS}
    for root in engine.cache.tree.roots.values():
        for child in root.children:
            check_chain(engine, child, np.zeros(0, np.int32), NOTHING, numbers)


def check_chain(engine, node, before, stored, numbers):
    page, tokens = node.pages[0], np.append(before, np.frombuffer(node.key, np.int32) & 127)
    own = stored_kv(engine, 16 * page + np.arange(node.length))
    stored = [tuple(map(np.concatenate, zip(old, each, strict=True))) for old, *each in zip(stored, *own, strict=True)]
    for number in node.seen_by:
        name = numbers[number]
        slot = 8 * engine.adapters[name].slot
        ours = np.asarray(engine.runner.store.low_rank)[:, page, : node.length, slot : slot + WEIGHTS[name].rank]
        AGENTS[name].run(tokens, stored)
        expected = np.array(AGENTS[name].own_y)[:, len(before) :]
        np.testing.assert_allclose(ours, expected, atol=1e-3)
    for child in node.children:
        check_chain(engine, child, tokens, stored, numbers)


@pytest.mark.slow
def test_many_at_once_disturb_nobody():
    """Agents who run through the same pages in one plan, and one whose answer goes on meanwhile."""
    engine = trio()
    engine.prefill(TEXT[:64], adapter="one", **BASE)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = [np.append(TEXT[:64], TEXT[at : at + 9]).astype(np.int32) for at in (100, 110, 120, 130)]
    names = ["two", "later", "one", "two"]
    outs = engine.generate_batch(prompts, sampling, adapter=names, return_logits=True, **BASE)
    _, stored = AGENTS["one"].run(TEXT[:64], NOTHING)
    for prompt, name, out in zip(prompts, names, outs, strict=True):
        assert out.report.sharing.cross_adapter_tokens == 64
        logits, kept = AGENTS[name].run(prompt, stored)
        np.testing.assert_allclose(out.logits, logits, atol=1e-3)
        assert out.token_ids == greedy_over(AGENTS[name], prompt, kept, 12)
    assert idle(engine)


def greedy_over(agent, prompt, stored, number):
    tokens = list(prompt)
    for _ in range(number):
        logits, _ = agent.run(np.array(tokens), stored)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_a_preemption_changes_no_answer():
    sampling, answers = SamplingParams(max_new_tokens=40, ignore_eos=True), []
    for tokens in (1024, 96):
        engine = sharing_engine(store_tokens=tokens)
        engine.prefill(TEXT[:16], adapter="one", **BASE)
        prompts = [TEXT[:24], np.concatenate([TEXT[:16], TEXT[60:68]])]
        outs = engine.generate_batch(prompts, sampling, adapter=["two", "two"], **BASE)
        assert (engine.loop.stats.preempted > 0) == (tokens == 96)
        answers.append([out.token_ids for out in outs])
        engine.admission.check_books()
    assert answers[0] == answers[1]


def test_what_stands_behind_anothers_page_is_unseen(engine):
    """Two compute the same pages at once, and those of one of them are kept. What the other one has behind its own came
    of these."""
    names, one_token = ["one", "two"], SamplingParams(max_new_tokens=1, ignore_eos=True)
    outs = engine.generate_batch([TEXT[:48], TEXT[:57]], one_token, adapter=names, **BASE)
    assert [out.report.fresh_tokens for out in outs] == [48, 57]
    check_seen(engine)
    again = [engine.prefill(TEXT[:60], adapter=name, keep=False, **BASE).report for name in names]
    assert [each.approximate_prefix_tokens for each in again] == [57, 57]
    assert [each.sharing.unseen_tokens for each in again] == [9, 57]
    assert idle(engine)


def test_a_page_that_is_left_to_its_twin_is_unseen():
    """Of texts that are remembered twice at once, the second page is not what prompts read."""
    engine = trio()
    engine.prefill(TEXT[:16], adapter="one", **BASE)
    tree = engine.cache.tree
    (node,) = tree.live_nodes()
    number = engine.adapters["one"].number
    assert tree.has_seen(node.pages[0], number)
    (twin,) = engine.cache.allocate(1)
    keys = np.frombuffer(node.key, np.int32)
    engine.cache.commit([twin], keys, "default", exact_tokens=16)
    tree.mark_seen([twin], 16, number + 1)
    assert node.seen_by == {number}
    engine.cache.withdraw([node.pages[0]])
    assert node.pages == [twin]
    assert not tree.has_seen(twin, number)
    engine.cache.release([twin])
    assert idle(engine)


def test_what_adapters_come_and_go_for_is_unseen_again(engine):
    engine.prefill(TEXT[:40], adapter="one", **BASE)
    engine.unload_adapter("later")
    report = engine.prefill(TEXT[:60], adapter="two", **BASE).report
    assert (report.fresh_tokens, report.sharing.unseen_tokens) == (60, 0)
    full = engine.prefill(TEXT[:60], adapter="two", reuse=ReuseConfig("full"), keep=False, **BASE).report
    assert dataclasses.astuple(full.sharing) == ("base_shared", 0, 0)
    assert engine.prefill(TEXT[:60], adapter="one", namespace="another", **BASE).report.fresh_tokens == 60


@pytest.mark.slow
def test_keys_and_values_in_float8():
    """Y is not rounded, and neither is what is computed of it."""
    engine = Engine(TINY, tiny_params(), config=EngineConfig(**SHARED | {"kv_dtype": "fp8"}))
    for name in ("one", "two"):
        engine.load_adapter(name, WEIGHTS[name])
    store, as_stored = engine.runner.store, lambda x: np.float32(x).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert (store.kv.dtype, store.low_rank.dtype) == ("float8_e4m3fn", np.float32)
    one, two = Agent(ONE, as_stored), Agent(TWO, as_stored)
    expected, written = one.run(TEXT[:40], NOTHING)
    for mode in ("isolated", "pre_lr", "base_shared"):
        out = engine.prefill(TEXT[:40], adapter="one", sharing=mode, reuse=ReuseConfig("prefix"))
        np.testing.assert_allclose(out.logits, expected, atol=0.02)  # what differs by a little may round otherwise
    assert np.abs(AGENTS["one"].run(TEXT[:40], NOTHING)[0] - expected).max() > 0.05
    out = engine.prefill(TEXT[:60], adapter="two", **BASE)
    assert out.report.sharing.unseen_tokens == 40
    np.testing.assert_allclose(out.logits, two.run(TEXT[:60], written)[0], atol=0.02)
    assert idle(engine)


# Texts that are remembered ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pre_lr", "refresh", "rebase", "base_shared"])
def test_a_text_is_remembered_for_those_who_share(engine, mode):
    text, finds, events = TEXT[:40], "pre_lr" if mode == "refresh" else mode, []
    engine.loop.remember(text, adapter="one", sharing=mode, listener=events.append)
    run(engine.loop)
    handle, told = events[-1].handle, [event.report for event in events if event.report]
    assert engine.remember(text, adapter="one", sharing=mode) == handle
    (entry,) = engine.entries()
    assert (entry.origin.adapter, entry.origin.sharing) == (None if mode == "rebase" else "one", mode)
    assert (told[0].adapter is None) == (mode == "rebase")  # not one without a name
    out = engine.prefill(TEXT[:60], adapter="two", sharing=finds, reuse=ReuseConfig("prefix"), keep=False)
    assert (out.report.approximate_prefix_tokens, out.report.sharing.cross_adapter_tokens) == (40, 40)
    assert out.report.sharing.unseen_tokens == (40 if mode == "base_shared" else 0)
    if mode == "base_shared":
        logits, _ = AGENTS["two"].run(TEXT[:60], AGENTS["one"].run(text, NOTHING)[1])
        np.testing.assert_allclose(out.logits, logits, atol=1e-3)
    for others in ({"adapter": "one"}, {}):
        assert engine.prefill(TEXT[:60], keep=False, **others).report.fresh_tokens == 60
    engine.forget(handle)
    report = engine.prefill(TEXT[:60], adapter="two", sharing=finds, reuse=ReuseConfig("prefix"), keep=False).report
    assert report.fresh_tokens == 60
    engine.remember(text, adapter="one", sharing=mode, frozen=True)
    engine.unload_adapter("later")  # what is shared begins anew
    assert engine.entries() == []
    engine.admission.check_books()
    assert idle(engine)


@pytest.mark.parametrize("mode", ["pre_lr", "rebase", "base_shared"])
@pytest.mark.parametrize("rounds", [0, 1])
def test_a_text_is_found_that_is_remembered_while_an_adapter_comes(mode, rounds):
    engine, events = sharing_engine(prefill_tokens=128), []
    about = {"adapter": "one", "sharing": mode}
    text = TEXT[:140]  # of two chunks
    engine.loop.remember(text, frozen=True, listener=events.append, **about)
    for _ in range(rounds):  # it waits, or is prefilled
        engine.loop.step()
    engine.load_adapter("later", LATER)
    run(engine.loop)
    assert engine.remember(text, frozen=True, **about) == events[-1].handle
    report = engine.prefill(TEXT[:150], reuse=ReuseConfig("prefix"), keep=False, **about).report
    assert report.approximate_prefix_tokens == 140
    engine.unload_adapter("later")
    assert engine.entries() == []
    assert idle(engine)


def test_who_waits_while_an_adapter_comes_finds_what_is_shared_then():
    engine, events = sharing_engine(), []
    about = {"adapter": "one", "sharing": "pre_lr", "reuse": ReuseConfig("prefix")}
    for _ in range(2):
        engine.loop.submit(TEXT[:40], SamplingParams(max_new_tokens=1), listener=events.append, **about)
    engine.load_adapter("later", LATER)
    run(engine.loop)
    assert engine.prefill(TEXT[:60], keep=False, **about).report.approximate_prefix_tokens == 40
    assert idle(engine)


def test_texts_that_cannot_be_shared_are_refused(engine):
    refused = {
        "sharing='pre_lr' needs an adapter": {"sharing": "pre_lr"},
        "sharing='base_shared' and a preamble exclude each other": {
            "adapter": "one",
            "sharing": "base_shared",
            "preamble": TEXT[:5],
        },
        "sharing='all' must be one of": {"adapter": "one", "sharing": "all"},
    }
    for message, asked in refused.items():
        with pytest.raises(InvalidRequestError, match=message):
            engine.remember(TEXT[:40], **asked)
    assert typing.get_args(Sharing) == SHARING
    assert idle(engine)


@pytest.mark.slow
def test_texts_behind_a_preamble_are_segments_for_those_who_share(engine):
    engine.remember(TEXT[:40], adapter="one", sharing="pre_lr", preamble=TEXT[200:210])
    prompt = np.concatenate([TEXT[100:106], TEXT[:40], TEXT[110:116]])
    naive = ReuseConfig("naive", only_if_faster=False)
    report = engine.prefill(prompt, adapter="two", sharing="refresh", reuse=naive, keep=False).report
    assert (report.reused_tokens, report.sharing.cross_adapter_tokens) == (40, 40)
    assert idle(engine)
