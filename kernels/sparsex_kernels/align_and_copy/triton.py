"""Alignment in Triton, all layers in one launch: a program has a tile of tokens in one layer."""

import jax.numpy as jnp

from sparsex_kernels.align_and_copy.runs import by_runs
from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.layout import FLOAT8, Store
from sparsex_kernels.triton import check_copies, in_place

TILE = 32  # tokens


def align_and_copy(args: CopyArgs) -> Store:
    """See `sparsex_kernels.align_and_copy`."""
    check_copies(args)
    return by_runs(args, _align)


def _align(args: CopyArgs) -> Store:
    from sparsex_kernels.align_and_copy.triton_kernels import align

    layers, pages, _, kv_heads, page_size, head_dim = args.store.shape
    angles = args.shift[:, None].astype(jnp.float32) * args.inv_freq
    return in_place(
        align,
        *(args.layers.astype(jnp.int32), args.source.astype(jnp.int32), args.target.astype(jnp.int32)),
        *(jnp.cos(angles), jnp.sin(angles)),
        store=args.store,
        grid=(-(-len(args.source) // TILE), layers),
        num_warps=4,
        tokens=len(args.source),
        pages=pages,
        TILE=TILE,
        KV_HEADS=kv_heads,
        PAGE=page_size,
        DIM=head_dim,
        MOST=float(jnp.finfo(FLOAT8).max) if args.store.dtype == FLOAT8 else 0.0,
    )
