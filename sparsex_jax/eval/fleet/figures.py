"""What became of the requests of a run, as figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sparsex_jax.eval.fleet.replica import Outcome
from sparsex_jax.eval.fleet.simulation import FleetConfig, Run

TTFT_LIMIT, GAP_LIMIT = 1.0, 0.05  # seconds to the first token, and between two tokens, of a good answer


def figures(run: Run, config: FleetConfig, since: float, until: float) -> dict[str, float]:
    """Figures of the requests that were due from `since` on and before `until`, in seconds, and of the whole fleet.

    Times are in seconds. Shares of tokens are of those of all prompts.
    """
    outcomes = [outcome for outcome in run.outcomes if since <= outcome.due < until]
    return {
        "requests": float(len(outcomes)),
        "failed": sum(outcome.failed for outcome in outcomes) / max(len(outcomes), 1),
        **of_tokens(outcomes),
        **of_times(outcomes),
        **_of_balance(run, outcomes, config.replicas),
        **_of_links(run, config),
        **_of_routers(run),
    }


def of_tokens(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares of the tokens of all prompts that were answered."""
    answered = [outcome for outcome in outcomes if not outcome.failed]
    tokens = max(sum(outcome.tokens for outcome in answered), 1)
    prefix, reused = sum(outcome.prefix for outcome in answered), sum(outcome.reused for outcome in answered)
    return {
        "hit rate": (prefix + reused) / tokens,
        "prefix": prefix / tokens,
        "reused": reused / tokens,
        "loaded": sum(outcome.loaded for outcome in answered) / tokens,
        "computed": sum(outcome.computed for outcome in answered) / tokens,
    }


def of_times(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Times to the first token, the mean time between tokens, and the share of good answers among all requests."""
    answered = [outcome for outcome in outcomes if not outcome.failed]
    if not answered:
        return {"TTFT p50": 0.0, "TTFT p95": 0.0, "TTFT p99": 0.0, "gap": 0.0, "good": 0.0}
    ttft = np.array([outcome.first - outcome.due for outcome in answered])
    gaps = np.array([(outcome.end - outcome.first) / max(outcome.answer - 1, 1) for outcome in answered])
    good = float(((ttft <= TTFT_LIMIT) & (gaps <= GAP_LIMIT)).sum()) / len(outcomes)
    percentiles = {f"TTFT p{p}": float(np.percentile(ttft, p)) for p in (50, 95, 99)}
    return percentiles | {"gap": float(gaps.mean()), "good": good}


def _of_balance(run: Run, outcomes: Sequence[Outcome], replicas: int) -> dict[str, float]:
    """How busy replicas are, and how unevenly: seconds of the busiest one, prompts sent to the one that got most, and
    prompts of the hottest tenant, all as multiples of a replica's mean."""
    busy = np.array(run.busy)
    sent = np.bincount([outcome.replica for outcome in outcomes if outcome.replica >= 0], minlength=replicas)
    return {
        "busy": float(busy.mean()) / max(run.seconds, 1e-9),
        "busiest of mean": float(busy.max() / max(busy.mean(), 1e-9)),
        "most prompts of mean": float(sent.max() / max(sent.mean(), 1e-9)),
        "hottest tenant of mean": _hottest(outcomes) / max(sent.mean(), 1e-9),
    }


def _hottest(outcomes: Sequence[Outcome]) -> int:
    """Prompts of the tenant that has most."""
    return max(Counter(outcome.tenant for outcome in outcomes).values(), default=0)


def _of_links(run: Run, config: FleetConfig) -> dict[str, float]:
    """Bytes a second of digests to one router, and the share of their time that replicas' links are busy."""
    names = [*(f"tier {index} link" for index in range(len(config.replica.tiers))), "network link"]
    links = {
        name: nbytes / (bytes_per_s * config.replicas * max(run.seconds, 1e-9))
        for name, nbytes, bytes_per_s in zip(names, run.loaded_bytes, config.replica.links, strict=False)
    }
    return {"digests, B/s": (run.digest_bytes + run.snapshot_bytes) / max(run.seconds, 1e-9), **links}


def _of_routers(run: Run) -> dict[str, float]:
    """What routing takes of this machine's processor: a request, and all routers together as cores that are busy."""
    return {
        "router, us a request": 1e6 * run.route_seconds / max(len(run.outcomes), 1),
        "router, cores": (run.route_seconds + run.digest_seconds) / max(run.seconds, 1e-9),
        "samples held": float(run.samples),
    }


def over_time(outcomes: Sequence[Outcome], step: float) -> list[tuple[float, float, float, float]]:
    """By windows of so many seconds: their middle, the hit rate, TTFT p95, and the share that failed."""
    windows: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        windows.setdefault(int(outcome.due // step), []).append(outcome)
    return [
        (
            (index + 0.5) * step,
            of_tokens(windows[index])["hit rate"],
            of_times(windows[index])["TTFT p95"],
            sum(outcome.failed for outcome in windows[index]) / len(windows[index]),
        )
        for index in sorted(windows)
    ]
