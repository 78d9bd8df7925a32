"""Engine calls and the loop are one scheduler: in what order plans run, and what is given back when one fails.

The order of plans is what is tested, not time: a P for each prefill plan, or a few layers of one, and a D for each
decode dispatch.
"""

import _thread
import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest
from conftest import TINY, found_in_segments, idle, run, tiny_engine, tiny_params

from sparsex_jax import (
    ContextLengthError,
    Engine,
    EngineConfig,
    InvalidRequestError,
    NonFiniteLogitsError,
    ReuseConfig,
    SamplingParams,
    StoreFullError,
)
from sparsex_jax.reuse.methods import Phase
from sparsex_jax.scheduler.chunks import layers_within
from sparsex_jax.scheduler.sequence import State

PARAMS = tiny_params()
POISONED = dataclasses.replace(PARAMS, embed=PARAMS.embed.at[96].set(np.nan))  # a prompt with token 96 has NaN logits
TEXT = np.random.default_rng(3).integers(1, 96, 9000).astype(np.int32)
SPARSE = ReuseConfig("sparsex", boundary_layer=2, recompute_ratio=0.2, overflow_tokens=4, tail_tokens=8)
PREFIX = ReuseConfig("prefix")
FULL = ReuseConfig("full")


def hear(loop, prompt, new_tokens, **options):
    """Submit a request; the list that is returned grows by its tokens."""
    tokens = []
    sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    ticket = loop.submit(prompt, sampling, listener=lambda event: tokens.extend(event.token_ids), **options)
    return tokens, ticket


def watch(engine):
    """The order of plans from now on, as a list of P and D."""
    order, runner = [], engine.runner
    advance, start_decode = runner.advance, runner.start_decode
    runner.advance = lambda *args: order.append("P") or advance(*args)
    runner.start_decode = lambda *args: order.append("D") or start_decode(*args)
    return order


def sparse_prompt(engine):
    """300 reused tokens behind 10 new ones, and a question."""
    engine.remember(TEXT[:300], frozen=True)
    return np.concatenate([TEXT[500:510], TEXT[:300], TEXT[600:620]])


def step_until_it_rests(loop):
    """Step until the only sequence's prefill rests between two layers."""
    loop.step()
    [sequence] = loop.policy.running
    while sequence.run is None:
        loop.step()
    assert 0 < sequence.run.next_layer < TINY.num_layers
    return sequence


# A huge prefill stalls nobody -------------------------------------------------------------------------------


def engine_for(length):
    """With room for a prompt of 600 tokens on the shapes of other tests, or for one of 6900 in plans of 512 rows."""
    if length == 600:
        return tiny_engine(prefill_tokens=64)
    return Engine.from_config(dataclasses.replace(TINY, max_position=8192), store_tokens=3 * 8192, page_size=64)


def huge_remember(engine, length):
    engine.loop.remember(TEXT[:length], namespace="text", listener=lambda event: None)


def huge_sparse(engine, length):
    engine.remember(TEXT[:length], namespace="sparse")
    prompt = np.concatenate([TEXT[8000:8010], TEXT[:length], TEXT[8100:8190]])
    hear(engine.loop, prompt, 1, reuse=SPARSE, namespace="sparse", keep=False)


@pytest.mark.parametrize("length", [600, pytest.param(6900, marks=pytest.mark.slow)])
@pytest.mark.parametrize("submit", [huge_remember, pytest.param(huge_sparse, marks=pytest.mark.slow)])
def test_streams_get_tokens_while_a_huge_prompt_is_prefilled(submit, length):
    engine = engine_for(length)
    loop = engine.loop
    streams = [hear(loop, TEXT[at : at + 20], 1000, keep=False) for at in (7000, 7100)]
    loop.step()
    submit(engine, length)
    order, before = watch(engine), [len(tokens) for tokens, _ in streams]
    loop.step()
    small, _ = hear(loop, TEXT[7200:7230], 4, keep=False)
    rounds = 1
    while len(loop.policy.running) > 2 or loop.stats.waiting:
        loop.step()
        rounds += 1
        if rounds == 6:
            assert small, "a small prompt that comes later does not wait for the huge one"
    assert rounds >= 4
    assert not any(pair == ("P", "P") for pair in itertools.pairwise(order)), "a dispatch behind every plan"
    for (tokens, ticket), already in zip(streams, before, strict=True):
        assert len(tokens) - already >= 4 * (rounds - 1)
        ticket.cancel()
    run(loop)
    assert idle(engine)


