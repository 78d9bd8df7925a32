"""Fits the simulator's timing to rows that were measured on one device, and predicts others.

Predictions are linear in `Speeds`, so the speeds that fit best are a least-squares problem (non-negative, in relative
errors). Fitted are the times to the first token of `bench_e2e.py`: full recompute, copies alone and two schedules of
SparseX, at four lengths; and its two decode rows. All others are predicted: other numbers of segments, prompts behind
a long prefix, rounds of agents and sessions that come back from host memory, the latter two by running a `Replica`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from sparsex_jax.config import ModelConfig, named_config
from sparsex_jax.eval.fleet.replica import NEVER, Outcome, Replica, ReplicaConfig
from sparsex_jax.eval.fleet.store import Found, TierConfig
from sparsex_jax.eval.fleet.timing import METHODS, DecodeTimes, Method, Timing
from sparsex_jax.eval.fleet.traffic import Prompt, Segment
from sparsex_jax.reuse.cost import ChunkTimes, Speeds

MODEL = "llama-3.1-8b"
E2E, OTHER_SEGMENTS = "e2e-{}-nvidia-h100-80gb-hbm3.json", "e2e-segments-{}-nvidia-h100-80gb-hbm3.json"
CHECKOUTS, AGENTS = "checkouts-{}-nvidia-h100-80gb-hbm3.json", "agents-{}-nvidia-h100-80gb-hbm3.json"
TIERS, RESTORE = "tiers-{}-nvidia-h200.json", "restore-{}-nvidia-h200.json"
BUDGET = 8192  # rows of a plan of the engine that was measured: four chunks of 2048
_ROWS = (1, 512, 2048)  # the knots of `ChunkTimes`
_KNOTS = 2 * len(_ROWS)
_OTHERS = ("start", "boundary", "copy", "copied_token")


class Row(NamedTuple):
    """A figure that was measured beside what the simulator says.

    Attributes:
      source: the result file.
      work, implementation, unit: as in the file.
      fitted: whether the timing was fitted to it.
    """

    source: str
    work: str
    implementation: str
    measured: float
    predicted: float
    unit: str
    fitted: bool

    @property
    def error(self) -> float:
        """As a share of what was measured."""
        return self.predicted / self.measured - 1


class Case(NamedTuple):
    """A prompt alone on an idle device, whose time to the first token was measured."""

    source: str
    work: str
    method: str
    seconds: float
    found: Found
    fitted: bool


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was fitted.

    Attributes:
      token_bytes: of a token's KV.
      link: bytes a second from host memory.
    """

    model: ModelConfig
    speeds: Speeds
    decode: DecodeTimes
    token_bytes: int
    link: float

    def timing(self, method: Method) -> Timing:
        """Of a replica that reuses by this method."""
        return Timing(self.model, self.speeds, self.decode, method, budget=BUDGET, token_bytes=self.token_bytes)


def fit(results: Path) -> Fit:
    """Fit the timing to the files of a folder.

    Raises:
      FileNotFoundError, KeyError: a file or a row that is needed is not there.
    """
    model = named_config(MODEL)
    cases = [case for case in prefill_cases(results) if case.fitted]
    matrix = np.array([_predictions(model, case, _unit_speeds()) for case in cases])
    seconds = np.array([case.seconds for case in cases])
    solution, _ = nnls(matrix / seconds[:, None], np.ones(len(cases)))
    token_bytes = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim  # K and V, in bfloat16
    return Fit(model, _speeds(solution), _decode_times(results), token_bytes, _link(results, token_bytes))


def _unit_speeds() -> list[Speeds]:
    return [_speeds(unit) for unit in np.eye(_KNOTS + len(_OTHERS))]


def _speeds(values: Sequence[float] | np.ndarray) -> Speeds:
    layer, key, rest = np.split(np.asarray(values, np.float64), [len(_ROWS), _KNOTS])
    chunks = ChunkTimes(_ROWS, tuple(layer.tolist()), tuple(key.tolist()))
    return Speeds(chunks, chunks, **dict(zip(_OTHERS, rest.tolist(), strict=True)))


