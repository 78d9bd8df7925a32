"""The server's metrics, in Prometheus' text format.

Nothing here waits for the loop. What requests did is counted when their events come, also those that come after a
client went away; the state of the store is what the loop published last. Every series of a labelled counter is there
from the start, so that `rate` sees its first increase.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.reuse.report import KINDS

if TYPE_CHECKING:
    from sparsex_jax.cache import CacheStats
    from sparsex_jax.reuse.report import Report
    from sparsex_jax.scheduler.loop import Event, LoopStats
    from sparsex_jax.scheduler.tier_stats import TierStats
    from sparsex_jax.serving.progress import Progress

OTHER = "other"  # the endpoint of requests that no route takes
FINISH_REASONS = ("stop", "length", "cancelled", "error", "timeout")
_STATUSES = (200, 400, 401, 403, 404, 405, 408, 409, 413, 415, 429, 499, 500, 502, 503, 504, 507)
_FOUND = ("prefix", "approximate_prefix", "segment")
_REQUEST_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_STATES = ("free", "active", "frozen", "pinned", "base", "spare", "cached")


class Metrics:
    """The metrics of one server, in a registry of their own. For the event loop's thread."""

    def __init__(self, build: dict[str, str], page_size: int) -> None:
        """
        Args:
          build: what runs here, for `sparsex_build_info`.
          page_size: tokens in a page of the store.
        """
        self._registry = CollectorRegistry()
        self._snapshot = _Snapshot()
        self._registry.register(self._snapshot)
        self._gauge("build_info", "What runs here; always 1.", *build).labels(**build).set(1)
        self._gauge("page_size_tokens", "Tokens in a page of the store.").set(page_size)
        self._request_metrics()
        self._prompt_metrics()
        self._requests = self._counter("requests", "Responses by endpoint and status.", "endpoint", "status")

    def _request_metrics(self) -> None:
        self._ttft = self._histogram("time_to_first_token_seconds", "From submission to the first token.", _REQUEST_S)
        self._per_token = self._histogram(
            "time_per_output_token_seconds", "Seconds for each token of an answer after its first tokens.", _TOKEN_S
        )
        self._queue = self._histogram("queue_time_seconds", "From submission to the first admission.", _REQUEST_S)
        self._held = self._histogram("round_wait_seconds", "From submission to the beginning of the round.", _REQUEST_S)
        self._total = self._histogram("e2e_request_latency_seconds", "From submission to the last token.", _REQUEST_S)
        self._finished = self._counter(
            "answers", "Prompts that ended, by finish reason. A text to keep ends with length.", "finish_reason"
        )
        self._new_tokens = self._counter("generated_tokens", "Tokens generated.")
        self._adapter_prompts = self._counter(
            "adapter_prompts", "Prompts that were prefilled with an adapter.", "adapter"
        )
        _start(self._finished, FINISH_REASONS)

    def _prompt_metrics(self) -> None:
        self._share = self._histogram("computed_ratio", "Computed share of a prompt's token-layers.", _SHARES)
        self._prompt_tokens = self._counter("prompt_tokens", f"Prompt tokens that are {', '.join(KINDS)}.", "kind")
        self._hit_tokens = self._counter("hit_tokens", "Those of the prompt tokens that lookups found.", "kind")
        _start(self._prompt_tokens, KINDS)
        _start(self._hit_tokens, _FOUND)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sparsex_{name}", text, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sparsex_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"sparsex_{name}", text, labels, registry=self._registry)

    def add(self, collector: Collector) -> None:
        """Show what another part of the server counts, too."""
        self._registry.register(collector)

    def expect(self, endpoints: Iterable[str]) -> None:
        """Start the counters of these endpoints, and of requests to no endpoint, at 0."""
        _start(self._requests, dict.fromkeys((*endpoints, OTHER)), _STATUSES)

    def expect_adapter(self, name: str) -> None:
        """Start the counter of an adapter at 0, unless it goes on."""
        self._adapter_prompts.labels(name)

    def listening(self) -> None:
        """Count compilations from now on as `listening`, because requests wait for them."""
        self._snapshot.compiled_before = num_compilations()

    def answered(self, endpoint: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(endpoint, str(status)).inc()

    def heard(self, event: Event, progress: Progress) -> None:
        """Count an event of a submitted job. `progress` has it already."""
        if event.report is not None:
            self._prefilled(event.report)
        if event.token_ids:
            self._generated(len(event.token_ids), progress)
        if event.finish_reason is not None:
            self._ended(progress)

    def _prefilled(self, report: Report) -> None:
        self._share.observe(report.computed_fraction)
        if report.adapter is not None:
            self._adapter_prompts.labels(report.adapter.name).inc()
        if report.round is not None:
            self._held.observe(report.round.waited_s)
        for kind, count in report.tokens_by_kind().items():
            self._prompt_tokens.labels(kind).inc(count)
        segments = sum(segment.length for segment in report.segments)
        found = (report.prefix_tokens, report.approximate_prefix_tokens, segments)
        for kind, count in zip(_FOUND, found, strict=True):
            self._hit_tokens.labels(kind).inc(count)

    def _generated(self, tokens: int, progress: Progress) -> None:
        self._new_tokens.inc(tokens)
        if progress.new_tokens == tokens:  # the first ones
            assert progress.ttft_s is not None
            self._ttft.observe(progress.ttft_s)

    def _ended(self, progress: Progress) -> None:
        self._finished.labels(progress.finish_reason).inc()
        observed = (
            (self._queue, progress.queue_s),
            (self._total, progress.total_s),
            (self._per_token, progress.seconds_per_token()),
        )
        for histogram, seconds in observed:
            if seconds is not None:
                histogram.observe(seconds)

    def render(self, store: CacheStats, loop: LoopStats, tiers: TierStats | None = None) -> bytes:
        """All metrics in Prometheus' text format.

        Args:
          store: what `Loop.snapshot` gives.
          loop: what `Loop.stats` gives.
          tiers: what `Loop.tiers` gives.
        """
        self._snapshot.store, self._snapshot.loop, self._snapshot.tiers = store, loop, tiers
        return generate_latest(self._registry)


def _start(counter: Counter, *labels: Iterable[object]) -> None:
    """Make the series of all these labels' values, which are 0."""
    for values in itertools.product(*labels):
        counter.labels(*map(str, values))


class _Snapshot(Collector):
    """The counts of the store and the loop when `render` was called last."""

    store: CacheStats | None = None
    loop: LoopStats | None = None
    tiers: TierStats | None = None
    compiled_before = 0

    def collect(self) -> Iterator[Metric]:
        if self.store is not None and self.loop is not None:
            yield from self._of_store(self.store)
            yield from self._of_loop(self.loop)
            yield from self._of_tiers(self.tiers) if self.tiers is not None else ()
            yield self._compilations()

    def _of_store(self, store: CacheStats) -> Iterator[Metric]:
        pages = GaugeMetricFamily("sparsex_pages", "Pages of the store by state.", labels=["state"])
        for state in _STATES:
            pages.add_metric([state], getattr(store, state))
        evictions = CounterMetricFamily("sparsex_evictions", "What was evicted.", labels=["what"])
        evictions.add_metric(["page"], store.evictions)
        approximate, text = store.approximate_tokens, "Tokens that healing would make exact."
        yield from (pages, evictions, GaugeMetricFamily("sparsex_approximate_tokens", text, value=approximate))
        yield from self._of_mirrors(store)
        yield GaugeMetricFamily("sparsex_pins", "Pins: prompts and answers that stay for a time.", value=store.pins)
        yield CounterMetricFamily("sparsex_lookups", "Prompts that were looked up in the store.", value=store.lookups)

    def _of_mirrors(self, store: CacheStats) -> Iterator[Metric]:
        derived = "Pages that are stored as rows of other pages."
        yield GaugeMetricFamily("sparsex_derived_pages", derived, value=store.derived)
        saved = "Pages more that the store would need without derived ones."
        yield GaugeMetricFamily("sparsex_saved_pages", saved, value=store.saved)
        rows = "Rows of single layers that derived pages have of their own."
        yield GaugeMetricFamily("sparsex_patch_rows", rows, value=store.patch_rows)
        restored = "Derived pages that were restored for a prompt."
        yield CounterMetricFamily("sparsex_restored_pages", restored, value=store.restored_pages)

    def _of_loop(self, loop: LoopStats) -> Iterator[Metric]:
        healed = "Approximate tokens that were made exact."
        yield CounterMetricFamily("sparsex_healed_tokens", healed, value=loop.healed_tokens)
        remade = "Tokens that were prefilled to make remembered texts again."
        yield CounterMetricFamily("sparsex_remade_tokens", remade, value=loop.remade_tokens)
        better = "Remembered texts that were made again."
        yield CounterMetricFamily("sparsex_remade_texts", better, value=loop.remade_texts)
        yield CounterMetricFamily("sparsex_preemptions", "How often a request was preempted.", value=loop.preempted)
        rounds = CounterMetricFamily("sparsex_rounds", "Rounds that began.", labels=["members"])
        rounds.add_metric(["all"], loop.complete_rounds)
        rounds.add_metric(["some"], loop.cut_short_rounds)
        yield rounds
        yield GaugeMetricFamily("sparsex_held_requests", "Waiting requests that are held for a round.", value=loop.held)
        yield GaugeMetricFamily("sparsex_queue_requests", "Waiting requests.", value=loop.waiting)
        yield GaugeMetricFamily("sparsex_running_requests", "Running requests.", value=loop.running)

    def _of_tiers(self, tiers: TierStats) -> Iterator[Metric]:
        size = GaugeMetricFamily("sparsex_tier_bytes", "Bytes of KV in the tiers below the store.", labels=["tier"])
        limit = GaugeMetricFamily("sparsex_tier_limit_bytes", "Bytes of KV that a tier may have.", labels=["tier"])
        blocks = GaugeMetricFamily("sparsex_tier_blocks", "Blocks in the tiers below the store.", labels=["tier"])
        hits = CounterMetricFamily("sparsex_tier_hit_tokens", "Tokens that prompts got from a tier.", labels=["tier"])
        for tier in ("host", "disk"):
            size.add_metric([tier], getattr(tiers, f"{tier}_bytes"))
            limit.add_metric([tier], getattr(tiers, f"{tier}_limit"))
            blocks.add_metric([tier], getattr(tiers, f"{tier}_blocks"))
        for tier in ("host", "disk", "peer"):
            hits.add_metric([tier], getattr(tiers.counts, f"{tier}_tokens"))
        moved = CounterMetricFamily("sparsex_tier_moved_bytes", "Bytes of KV that moved between tiers.", labels=["way"])
        for way in ("spilled", "loaded", "read", "fetched"):
            moved.add_metric([way], getattr(tiers.counts, f"{way}_bytes"))
        evictions = CounterMetricFamily("sparsex_tier_evictions", "Blocks that host memory lost.")
        evictions.add_metric([], tiers.counts.evictions)
        refused = CounterMetricFamily("sparsex_tier_refused_blocks", "Blocks that host memory had no room for.")
        refused.add_metric([], tiers.counts.refused)
        lost = CounterMetricFamily("sparsex_tier_lost_blocks", "Blocks that the disk should have had, whole.")
        lost.add_metric([], tiers.counts.lost)
        moving = GaugeMetricFamily("sparsex_tier_moving_blocks", "Blocks on their way down.", value=tiers.moving_blocks)
        yield from (size, limit, blocks, hits, moved, evictions, refused, lost, moving)

    def _compilations(self) -> Metric:
        compiled = CounterMetricFamily(
            "sparsex_compilations", "Programs compiled, or loaded from disk.", labels=["when"]
        )
        compiled.add_metric(["before_listening"], self.compiled_before)
        compiled.add_metric(["listening"], num_compilations() - self.compiled_before)
        return compiled
