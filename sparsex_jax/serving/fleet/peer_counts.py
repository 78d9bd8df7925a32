"""What moved between replicas, as counts, and as metrics in Prometheus' format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclasses.dataclass
class PeerCounts:
    """What came of asking other replicas.

    Attributes:
      asked: prompts for which another replica was asked.
      blocks, nbytes: that came.
      failed: lookups and blocks that did not.
    """

    asked: int = 0
    blocks: int = 0
    nbytes: int = 0
    failed: int = 0


@dataclasses.dataclass
class ServedCounts:
    """What other replicas asked for.

    Attributes:
      lookups: that were answered.
      blocks, nbytes: that were sent, to the last byte.
      refused: requests that got an error: without a seal of the fleet, of another model, or for what is not there.
    """

    lookups: int = 0
    blocks: int = 0
    nbytes: int = 0
    refused: int = 0


class PeerStats(NamedTuple):
    """Both sides of a replica."""

    fetched: PeerCounts
    served: ServedCounts

    def copy(self) -> PeerStats:
        return PeerStats(dataclasses.replace(self.fetched), dataclasses.replace(self.served))


class PeerMetrics(Collector):
    """What the counts are when metrics are asked for."""

    def __init__(self, stats: PeerStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        fetched, served = self._stats
        yield _counter("lookups", "Prompts about which replicas asked each other.", fetched.asked, served.lookups)
        yield _counter("blocks", "Blocks that came from other replicas and went there.", fetched.blocks, served.blocks)
        yield _counter("bytes", "Their bytes.", fetched.nbytes, served.nbytes)
        yield _counter("failures", "What did not come, and what was refused.", fetched.failed, served.refused)


def _counter(name: str, text: str, asking: int, giving: int) -> Metric:
    counter = CounterMetricFamily(f"sparsex_peer_{name}", text, labels=["side"])
    counter.add_metric(["asking"], asking)
    counter.add_metric(["giving"], giving)
    return counter
