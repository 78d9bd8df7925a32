"""A layer for two halves of a chunk on a mesh: each half's sums over the devices run beside the other's products.

A half waits for a sum behind its attention and for another behind its MLP. Meanwhile the other half has work: the later
half attends to what the earlier one has written, which no sum has to be done for. A layer is four stages long:

    earlier half    attention      | sum            MLP            | sum
    later half      sum            | attention      | sum            MLP

The last sum of the later half runs beside the attention of the earlier one in the next layer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from sparsex_jax.model.decoder import (
    Hidden,
    OneLayer,
    Stream,
    attention_addend,
    attention_product,
    mlp_addend,
    mlp_product,
    mlp_sum,
    stream_of,
)
from sparsex_jax.model.ops import DeviceParts
from sparsex_jax.model.store import AnyStore
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.layout import PageTables
from sparsex_kernels.product_parts import one_part


class Halves(NamedTuple):
    """What a layer finds of both halves.

    Attributes:
      earlier: the layer's input.
      later: the residual of the later half, before what the layer before this one adds to it.
      added: that, in the parts of the devices.
    """

    earlier: Stream
    later: Hidden
    added: DeviceParts

    @classmethod
    def of(cls, first_layer: OneLayer, earlier: Hidden, later: Hidden) -> Halves:
        """Before the first layer: nothing is to be added."""
        nothing = first_layer.decoder.ops.no_parts(later.shape, later.dtype)
        return cls(stream_of(first_layer, earlier), later, nothing)

    def hidden(self, last_layer: OneLayer) -> Hidden:
        """The rows behind the last layer."""
        summed = last_layer.decoder.ops.summed(self.added)
        added = mlp_sum(last_layer, one_part(summed), self.later.dtype)
        return jnp.concatenate([self.earlier.hidden, self.later + added])


def layer_of_halves(
    layer: OneLayer, store: AnyStore, halves: Halves, rows: tuple[Rows, Rows], tables: PageTables
) -> tuple[AnyStore, Halves]:
    """Run one layer for both halves of some rows."""
    (earlier, later), sum_of, dtype = rows, layer.decoder.ops.summed, halves.later.dtype
    attn_norm, mlp_norm, leaving_parts = layer.layers.attn_norm, layer.layers.mlp_norm, layer.leaving_parts
    before = layer._replace(number=jnp.maximum(layer.number - 1, 0))
    # Left to itself, XLA would begin with what needs a sum, beside nothing.
    added = sum_of(halves.added)
    store, parts = attention_product(leaving_parts, store, halves.earlier.normed, earlier, tables)
    added, parts = lax.optimization_barrier((added, parts))
    addend = mlp_addend(before, one_part(added), dtype)
    later_hidden, normed = layer.add_norm(addend, halves.later, attn_norm, later)

    attended = sum_of(parts)
    store, parts = attention_product(leaving_parts, store, normed, later, tables)
    attended, parts = lax.optimization_barrier((attended, parts))
    addend = attention_addend(layer, one_part(attended), dtype)
    hidden, normed = layer.add_norm(addend, halves.earlier.hidden, mlp_norm, earlier)

    attended = sum_of(parts)
    parts = mlp_product(leaving_parts, normed, earlier)
    attended, parts = lax.optimization_barrier((attended, parts))
    addend = attention_addend(layer, one_part(attended), dtype)
    later_hidden, normed = layer.add_norm(addend, later_hidden, mlp_norm, later)

    added = sum_of(parts)
    parts = mlp_product(leaving_parts, normed, later)
    added, parts = lax.optimization_barrier((added, parts))
    addend = mlp_addend(layer, one_part(added), dtype)
    stream = Stream(*layer.add_norm(addend, hidden, attn_norm, earlier, ahead=1))
    return store, Halves(stream, later_hidden, parts)
