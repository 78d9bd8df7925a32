"""Rotation as XLA fuses it, and the write of keys and values behind it."""

import jax.numpy as jnp

from sparsex_kernels.arguments import RotateArgs
from sparsex_kernels.layout import Queries, Store
from sparsex_kernels.product_parts import sum_parts
from sparsex_kernels.rope import apply_rope
from sparsex_kernels.write_kv import write_kv


def rotate_and_write(args: RotateArgs) -> tuple[Queries, Store]:
    """See `sparsex_kernels.rotate_and_write`."""
    product = sum_parts(args.product, args.dtype)
    heads = product.reshape(len(product), -1, args.heads.dim)
    q, keys, values = jnp.split(heads, [args.heads.queries, args.heads.queries + args.heads.keys], axis=1)
    q, keys = (apply_rope(x, args.positions, args.inv_freq) for x in (q, keys))
    rows = args.positions, args.requests, args.page_tables
    return q, write_kv(args.store, args.layer, keys, values, *rows, backend=args.backend)
