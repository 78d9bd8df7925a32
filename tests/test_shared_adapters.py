"""Adapters that share KV: who shares nothing has the answers of merged weights, and who shares finds what all wrote."""

import dataclasses

import numpy as np
import pytest
from adapting import (
    LATER,
    ONE,
    SHARED,
    TARGETS,
    TWO,
    adapting_engine,
    dense_of,
    greedy,
    make_adapter,
    merged,
    sharing_engine,
)
from conftest import TINY, idle, run, tiny_params
from dense import Dense, _norm, stored_kv
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import Engine, EngineConfig, InvalidRequestError, Pin, ReuseConfig, SamplingParams, SparseX
from sparsex_jax.config import named_config
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.model.adapters import Pair
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.store import abstract_low_rank_store, abstract_store
from sparsex_jax.reuse.adapters import SHARING
from sparsex_jax.scheduler import warmup

TEXT = np.random.default_rng(7).integers(1, 89, 200).astype(np.int32)
PREFIX = ReuseConfig("prefix")
ONE_TOKEN = SamplingParams(max_new_tokens=1, ignore_eos=True)


@pytest.fixture
def engine():
    return sharing_engine()


def test_who_shares_nothing_has_the_answers_of_merged_weights(engine):
    check_answers(engine, ONE_TOKEN)
    again = engine.prefill(TEXT[:12], adapter="one", reuse=PREFIX)
    assert again.report.prefix_tokens == 11
    np.testing.assert_allclose(again.logits, dense_of(ONE).full(TEXT[:12])[0][-1], atol=1e-3)
    assert idle(engine)


@pytest.mark.slow
def test_and_so_have_longer_answers(engine):
    check_answers(engine, dataclasses.replace(ONE_TOKEN, max_new_tokens=4))


def check_answers(engine, sampling):
    prompts, names = [TEXT[:12], TEXT[:12], TEXT[:12], TEXT[20:37]], ["one", "two", None, "one"]
    outs = engine.generate_batch(prompts, sampling, adapter=names, return_logits=True, reuse=PREFIX)
    of_name = {"one": dense_of(ONE), "two": dense_of(TWO), None: dense_of(None)}
    for prompt, name, out in zip(prompts, names, outs, strict=True):
        logits, tokens = greedy(of_name[name], prompt, sampling.max_new_tokens)
        np.testing.assert_allclose(out.logits, logits, atol=1e-3)
        assert list(out.token_ids) == tokens


# What a group shares ----------------------------------------------------------------------------------------


class Team(Dense):
    """The reference in which an adapter reads what another one wrote: K and V0 of the writer, and Y = X_writer A of its
    own. The writer's part ends at token `end`."""

    def __init__(self, writer, reader, end):
        super().__init__(TINY, tiny_params())
        self.writer, self.reader, self.end = WithApart(writer, reader), WithApart(reader, reader), end

    def last_logits(self, tokens):
        keys_values = self.writer.run(tokens[: self.end], [None] * TINY.num_layers)[1]
        return self.reader.logits(self.reader.run(tokens[self.end :], keys_values)[0])[-1]


class WithApart(Dense):
    """An adapter's forward pass over what is stored, and what it stores for another: K, V0, and that one's Y."""

    def __init__(self, weights, reader):
        super().__init__(TINY, merged(weights))
        self.plain = Dense(TINY, tiny_params())
        self.reader, self.own = reader.pairs["wv"], weights.pairs["wv"]

    def run(self, tokens, stored):
        """Hidden states of new tokens, and what all tokens have in each layer then: (K, V0, X A of the reader)."""
        hidden, kept = self.embedded(tokens), []
        for layer in range(TINY.num_layers):
            before = stored[layer]
            first = 0 if before is None else len(before[0])
            places = np.arange(first, first + len(tokens))
            q, keys, values = self.qkv(layer, hidden, places)
            w = self.plain.layers[layer]
            x = _norm(hidden, w["attn_norm"], TINY.rms_norm_eps)
            new = (keys, np.einsum("th,hnd->tnd", x, w["wv"]), x @ self.reader.a[layer].astype(np.float64))
            old = (keys, values)
            if before is not None:
                new = tuple(np.concatenate(pair) for pair in zip(before, new, strict=True))
                added = (new[2] @ self.reader.b[layer].astype(np.float64)).reshape(new[1].shape)
                old = (new[0], new[1] + added)
            kept.append(new)
            hidden = self.finish_layer(layer, hidden, q, *old, places)
        return hidden, kept