def _predictions(model: ModelConfig, case: Case, speeds: Sequence[Speeds]) -> list[float]:
    decode = DecodeTimes(0.0, 0.0, 0.0)
    timings = (Timing(model, each, decode, METHODS[case.method], budget=BUDGET, token_bytes=1) for each in speeds)
    return [timing.plan_seconds([timing.forced(case.found)]) for timing in timings]


def _decode_times(results: Path) -> DecodeTimes:
    """From a sequence of 8192 tokens, and 32 of them."""
    rows = {row["work"]: row["figure"] / 1e3 for row in _rows(results, E2E)}
    one, many = rows["decode, 1 x 8192"], rows["decode, 32 x 8192"]
    key = (many - one) / (31 * 8192)
    return DecodeTimes(step=one - 8192 * key, row=0.0, key=key)


def _link(results: Path, token_bytes: int) -> float:
    rows = {(row["work"], row["implementation"]): row["figure"] for row in _rows(results, RESTORE)}
    return 32768 * token_bytes / (rows["32768 tokens, link as it is", "loaded"] / 1e3)


# A prompt alone ---------------------------------------------------------------------------------------------


def prefill_cases(results: Path) -> Iterator[Case]:
    """All times to the first token on the H100."""
    for name, fitted in ((E2E, True), (OTHER_SEGMENTS, False)):
        yield from _end_to_end(results, name, fitted)
    for row in _rows(results, CHECKOUTS):
        if row["method"] == "prefix, 95 %":
            tokens, work = row["tokens"], f"TTFT, {row['tokens']} tokens"
            found = _behind_prefix(tokens, round(0.95 * tokens))
            yield Case(CHECKOUTS.format(MODEL), work, "prefix", row["after_ms"] / 1e3, found, True)


def _end_to_end(results: Path, name: str, fitted: bool) -> Iterator[Case]:
    for row in _rows(results, name):
        method = "prefix" if row["implementation"] == "full" else row["implementation"]
        if method in METHODS and row["work"].startswith("TTFT"):
            _, tokens, reused = row["work"].split(", ")
            segments, length = int(reused.split()[-1]), int(tokens.split()[0])
            found = _between_fresh(length, 0.95, segments) if method != "prefix" else _behind_prefix(length, 0)
            work = row["work"] if method != "prefix" else f"TTFT, {tokens}"
            yield Case(name.format(MODEL), work, method, row["figure"] / 1e3, found, fitted)


def _between_fresh(tokens: int, share: float, segments: int) -> Found:
    """Segments with fresh tokens before, between and behind them."""
    reused = int(tokens * share) // segments * segments
    fresh, half = tokens - reused, tokens / 2
    return Found(0, reused, 2 * segments, fresh, (), fresh * half, reused * half)


def _behind_prefix(tokens: int, prefix: int) -> Found:
    fresh = tokens - prefix
    return Found(prefix, 0, 0, fresh, (), fresh * (tokens + prefix) / 2, 0.0)


# A replica that runs ----------------------------------------------------------------------------------------


def predictions(fitted: Fit, results: Path) -> list[Row]:
    """All rows that were measured on these devices and that the simulator has something to say about."""
    rows = [_of_case(fitted, case) for case in prefill_cases(results)]
    return [*rows, *_of_agents(fitted, results), *_of_tiers(fitted, results)]


def _of_case(fitted: Fit, case: Case) -> Row:
    timing = fitted.timing(METHODS[case.method])
    predicted = timing.plan_seconds([timing.forced(case.found)])
    name = "full" if case.method == "prefix" and not case.found.prefix else case.method
    return Row(case.source, case.work, name, 1e3 * case.seconds, 1e3 * predicted, "ms", case.fitted)


def play(replica: Replica, arrivals: Sequence[Prompt]) -> None:
    """Run a replica alone until all of these rising prompts are answered."""
    coming = list(arrivals)[::-1]
    while coming or replica.next_time < NEVER:
        due = coming[-1].due if coming else NEVER
        if due <= replica.next_time:
            replica.submit(coming.pop(), due)
        else:
            replica.wake(replica.next_time)


