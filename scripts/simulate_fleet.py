"""Simulates fleets of 1 to 1000 replicas: which routing finds what, how long prompts wait, and what breaks first.

    python scripts/simulate_fleet.py [--only calibration policies ...] [--replicas 1 10 100] [--large 1000]

Nothing is computed on a device: `sparsex_jax.eval.fleet` moves events, in one process and on one core. The replicas are
H100s with a llama-3.1-8b in bfloat16. What prefill and decode take is fitted to `scripts/results` and compared with the
rows there that were not fitted (part `calibration`). The routers are those that serve, `sparsex_jax.routing`.

    calibration   predicted and measured, row by row
    policies      hit rate, balance and TTFT by policy and traffic
    capacity      prompts a second and replica of which 95 % are answered well
    digests       how often and how finely replicas say what they hold
    tuning        the options of the router's policy, with the capacity of each
    routers       how many processes route
    tiers         host memory and disks below the store, and what is fetched from other replicas
    failures      a replica dies; a document that all ask about; a tenant that floods
    bursts        arrivals that come in bursts, or rise and fall
    memory        of a router, for what it knows
    scale         the mixture of all traffic, by the number of replicas
    large         the same at the largest fleet, for a shorter time

A good answer has its first token within 1 s and 50 ms between tokens. Figures are of the second half of a run; the
first fills the stores. After each part, `fleet-llama-3.1-8b-cpu.json` is written to `scripts/results`, and the
plots beside it in the end; what is there of other parts is kept.
"""

import argparse
import dataclasses
import importlib.util
import json
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count, positive
from sparsex_jax.eval.fleet.calibration import MODEL, Fit, fit, predictions
from sparsex_jax.eval.fleet.figures import figures, of_times, of_tokens, over_time
from sparsex_jax.eval.fleet.policies import SIMPLE, Make, routed
from sparsex_jax.eval.fleet.replica import ReplicaConfig
from sparsex_jax.eval.fleet.simulation import FleetConfig, Run, Simulation
from sparsex_jax.eval.fleet.store import TierConfig
from sparsex_jax.eval.fleet.timing import METHODS
from sparsex_jax.eval.fleet.traffic import KINDS, Arrivals, Kind, Rag, Surge, Tenants, Traffic
from sparsex_jax.eval.results import file_stem, provenance, write_json
from sparsex_jax.routing import SegmentPolicy
from sparsex_jax.routing.holders import Holders

RESULTS = Path(__file__).resolve().parent / "results"
PREFIX, SEGMENTS = "prefix", "sparsex l*=0, 5 %"
ROUTER, HEAVY = "router", "router, weight 8"  # as it is, and where a prompt's own work counts 8 times its delay
EVERY = 128  # tokens for each sample of a digest
Row = dict[str, Any]


class Load(NamedTuple):
    """A traffic, and the prompts a second and replica at which policies are compared."""

    kinds: tuple[tuple[Kind, float], ...]
    rate: float

    def traffic(self, replicas: int, rate: float | None = None, **fields: Any) -> Traffic:
        """What this number of replicas gets, with two tenants for each."""
        rate = self.rate if rate is None else rate
        whole = sum(share for _, share in self.kinds)
        mix = tuple((kind, share / whole * rate * replicas) for kind, share in self.kinds)
        return Traffic(mix, Tenants(2 * replicas), **fields)


