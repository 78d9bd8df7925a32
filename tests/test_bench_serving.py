"""The serving bench: its workloads, its figures, and that all methods get the same requests."""

import argparse
import dataclasses
import json

import bench_serving
import numpy as np
import pytest
from conftest import closed_engine, report_of

from sparsex_jax import InvalidRequestError, ReuseConfig
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.eval import lexicon
from sparsex_jax.eval.conversations import CONVERSATIONS
from sparsex_jax.eval.workloads import WORKLOADS, WorkloadSize, make_workload
from sparsex_jax.reuse.prompt import TokenKind
from sparsex_jax.scheduler.loop import Loop

SIZE = WorkloadSize(requests=4, length=80, pieces=2)


@pytest.fixture(scope="module")
def tokenizer():
    return lexicon.ruler_tokenizer()


def ids(workload):
    return [[tokens.tolist() for tokens in part] for part in workload]


@pytest.fixture(scope="module")
def chatting():
    """A tokenizer with a chat template."""
    return open_checkpoint("smollm2-135m-instruct").tokenizer


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_workload(tokenizer, chatting, name):
    tokenizer = chatting if name in CONVERSATIONS else tokenizer
    once, again, other = (make_workload(name, tokenizer, SIZE, seed) for seed in (1, 1, 2))
    assert ids(once) == ids(again) != ids(other)
    assert len(once.prompts) == SIZE.requests


def test_conversations_take_turns(chatting):
    """Each prompt goes on with one before it, until the system text changes."""
    stored, prompts = make_workload("rag_chat", chatting, dataclasses.replace(SIZE, requests=8), 3)
    openings = {prompt[:60].tobytes() for prompt in prompts}
    assert len(openings) == SIZE.pieces, "as many conversations"
    assert len(stored) == 5 * SIZE.pieces, "four notes to begin with, and one more"
    assert len(prompts) == 8


def test_conversations_need_a_chat_template(tokenizer):
    with pytest.raises(InvalidRequestError, match="chat template"):
        make_workload("coding", tokenizer, SIZE, 0)


def test_ids_beyond_a_vocabulary_wrap(tokenizer):
    workload = make_workload("rag", tokenizer, SIZE, 0).within(50)
    assert all(tokens.max() < 50 for texts in workload for tokens in texts)


def test_histories_grow(tokenizer):
    prompts = make_workload("chat", tokenizer, SIZE, 3).prompts
    assert sorted(map(len, prompts))[SIZE.pieces - 1] < max(map(len, prompts))
    longest = max(prompts, key=len)
    same = [(longest[: len(prompt)] == prompt[: len(longest)]).cumprod().sum() for prompt in prompts]
    assert sorted(same)[-2] > SIZE.length // 2, "an earlier turn of the same user is a beginning"


def test_documents_and_outputs_come_back_whole_and_in_another_order(tokenizer):
    stored, prompts = make_workload("rag", tokenizer, SIZE, 4)
    found = [tuple(i for i, document in enumerate(stored) if _holds(prompt, document)) for prompt in prompts]
    assert {len(some) for some in found} == {SIZE.pieces}
    assert len({prompt.tobytes() for prompt in prompts}) == SIZE.requests
    stored, prompts = make_workload("agents", tokenizer, dataclasses.replace(SIZE, pieces=3), 4)
    for prompt in prompts:
        assert sum(_holds(prompt, output[-20:]) for output in stored) == 2, "the outputs of the two others"


def _holds(prompt, part):
    windows = np.lib.stride_tricks.sliding_window_view(prompt, len(part))
    return (windows == part).all(axis=1).any()


def test_bad_sizes_are_refused():
    with pytest.raises(InvalidRequestError, match="pieces=1 must be at least 2"):
        WorkloadSize(requests=4, length=80, pieces=1)


