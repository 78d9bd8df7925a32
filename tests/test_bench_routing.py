"""The bench of routing policies, without replicas: what its clients ask, and what it makes of the answers."""

import bench_routing as bench
import numpy as np
import pytest

from sparsex_jax.eval import lexicon
from sparsex_jax.eval.workloads import WorkloadSize


@pytest.fixture(scope="module")
def tokenizer():
    return lexicon.ruler_tokenizer()


def test_agents_store_their_words_before_any_of_them_reads(tokenizer):
    steps = bench.steps_of("agents", tokenizer, 1536, WorkloadSize(8, 256, 4), seed=0)
    assert [step.is_measured for step in steps] == 2 * (4 * [False] + 4 * [True])
    words = steps[0].prompt[-32:]
    readers = [step for step in steps[4:8] if _has(step.prompt, words)]
    assert len(readers) == 3  # all but the one who wrote it
    assert not any(_has(step.prompt, words) for step in steps[8:])


def _has(prompt, words) -> bool:
    return words.tobytes() in prompt.tobytes()


def test_documents_come_with_the_questions(tokenizer):
    steps = bench.steps_of("rag", tokenizer, 1536, WorkloadSize(6, 256, 4), seed=0)
    assert [step.is_measured for step in steps] == 6 * [True]


def test_figures_are_sums_over_tokens():
    def answered(replica, found, prompt, computed, ttft):
        report = dict.fromkeys(bench.FOUND, 0) | {"reused_tokens": found, "prompt_tokens": prompt}
        report["segments"] = [{"length": found // 9, "tier": "host"}, {"length": found * 5 // 9, "tier": "peer"}]
        return bench.Answered(replica, report | {"computed_fraction": computed}, ttft)

    told = bench.figures([answered("a", 90, 100, 0.1, 1.0), answered("a", 0, 300, 1.0, 3.0)], seconds=4.0)
    assert {name: figure for name, (figure, _) in told.items()} == {
        "hit rate": 90 / 400,
        "from others": pytest.approx(50 / 400),
        "computed": pytest.approx(310 / 400),
        "largest share of a replica": 1.0,
        "TTFT p50": 2.0,
        "TTFT p95": pytest.approx(np.percentile([1, 3], 95)),
        "throughput": 0.5,
    }
