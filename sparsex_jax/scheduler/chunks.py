"""One sequence's prefill in several plans, so that a long prompt does not stall the others.

    prompt   | prefix | fresh, fresh, fresh ... | reused  fresh  reused  fresh | answer so far |
    stages            | chunk | chunk |  chunk  |           the rest           |     chunk     |

What stands before the first reused token is computed in full, whatever comes behind it, since attention is causal.
So it can be cut anywhere: each chunk is a plain plan whose prefix is what the chunks before it computed. Only full
chunks are cut off in front of a reused token: every plan reads all weights, and a few tokens are not worth that.

A probe is one plan: what stands before the first reused token need not go through all layers, nor does it look at
anything that may be left out.

The rest is one plan. Which of its reused tokens are recomputed depends on the attention of *all* its fresh tokens at
the boundary layer; cut in two, the first part would choose without the second part's queries, and most often the
question stands at the end. The schedule is made for the whole prompt before anything is cut, so what is forced next
to the seam stays forced, and the logits are those of a single plan. If the rest has more rows than the token budget,
it is cut by layers instead of tokens: `layers_within` says how many of them cost what one full chunk costs.

A token of the prefix that an adapter has not seen runs through all layers, where it stands (`RequestPlan.unseen`). In
such plans, which reuse no segments, chunks are of those tokens first and then of what is fresh.

A sequence that was preempted while it decoded has an answer behind its prompt. Its tokens were decoded one by one,
each through all layers over the KV that was there: plain chunks again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int32, Int64

from sparsex_jax.cache import Segment
from sparsex_jax.reuse.methods import Phase
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap, TokenKind


def stages(plan: RequestPlan, tokens: Int32[np.ndarray, "tokens"], most: int) -> list[RequestPlan]:
    """The plans that prefill `tokens`, one after the other. The first makes all copies.

    Args:
      plan: of the prompt, as its method made it.
      tokens: the prompt, or the prompt and the answer so far.
      most: rows of a chunk, which is the token budget of a plan.
    """
    prompt, pages = plan.prompt, plan.pages
    first = prompt.num_prefix
    if not prompt.reused.any():
        unseen = np.zeros(0, np.int64) if plan.unseen is None else np.flatnonzero(plan.unseen)
        parts = list(_chunks(tokens, np.append(unseen, np.arange(first, len(tokens))), pages, most))
    elif plan.num_rows <= most or plan.probe:
        parts = [plan]
    else:
        lead = first + (prompt.first_reused - first) // most * most
        parts = [*_chunks(tokens, np.arange(first, lead), pages, most), _behind(plan, lead)]
    if prompt.reused.any():
        parts += _chunks(tokens, np.arange(len(prompt), len(tokens)), pages, most)
    return [_part(plan, part, copies=() if i else plan.copies) for i, part in enumerate(parts)]


def token_layers(phases: Sequence[Phase], num_layers: int) -> int:
    """How many token-layers these phases compute at most. Rows that a signal scores count as one layer more.

    8 rows in layers 0 and 1, of which a signal chooses 2 that go through layers 2 and 3:

    >>> token_layers([Phase(0, np.ones(8, bool)), Phase(2, np.zeros(8, bool), "key_mass", budget=2)], 4)
    28
    """
    scored = [before.size for before, phase in itertools.pairwise(phases) if phase.signal and phase.start < num_layers]
    return sum(_rows_by_layer(phases, 0, num_layers)) + sum(scored)


def layers_within(phases: Sequence[Phase], first: int, num_layers: int, token_layers: int) -> int:
    """How many layers from `first` on compute at most this many token-layers; 1 at least.

    A phase counts with the rows that it has at most. 8 rows in layers 0 and 1, then 2 rows; 20 token-layers:

    >>> phases = [Phase(0, np.ones(8, bool)), Phase(2, np.arange(8) < 2)]
    >>> [layers_within(phases, first, 6, 20) for first in range(6)]
    [4, 5, 4, 3, 2, 1]
    """
    rows = _rows_by_layer(phases, first, num_layers)
    return max(1, int((np.cumsum(rows) <= token_layers).sum()))


def _rows_by_layer(phases: Sequence[Phase], first: int, num_layers: int) -> list[int]:
    """How many rows each layer from `first` on computes at most."""
    ends = [*(phase.start for phase in phases[1:]), num_layers]
    spans = (range(max(phase.start, first), min(end, num_layers)) for phase, end in zip(phases, ends, strict=True))
    return [phase.size for phase, span in zip(phases, spans, strict=True) for _ in span]


def _part(whole: RequestPlan, part: RequestPlan, copies: tuple[Segment, ...]) -> RequestPlan:
    """A part of a plan, with what the whole says of its tokens."""
    unseen = None
    if whole.unseen is not None:
        unseen = np.zeros(len(part.prompt), bool)
        unseen[: len(whole.unseen)] = whole.unseen[: len(unseen)]
    return dataclasses.replace(part, copies=copies, adapter=whole.adapter, unseen=unseen)


def _chunks(
    tokens: np.ndarray, places: Int64[np.ndarray, "n"], pages: Sequence[int], most: int
) -> Iterator[RequestPlan]:
    """Plain plans of the tokens at these places, in order, each behind the one before it."""
    for begin in range(0, len(places), most):
        own = places[begin : begin + most]
        kind = np.full(own[-1] + 1, TokenKind.PREFIX, np.uint8)
        kind[own] = TokenKind.FRESH
        prompt = PromptMap(tokens[: len(kind)], kind)
        yield RequestPlan(prompt, (Phase(0, prompt.computed),), pages)


def _behind(plan: RequestPlan, lead: int) -> RequestPlan:
    """The same plan where the first `lead` tokens are in the store by now."""
    kind = plan.prompt.kind.copy()
    kind[plan.prompt.num_prefix : lead] = TokenKind.PREFIX
    prompt = dataclasses.replace(plan.prompt, kind=kind)
    phases = tuple(dataclasses.replace(phase, forced=phase.forced & prompt.computed) for phase in plan.phases)
    return dataclasses.replace(plan, prompt=prompt, phases=phases)