LOADS = {
    "chat": Load(((KINDS["chat"], 1.0),), 12.0),
    "rag": Load(((KINDS["rag"], 1.0),), 3.5),
    "agents": Load(((KINDS["agents"], 1.0),), 4.0),
    "mixture": Load(((KINDS["chat"], 0.5), (KINDS["rag"], 0.25), (KINDS["agents"], 0.25)), 5.0),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A fleet under a load.

    Attributes:
      reuse: a name of `METHODS`.
      policy: a name of `SIMPLE`, or one of the two routers.
      fleet: what differs from the plain fleet.
      router: what differs from the plain router.
    """

    load: str
    replicas: int
    reuse: str
    policy: str
    rate: float | None = None
    traffic: dict[str, Any] = dataclasses.field(default_factory=dict)
    fleet: dict[str, Any] = dataclasses.field(default_factory=dict)
    router: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> FleetConfig:
        digests = {"digest_s": None} if self.policy in SIMPLE else {}
        return FleetConfig(self.replicas, **({"every": EVERY} | digests | self.fleet))

    @property
    def make(self) -> Make:
        if self.policy in SIMPLE:
            return SIMPLE[self.policy]
        heavy = {"policy": SegmentPolicy(work_weight=8.0)} if self.policy == HEAVY else {}
        return routed(self.config.every, segments=METHODS[self.reuse].segments, **(heavy | self.router))

    @property
    def name(self) -> str:
        return f"{'segments' if METHODS[self.reuse].segments else 'prefixes'}, {self.policy}"


class Bench:
    """Runs cases with one fit, one seed and one length."""

    def __init__(self, fitted: Fit, seconds: float, seed: int) -> None:
        self.fitted, self.seconds, self.seed = fitted, seconds, seed

    def run(self, case: Case, seconds: float | None = None) -> tuple[Run, dict[str, float]]:
        """A run, and the figures of its second half."""
        until = self.seconds if seconds is None else seconds
        traffic = LOADS[case.load].traffic(case.replicas, case.rate, **case.traffic)
        simulation = Simulation(case.config, self.fitted.timing(METHODS[case.reuse]), case.make)
        run = simulation.run(traffic.prompts(self.seed, until))
        told = figures(run, case.config, until / 2, until) | speed(run)
        shown = ("hit rate", "TTFT p50", "TTFT p95", "good", "busiest of mean", "us a request")
        print(
            f"{case.load}, {case.replicas}, {case.name}, {case.fleet or ''}{case.router or ''}: "
            + ", ".join(f"{name} {told[name]:.3g}" for name in shown)
            + f"; {len(run.outcomes)} requests, {run.cpu_seconds:.1f} s",
            flush=True,
        )
        return run, told


def speed(run: Run) -> dict[str, float]:
    """Of the simulator."""
    return {"us a request": 1e6 * run.cpu_seconds / max(len(run.outcomes), 1), "processor, s": run.cpu_seconds}


def rows_of(work: str, implementation: str, told: dict[str, float]) -> list[Row]:
    return [
        {
            "work": f"{work}: {name}",
            "implementation": implementation,
            "figure": float(f"{value:.5g}"),
            "unit": unit(name),
        }
        for name, value in told.items()
    ]


UNITS = {
    "TTFT": "s",
    "gap": "s",
    "processor": "s",
    "us": "us",
    "router, us": "us",
    "router, cores": "cores",
    "router, bytes": "bytes",
    "digests": "B/s",
    "busiest": "times",
    "most": "times",
    "hottest": "times",
    "requests": "requests",
    "samples": "samples",
    "capacity": "prompts/s",
    "prompts": "prompts/s",
}


def unit(name: str) -> str:
    """
    >>> [unit(name) for name in ("TTFT p95", "hit rate", "router, us a request", "router, cores")]
    ['s', 'share', 'us', 'cores']
    """
    return next((UNITS[begin] for begin in UNITS if name.startswith(begin)), "share")


# The parts --------------------------------------------------------------------------------------------------


COMBINATIONS = (
    (PREFIX, "round robin"),
    (PREFIX, "least loaded"),
    (PREFIX, "session affinity"),
    (PREFIX, "prefix hash"),
    (PREFIX, ROUTER),
    (SEGMENTS, "round robin"),
    (SEGMENTS, "least loaded"),
    (SEGMENTS, "session affinity"),
    (SEGMENTS, "prefix hash"),
    (SEGMENTS, ROUTER),
    (SEGMENTS, HEAVY),
)
FEW_COMBINATIONS = (
    (PREFIX, "least loaded"),
    (PREFIX, "prefix hash"),
    (SEGMENTS, "least loaded"),
    (SEGMENTS, "session affinity"),
    (SEGMENTS, "prefix hash"),
    (SEGMENTS, HEAVY),
)
LARGE_COMBINATIONS = ((SEGMENTS, ROUTER), (SEGMENTS, HEAVY), (SEGMENTS, "prefix hash"))


def calibration(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for row in predictions(bench.fitted, RESULTS):
        about = {"work": f"{row.source.split('-')[0]}: {row.work}", "implementation": row.implementation}
        yield about | {
            "figure": float(f"{row.predicted:.5g}"),
            "unit": row.unit,
            "measured": float(f"{row.measured:.5g}"),
            "error": float(f"{row.error:.3g}"),
            "fitted": row.fitted,
            "source": row.source,
        }


def policies(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for load in ("chat", "rag", "agents"):
        for reuse, policy in COMBINATIONS:
            case = Case(load, options.few, reuse, policy)
            _, told = bench.run(case)
            yield from rows_of(f"{load}, {options.few} replicas", case.name, told)


def capacity(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for reuse, policy in FEW_COMBINATIONS:
        case = Case("rag", options.few, reuse, policy)
        most = {"capacity": most_prompts(bench, case)}
        yield from rows_of(f"rag, {options.few} replicas", case.name, most)


def most_prompts(bench: Bench, case: Case) -> float:
    """Prompts a second and replica of which 95 % are answered well: where the answer changes, within 6 %."""
    low, high = 0.0, LOADS[case.load].rate
    while high < 200 and is_good(bench, case, high):
        low, high = high, 1.5 * high
    while high > 1.06 * max(low, 0.1):
        middle = (low * high) ** 0.5 if low else high / 2
        low, high = (middle, high) if is_good(bench, case, middle) else (low, middle)
    return low


def is_good(bench: Bench, case: Case, rate: float) -> bool:
    _, told = bench.run(dataclasses.replace(case, rate=rate), 0.4 * bench.seconds)
    return told["good"] >= 0.95


def digests(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    replicas = options.few
    for digest_s in (0.1, 1.0, 10.0, 60.0):
        for assume_s in (0.0, 2.0):
            router = {"assume_s": assume_s, "stale_after_s": max(10.0, 3 * digest_s)}
            case = Case("rag", replicas, SEGMENTS, HEAVY, fleet={"digest_s": digest_s}, router=router)
            _, told = bench.run(case)
            yield from rows_of(
                f"rag, {replicas} replicas, a digest every {digest_s:g} s", f"assumes {assume_s:g} s", told
            )
    for every in (16, 64, 256, 1024):
        case = Case("rag", replicas, SEGMENTS, HEAVY, fleet={"every": every})
        _, told = bench.run(case)
        yield from rows_of(f"rag, {replicas} replicas, one sample in {every}", case.name, told)


def tuning(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    plain = SegmentPolicy()
    tried = [dataclasses.replace(plain, work_weight=weight) for weight in (1.0, 2.0, 4.0, 8.0, 16.0)]
    tried += [dataclasses.replace(plain, running_cost=16.0), dataclasses.replace(plain, slack=0.3)]
    for load in LOADS:
        for policy in tried:
            case = Case(load, options.few, SEGMENTS, ROUTER, router={"policy": policy})
            _, told = bench.run(case)
            told |= {"capacity": most_prompts(bench, case)}
            name = f"weight {policy.work_weight:g}, running {policy.running_cost:g}, slack {policy.slack:g}"
            yield from rows_of(f"{load}, {options.few} replicas", name, told)


def routers(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for number in (1, 4, 16, 64):
        for digest_s in (1.0, 10.0):
            fleet = {"routers": number, "digest_s": digest_s}
            router = {"stale_after_s": max(10.0, 3 * digest_s)}
            case = Case("rag", options.some, SEGMENTS, HEAVY, fleet=fleet, router=router)
            _, told = bench.run(case, bench.seconds / 2)
            yield from rows_of(
                f"rag, {options.some} replicas, {number} routers", f"a digest every {digest_s:g} s", told
            )


def tiers(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    link, tokens = bench.fitted.link, ReplicaConfig().store_tokens
    host = TierConfig(4 * tokens, link)
    below = {
        "none": ReplicaConfig(),
        "host 4x": ReplicaConfig(tiers=(host,)),
        "host 4x, disk 32x at 1 GB/s": ReplicaConfig(tiers=(host, TierConfig(32 * tokens, 1e9))),
        "others at 25 GB/s": ReplicaConfig(network=25e9),
        "host 4x, others at 25 GB/s": ReplicaConfig(tiers=(host,), network=25e9),
    }
    for name, replica in below.items():
        for policy in ("least loaded", HEAVY):
            case = Case("rag", options.few, SEGMENTS, policy, fleet={"replica": replica})
            _, told = bench.run(case)
            yield from rows_of(f"rag, {options.few} replicas, {name}", case.name, told)


FAILURE_COMBINATIONS = (
    (PREFIX, "prefix hash"),
    (SEGMENTS, "least loaded"),
    (SEGMENTS, "prefix hash"),
    (SEGMENTS, HEAVY),
)


def failures(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    at, end, few = 0.4 * bench.seconds, 0.8 * bench.seconds, options.few
    rate = 0.5 * LOADS["rag"].rate * few  # of a surge: half as much again
    hot = Surge(Rag(documents=8, found=8), rate, at, end)
    flood = Surge(Rag(documents=100_000, skew=0.0), rate, at, end)
    scenarios: dict[str, dict[str, Any]] = {
        "a replica dies": {"fleet": {"deaths": ((at, 0),), "restart_s": 0.3 * bench.seconds}},
        "a hot document": {"traffic": {"surge": hot}},
        "a tenant floods": {"traffic": {"surge": flood}},
    }
    for scenario, fields in scenarios.items():
        for reuse, policy in FAILURE_COMBINATIONS:
            case = Case("rag", few, reuse, policy, **fields)
            run, told = bench.run(case)
            yield from rows_of(f"{scenario}, rag, {few} replicas", case.name, _of_failure(run, told, at, end))
            about = {"work": f"{scenario}: over time", "implementation": case.name, "figure": at, "unit": "s"}
            yield about | {"line": _rounded(over_time(run.outcomes, bench.seconds / 40))}


def _of_failure(run: Run, told: dict[str, float], at: float, end: float) -> dict[str, float]:
    """Figures of the whole run, and of all tenants but the first from when it happens until it ends."""
    others = [each for each in run.outcomes if each.tenant and at <= each.due < end]
    of_others = {f"{name} of others": value for name, value in (of_times(others) | of_tokens(others)).items()}
    failed = {"failed": sum(each.failed for each in run.outcomes) / len(run.outcomes)}
    return {name: told[name] for name in ("hit rate", "busiest of mean", "most prompts of mean")} | failed | of_others


def _rounded(line: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in point] for point in line]


def bursts(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    comings = {
        "steady": Arrivals(1.0),
        "bursts of 3 times the rate": Arrivals(1.0, burst=3.0),
        "half more, then half less": Arrivals(1.0, swing=0.5, day=bench.seconds),
    }
    for name, arrivals in comings.items():
        for reuse, policy in FEW_COMBINATIONS:
            case = Case("mixture", options.few, reuse, policy, traffic={"arrivals": arrivals})
            _, told = bench.run(case)
            yield from rows_of(f"mixture, {options.few} replicas, {name}", case.name, told)


def scale(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for replicas in options.replicas:
        yield from _of_size(bench, replicas, COMBINATIONS, options.scale_seconds)


def large(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    yield from _of_size(bench, options.large, LARGE_COMBINATIONS, options.large_seconds)


def _of_size(bench: Bench, replicas: int, combinations: Sequence[tuple[str, str]], seconds: float) -> Iterator[Row]:
    for reuse, policy in combinations:
        case = Case("mixture", replicas, reuse, policy)
        _, told = bench.run(case, seconds)
        asked = {"prompts a second": LOADS["mixture"].rate * replicas}
        yield from rows_of(f"mixture, {replicas} replicas", case.name, told | asked)


def memory(bench: Bench, options: argparse.Namespace) -> Iterator[Row]:
    for replicas in (*options.replicas, options.large):
        told = {"router, bytes a sample": bytes_a_sample(replicas)}
        yield from rows_of(f"digests of {replicas} replicas that hold different texts", "router", told)


def bytes_a_sample(replicas: int, samples: int = 200) -> float:
    """Of this process's memory, for each sample that a router knows of a replica; as `tracemalloc` counts."""
    rng, tag = np.random.default_rng(0), bytes(8)
    tracemalloc.start()
    holders = Holders()
    for slot in range(replicas):
        holders.add(slot, tag, rng.integers(2**32, size=samples).tolist())
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return nbytes / (replicas * samples)


PARTS: dict[str, Callable[[Bench, argparse.Namespace], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        calibration,
        policies,
        memory,
        digests,
        failures,
        tuning,
        tiers,
        scale,
        large,
        bursts,
        routers,
        capacity,
    )
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--replicas", type=count, nargs="+", default=[1, 10, 100])
    add("--few", type=count, default=10, help="replicas of the parts that have one number of them")
    add("--some", type=count, default=50, help="replicas where routers are many")
    add("--large", type=count, default=1000, help="replicas of the largest fleet")
    add("--seconds", type=positive, default=100.0, help="of arrivals")
    add("--scale-seconds", type=positive, default=30.0, help="of arrivals where fleets of several sizes are compared")
    add("--large-seconds", type=positive, default=60.0, help="of arrivals at the largest fleet")
    add("--seed", type=int, default=0)
    add("--no-plots", action="store_true")
    return parser.parse_args(arguments)


def earlier(path: Path, parts: Sequence[str]) -> list[Row]:
    """Rows of the file that is there already, of other parts."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [row for row in rows if row["part"] not in parts]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    options = parse(arguments)
    bench = Bench(fit(RESULTS), options.seconds, options.seed)
    about: dict[str, Any] = {"bench": "fleet", "model": MODEL} | provenance()
    path = folder / f"{file_stem(about)}.json"
    settings = {name: value for name, value in vars(options).items() if name not in ("only", "no_plots")}
    for part in options.only:
        began, kept = time.perf_counter(), earlier(path, [part])
        rows = [{"part": part} | row for row in PARTS[part](bench, options)]
        write_json(about | {"settings": settings, "rows": kept + rows}, folder)
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    if not options.no_plots:
        draw(path)


def draw(path: Path) -> None:
    """Plot what is in a result file, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib"):
        from sparsex_jax.eval.fleet.plots import plot_all

        for written in plot_all(json.loads(path.read_text())["rows"], path.with_suffix("")):
            print(written)


if __name__ == "__main__":
    run_script(main)
