"""Sampling on the device: which tokens can be drawn, how often, and what is reported of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import InvalidRequestError, NonFiniteLogitsError, ReuseConfig, SamplingParams
from sparsex_jax.device.decode import advance, decode
from sparsex_jax.device.sampling import NON_FINITE, sample, sample_step
from sparsex_jax.device.state import BatchSlot, decode_state, sampling_arrays
from sparsex_jax.scheduler.output import Output

sample, sample_step = jax.jit(sample), jax.jit(sample_step)

PROBS = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
VOCAB = len(PROBS)
DRAWS = 2000
PROMPT = [1, 2, 3, 2]


def arrays(params, prompts=None, answers=None):
    """The device's view of requests with these prompts, which have generated these answers."""
    number = len(params)
    of_each = zip(prompts or [PROMPT] * number, answers or [[]] * number, params, strict=True)
    return sampling_arrays([BatchSlot(*slot) for slot in of_each], number, VOCAB)


def adjusted_logits(logits, sampling, position=100):
    at = jnp.full(len(logits), position)
    return np.asarray(sampling.adjustment.apply(jnp.asarray(logits), at))


def draws(**options):
    """Tokens drawn at many positions of one request."""
    sampling = arrays([SamplingParams(**options)] * DRAWS)
    logits = jnp.broadcast_to(jnp.log(PROBS), (DRAWS, VOCAB))
    return np.asarray(sample(logits, sampling, jnp.arange(DRAWS)))


def expected_probs(logits, params, prompt=(), answer=()):
    """A NumPy reference: bias, penalties, temperature, then min_p, top_k and top_p, as vLLM orders them. No ties."""
    scores = np.array(logits, np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in answer:
        scores[token] -= params.frequency_penalty
    for token in set(answer):
        scores[token] -= params.presence_penalty
    probs = np.exp((scores - scores.max()) / params.temperature)
    probs[probs < params.min_p * probs.max()] = 0
    best = np.argsort(-probs)
    probs[best[params.top_k or len(probs) :]] = 0
    nucleus = np.cumsum(probs[best]) - probs[best] < params.top_p * probs.sum()
    probs[best[~nucleus]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_p": 0.01}, {1}),  # the most probable always
        ({"top_p": 0}, {1}),
        ({"top_p": 1e-60}, {1}),
        ({"allowed_token_ids": (0, 3)}, {0, 3}),
        ({"allowed_token_ids": (0, 2, 3), "top_k": 2}, {0, 3}),
        ({"allowed_token_ids": (2,), "logit_bias": {2: -100.0}}, {2}),
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"top_p": 0.8, "top_k": 2}, {1, 3}),
        ({"top_p": 0.5, "top_k": 2}, {1}),  # of the two that are left
        ({"min_p": 1.0}, {1}),
        ({"min_p": 0.3}, {1, 3, 4}),
        ({"min_p": 0.3, "top_k": 2}, {1, 3}),
        ({"min_p": 0.3, "top_p": 0.8}, {1, 3}),
    ],
)
def test_kept_tokens_are_drawn_in_proportion_to_their_probabilities(options, kept):
    found = np.bincount(draws(temperature=1.0, **options), minlength=VOCAB) / DRAWS
    expected = np.where([i in kept for i in range(VOCAB)], PROBS, 0)
    assert set(np.flatnonzero(found)) == kept
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.05)


def test_temperature_zero_takes_the_most_probable():
    assert set(draws(temperature=0.0).tolist()) == {1}
    assert set(draws(temperature=0.0, min_p=0.9, top_k=2).tolist()) == {1}


def test_a_low_temperature_sharpens_the_distribution():
    found = np.bincount(draws(temperature=0.5), minlength=VOCAB) / DRAWS
    np.testing.assert_allclose(found, PROBS**2 / (PROBS**2).sum(), atol=0.05)


def test_min_p_is_a_share_after_the_temperature():
    assert set(draws(temperature=0.5, min_p=0.3).tolist()) == {1, 3}  # 0.09 of 0.16, and no longer 0.0225


# Penalties and bias ------------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, VOCAB - 1), max_size=8)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 0.6, 1.7]),
    presence_penalty=st.sampled_from([0.0, -1.3, 1.1]),
    frequency_penalty=st.sampled_from([0.0, -0.4, 0.45]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=3),
)
requests = st.lists(st.tuples(params, tokens.filter(bool), tokens), min_size=4, max_size=4)


