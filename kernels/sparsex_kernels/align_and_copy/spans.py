"""Copies whose tokens differ in the layers they move: restored tokens with a patch, and rows that are packed.

Both become one list of entries for the same kernels. An entry moves some layers of one slot to another, out of layers
that may lie higher or lower (`Spans`). A token with patch rows is two entries:

    depth 2 of 5 layers         layers 0 1  from slot `patch.slots`, layers `patch.layers` higher
                                layers 2 3 4  from slot `source`, the same layers

All tokens' sources come first and all patch rows behind them, so tokens that were next to each other stay so, and
kernels find the same runs of slots in both halves.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int

from sparsex_kernels.arguments import CopyArgs, Patch, Spans
from sparsex_kernels.layout import Slots

Entries = Int[Array, "entries"]


def all_layers(store: Array) -> Int[Array, "2"]:
    """The layers of a call that says none."""
    return jnp.array([0, len(store)], jnp.int32)


def with_patch(args: CopyArgs, patch: Patch | None) -> CopyArgs:
    """The arguments of a copy, some of whose rows come from a patch. None: all of them are copied."""
    if patch is None:
        return args
    source, target, shift, spans = patched(args.source, args.target, args.shift, patch, len(args.store))
    return dataclasses.replace(args, source=source, target=target, shift=shift, spans=spans)


def patched(
    source: Slots, target: Slots, shift: Slots, patch: Patch, num_layers: int
) -> tuple[Entries, Entries, Entries, Spans]:
    """Entries of tokens with a patch: source, target and shift of each, and their layers."""
    depth = jnp.clip(patch.depth, 0, num_layers)
    rest, patches = (target >= 0) & (depth < num_layers), (target >= 0) & (depth > 0)
    nothing = jnp.zeros_like(depth)

    def joined(of_source: Array, of_patch: Array) -> Array:
        return jnp.concatenate([of_source, of_patch])

    spans = Spans(
        first=joined(depth, nothing),
        end=joined(jnp.full_like(depth, num_layers), depth),
        offset=joined(nothing, patch.layers),
        as_is=joined(jnp.zeros_like(rest), patch.shift == 0),
    )
    source, target = only(joined(rest, patches), joined(source, patch.slots), joined(target, target))
    return source, target, joined(shift, patch.shift), spans


def packed(source: Slots, target: Slots, layers: Slots, depth: Slots) -> tuple[Slots, Slots, Spans]:
    """Entries of tokens whose first layers go to other layers of their targets: source, target, and their layers."""
    source, target = only((target >= 0) & (depth > 0), source, target)
    return source, target, Spans(layers, layers + depth, -layers, jnp.ones_like(depth, bool))


def only(moved: Bool[Array, "entries"], source: Entries, target: Entries) -> tuple[Entries, Entries]:
    """The slots of entries that move, slot 0 and -1 for the others, whose slots may be anything."""
    return jnp.where(moved, source, 0), jnp.where(moved, target, -1)


def within(spans: Spans, target: Entries, layers: Int[Array, "2"]) -> tuple[Spans, Bool[Array, "entries"]]:
    """The part of every span that lies in these layers, and which entries have one."""
    first, end = jnp.maximum(spans.first, layers[0]), jnp.minimum(spans.end, layers[1])
    return spans._replace(first=first, end=end), (target >= 0) & (first < end)
