"""Pieces: the KV of a few pages in a group of consecutive layers, page-major, gathered from the store and put back.

Nothing here computes: every byte is moved as it is, NaNs included.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from sparsex_jax.model.sharding import sharding, spec
from sparsex_jax.model.store import STORE_AXES
from sparsex_jax.tiers.blocks import BLOCK_PAGES
from sparsex_kernels.layout import Store

Piece = Float[Array, "rows _ 2 kv_heads page_size head_dim"]

SIZES = tuple(1 << power for power in range(BLOCK_PAGES.bit_length()))  # pages of a piece, with its padding
_AXES = ("pages", "layers", "kv", "kv_heads", "slots", "head_dim")
_STORE, _PIECE, _ALL = spec(STORE_AXES), spec(_AXES), PartitionSpec()


def padded_size(pages: int) -> int:
    """The size that a piece of so many pages is padded to, so that few programs do."""
    return next(size for size in SIZES if size >= pages)


def layer_groups(num_layers: int, num_groups: int) -> tuple[range, ...]:
    """The layers in consecutive groups, as even as they can be; one for each layer if there are fewer layers.

    >>> layer_groups(5, 3)
    (range(0, 2), range(2, 4), range(4, 5))
    """
    parts = np.array_split(np.arange(num_layers), min(num_groups, num_layers))
    return tuple(range(int(part[0]), int(part[-1]) + 1) for part in parts)


@functools.cache
def piece_sharding(mesh: Mesh, shape: tuple[int, ...], memory_kind: str) -> NamedSharding:
    """Where a piece lives: each device has the heads that it has of the store."""
    return sharding(mesh, _AXES, shape).with_memory_kind(memory_kind)


@functools.partial(jax.jit, static_argnames=("mesh", "groups"))
def gather(store: Store, pages: Int[Array, "rows"], *, mesh: Mesh, groups: tuple[range, ...]) -> tuple[Piece, ...]:
    """These pages of all layers, page-major, a piece for each group of layers."""

    def local(store: Array, pages: Array) -> tuple[Array, ...]:
        tiles = _tiles(store)
        rows = (_rows(store.shape[1], pages, group.start, len(group)) for group in groups)
        return tuple(tiles.at[row].get(mode="promise_in_bounds") for row in rows)

    run = jax.shard_map(local, mesh=mesh, in_specs=(_STORE, _ALL), out_specs=(_PIECE,) * len(groups), check_vma=False)
    return run(store, pages)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("store",))
def scatter(store: Store, piece: Piece, pages: Int[Array, "rows"], first_layer: Int[Array, ""], *, mesh: Mesh) -> Store:
    """Write each page of a piece into a page of the store, from `first_layer` on. -1 drops it."""

    def local(store: Array, piece: Array, pages: Array, first_layer: Array) -> Array:
        tiles = _tiles(store)
        rows = _rows(store.shape[1], pages, first_layer, piece.shape[1])
        behind = len(tiles) + jnp.arange(rows.size).reshape(rows.shape)  # distinct, as unique indices have to be
        rows = jnp.where(pages[:, None] >= 0, rows, behind)
        return tiles.at[rows].set(piece, mode="drop", unique_indices=True).reshape(store.shape)

    run = jax.shard_map(local, mesh=mesh, in_specs=(_STORE, _PIECE, _ALL, _ALL), out_specs=_STORE, check_vma=False)
    return run(store, piece, pages, first_layer)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("store",))
def scatter_all(
    store: Store,
    pieces: tuple[Piece, ...],
    pages: Int[Array, "pieces rows"],
    first_layer: Int[Array, ""],
    *,
    mesh: Mesh,
) -> Store:
    """As `scatter`, of several pieces of the same layers: one program is dispatched sooner than many."""
    for piece, targets in zip(pieces, pages, strict=True):
        store = scatter(store, piece, targets, first_layer, mesh=mesh)
    return store


def _tiles(store: Array) -> Array:
    """The store as `[layers * pages, 2, kv_heads, page_size, head_dim]`.

    Only its first axis is indexed then: for indices of an inner axis, XLA may bring the whole store into another order
    and back.
    """
    return store.reshape(-1, *store.shape[2:])


def _rows(num_pages: int, pages: Array, first_layer: Array | int, layers: int) -> Array:
    """Where these pages are among the tiles, `[pages, layers]`."""
    return (first_layer + jnp.arange(layers)) * num_pages + pages[:, None]