def test_layers_that_cost_as_much_as_a_chunk():
    phases = [Phase(0, np.ones(8, bool)), Phase(2, np.arange(8) < 2)]
    assert [layers_within(phases, first, 6, 20) for first in range(6)] == [4, 5, 4, 3, 2, 1]
    assert layers_within(phases, 0, 6, 1) == 1
    assert layers_within(phases, 0, 6, 1000) == 6


# Cut by layers ----------------------------------------------------------------------------------------------


def test_a_prefill_cut_by_layers_gives_the_same():
    whole, cut = tiny_engine(prefill_tokens=512), tiny_engine(prefill_tokens=64)
    outs = []
    for engine, number in ((whole, 1), (cut, 3)):
        prompt = sparse_prompt(engine)
        order = watch(engine)
        outs.append(engine.prefill(prompt, reuse=SPARSE, keep=False))
        assert len(order) >= number
    np.testing.assert_allclose(outs[0].logits, outs[1].logits, atol=1e-5)
    np.testing.assert_array_equal(outs[0].report.active, outs[1].report.active)
    assert found_in_segments(outs[1].report) == 300


def test_one_prefill_at_a_time_is_cut_by_layers_and_chunks_take_turns_with_it():
    engine = tiny_engine(prefill_tokens=64)
    prompt = sparse_prompt(engine)
    heard = [hear(engine.loop, prompt[at:], 3, reuse=SPARSE, keep=False)[0] for at in (0, 1)]
    chunked, _ = hear(engine.loop, TEXT[1000:1200], 3, reuse=FULL, keep=False)
    resting = []
    while engine.loop.step():
        sequences = engine.loop.policy.of_state(State.PREFILLING)
        resting.append([(one.id, one.run.next_layer) for one in sequences if one.run is not None])
    assert all(len(runs) <= 1 for runs in resting)
    first, second = (max(at for at, runs in enumerate(resting) if runs and runs[0][0] == each) for each in (2, 3))
    assert first < second
    assert [len(tokens) for tokens in (*heard, chunked)] == [3, 3, 3]
    assert heard[0] == engine.generate(prompt, SamplingParams(3, ignore_eos=True), reuse=SPARSE, keep=False).token_ids


@pytest.mark.parametrize("end", ["cancel", "fail", "lose the store"])
def test_what_ends_in_the_middle_of_a_cut_prefill_gives_all_back(end):
    engine = tiny_engine(prefill_tokens=64)
    prompt, before = sparse_prompt(engine), engine.stats()
    loop, events = engine.loop, []
    ticket = loop.submit(prompt, SamplingParams(5), reuse=SPARSE, keep=False, listener=events.append)
    sequence = step_until_it_rests(loop)

    def fails(*args):
        if end == "lose the store":
            engine.runner.store.delete()
        raise RuntimeError("broken")

    if end == "cancel":
        ticket.cancel()
    with pytest.MonkeyPatch.context() as patch:
        if end != "cancel":
            patch.setattr(engine.runner, "advance", fails)
        loop.step()
    assert events[-1].finish_reason == ("cancelled" if end == "cancel" else "error")
    assert sequence.run is None
    assert idle(engine)
    if end != "lose the store":
        assert [engine.stats()[name] for name in ("free", "frozen")] == [before[name] for name in ("free", "frozen")]
        assert found_in_segments(engine.prefill(prompt, reuse=SPARSE, keep=False).report) == 300


def test_a_cut_prefill_that_is_preempted_begins_anew():
    engine = tiny_engine(prefill_tokens=64)
    prompt = sparse_prompt(engine)
    expected = engine.generate(prompt, SamplingParams(5, ignore_eos=True), reuse=SPARSE, keep=False)
    order, loop = watch(engine), engine.loop
    huge, _ = hear(loop, prompt, 5, reuse=SPARSE, keep=False)
    sequence = step_until_it_rests(loop)
    loop.policy._preempt(sequence)
    assert (sequence.state, sequence.run, loop.stats.preempted) == (State.WAITING, None, 1)
    begun = len(order)
    run(loop)
    assert huge == expected.token_ids
    assert order[begun:].count("P") > 1
    assert idle(engine)


# Engine calls among others ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["remember", "prefill", "generate"])
def test_engine_calls_get_on_with_what_runs_in_the_loop(call):
    engine = tiny_engine(prefill_tokens=32)
    stream, ticket = hear(engine.loop, TEXT[:20], 300, keep=False)
    engine.loop.step()
    order, before = watch(engine), len(stream)
    getattr(engine, call)(TEXT[100:400])
    assert order[:8] == ["D", "P"] * 4
    assert len(stream) >= before + 9 * 4
    ticket.cancel()
    run(engine.loop)
    assert stream == tiny_engine().generate(TEXT[:20], SamplingParams(300, ignore_eos=True)).token_ids[: len(stream)]
    assert idle(engine)


