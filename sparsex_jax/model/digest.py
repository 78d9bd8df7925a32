"""A number that stands for all weights of a model: KV is kept for it, and served to no other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from sparsex_jax.model.weights import Params
from sparsex_kernels.quantised import Mixed, Quantised, turn

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def weights_digest(params: Params) -> str:
    """16 hexadecimal digits, from every bit of every weight. One pass over them, on the devices.

    Adapters are no part of it. The same on all platforms and meshes: sums of integers do not depend on their order, nor
    this on that of codes.
    """
    params = params.replace(adapters=None, mailboxes=None)  # type: ignore[attr-defined]
    total = sum(ord(char) * (i + 1) for i, char in enumerate("".join(kinds(params))))
    turned_around = _turned_around(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sum(ord(char) * (i + 1) for i, char in enumerate(jax.tree_util.keystr(path)))
        low, high = (int(part) for part in _digest(leaf, id(leaf) in turned_around))
        total = (total * 0x9E3779B97F4A7C15 + (high << 32 | low) + name) % 2**64
    return f"{total:016x}"


def kinds(params: Params) -> list[str]:
    """In which codes weights are, and where the layers of mixed ones are: names and kinds, sorted; none for floats."""
    coded = (Quantised, Mixed)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, coded))
    found = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, coded)]
    return sorted(f"{name} {_kind(leaf)}" for name, leaf in found)


def _kind(leaf: Quantised | Mixed) -> str:
    if isinstance(leaf, Quantised):
        return leaf.kind
    return f"{[getattr(part, 'kind', 'floats') for part in leaf.parts]} {leaf.places}"


def _turned_around(params: Params) -> set[int]:
    """Which arrays hold codes whose squares are turned around, by `id`."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return {id(leaf.codes) for leaf in leaves if isinstance(leaf, Quantised) and leaf.turned}


@functools.partial(jax.jit, static_argnums=1)
def _digest(leaf: Array, turned_around: bool) -> tuple[Array, Array]:
    leaf = turn(leaf) if turned_around else leaf
    bits = lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = _mix(bits ^ _mix(place + jnp.uint32(0x9E3779B9)))
    return mixed.sum(dtype=jnp.uint32), _mix(mixed + place).sum(dtype=jnp.uint32)


def _mix(x: Array) -> Array:
    """murmur3's finaliser: neighbouring numbers become unrelated ones."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
