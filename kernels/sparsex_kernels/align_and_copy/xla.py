"""Alignment by gather, rotation and scatter, some tokens of all layers at a time."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import Store, as_stored, num_tiles, pad_rows, slot_addresses, take_tile
from sparsex_kernels.rope import apply_rope

TOKENS_A_STEP = 256  # bounds the temporary memory


def align_and_copy(args: CopyArgs) -> Store:
    """See `sparsex_kernels.align_and_copy`."""
    step = min(TOKENS_A_STEP, len(args.source))
    source, target = (pad_rows(slots, step, -1) for slots in (args.source, args.target))
    shift = pad_rows(args.shift, step)

    def move(i: Array, store: Array) -> Array:
        old, new, by = take_tile(i, step, source, target, shift)
        return _move(store, old, new, by, args)

    return lax.fori_loop(0, num_tiles(target, step), move, args.store)


def _move(
    store: Store,
    source: Int[Array, "step"],
    target: Int[Array, "step"],
    shift: Int[Array, "step"],
    args: CopyArgs,
) -> Store:
    page, offset = slot_addresses(store, source)
    old = store.at[:, page, :, :, offset].get(mode="clip")  # [tokens, layers, 2, kv_heads, head_dim]
    by = jnp.broadcast_to(shift[:, None], old.shape[:2])
    keys = as_stored(apply_rope(old[:, :, 0].astype(jnp.float32), by, args.inv_freq), store.dtype)
    page, offset = slot_addresses(store, target)
    layer = jnp.arange(len(store))[:, None]
    layer = jnp.where(
        (layer >= args.layers[0]) & (layer < args.layers[1]), layer, len(store)
    )  # behind the last: dropped
    new = jnp.moveaxis(old.at[:, :, 0].set(keys), 1, 0)
    return store.at[layer, page, :, :, offset].set(new, mode="drop")