def test_a_listener_that_calls_the_engine_is_refused_and_its_request_cancelled():
    engine, errors = tiny_engine(), []

    def listener(event):
        try:
            engine.prefill(TEXT[:5], keep=False)
        except RuntimeError as error:
            errors.append(str(error))
            raise

    engine.loop.submit(TEXT[:20], SamplingParams(max_new_tokens=9, ignore_eos=True), listener=listener, keep=False)
    run(engine.loop)
    assert len(errors) == 1
    assert "listeners may only submit" in errors[0]
    assert engine.loop.stats.cancelled == 1
    assert idle(engine)


def test_ctrl_c_comes_between_two_rounds_and_leaks_no_page():
    engine, rng = tiny_engine(), np.random.default_rng(0)
    engine.generate(TEXT[:40], SamplingParams(max_new_tokens=2), keep=False)
    for _ in range(30):
        timer = threading.Timer(rng.uniform(0.0, 0.03), _thread.interrupt_main)
        with contextlib.suppress(KeyboardInterrupt):
            timer.start()  # the interrupt may come at once
            engine.generate_batch([TEXT[:90], TEXT[50:200]], SamplingParams(8, ignore_eos=True), reuse=SPARSE)
            timer.join()
            time.sleep(0.01)  # it comes here if the call was faster
        timer.join()
        engine.admission.check_books()
        assert engine.stats()["active"] == 0


def test_an_interrupt_of_a_listener_is_not_told_again():
    engine, told = tiny_engine(), []

    def listener(event):
        told.append(event.finish_reason)
        if event.finish_reason:
            raise KeyboardInterrupt

    engine.loop.submit(TEXT[:20], SamplingParams(max_new_tokens=3, ignore_eos=True), listener=listener, keep=False)
    with pytest.raises(KeyboardInterrupt):
        run(engine.loop)
    run(engine.loop)
    assert told.count("length") == 1
    assert idle(engine)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda engine: engine.generate(TEXT[:5], keep="no"), "keep="),
        (lambda engine: engine.prefill(TEXT[:5], keep=1), "keep="),
        (lambda engine: engine.remember(TEXT[:5], frozen="x"), "frozen="),
        (lambda engine: engine.generate(TEXT[:5], sampling={}), "sampling="),
        (lambda engine: engine.generate(TEXT[:5], reuse={}), "reuse="),
        (lambda engine: engine.generate_batch([TEXT[:5]] * 2, sampling=[]), "sampling "),
        (lambda engine: engine.loop.submit(TEXT[:5], {}, listener=print), "sampling="),
        (lambda engine: engine.loop.submit(TEXT[:5], listener=None), "listener="),
        (lambda engine: engine.generate(TEXT[:5], SamplingParams(stop=None)), "stop="),
        (lambda engine: EngineConfig(frozen_limit="x"), "frozen_limit="),
    ],
)
def test_wrong_arguments_are_named_and_the_engine_goes_on(call, field):
    engine = tiny_engine()
    with pytest.raises(InvalidRequestError, match=f"^{field}"):
        call(engine)
    assert len(engine.generate(TEXT[:5], SamplingParams(max_new_tokens=2, ignore_eos=True)).token_ids) == 2


