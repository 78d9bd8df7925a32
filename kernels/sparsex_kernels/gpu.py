"""What the kernels for GPUs share, those in Pallas (`mosaic.py`) and those in Triton (`triton.py`)."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.layout import FLOAT8, PageTables, Power, Store

LOG2_E = 1.4426950408889634  # scores are kept in base 2, so that exponentials are one instruction


def heads_a_tile(q_heads: int, kv_heads: int) -> int:
    """Query heads of one KV head that share a tile: the largest divisor of their number up to 8.

    >>> heads_a_tile(28, 4), heads_a_tile(24, 2)
    (7, 6)
    """
    group = q_heads // kv_heads
    return max(n for n in range(1, 9) if group % n == 0)


def power_of_two(n: int) -> int:
    """The smallest power of two that is no smaller than n."""
    return 1 << (n - 1).bit_length()


def padded_pages(store: Store, page_tables: PageTables, multiple: int) -> Int[Array, "requests n"]:
    """Page tables padded to a multiple of pages; the padding is some valid page.

    Kernels add the layer's first page themselves. The tables then do not depend on the layer, and XLA makes them once
    for all layers.
    """
    tables = jnp.pad(page_tables, ((0, 0), (0, -page_tables.shape[1] % multiple)))
    return jnp.clip(tables, 0, store.shape[1] - 1).astype(jnp.int32)


def in_float16(args: AttentionArgs) -> AttentionArgs:
    """With queries of float16 where the store is float8, whose numbers GPUs turn into float16 by one instruction.

    Keys and values lose nothing by it. A float16 has 3 bits more of a query than a bfloat16, and ends at 65504.
    """
    if args.store.dtype != FLOAT8 or args.query.dtype != jnp.bfloat16:
        return args
    return dataclasses.replace(args, query=args.query.astype(jnp.float16))


def raised(args: AttentionArgs, power: Power) -> AttentionArgs:
    """With scores that are this many times as large, those of the weights to the power.

    A number is part of the scale. As data, it multiplies the queries in their dtype, which is exact for powers of two.
    """
    if isinstance(power, int):
        return dataclasses.replace(args, scale=power * args.scale)
    return dataclasses.replace(args, query=args.query * power.astype(args.query.dtype))


def check_low_rank(args: AttentionArgs, ranks: tuple[int, ...]) -> None:
    """Raise `NotImplementedError` where there are adapters that kernels for these ranks cannot do."""
    low_rank = args.low_rank
    if low_rank is None:
        return
    if low_rank.rank not in ranks:
        raise NotImplementedError(f"adapters of rank {low_rank.rank}; kernels take {', '.join(map(str, ranks))}")
    if args.store.dtype != low_rank.store.dtype:
        raise NotImplementedError(f"adapters of {low_rank.store.dtype} beside a store of {args.store.dtype}")


def check_attention(args: AttentionArgs, block: int, smallest_page: int = 1) -> None:
    """Raise `NotImplementedError` where the attention kernels cannot do this shape or dtype.

    Args:
      block: keys a step; one of page size and block must be a multiple of the other.
      smallest_page: the page size must be a multiple of it.
    """
    query, store = args.query, args.store
    page_size, head_dim = store.shape[4:]
    if store.dtype not in (query.dtype, FLOAT8) or query.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"queries of {query.dtype} on a store of {store.dtype}; kernels take bfloat16 or float16 for both, or a "
            f"store of {FLOAT8}"
        )
    if head_dim not in (64, 128):
        raise NotImplementedError(
            f"head_dim {head_dim}; kernels take 64 and 128, for which shared memory and registers suffice"
        )
    if page_size % smallest_page or max(page_size, block) % min(page_size, block):
        raise NotImplementedError(
            f"page_size {page_size}; kernels take multiples of {smallest_page} that divide {block} or are its multiples"
        )