def test_an_agent_reads_what_another_wrote_with_its_own_part_of_values(engine):
    prompt = TEXT[:60]
    engine.prefill(prompt[:40], adapter="one", sharing="pre_lr", reuse=PREFIX)  # two pages, and half of one
    out = engine.prefill(prompt, adapter="two", sharing="pre_lr", reuse=PREFIX)
    assert out.report.prefix_tokens == 0
    assert out.report.approximate_prefix_tokens == 40
    assert out.report.to_dict()["sharing"] == {
        "mode": "pre_lr",
        "cross_adapter_tokens": 40,
        "unseen_tokens": 0,
    }
    np.testing.assert_allclose(out.logits, Team(ONE, TWO, 40).last_logits(prompt), atol=1e-3)
    alone = engine.prefill(prompt, adapter="two", reuse=PREFIX)
    assert alone.report.fresh_tokens == 60
    assert alone.report.sharing is None
    assert np.abs(alone.logits - out.logits).max() > 0.01
    np.testing.assert_allclose(alone.logits, dense_of(TWO).full(prompt)[0][-1], atol=1e-3)
    assert idle(engine)


def without_effect(weights):
    """The same adapter with B = 0."""
    pairs = {name: Pair(pair.a, np.zeros_like(pair.b)) for name, pair in weights.pairs.items()}
    return dataclasses.replace(weights, pairs=pairs, digest="zero")


def test_adapters_without_effect_share_what_is_the_base_models_bit_for_bit(engine):
    alone = engine.prefill(TEXT[:60], keep=False)
    for name in ("one", "two"):
        engine.unload_adapter(name)
        engine.load_adapter(name, without_effect(ONE))
    engine.prefill(TEXT[:32], adapter="one", sharing="pre_lr")
    out = engine.prefill(TEXT[:60], adapter="two", sharing="pre_lr", reuse=PREFIX)
    assert out.report.approximate_prefix_tokens == 32
    np.testing.assert_allclose(out.logits, alone.logits, atol=1e-5)


def test_nobody_else_finds_what_a_group_shares(engine):
    def found(**asked):
        report = engine.prefill(TEXT[:60], keep=False, **asked).report
        return report.prompt_tokens - report.fresh_tokens

    engine.prefill(TEXT[:60], adapter="one", sharing="pre_lr")
    for mode in ("pre_lr", "refresh"):
        asked = {"sharing": mode, "reuse": ReuseConfig("naive")}
        assert found(adapter="two", **asked) == found(adapter="one", **asked) == 59
        assert found(adapter="two", namespace="another", **asked) == 0
    assert found() == found(adapter="one") == found(adapter="two") == found(adapter="two", sharing="rebase") == 0
    engine.prefill(TEXT[:60])
    engine.prefill(TEXT[:60], adapter="one")
    assert found(adapter="two", sharing="rebase") == 0
    engine.unload_adapter("one")
    assert found(adapter="two", sharing="pre_lr") == 0
    engine.prefill(TEXT[:60], adapter="two", sharing="pre_lr")
    engine.load_adapter("one", LATER)  # Y of it was not written
    assert found(adapter="two", sharing="pre_lr") == found(adapter="one", sharing="pre_lr") == 0
    assert found() == found(adapter="two", sharing="pre_lr", namespace="another") + 59
    assert idle(engine)