def _of_agents(fitted: Fit, results: Path) -> Iterator[Row]:
    ways = {"prefix": "prefix", "reordered": "prefix", "one by one": "sparsex l*=0, 5 %", "round": "sparsex l*=0, 5 %"}
    measured = {(row["work"], row["implementation"]): row for row in _rows(results, AGENTS)}
    for shared, (way, method) in itertools.product((4096, 24576), ways.items()):
        told = _debate(fitted.timing(METHODS[method]), shared, way)
        for figure, predicted in told.items():
            work = f"debate, 8 agents, {shared} shared: {figure}"
            row = measured[work, way]
            yield Row(AGENTS.format(MODEL), work, way, row["figure"], predicted, row["unit"], False)


def _debate(timing: Timing, shared: int, way: str) -> dict[str, float]:
    """The second and third round of eight agents who read each other, as `bench_agents.py` has them; its figures."""
    done: list[Outcome] = []
    replica = Replica(0, ReplicaConfig(store_tokens=10**7), timing, done.append)
    keys, rng, began = itertools.count(), np.random.default_rng(0), 0.0
    system, private = Segment(next(keys), 64), [Segment(next(keys), 1088) for _ in range(8)]
    said = [Segment(next(keys), shared // max(8, shared // 1536)) for _ in range(max(8, shared // 1536))]
    told = []
    for _ in range(3):
        prompts = []
        for own in private:
            heard = [said[i] for i in rng.permutation(len(said))]
            body = (system, *said, own) if way == "reordered" else (system, own, *heard)
            prompts.append(_prompt((*body, Segment(next(keys), 32)), Segment(next(keys), 32), began))
        del done[:]
        _one_round(replica, prompts, done, one_by_one=way == "one by one")
        firsts, end = [outcome.first - began for outcome in done], max(outcome.end for outcome in done)
        told.append({"TTFT, mean": float(np.mean(firsts)), "TTFT, worst": max(firsts), "round": end - began})
        said, began = said + [prompt.answer for prompt in prompts], end + 1.0
    return {name: float(np.median([figures[name] for figures in told[1:]])) for name in told[0]}


def _one_round(replica: Replica, prompts: Sequence[Prompt], done: list[Outcome], *, one_by_one: bool) -> None:
    if not one_by_one:
        play(replica, prompts)
        return
    for prompt in prompts:
        play(replica, [dataclasses.replace(prompt, due=max([prompt.due, *(outcome.end for outcome in done)]))])


def _of_tiers(fitted: Fit, results: Path) -> Iterator[Row]:
    for row in _rows(results, TIERS):
        when, share = row["work"].split(", tier ")
        predicted = _sessions_that_come_back(fitted, float(share))[when]
        yield Row(TIERS.format(MODEL), row["work"], "engine", row["figure"], 1e3 * predicted, row["unit"], False)


def _sessions_that_come_back(fitted: Fit, share: float) -> dict[str, float]:
    """Median seconds to the first token of 16 sessions, of which the store holds 8, as in `bench_tiers.py`."""
    tiers = (TierConfig(int(share * 16 * 16384), fitted.link),) if share else ()
    done: list[Outcome] = []
    replica = Replica(0, ReplicaConfig(8 * (16384 + 192), tiers), fitted.timing(METHODS["prefix"]), done.append)
    told = {}
    for when, new in (("first", 0), ("back", 64)):
        took = []
        for session in range(16):
            begin = done[-1].end + 1.0 if done else 0.0
            segments = (Segment(session, 16384), *([Segment(100 + session, new)] if new else []))
            play(replica, [_prompt(segments, Segment(1000 + 100 * (new > 0) + session, 4), begin)])
            took.append(done[-1].first - begin)
        told[when] = float(np.median(took))
    return told


def _prompt(segments: tuple[Segment, ...], answer: Segment, due: float) -> Prompt:
    return Prompt(answer.key, due, 0, 0, segments, answer, sum(segment.tokens for segment in segments))


def _rows(results: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((results / name.format(MODEL)).read_text())["rows"]
