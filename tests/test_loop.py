"""The serving loop: whatever comes together, is cut, preempted or fails, a request gets what it would get alone."""

import contextlib
import dataclasses
import threading

import numpy as np
import pytest
from conftest import CONFIG, TINY, idle, run, tiny_engine, tiny_params
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from sparsex_jax import (
    ContextLengthError,
    Engine,
    InvalidRequestError,
    NonFiniteLogitsError,
    NoRoomError,
    OverloadedError,
    ReuseConfig,
    SamplingParams,
    StoreFullError,
    UnknownHandleError,
)
from sparsex_jax.device import runner
from sparsex_jax.reuse.methods import METHODS
from sparsex_jax.scheduler import policy

SMALL = {"store_tokens": 33 * 16}  # where pages are to be few
PARAMS = tiny_params()
POISONED = dataclasses.replace(PARAMS, embed=PARAMS.embed.at[96].set(np.nan))  # whoever takes token 96 has NaN logits
RNG = np.random.default_rng(7)
A, B = (RNG.integers(1, 96, 70).astype(np.int32) for _ in range(2))
TEXT = RNG.integers(1, 96, 4000).astype(np.int32)
GREEDY = SamplingParams(max_new_tokens=21)
FULL = ReuseConfig(method="full")


class Heard(list):
    """A listener: the events of one request."""

    def __call__(self, event):
        assert self.finish_reason is None, "an event after the last one"
        assert (event.report is not None) == (bool(event.token_ids) and not self.tokens)
        self.append(event)

    @property
    def tokens(self):
        return [token for event in self for token in event.token_ids]

    @property
    def text(self):
        return "".join(event.text for event in self)

    @property
    def report(self):
        return next(event.report for event in self if event.report is not None)

    @property
    def finish_reason(self):
        return self[-1].finish_reason if self else None


def submit(loop, prompt, sampling=GREEDY, **options):
    heard = Heard()
    heard.ticket = loop.submit(prompt, sampling, listener=heard, **options)
    return heard


def test_a_priority_counts_as_seconds_in_line():
    loop, came = tiny_engine(max_num_seqs=1).loop, []
    for name, delay_s in (("late", 5), ("usual", 0), ("early", -5), ("usual too", 0)):
        loop.submit(
            [1, 2, 3],
            SamplingParams(max_new_tokens=1),
            delay_s=delay_s,
            listener=lambda event, name=name: came.append(name),
        )
    run(loop)
    assert list(dict.fromkeys(came)) == ["early", "usual", "usual too", "late"]


def facts(report):
    """What does not depend on time, or on the order of sums."""
    return report.to_dict() | {"ttft_s": 0, "confidence": 0}


def watch_admissions(engine):
    """A list that grows: the tokens of each request that is admitted, and of the prefix that it found."""
    admitted, admit = [], engine.admission.admit

    def watched(sequence, tokens, *args):
        admit(sequence, tokens, *args)
        admitted.append((len(tokens), sequence.match.num_prefix_tokens))

    engine.admission.admit = watched
    return admitted


def mixed_prompts():
    """Fresh text, reused text, long beginnings that are cut, all different from each other."""
    at = iter(range(0, 4000, 200))

    def new(length):
        start = next(at)
        return TEXT[start : start + length]

    return [
        np.concatenate([new(100), A, new(20), B, new(15)]),
        np.concatenate([new(11), A[5:], new(40), B[:50]]),
        new(150),
        np.concatenate([A, new(33)]),
        new(3),
        np.concatenate([new(60), B, A, new(1)]),
    ]


def remember(engine):
    """Two documents, frozen and pinned, so that no request finds less than another."""
    for document in (A, B):
        engine.remember(document, frozen=True)
    return [engine.cache.lookup(document, "default") for document in (A, B)]


def answers_alone(prompts, sampling, reuse, **changes):
    """What an engine that cuts nothing answers to one prompt at a time."""
    engine = tiny_engine(prefill_tokens=512, **changes)
    remember(engine)
    return [engine.generate(prompt, sampling, reuse=reuse, keep=False) for prompt in prompts]


