"""The server's metrics, in Prometheus' text format."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sparsex_jax.device.compilation import num_compilations

if TYPE_CHECKING:
    from sparsex_jax.scheduler.loop import Event
    from sparsex_jax.serving.worker import Stream

_TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_STATES = ("free", "active", "frozen", "cached")


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._snapshot = _Snapshot()
        self._registry.register(self._snapshot)
        self._ttft = self._histogram("time_to_first_token_seconds", "From submission to the first token.", _TTFT_S)
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Seconds for each token of an answer after its first tokens.", _TOKEN_S
        )
        self._fraction = self._histogram("computed_fraction", "Computed share of a prompt's token-layers.", _SHARES)
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens: prefix, approximate_prefix, reused, recomputed or fresh.", "kind"
        )
        self._new_tokens = self._counter("generated_tokens", "Tokens generated.")
        self._requests = self._counter("requests", "Requests by endpoint and status.", "endpoint", "status")
        self._finished = self._counter("answers", "Answers by finish reason.", "finish_reason")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sparsex_{name}", text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sparsex_{name}", text, labels, registry=self._registry)

    def listening(self) -> None:
        """Count compilations from now on as `listening`, because requests wait for them."""
        self._snapshot.compiled_before = num_compilations()

    def answered(self, endpoint: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(endpoint, str(status)).inc()

    async def observed(self, stream: Stream) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of a stream, and count and time them."""
        clocks = [_Clock() for _ in stream.tickets]
        async for number, event in stream:
            self._observe(event, clocks[number])
            yield number, event

    def _observe(self, event: Event, clock: _Clock) -> None:
        if event.report is not None:
            self._ttft.observe(time.perf_counter() - clock.started)
            self._fraction.observe(event.report.computed_fraction)
            for kind, count in event.report.tokens_by_kind().items():
                self._prompt_tokens.labels(kind).inc(count)
        self._new_tokens.inc(len(event.token_ids))
        clock.record(len(event.token_ids))
        if event.finish_reason is not None:
            self._finished.labels(event.finish_reason).inc()
            if (pace := clock.pace()) is not None:
                self._per_token.observe(pace)

    def render(self, store: Mapping[str, int], loop: Any) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
          store: what `Engine.stats` gives.
          loop: what `Loop.stats` gives.
        """
        self._snapshot.store, self._snapshot.loop = store, loop
        return generate_latest(self._registry)


class _Clock:
    """Times the tokens of one answer. An event has several tokens, so the pace counts those after the first event."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = self.started
        self._later = 0

    def record(self, tokens: int) -> None:
        """Record the arrival of tokens."""
        if not tokens:
            return
        self._last_s = time.perf_counter()
        if self._first_s is None:
            self._first_s = self._last_s
        else:
            self._later += tokens

    def pace(self) -> float | None:
        """Seconds for each token after the first event, or None if there was only one event."""
        return (self._last_s - self._first_s) / self._later if self._first_s is not None and self._later else None


class _Snapshot(Collector):
    """The counts of the engine and the loop when `render` was called last."""

    store: Mapping[str, int] = {}
    loop: Any = None
    compiled_before = 0

    def collect(self) -> Iterator[Metric]:
        if not self.store:
            return
        pages = GaugeMetricFamily("sparsex_pages", "Pages of the store by state.", labels=["state"])
        for state in _STATES:
            pages.add_metric([state], self.store[state])
        hits = CounterMetricFamily("sparsex_hit_tokens", "Prompt tokens that lookups found.", labels=["kind"])
        hits.add_metric(["prefix"], self.store["prefix_tokens"])
        hits.add_metric(["approximate_prefix"], self.store["approximate_prefix_tokens"])
        hits.add_metric(["segment"], self.store["segment_tokens"])
        evictions = CounterMetricFamily("sparsex_evictions", "Evicted pages and frozen entries.", labels=["what"])
        evictions.add_metric(["page"], self.store["evictions"])
        evictions.add_metric(["frozen_entry"], self.store["frozen_evictions"])
        compiled = CounterMetricFamily(
            "sparsex_compilations", "Programs compiled, or loaded from disk.", labels=["when"]
        )
        compiled.add_metric(["before_listening"], self.compiled_before)
        compiled.add_metric(["listening"], num_compilations() - self.compiled_before)
        yield from (pages, hits, evictions, compiled)
        yield CounterMetricFamily(
            "sparsex_healed_tokens", "Approximate tokens that were made exact.", value=self.loop.healed_tokens
        )
        yield GaugeMetricFamily(
            "sparsex_approximate_tokens",
            "Tokens that healing would make exact.",
            value=self.store["approximate_tokens"],
        )
        yield CounterMetricFamily("sparsex_lookups", "Lookups in the store.", value=self.store["lookups"])
        yield GaugeMetricFamily("sparsex_queue_requests", "Waiting requests.", value=self.loop.waiting)
        yield GaugeMetricFamily("sparsex_running_requests", "Running requests.", value=self.loop.running)
