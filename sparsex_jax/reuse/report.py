"""What a request did with the cache, as numbers that can be printed or sent."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from sparsex_jax.reuse.methods import Phase
from sparsex_jax.reuse.prompt import Kind, PromptMap


@dataclasses.dataclass(frozen=True)
class ReusedSegment:
    """A reused run: where it is in the prompt, and the position its KV was computed at."""

    start: int
    length: int
    donor_start: int

    @property
    def donor_positions(self) -> range:
        return range(self.donor_start, self.donor_start + self.length)


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """How a prompt was prefilled.

    Attributes:
      prompt_tokens: prefix + reused + fresh tokens.
      active_tokens: tokens computed from the boundary layer on.
      boundary_layer: `l*`: layers before it computed every non-prefix token.
      computed_fraction: token-layers computed, those of a signal's own pass included, as a share of the prompt's.
      ttft_s: seconds from the call to the first token (or its logits) on the host.
      kind: a `Kind` for each prompt token; active: whether it was computed from the boundary on.
    """

    prompt_tokens: int
    prefix_tokens: int
    reused_tokens: int
    fresh_tokens: int
    active_tokens: int
    boundary_layer: int
    segments: tuple[ReusedSegment, ...]
    computed_fraction: float
    ttft_s: float
    kind: np.ndarray
    active: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-token arrays, ready for JSON."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("kind", "active")}
        return fields | {"segments": [dataclasses.asdict(segment) for segment in self.segments]}


def make_report(
    prompt: PromptMap,
    phases: Sequence[Phase],
    num_layers: int,
    active: Bool[np.ndarray, "tokens"],
    ttft_s: float,
    counts: Sequence[int] | None = None,
) -> Report:
    """The report of one request.

    Args:
      active: which tokens of the prompt were computed from the boundary layer on.
      counts: how many tokens each phase computed; None, where nothing ran: as many as it may.
    """
    counts = [phase.size for phase in phases] if counts is None else counts
    ends = [*(phase.start for phase in phases[1:]), num_layers]
    token_layers = sum(n * (end - phase.start) for n, phase, end in zip(counts, phases, ends, strict=True))
    everyone = counts[0] == prompt.computed.sum()
    return Report(
        prompt_tokens=len(prompt),
        prefix_tokens=int((prompt.kind == Kind.PREFIX).sum()),
        reused_tokens=int(prompt.reused.sum()),
        fresh_tokens=int(prompt.fresh.sum()),
        active_tokens=int(counts[min(1, len(counts) - 1)]),
        boundary_layer=ends[0] if everyone else 0,
        segments=tuple(ReusedSegment(s.start, s.length, s.donor_start) for s in prompt.segments),
        computed_fraction=(int(token_layers) + probed(prompt, phases)) / (num_layers * len(prompt)),
        ttft_s=ttft_s,
        kind=prompt.kind,
        active=active,
    )


def probed(prompt: PromptMap, phases: Sequence[Phase]) -> int:
    """Token-layers that signals ran the fresh tokens through. A phase that narrows nothing asks no signal."""
    pairs = itertools.pairwise(phases)
    layers = sum(phase.probe_layers for before, phase in pairs if phase.can_leave_out(before.size))
    return layers * int(prompt.fresh.sum())