# The same as alone ------------------------------------------------------------------------------------------


def some_by_default(*names):
    """A parameter `method` of all methods. Those not named are slow, as each may have programs of its own."""
    return pytest.mark.parametrize(
        "method", [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
    )


@some_by_default("sparsex", "prophetkv")  # with a choice, and with a pass of its own before it
def test_batched_and_chunked_is_as_one_at_a_time(method):
    engine = tiny_engine(prefill_tokens=24)
    donors = remember(engine)
    reuse = ReuseConfig.fitting(method, recompute_ratio=0.2, coverage=0.5, overflow_tokens=4, tail_tokens=8)
    prompts = mixed_prompts()
    alone = answers_alone(prompts, GREEDY, reuse)
    loop = engine.loop
    together = [submit(loop, prompt, reuse=reuse, keep=False) for prompt in prompts]
    run(loop)
    for heard, expected in zip(together, alone, strict=True):
        assert (heard.tokens, heard.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert facts(heard.report) == facts(expected.report)
        np.testing.assert_array_equal(heard.report.active, expected.report.active)
    for match in donors:
        engine.cache.let_go(match)
    assert idle(engine)


@some_by_default("sparsex")
def test_what_is_preempted_goes_on_as_if_nothing_had_been(method):
    reuse = ReuseConfig.fitting(method, recompute_ratio=0.2, coverage=0.5, overflow_tokens=4, tail_tokens=8)
    sampling = SamplingParams(max_new_tokens=60, temperature=0.7, seed=3, repetition_penalty=1.2)
    prompts = mixed_prompts()[:4]
    engine = tiny_engine(**SMALL, prefill_tokens=64)
    donors = remember(engine)  # 10 of the pages
    alone = answers_alone(prompts, sampling, reuse, **SMALL)
    loop = engine.loop
    together = [submit(loop, prompt, sampling, reuse=reuse) for prompt in prompts]
    run(loop)
    assert loop.stats.preempted > 0
    for heard, expected in zip(together, alone, strict=True):
        assert (heard.tokens, heard.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert facts(heard.report) == facts(expected.report)
    for match in donors:
        engine.cache.let_go(match)
    assert idle(engine)


def test_the_logits_of_what_was_preempted_are_those_behind_its_prompt():
    prompts, sampling = [TEXT[:200], TEXT[300:450]], SamplingParams(max_new_tokens=90, temperature=0)
    alone = [tiny_engine().prefill(prompt).logits for prompt in prompts]
    engine = tiny_engine(**SMALL)
    outs = engine.generate_batch(prompts, sampling, return_logits=True)
    assert engine.loop.stats.preempted >= 1
    for out, expected in zip(outs, alone, strict=True):
        np.testing.assert_allclose(out.logits, expected, atol=1e-4)


def test_logits_are_asked_for_by_true_or_false():
    with pytest.raises(InvalidRequestError, match="return_logits='x' must be a bool"):
        tiny_engine().generate_batch([TEXT[:9]], return_logits="x")


def test_an_exact_request_that_was_preempted_finds_itself_again():
    engine = tiny_engine(**SMALL)
    prompts = [TEXT[:200], TEXT[300:450]]  # 13 and 10 pages; 90 new tokens are 6 more each
    prefixes = watch_admissions(engine)
    loop = engine.loop
    heard = [submit(loop, prompt, SamplingParams(max_new_tokens=90)) for prompt in prompts]
    run(loop)
    assert [len(one.tokens) for one in heard] == [90, 90]
    assert loop.stats.preempted >= 1
    again = prefixes[2:]
    assert again
    assert all(length > 150 and prefix >= 100 for length, prefix in again)


def test_random_streams_are_the_requests_own():
    engine = tiny_engine(prefill_tokens=32)
    samplings = [
        SamplingParams(max_new_tokens=15, temperature=1.0, seed=seed, top_k=20, presence_penalty=0.5, logprobs=2)
        for seed in range(6)
    ]
    prompts = [TEXT[at : at + 40] for at in range(0, 240, 40)]
    alone = [engine.generate(p, s, reuse=FULL, keep=False) for p, s in zip(prompts, samplings, strict=True)]
    loop = engine.loop
    together = [submit(loop, p, s, reuse=FULL, keep=False) for p, s in zip(prompts, samplings, strict=True)]
    run(loop)
    assert [heard.tokens for heard in together] == [out.token_ids for out in alone]
    for heard, out in zip(together, alone, strict=True):
        got = [entry for event in heard for entry in event.logprobs]
        assert [entry.token_id for entry in got] == out.token_ids
        np.testing.assert_allclose([e.logprob for e in got], [e.logprob for e in out.logprobs], atol=1e-4)


@pytest.mark.slow
def test_text_streams_and_ends_at_stop_strings(smollm):
    prompt = [{"role": "user", "content": "Name three colours, and write 🦜 after each."}]
    sampling = SamplingParams(max_new_tokens=24)
    whole = smollm.generate(prompt, sampling, namespace="loop")
    stop = whole.text[len(whole.text) // 2 :][:5]
    loop = smollm.loop
    heard = submit(loop, prompt, sampling, namespace="loop")
    stopped = submit(loop, prompt, SamplingParams(max_new_tokens=24, stop=(stop,)), namespace="loop")
    run(loop)
    assert (heard.text, heard.tokens) == (whole.text, whole.token_ids)
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert len([event for event in heard if event.text]) > 1


# In what order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prefix", "naive", "sparsex"])
def test_what_two_share_is_computed_once(method):
    """In front for the prefix, elsewhere for segments."""
    engine = tiny_engine()
    shared, reuse = TEXT[:160], ReuseConfig(method=method)
    before = [[], []] if method == "prefix" else [TEXT[500:520], TEXT[600:607]]
    behind = [TEXT[700:725], TEXT[800:825]]
    prompts = [np.concatenate([b, shared, e]).astype(np.int32) for b, e in zip(before, behind, strict=True)]
    loop = engine.loop
    first, second, other = [submit(loop, prompt, reuse=reuse) for prompt in (*prompts, TEXT[1000:1100])]
    run(loop)
    assert first.report.fresh_tokens == len(prompts[0])
    assert second.report.fresh_tokens <= len(prompts[1]) - 159
    assert other.report.fresh_tokens == 100


def test_who_waits_for_another_goes_on_when_that_one_is_gone():
    loop = tiny_engine(prefill_tokens=16).loop
    first, second = [submit(loop, TEXT[:160]) for _ in range(2)]
    loop.step()
    assert (loop.stats.running, loop.stats.waiting) == (1, 1)
    first.ticket.cancel()
    run(loop)
    assert (first.finish_reason, second.finish_reason) == ("cancelled", "length")
    assert second.report.fresh_tokens == 160


@pytest.mark.parametrize("difference", ["namespace", "keep", "full"])
def test_nobody_waits_for_what_it_cannot_use(difference):
    loop = tiny_engine().loop
    options = {
        "namespace": [{"namespace": "a"}, {"namespace": "b"}],
        "keep": [{"keep": False}, {}],
        "full": [{}, {"reuse": FULL}],
    }[difference]
    for each in options:
        submit(loop, TEXT[:160], **each)
    loop.step()
    assert (loop.stats.running, loop.stats.waiting) == (2, 0)
    run(loop)


@pytest.mark.parametrize(("most_seconds", "expected"), [(float("inf"), [1, 16, 16]), (0.0, [1, 16, 4, 4, 4, 4])])
def test_a_dispatch_on_a_slow_device_is_short(monkeypatch, most_seconds, expected):
    """So that who comes meanwhile waits for few tokens. How slow it is shows from the second dispatch on."""
    monkeypatch.setattr(policy, "MOST_SECONDS", most_seconds)
    loop = tiny_engine().loop
    heard = submit(loop, A, SamplingParams(max_new_tokens=33))
    run(loop)
    assert [len(event.token_ids) for event in heard] == expected


def test_a_huge_prompt_stalls_nobody():
    engine = tiny_engine(prefill_tokens=32)
    loop = engine.loop
    running = submit(loop, TEXT[:10], SamplingParams(max_new_tokens=200))
    loop.step()
    huge = submit(loop, TEXT[100:900])
    loop.step()
    small = submit(loop, TEXT[1000:1020])
    before = len(running.tokens)
    for _ in range(3):
        loop.step()
    assert small.tokens
    assert not huge.tokens
    assert len(running.tokens) > before
    run(loop)
    expected = engine.generate(TEXT[100:900], GREEDY, reuse=FULL, keep=False)
    assert (huge.tokens, huge.report.fresh_tokens) == (expected.token_ids, 800)


def test_chunks_have_at_most_so_many_rows_and_small_prompts_share_them():
    engine = tiny_engine(prefill_tokens=64)
    plans, begin = [], engine.runner.begin
    engine.runner.begin = lambda requests, late: plans.append([r.num_rows for r in requests]) or begin(requests, late)
    loop = engine.loop
    for start, length in ((0, 200), (300, 10), (400, 20), (500, 30)):
        submit(loop, TEXT[start : start + length])
    run(loop)
    assert plans == [[64], [10, 20, 30], [64], [64], [8]]


def test_small_prompts_pass_one_that_waits_for_pages_but_not_for_ever():
    engine = tiny_engine(**SMALL, max_overtakes=3)
    admitted = watch_admissions(engine)
    loop = engine.loop
    first = submit(loop, TEXT[:200], SamplingParams(max_new_tokens=100))
    loop.step()
    huge = submit(loop, TEXT[300:700])  # 27 pages
    small = [submit(loop, TEXT[at : at + 20], SamplingParams(max_new_tokens=5)) for at in range(1000, 1400, 40)]
    while first.finish_reason is None:
        assert loop.step()
    assert [bool(one.tokens) for one in small] == [True] * 3 + [False] * 7
    while (400, 0) not in admitted:
        assert loop.step()
    assert not small[3].tokens
    run(loop)
    assert all(one.finish_reason == "length" for one in (huge, *small))


def test_donors_that_fill_the_store_do_not_lock_a_request_out():
    engine = tiny_engine(**SMALL)  # 33 pages
    engine.remember(TEXT[:400])  # 25 pages, which the request would copy into as many of its own
    loop = engine.loop
    prompt = np.concatenate([TEXT[500:510], TEXT[:400]])
    heard = submit(loop, prompt, SamplingParams(max_new_tokens=60))
    run(loop)
    assert heard.tokens == engine.generate(prompt, SamplingParams(max_new_tokens=60), reuse=FULL).token_ids
    assert idle(engine)


# How it ends otherwise --------------------------------------------------------------------------------------


def test_cancelling_frees_the_pages_at_the_next_step():
    engine = tiny_engine(prefill_tokens=16)
    loop = engine.loop
    decoding = submit(loop, TEXT[:10], SamplingParams(max_new_tokens=300), keep=False)
    loop.step()
    prefilling, waiting = [submit(loop, TEXT[100:300]) for _ in range(2)]
    loop.step()
    assert (loop.stats.running, loop.stats.waiting) == (2, 1)
    inbox = submit(loop, TEXT[400:450], keep=False)
    for heard in (decoding, prefilling, waiting, inbox):
        threading.Thread(target=heard.ticket.cancel).start()
    run(loop, rounds=1)
    assert [heard.finish_reason for heard in (decoding, prefilling, waiting, inbox)] == ["cancelled"] * 4
    assert decoding.tokens
    assert loop.stats.cancelled == 4
    assert engine.stats()["free"] == engine.stats()["pages"]
    decoding.ticket.cancel()  # no harm


def test_a_poisoned_request_fails_alone_and_leaves_nothing():
    engine = Engine(TINY, POISONED, config=CONFIG)
    expected = engine.generate(TEXT[:50], GREEDY, keep=False).token_ids
    loop = engine.loop
    good = submit(loop, TEXT[:50])
    bad = submit(loop, [*TEXT[100:200].tolist(), 96])
    late = submit(loop, TEXT[200:240], SamplingParams(max_new_tokens=30, logit_bias={96: 100}))
    run(loop)
    assert (good.tokens, good.finish_reason) == (expected, "length")
    for heard in (bad, late):
        assert heard.finish_reason == "error"
        assert isinstance(heard[-1].error, NonFiniteLogitsError)
    assert (bad.tokens, late.tokens) == ([], [96])
    assert (loop.stats.failed, loop.stats.finished) == (2, 2)
    assert idle(engine)
    for tokens in (TEXT[100:200], TEXT[200:240]):
        assert engine.prefill(tokens, reuse=ReuseConfig(method="prefix"), keep=False).report.prefix_tokens == 0


def poison_stored(engine, tokens) -> None:
    """Make a page of stored KV NaN in the last layer, as a fault of the device would."""
    match = engine.cache.lookup(np.asarray([*tokens, 0], np.int32), "default", counted=False)
    engine.cache.let_go(match)
    engine.runner.store = engine.runner.store.at[-1, match.prefix_pages[1]].set(np.nan)


@pytest.mark.parametrize("method", ["prefix", "naive", "sparsex"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_clean_prompt_is_answered_whatever_it_finds(method, in_place):
    """What is not finite in the store is withdrawn, and the rest stays; the answer is that of a full prefill."""
    engine = Engine(TINY, PARAMS, config=dataclasses.replace(CONFIG, choose="always"))
    prompt = TEXT[:250] if in_place else np.concatenate([TEXT[300:310], TEXT[:240], TEXT[600:610]])
    expected = engine.generate(prompt, GREEDY, keep=False, reuse=ReuseConfig(method="full")).token_ids
    broken, whole = engine.remember(TEXT[:240], frozen=True), engine.remember(TEXT[400:460], frozen=True)
    poison_stored(engine, TEXT[:240])
    loop = engine.loop
    heard = [submit(loop, prompt, reuse=ReuseConfig(method=method)) for _ in range(2)]
    run(loop)
    assert [one.tokens for one in heard] == [expected] * 2
    if method != "prefix" or in_place:  # else nothing of it was found
        assert [entry.handle for entry in engine.entries()] == [whole]
    else:
        assert [entry.handle for entry in engine.entries()] == [broken, whole]
    assert loop.stats.failed == 0
    again = engine.prefill(prompt, reuse=ReuseConfig(method="prefix"), keep=False)
    assert again.report.prefix_tokens >= len(prompt) - 1 - CONFIG.page_size
    assert np.isfinite(again.logits).all()
    engine.admission.check_books()


def test_a_poisoned_text_is_not_remembered_and_no_chunk_of_it_stays():
    """Also where a chunk behind the poisoned token is computed and the request is preempted before the last one."""
    engine = Engine(TINY, POISONED, config=dataclasses.replace(CONFIG, prefill_tokens=16, choose="always"))
    poisoned = [*TEXT[:20].tolist(), 96, *TEXT[100:180].tolist()]
    for call in (engine.remember, engine.prefill, lambda prompt: engine.remember(prompt, preamble=TEXT[:30])):
        with pytest.raises(NonFiniteLogitsError):
            call(poisoned)
    heard = submit(engine.loop, poisoned)
    for _ in range(20):
        engine.loop.step()
        for sequence in engine.loop.policy.running:
            engine.loop.policy._preempt(sequence)
    run(engine.loop)
    assert isinstance(heard[-1].error, NonFiniteLogitsError)
    assert engine.prefill(TEXT[100:180], reuse=ReuseConfig(method="naive"), keep=False).report.reused_tokens == 0
    assert idle(engine)


@pytest.mark.parametrize("step", ["admit", "begin", "start_decode"])
def test_what_fails_for_one_request_fails_for_it_alone(step, monkeypatch):
    engine = tiny_engine()
    expected = engine.generate(TEXT[:50], GREEDY, keep=False).token_ids
    owner = engine.admission if step == "admit" else engine.runner
    works = getattr(owner, step)

    def fails(first, *args):
        """With the request whose prompt has 77 tokens, alone or with others."""
        lengths = {
            "admit": lambda: [len(first.prompt)],
            "begin": lambda: [len(plan.prompt) for plan in first],
            "start_decode": lambda: [position for position in np.asarray(first.position) if 77 <= position < 100],
        }[step]()
        if 77 in lengths or (step == "start_decode" and lengths):
            raise RuntimeError("broken")
        return works(first, *args)

    monkeypatch.setattr(owner, step, fails)
    loop = engine.loop
    heard = [submit(loop, TEXT[start : start + length]) for start, length in ((0, 50), (100, 77), (200, 30))]
    run(loop)
    assert [one.finish_reason for one in heard] == ["length", "error", "length"]
    assert heard[0].tokens == expected
    assert str(heard[1][-1].error) == "broken"
    assert idle(engine)


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_lost_store_costs_time_and_at_most_the_request_that_lost_it(step, monkeypatch):
    engine = tiny_engine()
    prompts = [TEXT[start : start + length] for start, length in ((0, 50), (100, 77), (200, 30))]
    expected = [engine.generate(prompt, GREEDY, keep=False).token_ids for prompt in prompts]
    works = getattr(runner, step)

    def fails(params, store, plan, *args, **static):
        positions = args[0].rows.position if step == "prefill" else plan.position
        if any(77 <= position < 100 for position in np.asarray(positions)) or (np.asarray(positions) == 76).any():
            store.delete()
            raise RuntimeError("device lost")
        return works(params, store, plan, *args, **static)

    monkeypatch.setattr(f"sparsex_jax.device.runner.{step}", fails)
    loop = engine.loop
    heard = [submit(loop, prompt) for prompt in prompts]
    run(loop)
    assert [one.finish_reason for one in heard] == ["length", "error", "length"]
    assert [heard[0].tokens, heard[2].tokens] == [expected[0], expected[2]]
    assert idle(engine)


def test_a_store_lost_by_a_call_costs_the_others_time():
    engine = tiny_engine()
    expected = engine.generate(TEXT[:50], GREEDY, keep=False).token_ids
    loop = engine.loop
    heard = submit(loop, TEXT[:50])
    loop.step()

    def fails(*arguments):
        engine.runner.store.delete()
        raise RuntimeError("device lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "begin", fails)
        with pytest.raises(RuntimeError, match="device lost"):
            engine.remember(A)
    run(loop)
    assert heard.tokens == expected
    assert idle(engine)


def test_a_listener_that_raises_hurts_nobody(caplog):
    engine = tiny_engine()
    loop = engine.loop
    calls = []

    def broken(event):
        calls.append(event)
        raise ValueError("gone")

    loop.submit(TEXT[:50], GREEDY, listener=broken)
    heard = submit(loop, TEXT[100:150])
    run(loop)
    assert heard.finish_reason == "length"
    assert len(calls) == 1
    assert loop.stats.cancelled == 1
    assert "listener of request 1" in caplog.text
    assert idle(engine)


FORGOTTEN = TEXT[:160]  # 10 pages


def found(engine, tokens):
    """How many of the tokens a prompt that begins with them finds, and one that has them elsewhere."""
    total = 0
    for prompt in ([*tokens, 1], [1, *tokens, 1]):
        match = engine.cache.lookup(np.array(prompt, np.int32), "default")
        engine.cache.let_go(match)
        total += match.num_prefix_tokens + sum(segment.length for segment in match.segments)
    return total


@pytest.mark.parametrize("rounds", [1, 2, 6])
@pytest.mark.parametrize("place", ["in front", "elsewhere"])
def test_what_is_forgotten_is_not_brought_back_by_requests_that_use_it(place, rounds):
    engine = tiny_engine(prefill_tokens=32)
    handle = engine.remember(FORGOTTEN, frozen=True)
    before = TEXT[:0] if place == "in front" else TEXT[1000:1200]  # prefilled in 7 chunks
    loop = engine.loop
    prompt = np.concatenate([before, FORGOTTEN, TEXT[500:540]])
    heard = submit(loop, prompt, SamplingParams(max_new_tokens=60), reuse=ReuseConfig("sparsex", boundary_layer=1))
    other = submit(loop, TEXT[2000:2060])
    for _ in range(rounds):
        loop.step()
    assert heard.finish_reason is None
    engine.forget(handle)
    run(loop)
    assert (heard.finish_reason, other.finish_reason) == ("length", "length")
    assert heard.report.fresh_tokens <= heard.report.prompt_tokens - 160
    assert found(engine, FORGOTTEN) == 0
    assert found(engine, TEXT[2000:2060]) == 120
    assert idle(engine)


def test_what_is_forgotten_is_not_brought_back_by_who_is_computed_again():
    engine = tiny_engine()
    handle = engine.remember(FORGOTTEN, frozen=True)
    loop = engine.loop
    heard = submit(loop, np.concatenate([FORGOTTEN, TEXT[500:540]]))
    loop.step()
    engine.forget(handle)
    engine.runner.store.delete()
    assert engine.recover()
    run(loop)
    assert heard.finish_reason == "length"
    assert found(engine, FORGOTTEN) == 0


def test_too_many_are_refused_and_told_when_to_come_again():
    loop = tiny_engine(max_waiting=3).loop
    for _ in range(3):
        submit(loop, TEXT[:10])
    with pytest.raises(OverloadedError, match="3 requests wait already, and max_waiting is 3") as refused:
        submit(loop, TEXT[:10])
    assert refused.value.retry_after_s >= 1
    loop.step()
    submit(loop, TEXT[:10])
    run(loop)
    assert (loop.stats.finished, loop.stats.waiting) == (4, 0)


BAD = {
    "prompt": ([], {}, InvalidRequestError, "prompt is empty"),
    "text": ("hello", {}, InvalidRequestError, "no tokenizer"),
    "namespace": ([1], {"namespace": ""}, InvalidRequestError, "namespace=''"),
    "method": ([1], {"reuse": "magic"}, InvalidRequestError, "reuse='magic' must be a ReuseConfig"),
    "boundary": ([1], {"reuse": ReuseConfig(boundary_layer=9)}, InvalidRequestError, "boundary_layer=9"),
    "stop": ([1], {"sampling": SamplingParams(stop="x")}, InvalidRequestError, "stop="),
    "bias": ([1], {"sampling": SamplingParams(logit_bias={97: 1})}, InvalidRequestError, "token id 97"),
    "too long": ([1], {"sampling": SamplingParams(max_new_tokens=2000)}, InvalidRequestError, "together 2001"),
    "too large": ([1] * 600, {}, ContextLengthError, "KV for 620 tokens, 39 pages of 16; store_tokens=528 gives 33"),
}


@pytest.mark.parametrize(("prompt", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused_at_once(prompt, options, error, message):
    loop = tiny_engine(**SMALL).loop
    with pytest.raises(error, match=message):
        submit(loop, prompt, **options)
    assert not loop.step()


@pytest.mark.parametrize("rows", [0, 4000])
def test_bad_chunks_are_refused(rows):
    with pytest.raises(InvalidRequestError, match=f"prefill_tokens={rows} must be from 1 to 2048"):
        tiny_engine(prefill_tokens=rows)


def test_who_waits_for_work_is_woken():
    loop = tiny_engine().loop
    woken = threading.Event()

    def wait():
        loop.wait(60)
        woken.set()

    threading.Thread(target=wait, daemon=True).start()
    heard = submit(loop, TEXT[:10])
    assert woken.wait(30)
    run(loop)
    assert heard.finish_reason == "length"


# Random lives -----------------------------------------------------------------------------------------------

REFERENCE = tiny_engine()
CUTS = st.tuples(st.integers(0, 5), st.integers(1, 130)).map(lambda cut: TEXT[40 * cut[0] :][: cut[1]])


class LoopMachine(RuleBasedStateMachine):
    """A store that holds few requests at a time, and some not at all."""

    requests = Bundle("requests")
    handles = Bundle("handles")
    company_tokens = 0

    def __init__(self):
        super().__init__()
        options = SMALL | {"prefill_tokens": 32, "max_waiting": 8, "max_overtakes": 2}
        options["company_tokens"] = self.company_tokens
        self.engine = tiny_engine(POISONED, **options)
        self.loop = self.engine.loop
        self.accepted, self.remembered = [], 0

    @rule(
        target=requests,
        parts=st.lists(CUTS, min_size=1, max_size=4),
        new=st.integers(1, 12) | st.integers(60, 110),
        method=st.sampled_from(["full", "prefix", "naive", "sparsex", "excerpt"]),
        keep=st.booleans(),
        poison=st.sampled_from([[], [], [], [96]]),
    )
    def submit(self, parts, new, method, keep, poison):
        prompt = np.concatenate([*parts, poison]).astype(np.int32)
        reuse = ReuseConfig.fitting(method, boundary_layer=1, coverage=0.5, piece_tokens=16)
        try:
            heard = submit(self.loop, prompt, SamplingParams(max_new_tokens=new), reuse=reuse, keep=keep)
        except ContextLengthError:
            assert len(prompt) + new - 1 > 33 * 16
            return multiple()
        except OverloadedError:
            assert self.loop.stats.waiting == 8
            return multiple()
        self.accepted.append((heard, prompt, new, method))
        return heard

    @rule(heard=requests)
    def cancel(self, heard):
        heard.ticket.cancel()

    @rule(rounds=st.integers(1, 6))
    def step(self, rounds):
        for _ in range(rounds):
            self.loop.step()

    @rule(target=handles, part=CUTS, frozen=st.booleans())
    def remember(self, part, frozen):
        """Between two steps, engine calls are as good as ever: they wait until there is room."""
        self.remembered += 1
        try:
            return self.engine.remember(part, frozen=frozen)
        except StoreFullError:
            assert frozen
            return multiple()

    @rule(handle=handles)
    def forget(self, handle):
        with contextlib.suppress(UnknownHandleError):  # evicted, lost or forgotten
            self.engine.forget(handle)

    @precondition(lambda self: self.loop.stats.running)
    @rule(step=st.sampled_from(["prefill", "probe", "decode"]))
    def lose_the_store(self, step):
        def broken(params, store, *args, **static):
            store.delete()
            raise RuntimeError("device lost")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"sparsex_jax.device.runner.{step}", broken)
            self.loop.step()

    @invariant()
    def the_books_are_right(self):
        self.engine.admission.check_books()

    def teardown(self):
        run(self.loop)
        assert idle(self.engine)
        stats = self.loop.stats
        assert stats.finished + stats.cancelled + stats.failed == len(self.accepted) + self.remembered
        for heard, prompt, new, method in self.accepted:
            assert heard.finish_reason in ("length", "cancelled", "error")
            if heard.finish_reason == "length":
                assert len(heard.tokens) == new or self.engine.entries()
            if heard.finish_reason == "error":
                assert isinstance(heard[-1].error, (NonFiniteLogitsError, NoRoomError, RuntimeError))
            if 96 in prompt:
                assert heard.tokens == []
            elif method in ("full", "prefix"):
                expected = REFERENCE.generate(prompt, SamplingParams(max_new_tokens=new), reuse=FULL, keep=False)
                assert heard.tokens == expected.token_ids[: len(heard.tokens)]


class CompanyMachine(LoopMachine):
    """The same where texts are remembered in company, and made again while requests come."""

    company_tokens = 90

    @rule()
    def heal(self):
        self.loop.heal(asked=True)

    @rule(part=CUTS, rounds=st.integers(0, 3), cancelled=st.booleans())
    def remember_meanwhile(self, part, rounds, cancelled):
        with contextlib.suppress(OverloadedError):
            ticket = self.loop.remember(part, listener=lambda event: None)
            self.remembered += 1
            for _ in range(rounds):
                self.loop.step()
            if cancelled:
                ticket.cancel()


LoopMachine.TestCase.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
CompanyMachine.TestCase.settings = settings(LoopMachine.TestCase.settings, max_examples=4)
test_loop_machine = LoopMachine.TestCase
test_company_machine = CompanyMachine.TestCase
