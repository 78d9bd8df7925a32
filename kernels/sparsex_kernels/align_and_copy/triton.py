"""Alignment in Triton, all layers in one launch: a program has a tile of tokens in one layer."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

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
    return in_place(
        align,
        *(args.layers.astype(jnp.int32), args.source.astype(jnp.int32), args.target.astype(jnp.int32)),
        *_rotations(args),
        args.layers.astype(jnp.int32) if args.spans is None else jnp.stack(args.spans).astype(jnp.int32),
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
        SPANS=args.spans is not None,
        ROTATE=args.inv_freq is not None,
    )


def _rotations(args: CopyArgs) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
    """Cosines and sines of every token; something to point at where keys are not rotated."""
    if args.inv_freq is None:
        return jnp.ones((1, 1)), jnp.zeros((1, 1))
    angles = args.shift[:, None].astype(jnp.float32) * args.inv_freq
    return jnp.cos(angles), jnp.sin(angles)