def test_who_began_before_an_adapter_was_loaded_leaves_nothing_to_those_behind_it():
    engine, asked = sharing_engine(prefill_tokens=128), {"adapter": "one", "sharing": "pre_lr"}
    asked |= {"sampling": ONE_TOKEN, "reuse": PREFIX, "listener": lambda event: None}
    engine.loop.submit(TEXT[:140], **asked)
    engine.loop.step()  # the first of two chunks
    engine.load_adapter("later", LATER)
    run(engine.loop)
    assert engine.stats()["tokens"] == 0
    engine.loop.submit(TEXT[:140], **asked)
    run(engine.loop)
    assert engine.stats()["tokens"] == 140
    assert idle(engine)


def test_a_forgotten_text_is_forgotten_by_a_group(engine):
    handle = engine.remember(TEXT[:32])
    engine.prefill(TEXT[:60], adapter="one", sharing="pre_lr")
    engine.prefill(TEXT[:60], adapter="one", sharing="rebase")
    engine.forget(handle)
    assert len(engine.admission.neutral) == 0
    report = engine.prefill(TEXT[:60], adapter="two", sharing="pre_lr", keep=False).report
    assert report.fresh_tokens > 32


# A neutral run ----------------------------------------------------------------------------------------------


def test_all_read_what_the_model_computed_without_adapters(engine):
    prompts = [TEXT[:40], *TEXT[60:84].reshape(3, 8)]
    out, *_ = engine.generate_batch(prompts, ONE_TOKEN, adapter="one", sharing="rebase", reuse=PREFIX)
    assert out.token_ids == greedy(dense_of(ONE), TEXT[:40], 1)[1]  # nothing was there: it is as alone
    text = np.array([*TEXT[:40], *out.token_ids, 5])
    assert engine.prefill(text, adapter="two", sharing="rebase", keep=False).report.fresh_tokens == len(text)
    assert engine.heal() == 41 + 3 * 9
    assert engine.heal() == 0
    with engine.prefilled(text, adapter="two", sharing="rebase", reuse=PREFIX) as held:
        assert held.report.approximate_prefix_tokens == held.report.sharing.cross_adapter_tokens == len(text) - 1
        slots = np.asarray(held.pages)[np.arange(41) // 16] * 16 + np.arange(41) % 16
        keys, values = stored_kv(engine, slots)
    for layer, (exact_keys, exact_values) in enumerate(dense_of(None).full(text)[1]):
        np.testing.assert_allclose(keys[layer], exact_keys[:41], atol=1e-4)
        np.testing.assert_allclose(values[layer], exact_values[:41], atol=1e-4)
    assert engine.prefill(text, keep=False).report.fresh_tokens == len(text)
    assert idle(engine)


# A refresh --------------------------------------------------------------------------------------------------


def test_a_refresh_of_all_is_as_alone(engine):
    alone = engine.prefill(TEXT[:60], adapter="two", keep=False)
    engine.prefill(TEXT[:48], adapter="one", sharing="pre_lr")
    all_of_it = SparseX(boundary_layer=0, recompute_ratio=1.0)
    out = engine.prefill(TEXT[:60], adapter="two", sharing="refresh", reuse=all_of_it, keep=False)
    assert out.report.recomputed_tokens == 48
    assert out.report.sharing.cross_adapter_tokens == 0
    np.testing.assert_allclose(out.logits, alone.logits, atol=1e-4)
    pasted = engine.prefill(TEXT[:60], adapter="two", sharing="pre_lr", reuse=PREFIX, keep=False)
    some = SparseX(boundary_layer=1, recompute_ratio=0.25, overflow_tokens=0)
    part = engine.prefill(TEXT[:60], adapter="two", sharing="refresh", reuse=some)
    assert part.report.recomputed_tokens == 12
    assert part.report.sharing.cross_adapter_tokens == 36
    off = [float(np.abs(each.logits - alone.logits).max()) for each in (part, pasted)]
    assert 0 < off[0] < off[1]
    assert engine.stats()["tokens"] == 60  # what it copied and repaired is not kept beside what it is of
    again = engine.prefill(TEXT[:60], adapter="one", sharing="pre_lr", reuse=PREFIX, keep=False)
    assert again.report.approximate_prefix_tokens == 59
    assert idle(engine)


@pytest.mark.parametrize("method", ["prefix", "naive"])
def test_a_refresh_repairs_also_where_the_default_does_not(engine, method):
    engine.reuse = ReuseConfig(method)
    engine.prefill(TEXT[:40], adapter="one", sharing="pre_lr")
    report = engine.prefill(TEXT[:60], adapter="two", sharing="refresh", keep=False).report
    assert report.recomputed_tokens > 0
    sharing = engine.loop.requests.default_reuse
    assert [sharing(mode).method for mode in SHARING] == [method, method, "sparsex", method, "prefix"]


def test_what_moved_and_is_another_adapters_work_is_refreshed_too(engine):
    alone = engine.prefill(TEXT[:60], adapter="two", keep=False)
    engine.prefill(TEXT[5:50], adapter="one", sharing="pre_lr")
    all_of_it = SparseX(boundary_layer=0, recompute_ratio=1.0)
    out = engine.prefill(TEXT[:60], adapter="two", sharing="refresh", reuse=all_of_it, keep=False)
    assert [(each.start, each.length, each.donor_start) for each in out.report.segments] == [(5, 45, 0)]
    np.testing.assert_allclose(out.logits, alone.logits, atol=1e-4)
    pasted = engine.prefill(TEXT[:60], adapter="two", sharing="pre_lr", reuse=ReuseConfig("naive"), keep=False)
    assert pasted.report.reused_tokens == 45
    assert pasted.report.sharing.cross_adapter_tokens == 45
    assert np.isfinite(pasted.logits).all()


# What is refused, and what it takes ------------------------------------------------------------------------


def test_what_cannot_be_shared_is_refused(engine):
    refused = {
        "sharing='full' must be one of 'isolated', 'pre_lr', 'refresh', 'rebase', 'base_shared'": {"sharing": "full"},
        "sharing='pre_lr' needs an adapter": {"sharing": "pre_lr"},
        "sharing='refresh' needs a method that repairs": {"adapter": "one", "sharing": "refresh", "reuse": PREFIX},
        "sharing='base_shared' finds prefixes and no segments: it needs the method prefix, not 'sparsex'": {
            "adapter": "one",
            "sharing": "base_shared",
            "reuse": SparseX(),
        },
        "sharing='rebase' and a pin exclude each other": {"adapter": "one", "sharing": "rebase", "pin": Pin("mine")},
    }
    for message, asked in refused.items():
        with pytest.raises(InvalidRequestError, match=message):
            engine.generate(TEXT[:20], ONE_TOKEN, **asked)
    with pytest.raises(InvalidRequestError, match=r"adapter 'keys' does not fit .* it adds to keys \('wk'\)"):
        engine.load_adapter("keys", make_adapter(3))
    with pytest.raises(
        InvalidRequestError, match=r"adapter 'late' does not fit .* it adds to values \('wv'\) from its"
    ):
        engine.load_adapter("late", make_adapter(3, targets=TARGETS, invocation=(90, 91)))
    engine.load_adapter("late", make_adapter(3, targets=("wq", "wo"), invocation=(90, 91)))
    with pytest.raises(InvalidRequestError, match="adapter 'late' acts from its invocation sequence on"):
        engine.generate(TEXT[:20], ONE_TOKEN, adapter="late", sharing="pre_lr")
    with pytest.raises(InvalidRequestError, match="sharing='pre_lr' needs an engine with share_adapters"):
        adapting_engine().generate(TEXT[:20], ONE_TOKEN, adapter="one", sharing="pre_lr")
    assert idle(engine)


def test_configurations_that_cannot_share_are_refused():
    for name, value in {"mirrors": True, "host_store_bytes": 1 << 20}.items():
        with pytest.raises(
            InvalidRequestError, match=f"share_adapters=True excludes {name}={value}, which does not keep"
        ):
            EngineConfig(**{"max_adapters": 3, "share_adapters": True, name: value})
    with pytest.raises(InvalidRequestError, match="share_adapters='yes' must be True or False"):
        EngineConfig(share_adapters="yes")
    with pytest.raises(InvalidRequestError, match="share_adapters needs max_adapters above 0"):
        Engine(TINY, tiny_params(), config=EngineConfig(share_adapters=True))


def test_three_agents_take_little_more_than_one(engine):
    """Of SmolLM2-135M, by the shapes of its stores."""
    model, mesh = named_config("smollm2-135m"), make_mesh()
    config = EngineConfig(max_adapters=3, max_adapter_rank=8, share_adapters=True, dtype="float32")
    kv, low_rank = (4 * np.prod(make(model, config, mesh).shape) for make in (abstract_store, abstract_low_rank_store))
    assert (kv + low_rank) / (3 * kv) <= 0.36
    assert engine.runner.store.nbytes == sum(
        each.nbytes for each in (engine.runner.store.kv, engine.runner.store.low_rank)
    )


# Whatever comes ---------------------------------------------------------------------------------------------

LENGTHS = st.integers(1, 50)
ASKED = st.tuples(
    st.sampled_from([None, "one", "two"]),
    st.sampled_from(SHARING),
    st.sampled_from(["default", "other"]),
    st.integers(0, 12),
    LENGTHS,
    st.integers(1, 30),
)
BATCH = st.lists(ASKED, min_size=1, max_size=3)
STEPS = st.one_of(BATCH, st.sampled_from(["heal", "load", "remember", "forget"]))


@pytest.mark.slow
@given(st.lists(STEPS, min_size=3, max_size=8))
@settings(max_examples=40)
def test_nothing_leaks_and_who_shares_nothing_stays_exact(steps):
    engine, weights = sharing_engine(store_tokens=128), {None: None, "one": ONE, "two": TWO}
    for step in steps:
        if isinstance(step, list):
            ask(engine, step, weights)
        elif step == "heal":
            engine.heal()
        elif step == "load":
            engine.unload_adapter("one")
            weights["one"] = LATER if weights["one"] is ONE else ONE
            engine.load_adapter("one", weights["one"])
        elif step == "remember":
            engine.remember(TEXT[:20])
        else:
            for entry in engine.entries():
                engine.forget(entry.handle)
        engine.admission.check_books()
        assert idle(engine)


def ask(engine, batch, weights):
    prompts = [TEXT[at : at + length] for _, _, _, at, length, _ in batch]
    adapters, modes, namespaces, _, _, lengths = zip(*batch, strict=True)
    modes = [mode if name else "isolated" for name, mode in zip(adapters, modes, strict=True)]
    asked = {"adapter": adapters, "sharing": modes, "namespace": namespaces, "keep": lengths[0] > 3}
    sampling = [dataclasses.replace(ONE_TOKEN, max_new_tokens=number) for number in lengths]
    engine.reuse = SparseX(min_segment_tokens=16)  # of those that name none; base_shared has its own
    outs = engine.generate_batch(prompts, sampling, return_logits=True, **asked)
    for prompt, name, mode, out in zip(prompts, adapters, modes, outs, strict=True):
        report = out.report
        assert report.sharing is None or report.prefix_tokens == 0
        if mode == "isolated" and report.approximate_prefix_tokens + report.reused_tokens == 0:
            exact = dense_of(weights[name]).full(prompt)[0][-1]
            np.testing.assert_allclose(out.logits, exact, atol=1e-3)
        assert np.isfinite(out.logits).all()


@pytest.mark.slow
def test_a_preemption_changes_no_answer_behind_what_others_wrote():
    sampling, answers = dataclasses.replace(ONE_TOKEN, max_new_tokens=40), []
    for tokens in (1024, 96):
        engine = sharing_engine(store_tokens=tokens)
        engine.prefill(TEXT[:16], adapter="one", sharing="pre_lr")
        prompts = [TEXT[:24], np.concatenate([TEXT[:16], TEXT[60:68]])]
        outs = engine.generate_batch(prompts, sampling, adapter=["two", "two"], sharing="pre_lr", reuse=PREFIX)
        assert [out.report.sharing.cross_adapter_tokens for out in outs] == [16, 16]
        assert (engine.loop.stats.preempted > 0) == (tokens == 96)
        answers.append([out.token_ids for out in outs])
        engine.admission.check_books()
        assert idle(engine)
    assert answers[0] == answers[1]


def trace(engine, mode):
    """Three agents take turns on a trajectory, to which each adds 8 tokens and an answer of 4. What they computed."""
    trajectory, computed = TEXT[:16].tolist(), []
    for step in range(6):
        trajectory += TEXT[100 + 8 * step :][:8].tolist()
        name = ("one", "two", "later")[step % 3]
        sampling = dataclasses.replace(ONE_TOKEN, max_new_tokens=4)
        out = engine.generate(np.array(trajectory), sampling, adapter=name, sharing=mode, reuse=PREFIX)
        trajectory += out.token_ids
        computed.append(out.report.fresh_tokens + (out.report.sharing.unseen_tokens if out.report.sharing else 0))
        engine.heal()
    return computed


@pytest.mark.slow
def test_in_a_trace_nobody_computes_what_another_did():
    engines = {mode: sharing_engine() for mode in ("isolated", "pre_lr", "rebase", "base_shared")}
    for engine in engines.values():
        engine.load_adapter("later", LATER)
    computed = {mode: trace(engine, mode) for mode, engine in engines.items()}
    assert computed["isolated"] == [24, 36, 48, 33, 33, 33]  # all but its own turn three steps before
    assert computed["pre_lr"] == [24, 9, 9, 9, 9, 9]  # and the last token of the answer before, which was no input
    assert computed["rebase"] == [24, 8, 8, 8, 8, 8]
    # As isolated, and what it had of a page that another one went on in a copy of.
    assert computed["base_shared"] == [24, 36, 48, 33 + 11, 33 + 7, 33 + 3]
    assert engines["rebase"].loop.stats.healed_tokens == 16 + 6 * 12  # each token once more


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rebase", "pre_lr"])
def test_who_is_preempted_goes_on_with_its_own_adapter(mode):
    engine = sharing_engine(store_tokens=96)
    prompts, sampling = [TEXT[:20], TEXT[60:80]], dataclasses.replace(ONE_TOKEN, max_new_tokens=40)
    outs = engine.generate_batch(prompts, sampling, adapter=["one", "two"], sharing=mode, reuse=PREFIX)
    assert engine.loop.stats.preempted > 0
    for prompt, weights, out in zip(prompts, (ONE, TWO), outs, strict=True):
        assert out.token_ids == greedy(dense_of(weights), prompt, 40)[1]  # of the other's prompt there is nothing in it
    engine.admission.check_books()
    assert idle(engine)


@pytest.mark.slow
def test_a_mesh_computes_the_same():
    one, two = (Engine.from_config(TINY, mesh=make_mesh(devices), **SHARED) for devices in (1, 2))
    few, logits = dataclasses.replace(ONE_TOKEN, max_new_tokens=4), []
    for engine in (one, two):
        for name, weights in (("one", ONE), ("two", TWO)):
            engine.load_adapter(name, weights)
        engine.prefill(TEXT[:40], adapter="one", sharing="pre_lr")
        asked = {"adapter": "two", "return_logits": True, "keep": False}
        outs = [engine.generate_batch([TEXT[:60]], few, sharing=mode, **asked)[0] for mode in SHARING]
        logits.append([(out.logits, out.token_ids) for out in outs])
    for (first, tokens), (second, again) in zip(*logits, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)
        assert tokens == again


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up():
    model = dataclasses.replace(TINY, vocab_size=203)
    engine = Engine.from_config(model, **SHARED | {"chunk_rows": 256, "max_num_seqs": 2})
    for step in warmup.steps(engine.loop):
        step()
    warm, few = num_compilations(), dataclasses.replace(ONE_TOKEN, max_new_tokens=4)
    for name, weights in (("one", ONE), ("two", TWO)):
        engine.load_adapter(name, weights)
    for mode in SHARING:
        for prompt in (TEXT[:40], TEXT[:190], TEXT[20:150]):
            engine.generate_batch([prompt] * 2, few, adapter=["one", "two"], sharing=mode)
        engine.heal()
    assert num_compilations() == warm
    assert idle(engine)
