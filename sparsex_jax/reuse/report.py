"""What was reused of a prompt and what was computed, as numbers that can be printed or sent."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from sparsex_jax.reuse.excerpt import Excerpt
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.schedule import Phase

# What the tokens of a prompt can be, in the order in which tables and pages show it. A report counts each kind in the
# field of the kind's name and `_tokens`.
KINDS = ("prefix", "approximate_prefix", "reused", "recomputed", "fresh", "omitted")
_OF_EACH_TOKEN = ("kind", "active", "phase_tokens", "layers")
_OF_SOME = ("round", "adapter", "sharing")  # what most requests have none of
_FOUND = {
    TokenKind.PREFIX: "prefix",
    TokenKind.REUSED: "reused",
    TokenKind.FRESH: "fresh",
    TokenKind.APPROXIMATE: "approximate_prefix",
    TokenKind.OMITTED: "omitted",
}


@dataclasses.dataclass(frozen=True)
class ReusedSegment:
    """A reused run of tokens: its place in the prompt, and the position in the donor's prompt where it began.

    Attributes:
      tier: where its KV was when the prompt came: `device`, `host` (memory), `disk` or `peer` (another
        engine of its fleet). The slowest of these, if its parts were in several.
    """

    start: int
    length: int
    donor_start: int
    tier: str = "device"


@dataclasses.dataclass(frozen=True)
class RoundShare:
    """A prompt's part in a round.

    Attributes:
      id, size: as its request named them.
      members: how many were there when the round began.
      late: whether this one came after that, and so was not held.
      waited_s: for how many seconds it was held.
    """

    id: str
    size: int
    members: int
    late: bool
    waited_s: float


@dataclasses.dataclass(frozen=True)
class AdapterShare:
    """The adapter of a prompt.

    Attributes:
      name: as its request named it.
      tokens: on how many tokens of the prompt it acted, or of the excerpt that was answered from. 0 for an activated
        one whose invocation sequence is not in the prompt: the base model answered.
    """

    name: str
    tokens: int


@dataclasses.dataclass(frozen=True)
class SharedKV:
    """What a prompt read of other adapters' work.

    Attributes:
      mode: as its request asked, one of `reuse.adapters.SHARING`.
      cross_adapter_tokens: tokens whose KV is left as somebody else may have computed it: another adapter, or the model
        without adapters. They are among those of the approximate prefix and of the reused segments, and exact for
        nobody.
      unseen_tokens: how many of these it ran through all layers, for what its own adapter adds to values
        (`base_shared`). 0 in the other modes, and once the adapter has seen them.
    """

    mode: str
    cross_adapter_tokens: int
    unseen_tokens: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class ComputedLayers:
    """The layers from `start` up to `end`, and whether they computed each prompt token: bool `[tokens]`."""

    start: int
    end: int
    computed: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """How a prompt was prefilled. Printed, it leaves out the arrays.

    Attributes:
      prompt_tokens: the tokens of all `KINDS` together.
      prefix_tokens: those of an exact prefix that was found.
      approximate_prefix_tokens: those behind it of an approximate prefix that was found.
      reused_tokens: those found in segments whose KV was pasted and, from the boundary layer on, left as it is.
      recomputed_tokens: those found in segments, but computed from the boundary layer on.
      omitted_tokens: those that were left out of the excerpt which was answered from.
      fresh_tokens: the others. They were computed.
      active_tokens: tokens that were computed from the boundary layer on.
      boundary_layer: `l*`: layers before it computed every token that is not in the prefix.
      segments: the reused runs, in order.
      computed_fraction: token-layers that were computed, those of a signal's own pass included, as a share of all
        token-layers of the prompt.
      confidence: of what a signal saw in the reused tokens where it first looked, the share of those that were computed
        from there on, from 0 to 1. 1 where every reused token was computed in every layer, or there was none. None
        where tokens were left out and no signal looked, and behind an approximate prefix if all else was computed.
        Of an excerpt: the share of the probe's focus that is on what was kept.
      probe_layers: how many layers a probe ran the fresh tokens through before an excerpt was made. 0: there was none.
      ttft_s: seconds from the call to the first token (or its logits) on the host.
      restored_tokens: how many were loaded into the store for it, from host memory or the disk.
      prefix_tier: where the prefix's KV was when the prompt came, as a segment's `tier`. None: no prefix was found.
      round: its part in a round. None: it was of none.
      adapter: which one it ran with. None: the base model's weights alone.
      sharing: what it read of other adapters' work, if it asked for that.
      kind: a `TokenKind` for each prompt token, uint8 `[tokens]`.
      active: whether each prompt token was computed from the boundary layer on, bool `[tokens]`.
      phase_tokens: how many tokens each phase of the schedule computed.
      layers: what each run of layers computed, from the first layer to the last, those of a probe included. What a
        signal's own pass over the fresh tokens computed is not among it.
    """

    prompt_tokens: int
    prefix_tokens: int
    approximate_prefix_tokens: int
    reused_tokens: int
    recomputed_tokens: int
    fresh_tokens: int
    omitted_tokens: int
    active_tokens: int
    boundary_layer: int
    segments: tuple[ReusedSegment, ...]
    computed_fraction: float
    confidence: float | None
    probe_layers: int
    ttft_s: float
    kind: np.ndarray = dataclasses.field(repr=False)
    active: np.ndarray = dataclasses.field(repr=False)
    phase_tokens: tuple[int, ...]
    restored_tokens: int = 0
    prefix_tier: str | None = None
    round: RoundShare | None = None
    adapter: AdapterShare | None = None
    sharing: SharedKV | None = None
    layers: tuple[ComputedLayers, ...] = ()

    def tokens_by_kind(self) -> dict[str, int]:
        """The number of tokens of each of the `KINDS`. Their sum is `prompt_tokens`."""
        return {kind: getattr(self, f"{kind}_tokens") for kind in KINDS}

    def in_words(self) -> str:
        """The number of tokens, and of each kind that there are any of: `90 tokens: 60 reused, 30 fresh`."""
        counts = self.tokens_by_kind().items()
        return f"{self.prompt_tokens} tokens: {', '.join(f'{n} {words_of(kind)}' for kind, n in counts if n)}"

    def tiers_in_words(self) -> str:
        """What was not on the device when the prompt came: `prefix from disk, 2 segments from host`. Empty: nothing."""
        counts = collections.Counter(each.tier for each in self.segments)
        found = [(f"{counts[tier]} segments", tier) for tier in sorted(counts)]
        parts = [("prefix", self.prefix_tier), *found]
        return ", ".join(f"{what} from {tier}" for what, tier in parts if tier not in (None, "device"))

    def to_dict(self) -> dict[str, Any]:
        """Everything but what is known of each token and each phase, ready for JSON."""
        names = [each.name for each in dataclasses.fields(self) if each.name not in (*_OF_EACH_TOKEN, *_OF_SOME)]
        fields = {name: getattr(self, name) for name in names}
        of_some = {name: dataclasses.asdict(getattr(self, name)) for name in _OF_SOME if getattr(self, name)}
        return fields | {"segments": [dataclasses.asdict(segment) for segment in self.segments]} | of_some


def make_report(
    prompt: PromptMap,
    phases: Sequence[Phase],
    num_layers: int,
    ttft_s: float,
    computed: Bool[np.ndarray, "phases tokens"] | None = None,
    confidence: float | None = None,
) -> Report:
    """The report of one request.

    Args:
      ttft_s: see `Report`.
      computed: which tokens each phase computed. None, where nothing ran: those that it forces. How many a signal adds
        to them is counted then, as the least that it may add.
      confidence: of the scores where a signal looked, the share of the tokens that were computed. None: none looked.
    """
    ran = computed is not None
    masks = np.stack([phase.forced for phase in phases]) if computed is None else computed
    counts = masks.sum(1).tolist() if ran else [phase.least for phase in phases]
    ends = [*(phase.start for phase in phases[1:]), num_layers]
    token_layers = sum(n * (end - phase.start) for n, phase, end in zip(counts, phases, ends, strict=True))
    active = masks[min(1, len(phases) - 1)]
    return Report(
        prompt_tokens=len(prompt),
        **_counts(prompt, active),
        active_tokens=counts[min(1, len(phases) - 1)],
        boundary_layer=ends[0] if counts[0] >= prompt.computed.sum() else 0,
        segments=_segments(prompt),
        computed_fraction=(token_layers + probed(prompt, phases)) / (num_layers * len(prompt)),
        confidence=1.0 if ran and _is_complete(prompt, masks) else confidence,
        probe_layers=0,
        ttft_s=ttft_s,
        kind=prompt.kind,
        active=active,
        phase_tokens=tuple(counts),
        prefix_tier=prompt.prefix_tier if prompt.num_prefix else None,
        layers=tuple(
            ComputedLayers(phase.start, end, mask) for phase, end, mask in zip(phases, ends, masks, strict=True)
        ),
    )


def _segments(prompt: PromptMap) -> tuple[ReusedSegment, ...]:
    return tuple(ReusedSegment(each.start, each.length, each.donor_start, each.tier) for each in prompt.segments)


def report_of_excerpt(whole: PromptMap, excerpt: Excerpt, answered: Report, num_layers: int) -> Report:
    """The report of a prompt that was answered from an excerpt.

    Args:
      whole: the prompt as it was probed.
      answered: how the excerpt was prefilled.
    """
    kind, active = np.full(len(whole), TokenKind.OMITTED, np.uint8), np.zeros(len(whole), bool)
    computed = np.where(whole.reused, TokenKind.REUSED, TokenKind.FRESH)[excerpt.keep]
    kind[excerpt.keep] = np.where(answered.kind == TokenKind.PREFIX, TokenKind.PREFIX, computed)
    active[excerpt.keep] = answered.active
    work = whole.fresh.sum() * excerpt.probe_layers / num_layers + answered.computed_fraction * answered.prompt_tokens
    return dataclasses.replace(
        answered,
        prompt_tokens=len(whole),
        **_counts(dataclasses.replace(whole, kind=kind), active),
        segments=_segments(whole),
        computed_fraction=float(work / len(whole)),
        confidence=excerpt.confidence,
        probe_layers=excerpt.probe_layers,
        kind=kind,
        active=active,
        layers=tuple(_with_probe(whole, excerpt, answered.layers)),
    )


def _with_probe(whole: PromptMap, excerpt: Excerpt, answered: Sequence[ComputedLayers]) -> Iterator[ComputedLayers]:
    """What the layers computed of the whole prompt: the probe the fresh tokens, the excerpt its own."""
    for layers in answered:
        computed = np.zeros(len(whole), bool)
        computed[excerpt.keep] = layers.computed
        cut = min(max(excerpt.probe_layers, layers.start), layers.end)
        if layers.start < cut:
            yield ComputedLayers(layers.start, cut, computed | whole.fresh)
        if cut < layers.end:
            yield ComputedLayers(cut, layers.end, computed)


def _is_complete(prompt: PromptMap, computed: Bool[np.ndarray, "phases tokens"]) -> bool:
    """Whether nothing that was found is approximate: each reused token was computed in every layer."""
    return bool(computed[:, prompt.reused].all()) and not prompt.approximate.any()


def words_of(kind: str) -> str:
    """The name of one of the `KINDS` for people to read."""
    return kind.replace("_", " ")


def found_as(kind: UInt8[np.ndarray, "tokens"]) -> np.ndarray:
    """The name of what each token was found as, one of `KINDS`: str `[tokens]`.

    A token of a segment is `reused` here, whether it was recomputed or not.

    Args:
      kind: a `TokenKind` for each token.
    """
    return np.array([_FOUND[each] for each in TokenKind])[kind]


def token_kinds(kind: UInt8[np.ndarray, "tokens"], active: Bool[np.ndarray, "tokens"]) -> np.ndarray:
    """As `found_as`, but `recomputed` where a token of a segment was computed from the boundary layer on."""
    return np.where((kind == TokenKind.REUSED) & active, "recomputed", found_as(kind))


def _counts(prompt: PromptMap, active: Bool[np.ndarray, "tokens"]) -> dict[str, Any]:
    recomputed = int((prompt.reused & active).sum())
    found = np.bincount(prompt.kind, minlength=len(TokenKind)).tolist()
    return {
        "prefix_tokens": found[TokenKind.PREFIX],
        "approximate_prefix_tokens": found[TokenKind.APPROXIMATE],
        "reused_tokens": found[TokenKind.REUSED] - recomputed,
        "recomputed_tokens": recomputed,
        "fresh_tokens": found[TokenKind.FRESH],
        "omitted_tokens": found[TokenKind.OMITTED],
    }


def probed(prompt: PromptMap, phases: Sequence[Phase]) -> int:
    """Token-layers that signals ran the fresh tokens through. Before a phase that leaves nothing out, none runs."""
    pairs = itertools.pairwise(phases)
    layers = sum(phase.probe_layers for before, phase in pairs if phase.can_leave_out(before.size))
    return layers * int(prompt.fresh.sum())