def test_calls_from_two_threads_take_turns_by_rounds():
    engine = tiny_engine()
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
    prompts = [TEXT[at : at + 30] for at in range(0, 240, 30)]
    expected = [tiny_engine().generate(prompt, sampling, keep=False).token_ids for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        outs = list(threads.map(lambda prompt: engine.generate(prompt, sampling, keep=False).token_ids, prompts))
    assert outs == expected
    assert idle(engine)


def test_engine_calls_are_not_refused_where_servers_are_full():
    engine = tiny_engine(max_waiting=1)
    hear(engine.loop, TEXT[:20], 5)
    outs = engine.generate_batch([TEXT[at : at + 30] for at in range(100, 400, 50)], SamplingParams(3))
    assert [len(out.token_ids) for out in outs] == [3] * 6
    run(engine.loop)


@pytest.mark.parametrize("call", ["prefill", "remember"])
def test_a_prefill_that_fails_in_a_chunk_leaks_no_page(call):
    engine = tiny_engine(prefill_tokens=32)
    engine.remember(TEXT[:64])
    before, calls, advance = engine.stats(), itertools.count(), engine.runner.advance

    def fails(*args):
        if next(calls) == 2:
            raise RuntimeError("broken")
        advance(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "advance", fails)
        with pytest.raises(RuntimeError, match="broken"):
            getattr(engine, call)(TEXT[:300], **({"reuse": PREFIX} if call == "prefill" else {}))
    assert idle(engine)
    assert engine.stats()["free"] == before["free"]
    assert engine.prefill(TEXT[:300], reuse=PREFIX).report.prefix_tokens == 64


@pytest.mark.parametrize("call", ["prefill", "remember", "generate"])
def test_logits_that_are_not_finite_are_an_error_of_every_call(call):
    engine = tiny_engine(POISONED)
    with pytest.raises(NonFiniteLogitsError):
        getattr(engine, call)([*TEXT[:50].tolist(), 96])
    assert (idle(engine), engine.stats()["free"]) == (True, engine.stats()["pages"])


def test_if_one_prompt_of_a_batch_fails_the_others_are_cancelled_and_not_kept():
    engine = tiny_engine(POISONED)
    prompts = [TEXT[:100], [*TEXT[100:200].tolist(), 96], TEXT[300:400]]
    with pytest.raises(NonFiniteLogitsError):
        engine.generate_batch(prompts, SamplingParams(max_new_tokens=300, ignore_eos=True))
    assert (idle(engine), engine.stats()["free"]) == (True, engine.stats()["pages"])
    assert engine.loop.stats.cancelled == 2
    assert engine.generate(TEXT[:100], SamplingParams(2)).report.prefix_tokens == 0


def test_what_can_never_fit_is_refused_before_anything_runs():
    engine = tiny_engine(store_tokens=160)
    order = watch(engine)
    with pytest.raises(ContextLengthError, match="KV for 164 tokens, 11 pages of 16; store_tokens=160 gives 10"):
        engine.generate_batch([TEXT[:20], TEXT[:100]], SamplingParams(65))
    with pytest.raises(ContextLengthError, match="KV for 190 tokens, 13 pages"):
        engine.remember(TEXT[:90], preamble=TEXT[100:110])
    assert order == []


# Prefilled and held -----------------------------------------------------------------------------------------


def test_a_prefilled_prompt_is_held_while_the_context_is_open():
    engine = tiny_engine(store_tokens=33 * 16)
    with engine.prefilled(TEXT[:400], reuse=FULL) as held:
        assert (held.state, len(held.pages), held.num_computed) == (State.HELD, 25, 400)
        assert not engine.loop.step()
        assert engine.generate(TEXT[:100], SamplingParams(2), keep=False).report.prefix_tokens == 0
        with pytest.raises(StoreFullError):
            engine.prefill(TEXT[:150], reuse=FULL)
        assert held.state is State.HELD
    assert held.state is State.FINISHED
    assert idle(engine)
    assert engine.prefill(TEXT[:150], reuse=FULL).report.fresh_tokens == 150


def test_a_text_whose_beginning_is_forgotten_meanwhile_is_computed_anew():
    engine = tiny_engine(prefill_tokens=32)
    first = engine.remember(TEXT[:64])
    events = []
    engine.loop.remember(TEXT[:200], listener=events.append)
    engine.loop.step()
    engine.forget(first)
    run(engine.loop)
    assert events[-1].report.prefix_tokens == 0
    [entry] = engine.entries()
    assert (entry.handle, entry.num_tokens) == (events[-1].handle, 200)
    assert engine.prefill([*TEXT[:200].tolist(), 1], reuse=PREFIX, keep=False).report.prefix_tokens == 200


# How many ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "platform", "number"),
    [
        ({}, "cpu", 8),
        ({"store_tokens": 1 << 20}, "cpu", 8),
        ({}, "gpu", 16),
        ({"store_tokens": 1024}, "tpu", 8),
        ({"store_tokens": 1 << 20}, "gpu", 256),
        ({"max_num_seqs": 3}, "gpu", 3),
    ],
)
def test_how_many_sequences_run_at_once(options, platform, number):
    assert EngineConfig(**options).num_seqs_on(platform) == number


def test_few_share_a_plan_and_more_decode_together():
    engine = tiny_engine(max_num_seqs=6, max_prefill_seqs=2)
    plans, begin = [], engine.runner.begin
    engine.runner.begin = lambda requests, late: plans.append(len(requests)) or begin(requests, late)
    for at in range(0, 400, 50):
        hear(engine.loop, TEXT[at : at + 10], 60, keep=False)
    most = 0
    while engine.loop.step():
        most = max(most, engine.loop.stats.running)
    assert (max(plans), most) == (2, 6)
