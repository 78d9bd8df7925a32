"""Copies of Y, which adapters have beside K and V. It has no position, so its bits do not change."""

import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.align_and_copy.spans import within
from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import LowRankStore, num_tiles, pad_rows, take_tile

TOKENS_A_STEP = 256  # bounds the temporary memory


def reference(args: CopyArgs) -> LowRankStore:
    """Token by token."""
    page_size, layer = args.store.shape[2], jnp.arange(len(args.store))
    first, end, offset = _layers(args)

    def move(i: Array, store: Array) -> Array:
        copied = (layer >= first[i]) & (layer < end[i]) & (args.target[i] >= 0)
        source = jnp.clip(layer + offset[i], 0, len(store) - 1)
        rows = store[source, args.source[i] // page_size, args.source[i] % page_size]
        moved = store.at[:, args.target[i] // page_size, args.target[i] % page_size].set(rows)
        return jnp.where(copied[:, None, None, None], moved, store)

    return lax.fori_loop(0, len(args.source), move, args.store)


def xla(args: CopyArgs) -> LowRankStore:
    """By gather and scatter, some tokens of all layers at a time."""
    first, end, offset = _layers(args)
    moved = (args.target >= 0) & (first < end)
    order = jnp.argsort(~moved, stable=True)  # what does not move stands at the end, and costs nothing
    entries = args.source, jnp.where(moved, args.target, -1), first, end, offset
    step = min(TOKENS_A_STEP, len(args.source))
    source, target, *layers = (pad_rows(x[order], step, -1) for x in entries)

    def move(i: Array, store: Array) -> Array:
        return _move(store, *take_tile(i, step, source, target, *layers))

    return lax.fori_loop(0, num_tiles(target, step), move, args.store)


def _layers(args: CopyArgs) -> tuple[Array, Array, Array]:
    """Of each entry, the first layer that it moves, the one behind the last, and where it takes them from."""
    if args.spans is not None:
        spans, _ = within(args.spans, args.target, args.layers)
        return spans.first, spans.end, spans.offset
    first, end = (jnp.broadcast_to(layer, args.source.shape) for layer in args.layers)
    return first, end, jnp.zeros_like(args.source)


def _move(store: Array, source: Array, target: Array, first: Array, end: Array, offset: Array) -> Array:
    layers, pages, page_size, _ = store.shape
    layer = jnp.arange(layers)
    rows = store.at[layer + offset[:, None], (source // page_size)[:, None], (source % page_size)[:, None]]
    copied = (layer >= first[:, None]) & (layer < end[:, None]) & (target >= 0)[:, None]
    page = jnp.where(copied, (target // page_size)[:, None], pages)  # behind the last: dropped
    return store.at[layer, page, (target % page_size)[:, None]].set(rows.get(mode="clip"), mode="drop")


# Where others are preferred, they are XLA's too.
IMPLEMENTATIONS = {"reference": reference, **dict.fromkeys(("xla", "hopper", "triton", "tpu"), xla)}