@given(requests, st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_penalties_and_bias_follow_the_formulas(requests, seed):
    """Each request is compared with NumPy, in a batch of requests with other settings."""
    each, prompts, answers = zip(*requests, strict=True)
    logits = np.random.default_rng(seed).normal(0, 3, (len(each), VOCAB)).astype(np.float32)
    sampling = arrays(each, prompts, answers)
    adjusted = logits if sampling.adjustment is None else adjusted_logits(logits, sampling)
    for line, (one, prompt, answer) in enumerate(requests):
        exp = np.exp(adjusted[line].astype(np.float64) - adjusted[line].max())
        expected = expected_probs(logits[line], dataclasses.replace(one, temperature=1.0), prompt, answer)
        np.testing.assert_allclose(exp / exp.sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.0},
        {"frequency_penalty": -0.5, "top_k": 3},
        {"logit_bias": {0: 2.0, 1: -100}, "min_p": 0.2},
        {"repetition_penalty": 0.8, "frequency_penalty": 0.7, "logit_bias": {4: 1.5}, "top_p": 0.7},
    ],
)
def test_draws_have_the_shares_of_the_reference(options):
    params = SamplingParams(temperature=0.8, **options)
    sampling = arrays([params] * DRAWS, answers=[[3, 3, 4]] * DRAWS)
    logits = np.log(PROBS) + 2  # of both signs
    found = sample(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (DRAWS, VOCAB)), sampling, jnp.arange(DRAWS))
    expected = expected_probs(logits, params, PROMPT, [3, 3, 4])
    shares = np.bincount(np.asarray(found), minlength=VOCAB) / DRAWS
    assert set(np.flatnonzero(shares)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(shares, expected, atol=0.05)


def test_arrays_of_the_vocabulary_exist_only_if_a_request_needs_them():
    plain = SamplingParams(temperature=1.0, top_k=3, min_p=0.1)
    assert arrays([plain, SamplingParams()]).adjustment is None
    assert arrays([plain, SamplingParams(presence_penalty=0.1)]).adjustment is not None
    assert arrays([SamplingParams(logit_bias={0: 1})]).adjustment is not None


def test_ends_cannot_be_drawn_before_the_least_number_of_tokens():
    params = SamplingParams(min_new_tokens=3, stop_token_ids=[3, 4], temperature=1.0)
    sampling = sampling_arrays([BatchSlot(PROMPT, [], params, end_tokens=(1, -1))] * DRAWS, DRAWS, VOCAB)
    logits = jnp.broadcast_to(jnp.log(PROBS), (DRAWS, VOCAB))
    drawn = [set(sample(logits, sampling, jnp.full(DRAWS, len(PROMPT) + at)).tolist()) for at in (0, 2, 3)]
    assert [tokens <= {0, 2} for tokens in drawn] == [True, True, False]


# Batch-mates and seeds ---------------------------------------------------------------------------------------

MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.0, seed=2, top_p=0.7, logprobs=3),
    SamplingParams(temperature=1.0, seed=3, top_k=2, min_p=0.2, frequency_penalty=1.0),
    SamplingParams(temperature=1.0, seed=4, repetition_penalty=1.3, logit_bias={2: 4.0}),
    SamplingParams(presence_penalty=2.0, logprobs=0),
]


def test_other_requests_of_the_batch_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (len(MIXED), VOCAB))
    answers = [[1, 1, 3]] * len(MIXED)
    for position in range(10):
        at = jnp.full(len(MIXED), position)
        together = sample(logits, arrays(MIXED, answers=answers), at)
        alone = [
            int(sample(logits[i : i + 1], arrays([each], answers=answers[:1]), at[i : i + 1])[0])
            for i, each in enumerate(MIXED)
        ]
        assert together.tolist() == alone


def test_the_draw_depends_on_seed_and_position_alone():
    logits = jnp.broadcast_to(jnp.log(PROBS), (4, VOCAB))
    each = [SamplingParams(temperature=1.0, seed=s) for s in range(4)]
    alone = [int(sample(logits[:1], arrays([one]), jnp.array([9]))[0]) for one in each]
    assert sample(logits, arrays(each), jnp.full(4, 9)).tolist() == alone


# Log-probabilities -------------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_distribution():
    params = SamplingParams(temperature=0.5, top_k=1, logit_bias={2: 50.0}, logprobs=2)
    sampled = sample_step(jnp.log(PROBS)[None] + 7, arrays([params]), jnp.array([0]))
    assert sampled.token.tolist() == [[2]]
    np.testing.assert_allclose(sampled.logprobs.chosen, np.log([[0.05]]), rtol=1e-5)
    np.testing.assert_array_equal(sampled.logprobs.top_ids, [[[1, 3, 4, 0, 2]]])
    np.testing.assert_allclose(np.exp(sampled.logprobs.top[0, 0]), sorted(PROBS, reverse=True), rtol=1e-5)


