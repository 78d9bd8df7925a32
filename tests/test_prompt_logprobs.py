"""Log-probabilities of prompts in the engine: exact without reuse, of what is computed with it, in bounded memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, idle, run, sharded_tiny, tiny_engine, tiny_params

from sparsex_jax import InvalidRequestError, ReuseConfig, SamplingParams
from sparsex_jax.device.prefill import embed_rows
from sparsex_jax.device.scoring import score
from sparsex_jax.model.decoder import Decoder
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.reuse.plan import Rows

TEXT = np.random.default_rng(2).integers(1, 90, 400).astype(np.int32)
SCORED = SamplingParams(2, prompt_logprobs=2)


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def exact(engine):
    """Of the first 150 tokens."""
    return engine.generate(TEXT[:150], SCORED, keep=False).prompt_logprobs


def values(logprobs):
    return np.array([np.nan if each is None else each.logprob for each in logprobs])


def test_they_are_those_of_the_logits_before_each_token(engine, exact):
    assert exact[0] is None
    assert [each.token_id for each in exact[1:]] == TEXT[1:150].tolist()
    for place in (1, 40, 149):
        logits = engine.prefill(TEXT[:place], keep=False, reuse=ReuseConfig("full")).logits.astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        each, best = exact[place], np.argsort(-expected)[:2]
        assert each.logprob == pytest.approx(expected[TEXT[place]], abs=1e-4)
        assert each.rank == 1 + (expected > expected[TEXT[place]]).sum()
        assert [id_ for id_, _ in each.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in each.top], expected[best], atol=1e-4)


def test_a_prompt_in_chunks_among_others_that_are_not_scored(exact):
    engine = tiny_engine(prefill_tokens=48)
    scored, other = engine.generate_batch([TEXT[:150], TEXT[200:230]], [SCORED, SamplingParams(2)], keep=False)
    np.testing.assert_allclose(values(scored.prompt_logprobs), values(exact), atol=1e-4)
    assert other.prompt_logprobs == ()


def test_preemption_computes_them_anew(exact):
    engine = tiny_engine(store_tokens=256)
    first, second = engine.generate_batch([TEXT[200:280], TEXT[:150]], dataclasses.replace(SCORED, max_new_tokens=40))
    assert len(first.prompt_logprobs) == 80
    np.testing.assert_allclose(values(second.prompt_logprobs), values(exact), atol=1e-4)
    assert idle(engine)


@pytest.mark.slow
def test_on_a_mesh(exact):
    out = sharded_tiny(2).generate(TEXT[:150], SCORED, keep=False)
    np.testing.assert_allclose(values(out.prompt_logprobs), values(exact), atol=1e-4)


def test_without_a_method_nothing_approximate_is_in_them(engine, exact):
    engine.remember(TEXT[20:120], namespace="plain")
    engine.generate(TEXT[:130], SamplingParams(1), namespace="plain", reuse=ReuseConfig("naive"))
    whole = engine.generate(TEXT[:150], SCORED, namespace="plain", keep=False)
    assert whole.report.fresh_tokens == 150
    np.testing.assert_allclose(values(whole.prompt_logprobs), values(exact), atol=1e-4)
    engine.generate(TEXT[:130], SamplingParams(1), namespace="exactly", reuse=ReuseConfig("full"))
    end = dataclasses.replace(SCORED, prompt_logprobs_start=-10)
    for namespace, found in (("plain", 20), ("exactly", 130)):  # what is exact of what is stored
        part = engine.generate(TEXT[:150], end, namespace=namespace, keep=False)
        assert (part.report.prefix_tokens, part.report.fresh_tokens) == (found, 150 - found)
        np.testing.assert_allclose(values(part.prompt_logprobs)[140:], values(exact)[140:], atol=1e-4)
        assert set(part.prompt_logprobs[:140]) == {None}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["naive", "sparsex", "prophetkv", "qcfuse", "cacheblend", "excerpt", "prefix"])
def test_with_a_method_all_behind_the_start_are_computed(engine, method):
    engine.remember(TEXT[250:380], namespace=method)
    prompt = np.concatenate([TEXT[:20], TEXT[250:380], TEXT[30:40]])
    # The document's own last tokens are scored too, so they are not found.
    sampling, reuse = SamplingParams(1, prompt_logprobs=0, prompt_logprobs_start=140), ReuseConfig(method)
    out = engine.generate(prompt, sampling, namespace=method, reuse=reuse, keep=False)
    assert [each is None for each in out.prompt_logprobs] == [True] * 140 + [False] * 20
    assert out.report.fresh_tokens >= 21
    assert out.report.computed_fraction < 1 or method in ("prefix", "qcfuse", "cacheblend", "prophetkv")


def test_with_a_method_and_no_start_those_that_are_computed_have_one(engine):
    engine.remember(TEXT[250:380], namespace="some")
    prompt = np.concatenate([TEXT[:20], TEXT[250:380], TEXT[30:40]])
    out = engine.generate(prompt, SCORED, namespace="some", reuse=ReuseConfig("naive"), keep=False)
    computed = out.report.active
    assert out.report.reused_tokens > 100
    assert [each is not None for each in out.prompt_logprobs[1:]] == computed[:-1].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs=21 must be an integer from 0 to 20 or None"),
        ({"prompt_logprobs_start": 1}, "prompt_logprobs_start=1 needs prompt_logprobs"),
        ({"prompt_logprobs": 0, "prompt_logprobs_start": 9}, "must be from -9 to 8: the prompt has 9 tokens"),
    ],
)
def test_wrong_arguments(engine, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate(TEXT[:9], SamplingParams(1, **options))


def test_they_come_with_the_report(engine):
    events = []
    engine.loop.submit(TEXT[:20], SCORED, listener=events.append)
    run(engine.loop)
    assert [event.prompt_logprobs is not None for event in events] == [event.report is not None for event in events]


def test_logits_of_few_rows_are_in_memory_at_once():
    model = dataclasses.replace(TINY, vocab_size=4096)
    decoder, rows = Decoder(model, Ops.on(make_mesh())), 4096
    index = jnp.arange(rows)
    of_rows = Rows(token=index, position=index, request=jnp.zeros_like(index), index=index)
    params = dataclasses.replace(tiny_params(), embed=jnp.zeros((4096, 32)), lm_head=None)
    state = embed_rows(params, of_rows, decoder=decoder, requests=1)

    def scored(hidden):
        return score(params, dataclasses.replace(state, hidden=hidden), index, decoder=decoder, number=1).chosen

    compiled = jax.jit(scored).lower(state.hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * 4096 * 4 / 4
