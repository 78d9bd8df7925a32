"""Shapes of the paged store and of rows, and addresses in the store: from rows and slots to pages and offsets."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Store = Float[Array, "layers pages 2 kv_heads page_size head_dim"]  # index 0 of the third axis is K, 1 is V
LowRankStore = Float[Array, "layers pages page_size width"]  # beside a `Store`, on the same pages; heads share it
PageTables = Int[Array, "requests max_pages"]
Queries = Float[Array, "rows q_heads head_dim"]
KVRows = Float[Array, "rows kv_heads head_dim"]  # K or V of new rows
RowInts = Int[Array, "rows"]  # positions or request indices
Slots = Int[Array, "tokens"]  # page * page_size + offset, or a shift of positions for each
Window = Int[Array, ""]  # keys that a row sees at most, its own among them
Power = int | Int[Array, ""]  # of attention weights; at least 1. A Python number is static, an array is data
Frequencies = Float[Array, "half"] | Float[Array, "layers half"]  # radians a position, of rotary pairs

FLOAT8 = jnp.dtype(jnp.float8_e4m3fn)  # 3 bits of mantissa, from 2^-9 to 448 (Micikevicius et al., FP8 formats)


def as_stored(x: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """Numbers as a store of this dtype keeps them.

    In float8 what is larger than its largest number becomes that one, and infinities become NaN: the type has none.
    """
    if dtype != FLOAT8:
        return x.astype(dtype)
    wide, most = x.astype(jnp.float32), float(jnp.finfo(FLOAT8).max)
    return jnp.where(jnp.isfinite(wide), jnp.clip(wide, -most, most), jnp.nan).astype(dtype)


def widen(stored: Float[Array, "*shape"], dtype: Any) -> Float[Array, "*shape"]:
    """What was read of a store, float8 in the dtype that it is to be multiplied in: 16 bits or more lose nothing."""
    return stored.astype(dtype) if stored.dtype == FLOAT8 else stored


def row_addresses(
    store: Store, positions: RowInts, requests: RowInts, page_tables: PageTables
) -> tuple[RowInts, RowInts]:
    """The page and offset of each row; padding gets the page behind the last, which a scatter drops.

    With pages of 4 slots and the page table [[7, 2]], position 5 is at page 2, offset 1.
    """
    page_size = store.shape[4]
    page = page_tables.at[requests, positions // page_size].get(mode="clip")
    return jnp.where(positions >= 0, page, store.shape[1]), positions % page_size


def slot_addresses(store: Store, slots: Int[Array, "n"]) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """The page and offset of each slot; padding (-1) gets the page behind the last."""
    page_size = store.shape[4]
    return jnp.where(slots >= 0, slots // page_size, store.shape[1]), slots % page_size


def read_kv(
    store: Store, layer: Int[Array, ""], positions: RowInts, requests: RowInts, page_tables: PageTables
) -> Float[Array, "rows 2 kv_heads head_dim"]:
    """What the store holds for these rows in one layer: K, then V. Padding gets some slot's.

    A gather of the store's vectors in the order they lie in. One over its six axes has XLA copy the whole store into
    another order first, on TPUs.
    """
    _, pages, kv, heads, page_size, head_dim = store.shape
    page, offset = row_addresses(store, positions, requests, page_tables)
    tile = ((layer * pages + jnp.minimum(page, pages - 1)) * kv * heads)[:, None] + jnp.arange(kv * heads)
    vectors = store.reshape(-1, head_dim)[tile * page_size + offset[:, None]]
    return vectors.reshape(-1, kv, heads, head_dim)


def first_seen(positions: Int[Array, "*rows"], window: Window) -> Int[Array, "*rows"]:
    """The position of the first key that each row sees: with a window of 4, position 9 sees keys 6, 7, 8 and 9."""
    return jnp.maximum(positions - window + 1, 0)


def visible(keys: Int[Array, "..."], positions: Int[Array, "..."], window: Window | None) -> Bool[Array, "..."]:
    """Which keys, by position, are visible to rows at these positions; shapes are broadcast, and padding sees none."""
    seen = keys <= positions
    return seen if window is None else seen & (keys >= first_seen(positions, window))


def group_heads(query: Queries, store: Store) -> Float[Array, "rows kv_heads group head_dim"]:
    """Each query head beside the others that read the same KV head."""
    rows, q_heads, head_dim = query.shape
    return query.reshape(rows, store.shape[3], q_heads // store.shape[3], head_dim)


def context(
    store: Store, layer: Int[Array, ""], pages: Int[Array, "n"]
) -> tuple[Float[Array, "kv_heads keys head_dim"], Float[Array, "kv_heads keys head_dim"]]:
    """K and V of these pages of one layer, their slots one after the other."""
    tiles = store[layer, pages]  # [n, 2, kv_heads, page_size, head_dim]
    keys, values = tiles.transpose(1, 2, 0, 3, 4).reshape(2, store.shape[3], -1, store.shape[5])
    return keys, values


def num_tiles(positions: RowInts, tile: int) -> Int[Array, ""]:
    """How many tiles of `tile` rows hold anything but the padding at the end."""
    used = jnp.max(jnp.where(positions >= 0, jnp.arange(1, positions.size + 1), 0), initial=0)
    return -(-used // tile)


def pad_rows(x: jax.Array, tile: int, fill: int = 0) -> jax.Array:
    """Pad the leading axis to a multiple of `tile`."""
    missing = -x.shape[0] % tile
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def pad_positions(positions: RowInts, requests: RowInts, tile: int) -> tuple[jax.Array, jax.Array]:
    """Positions and requests of rows that are padded to a multiple of `tile`."""
    return pad_rows(positions, tile, -1), pad_rows(requests, tile)


def take_tile(i: jax.Array, tile: int, *arrays: jax.Array) -> list[jax.Array]:
    """The i-th `tile` entries along the leading axis of each array."""
    return [jax.lax.dynamic_slice_in_dim(x, i * tile, tile) for x in arrays]