def test_logprobs_are_computed_only_if_asked_for():
    assert sample_step(jnp.log(PROBS)[None], arrays([SamplingParams()]), jnp.array([0])).logprobs is None


# Logits that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, logit_bias={0: 1.0})])
def test_a_poisoned_request_fails_alone(bad, params):
    logits = np.tile(np.log(PROBS), (3, 1))
    healthy = sample(jnp.asarray(logits), arrays([params] * 3), jnp.arange(3)).tolist()
    logits[1, 4] = bad
    found = sample(jnp.asarray(logits), arrays([params] * 3), jnp.arange(3)).tolist()
    assert found == [healthy[0], NON_FINITE, healthy[2]]


def test_decode_goes_on_without_a_poisoned_request():
    params = SamplingParams(presence_penalty=1.0)
    state = decode_state([BatchSlot(PROMPT, [1, 3], params, pages=[page]) for page in (0, 1)], 1, VOCAB)
    after = advance(jax.device_put(state), jnp.array([NON_FINITE, 3]))
    assert (state.position.tolist(), after.position.tolist()) == ([5, 5], [-1, 6])
    assert after.sampling.adjustment.counts.tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 2, 0]]


def test_an_output_keeps_the_tokens_before_the_failure():
    output = Output(SamplingParams(), (), None)
    with pytest.raises(NonFiniteLogitsError, match="new token 2 "):
        output.extend([5, 6, NON_FINITE, 7])
    assert (output.token_ids, output.finish_reason) == ([5, 6], None)
    done = Output(SamplingParams(max_new_tokens=1), (), None)
    done.extend([5, NON_FINITE])  # behind the end, nothing counts
    assert (done.token_ids, done.finish_reason) == ([5], "length")


# Through the engine ------------------------------------------------------------------------------------------


def reference_answer(engine, prompt, params):
    """A greedy reference: one full prefill for each token, with penalties by NumPy."""
    answer, reports = [], []
    for _ in range(params.max_new_tokens):
        logits = engine.prefill([*prompt, *answer], reuse=ReuseConfig(method="full"), keep=False).logits
        scores = expected_probs(logits, dataclasses.replace(params, temperature=1.0), prompt, answer)
        raw = logits - np.logaddexp.reduce(logits)
        answer.append(int(scores.argmax()))
        reports.append((raw[answer[-1]], np.argsort(-raw)[:4], np.sort(raw)[::-1][:4]))
    return answer, reports


@pytest.mark.slow
def test_the_engine_penalises_and_reports_what_the_reference_does(tiny):
    """The counts begin with the token of the prefill and grow in the decode loop, over several decode calls."""
    prompt = [5, 9, 9, 40]
    params = SamplingParams(
        max_new_tokens=20,
        repetition_penalty=1.3,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={7: 0.5},
        logprobs=4,
        ignore_eos=True,
    )
    others = [SamplingParams(max_new_tokens=7), SamplingParams(max_new_tokens=12, temperature=1.0, min_p=0.1)]
    alone = [tiny.generate(prompt, other, keep=False).token_ids for other in others]
    penalised, *rest = tiny.generate_batch([prompt] * 3, [params, *others], keep=False)
    answer, reports = reference_answer(tiny, prompt, params)
    assert penalised.token_ids == answer
    assert [out.token_ids for out in rest] == alone
    assert [out.logprobs for out in rest] == [(), ()]
    for token, report, (logprob, top_ids, top) in zip(answer, penalised.logprobs, reports, strict=True):
        assert report.token_id == token
        np.testing.assert_allclose(report.logprob, logprob, atol=1e-4)
        assert [token for token, _ in report.top] == top_ids.tolist()
        np.testing.assert_allclose([value for _, value in report.top], top, atol=1e-4)


def test_a_stop_token_ends_the_answer_and_is_part_of_it(tiny):
    free = tiny.generate([1, 2, 3], SamplingParams(max_new_tokens=24, ignore_eos=True), keep=False)
    at = next(at for at in range(3, 24) if free.token_ids[at] not in free.token_ids[:at])
    ends = SamplingParams(max_new_tokens=24, stop_token_ids=[free.token_ids[at]], ignore_eos=True)
    stopped = tiny.generate([1, 2, 3], ends, keep=False)
    assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: at + 1], "stop")
    least = tiny.generate([1, 2, 3], dataclasses.replace(ends, min_new_tokens=at + 1), keep=False)
    assert least.token_ids[:at] == free.token_ids[:at]
    assert len(least.token_ids) > at + 1 or least.token_ids[at] != free.token_ids[at]