@pytest.mark.slow
def test_every_method_gets_the_same_requests_at_the_same_times(tokenizer, monkeypatch):
    asked = []

    def watched(loop, prompt, *arguments, **options):
        asked.append((options["reuse"].method, prompt.tolist(), options["namespace"]))
        return submit(loop, prompt, *arguments, **options)

    submit = Loop.submit
    monkeypatch.setattr(Loop, "submit", watched)
    bench = bench_serving.Bench(closed_engine(1), 4)
    workload = make_workload("rag", tokenizer, SIZE, 0)
    options = argparse.Namespace(rate=20.0, seed=0)
    rate, runs = bench_serving.compare(
        bench, workload, {name: ReuseConfig(name) for name in ("full", "naive")}, options
    )
    assert rate == 20.0
    for method, timelines in runs.items():
        prompts = [(prompt, namespace) for name, prompt, namespace in asked if name == method]
        assert [prompt for prompt, _ in prompts[-4:]] == [prompt.tolist() for prompt in workload.prompts]
        assert len({namespace for _, namespace in prompts}) == len(prompts) / 4 >= 2, "a namespace a pass"
        assert [sum(new for _, new in timeline.came) for timeline in timelines] == [4] * 4
    gaps = [np.diff([timeline.due for timeline in timelines]) for timelines in runs.values()]
    np.testing.assert_allclose(gaps[0], gaps[1], atol=1e-6)
    assert all(timeline.report.reused_tokens > 0 for timeline in runs["naive"])
    assert all(timeline.report.computed_fraction == 1.0 for timeline in runs["full"])


def report(prefix, reused, fresh, computed):
    kind = np.repeat([TokenKind.PREFIX, TokenKind.REUSED, TokenKind.FRESH], [prefix, reused, fresh])
    return report_of(kind, kind == TokenKind.FRESH, computed_fraction=computed)


SCRIPTED = [
    bench_serving.Timeline(1.0, came=[(1.5, 1), (1.9, 4), (2.0, 1)], report=report(2, 4, 4, 0.5)),
    bench_serving.Timeline(2.0, came=[(4.0, 1), (5.0, 2)], report=report(0, 15, 15, 0.75)),
]


def test_figures_of_scripted_times():
    found = bench_serving.figures(SCRIPTED, ttft_limit=1.0, gap_limit=0.2)
    assert {name: figure for name, (figure, _) in found.items()} == pytest.approx(
        {
            "TTFT p50": 1.25,  # of 0.5 and 2 seconds
            "TTFT p95": 1.925,
            "TTFT p99": 1.985,
            "ITL p50": 100,  # of 5 times 0.1 and 2 times 0.5 seconds
            "ITL p95": 500,
            "ITL p99": 500,
            "generated": 9 / 4,  # from 1 to 5
            "prompt": 40 / 4,
            "goodput": 1 / 4,
            "prefix": 0.05,
            "approximate prefix": 0,
            "reused": 19 / 40,
            "recomputed": 0,
            "fresh": 19 / 40,
            "omitted": 0,
            "computed": (0.5 * 10 + 0.75 * 30) / 40,
        }
    )


@pytest.mark.parametrize(("ttft", "gap", "good"), [(2.0, 0.5, 2), (2.0, 0.4, 1), (0.4, 9.0, 0)])
def test_goodput_counts_requests_within_both_limits(ttft, gap, good):
    assert bench_serving.figures(SCRIPTED, ttft, gap)["goodput"][0] == good / 4


def test_a_listener_records_the_times_of_its_tokens():
    timeline = bench_serving.Timeline(1.0, clock=iter([2.0, 2.5]).__next__)
    timeline(bench_serving.Event("a", (1,), report=SCRIPTED[0].report))
    timeline(bench_serving.Event("held back", ()))
    timeline(bench_serving.Event("b", (2, 3), finish_reason="length"))
    assert timeline.came == [(2.0, 1), (2.5, 2)]
    assert timeline.ttft == 1.0
    assert timeline.gaps == [0.25, 0.25]
    assert timeline.report is SCRIPTED[0].report


def test_results_are_rows_and_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_serving, "RESULTS", tmp_path)
    options = argparse.Namespace(
        model="tiny",
        note="Scripted.",
        ttft_limit=1.0,
        itl_limit=0.2,
        requests=2,
        length=40,
        rate=None,
        tensor_parallel=1,
    )
    bench_serving.save(options, {"rag": 0.5}, {"rag": {"full": SCRIPTED}})
    (path,) = tmp_path.glob("serving-tiny-*.json")
    content = json.loads(path.read_text())
    assert {"command", "device", "versions", "commit", "settings", "note"} <= content.keys()
    assert content["rates"] == {"rag": 0.5}
    expected = {"work": "rag: TTFT p50", "implementation": "full", "figure": 1.25, "unit": "s"}
    assert expected in content["rows"]
    assert "| full | 1.25 / 1.92 / 1.98 | 100 / 500 / 500 | 2.2 | 10.0 | 0.25 |" in capsys.readouterr().out
