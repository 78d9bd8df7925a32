"""What a request did with the cache, as numbers that can be printed or sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsex_jax.methods import Phase
from sparsex_jax.prompt import Kind, PromptMap


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
      computed_fraction: token-layers computed, as a share of all of the prompt's.
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
    prompt: PromptMap, phases: Sequence[Phase], num_layers: int, active: np.ndarray, ttft_s: float
) -> Report:
    """The report of one request.

    Args:
      active: which tokens of the prompt were computed from the boundary layer on.
    """
    ends = [*(phase.start for phase in phases[1:]), num_layers]
    token_layers = sum(phase.size * (end - phase.start) for phase, end in zip(phases, ends, strict=True))
    everyone = phases[0].size == prompt.computed.sum()
    return Report(
        prompt_tokens=len(prompt),
        prefix_tokens=int((prompt.kind == Kind.PREFIX).sum()),
        reused_tokens=int(prompt.reused.sum()),
        fresh_tokens=int(prompt.fresh.sum()),
        active_tokens=phases[min(1, len(phases) - 1)].size,
        boundary_layer=ends[0] if everyone else 0,
        segments=tuple(ReusedSegment(s.start, s.length, s.donor_start) for s in prompt.segments),
        computed_fraction=token_layers / (num_layers * len(prompt)),
        ttft_s=ttft_s,
        kind=prompt.kind,
        active=active,
    )