def test_the_least_number_of_tokens_comes_before_any_end(tiny):
    params = SamplingParams(max_new_tokens=30, min_new_tokens=21, stop_token_ids=[7], logit_bias={7: 100.0})
    out = tiny.generate([1, 2, 3], params, keep=False)
    assert (len(out.token_ids), out.token_ids.index(7), out.finish_reason) == (22, 21, "stop")


def test_no_new_tokens_is_a_prefill(tiny):
    out = tiny.generate([1, 2, 3], SamplingParams(max_new_tokens=0), keep=False)
    assert (out.token_ids, out.finish_reason, out.report.prompt_tokens) == ([], "length", 3)


def test_tokens_that_only_end_cannot_be_the_only_ones_allowed_before_the_end(tiny):
    params = SamplingParams(min_new_tokens=1, allowed_token_ids=[5], stop_token_ids=[4, 5])
    with pytest.raises(InvalidRequestError, match="allowed_token_ids has only tokens that end the answer"):
        tiny.generate([1, 2, 3], params)


def test_logprobs_zero_reports_the_chosen_token_alone(tiny):
    out = tiny.generate([1, 2, 3], SamplingParams(max_new_tokens=3, logprobs=0))
    assert [(report.token_id, report.top) for report in out.logprobs] == [(token, ()) for token in out.token_ids]


def test_two_decode_programs_for_penalties_and_two_for_logprobs(tiny):
    before = decode._cache_size()
    for options in ({}, {"presence_penalty": 1.0}, {"logit_bias": {1: 1.0}, "min_p": 0.1}, {"repetition_penalty": 2.0}):
        for logprobs in (None, 0, 20):
            tiny.generate([1, 2, 3], SamplingParams(max_new_tokens=3, logprobs=logprobs, **options), keep=False)
    assert decode._cache_size() - before <= 4


def test_broken_weights_raise_and_leave_nothing_in_the_store(tiny):
    params = tiny.runner.params
    tiny.runner.params = dataclasses.replace(params, final_norm=params.final_norm * jnp.nan)
    with pytest.raises(NonFiniteLogitsError, match="behind the prompt"):
        tiny.generate([1, 2, 3])
    assert (tiny.stats()["active"], tiny.stats()["free"]) == (0, tiny.stats()["pages"])
    tiny.runner.params = params
    assert tiny.generate([1, 2, 3], SamplingParams(max_new_tokens=2)).finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5}, "min_p=1.5 must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be a number from 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"presence_penalty": 3}, "presence_penalty=3 must be a number from -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"),
        ({"logit_bias": [(1, 2)]}, "logit_bias=.* must map token ids to numbers"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias has the key 'a'; it must be a token id"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has the key -1"),
        ({"logit_bias": {5: 101}}, r"logit_bias of token 5 is 101; it must be in \[-100, 100\]"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias has 1025 entries; the limit is 1024"),
        ({"logprobs": 21}, "logprobs=21 must be an integer from 0 to 20 or None"),
        ({"logprobs": True}, "logprobs=True"),
        ({"top_k": 2**31}, r"top_k=2147483648 must be an integer >= 0 and below 2\*\*31"),
        ({"max_new_tokens": 2**40}, "max_new_tokens=1099511627776 must be an integer"),
        ({"temperature": 1e39}, "temperature=1e\\+39 must be a number from 0 to 100"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty=1e-50 must be a number from 0.01 to 100"),
        ({"ignore_eos": "no"}, "ignore_eos='no' must be True or False"),
        ({"stop": ["x"] * 17}, "stop has 17 strings; the limit is 16"),
        ({"stop": "x" * 1025}, "stop has a string of 1025 characters; the limit is 1024 each"),
        ({"min_new_tokens": 129}, "min_new_tokens=129 must be at most max_new_tokens=128"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids has 1.5; it must be a token id"),
        ({"stop_token_ids": [1, None]}, "stop_token_ids has None"),
        ({"stop_token_ids": "12"}, "stop_token_ids='12' must be a list of token ids"),
        ({"stop_token_ids": range(1025)}, "stop_token_ids has 1025 entries; the limit is 1024"),
        ({"allowed_token_ids": []}, "allowed_token_ids has no entries"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids has True"),
    ],
)
def test_error_names_the_bad_value(options, message):
    with pytest.raises(InvalidRequestError, match=message):
        SamplingParams(**options)


@pytest.mark.parametrize(
    ("field", "value"), [("logit_bias", {97: 1.0}), ("stop_token_ids", [97]), ("allowed_token_ids", [5, 97])]
)
def test_error_names_a_token_beyond_the_vocabulary(tiny, field, value):
    with pytest.raises(InvalidRequestError, match=f"{field} has token id 97; ids must be from 0 to 96"):
        tiny.generate([1, 2, 3], SamplingParams(**{field: value}))
