"""Frequencies that differ by layer, for kernels whose calls have one rotation a token.

Layers with the same frequencies, one after the other, are a *run* and are moved together: models alternate between few
rotary tables, and a kernel's call may read them as data.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import Store


def by_runs(args: CopyArgs, align: Callable[[CopyArgs], Store]) -> Store:
    """Call `align` once where all layers have the same frequencies or none, otherwise for each run of layers."""
    frequencies = args.inv_freq
    if frequencies is None or frequencies.ndim == 1:
        return align(args)
    ends, end_layer = run_ends(frequencies), args.layers[1]

    def move(state: tuple[Array, Store]) -> tuple[Array, Store]:
        layer, store = state
        end = jnp.minimum(ends[layer], end_layer)
        layers = jnp.stack([layer, end])
        return end, align(dataclasses.replace(args, store=store, inv_freq=frequencies[layer], layers=layers))

    return lax.while_loop(lambda state: state[0] < end_layer, move, (args.layers[0], args.store))[1]


def run_ends(inv_freq: Float[Array, "layers half"]) -> Int[Array, "layers"]:
    """For each layer, the one behind its run: for frequencies a a b a, 2 2 3 4."""
    layers = len(inv_freq)
    changes = (inv_freq[1:] != inv_freq[:-1]).any(axis=1)
    starts = jnp.append(jnp.where(changes, jnp.arange(1, layers), layers), layers)
    return lax.cummin(starts, reverse=True).astype(jnp.int32)
