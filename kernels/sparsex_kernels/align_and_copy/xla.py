"""Alignment by gather, rotation and scatter, some tokens of all layers at a time."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.align_and_copy.spans import within
from sparsex_kernels.arguments import CopyArgs, Spans
from sparsex_kernels.layout import Store, as_stored, num_tiles, pad_rows, slot_addresses, take_tile
from sparsex_kernels.rope import apply_rope

TOKENS_A_STEP = 256  # bounds the temporary memory


def align_and_copy(args: CopyArgs) -> Store:
    """See `sparsex_kernels.align_and_copy`."""
    args = _moved_first(args)
    step = min(TOKENS_A_STEP, len(args.source))
    source, target = (pad_rows(slots, step, -1) for slots in (args.source, args.target))
    shift = pad_rows(args.shift, step)
    spans = jax.tree.map(lambda x: pad_rows(x, step), args.spans)

    def move(i: Array, store: Array) -> Array:
        old, new, by = take_tile(i, step, source, target, shift)
        own = None if spans is None else Spans(*take_tile(i, step, *spans))
        return _move(store, old, new, by, own, args)

    return lax.fori_loop(0, num_tiles(target, step), move, args.store)


def _moved_first(args: CopyArgs) -> CopyArgs:
    """Entries that move anything before the others, which are padding then."""
    if args.spans is None:
        return args
    _, moved = within(args.spans, args.target, args.layers)
    order = jnp.argsort(~moved, stable=True)
    arrays = args.source, jnp.where(moved, args.target, -1), args.shift, args.spans
    source, target, shift, spans = jax.tree.map(lambda x: x[order], arrays)
    return dataclasses.replace(args, source=source, target=target, shift=shift, spans=spans)


def _move(
    store: Store,
    source: Int[Array, "step"],
    target: Int[Array, "step"],
    shift: Int[Array, "step"],
    spans: Spans | None,
    args: CopyArgs,
) -> Store:
    page, offset = slot_addresses(store, source)
    layer = jnp.arange(len(store))[:, None]
    copied = (layer >= args.layers[0]) & (layer < args.layers[1])
    if spans is None:
        old = store.at[:, page, :, :, offset].get(mode="clip")  # [tokens, layers, 2, kv_heads, head_dim]
    else:
        copied &= (layer >= spans.first) & (layer < spans.end)
        from_layer = (layer + spans.offset).T
        old = store.at[from_layer, page[:, None], :, :, offset[:, None]].get(mode="clip")
    new = jnp.moveaxis(old.at[:, :, 0].set(_rotated(old[:, :, 0], shift, spans, args)), 1, 0)
    page, offset = slot_addresses(store, target)
    layer = jnp.where(copied, layer, len(store))  # behind the last: dropped
    return store.at[layer, page, :, :, offset].set(new, mode="drop")


def _rotated(
    keys: Float[Array, "step layers kv_heads head_dim"], shift: Int[Array, "step"], spans: Spans | None, args: CopyArgs
) -> Float[Array, "step layers kv_heads head_dim"]:
    if args.inv_freq is None:
        return keys
    by = jnp.broadcast_to(shift[:, None], keys.shape[:2])
    rotated = as_stored(apply_rope(keys.astype(jnp.float32), by, args.inv_freq), keys.dtype)
    return rotated if spans is None else jnp.where(spans.as_is[:, None, None, None], keys, rotated)
