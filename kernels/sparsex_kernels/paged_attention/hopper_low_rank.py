"""Adapters in attention for Hopper GPUs: Y beside V, and the matrices that expand its weighted sums.

Y goes through the softmax as V does, into an accumulator of its own. When a warpgroup has a request's sums, it divides
both by the softmax's denominator and adds `Y B` to the output by one more product, whose right operand it fetched when
it began. What is merged of parts of keys is already expanded: the merge is a weighted sum, which commutes with B.
"""

from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.attention_shape import AttentionShape
from sparsex_kernels.mosaic import Ref, add_weighted, tiled_smem

# By head_dim: a line of Y is one that TMA swizzles, and B has its place in shared memory beside K, V and Y.
RANKS = {64: (16, 32, 64), 128: (16, 32)}


class LowRankRefs(NamedTuple):
    """What the kernels read in global memory."""

    store: Ref  # [layers * pages, page_size, width]
    matrices: Ref  # [layers * adapters, kv_heads, rank, head_dim]
    columns: Ref  # [requests], -1 for those without an adapter
    adapters: Ref  # [requests]


def low_rank_operands(args: AttentionArgs) -> list[Array]:
    """The arrays of `LowRankRefs`, without copies of the large ones; none without adapters."""
    low_rank = args.low_rank
    if low_rank is None:
        return []
    layers, pages, page_size, width = low_rank.store.shape
    matrices = low_rank.matrices.astype(args.query.dtype)
    return [
        low_rank.store.reshape(layers * pages, page_size, width),
        matrices.reshape(-1, *matrices.shape[2:]),
        low_rank.columns.astype(jnp.int32),
        jnp.clip(low_rank.adapters, 0, matrices.shape[1] - 1).astype(jnp.int32),
    ]


def matrix_scratch(shape: AttentionShape, warpgroups: int) -> dict[str, Any]:
    """Scratch types of each warpgroup's B."""
    if not shape.rank:
        return {}
    size = (warpgroups, shape.rank, shape.head_dim)
    line = shape.rank * jnp.dtype(shape.dtype).itemsize
    return {"b_smem": tiled_smem(size, shape.dtype, line), "b_ready": plgpu.Barrier(num_barriers=warpgroups)}


def first_column(refs: LowRankRefs, request: Array, rank: int) -> Array:
    """The first column of a request's Y; some column for requests without an adapter."""
    return lax.div(jnp.maximum(refs.columns[request], 0), rank) * rank


class Expansion(NamedTuple):
    """What one warpgroup expands its sums by: its buffer for a request's B."""

    smem: Ref  # [rank, head_dim]
    ready: Ref

    @classmethod
    def of(cls, scratch: dict[str, Any], wg: Array) -> "Expansion":
        """That of a warpgroup among the kernel's scratch references."""
        return cls(scratch["b_smem"].at[wg], scratch["b_ready"].at[wg])

    def fetch(self, shape: AttentionShape, refs: LowRankRefs, layer: Array, request: Array, kv_head: Array) -> None:
        """Begin to copy B of the request's adapter. The product that read the one before must have ended."""
        matrix = layer * shape.adapters + refs.adapters[request]
        plgpu.copy_gmem_to_smem(refs.matrices.at[matrix, kv_head], self.smem, self.ready)

    def add(self, out: Array, sums: Array, has_adapter: Array, shape: AttentionShape) -> Array:
        """`out + sums @ B`, or `out` for a request without an adapter, whose sums may be NaN.

        Args:
          out, sums: float32 `[64, head_dim]` and `[64, rank]`, divided by the softmax's denominator.
        """
        plgpu.barrier_wait(self.ready)
        sums = jnp.where(jnp.broadcast_to(has_adapter, sums.shape), sums, 0.0)
        return add_weighted(out, sums.astype(shape.dtype), self.smem, shape.interpreted)
