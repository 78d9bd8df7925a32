"""How decode kernels cut the keys of few rows among programs (FlashDecoding)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.layout import RowInts


def key_parts(
    positions: RowInts, requests: RowInts, heads: int, *, programs: int, block: int
) -> tuple[Int[Array, "parts 5"], Int[Array, "rows 2"]]:
    """Cut each row's keys into parts of about one size over all rows: row, request, position and range of key blocks
    of each part; and the first part and one behind the last of each row. What is left over at the end has no blocks.

    No more parts come out than there are: a part is at least a `programs / heads`-th of all blocks, but for one a row.

    Args:
      heads: programs over the heads that each part has.
      programs: to aim at.
      block: keys of a block.
    """
    blocks = (positions + block) // block  # 0 for padding
    largest = jnp.maximum(-(-blocks.sum() * heads // programs), 1)
    count = -(-blocks // largest)
    size = -(-blocks // jnp.maximum(count, 1))  # of each row's parts
    ends = jnp.cumsum(count)
    part = jnp.arange(len(positions) + -(-programs // heads))
    row = jnp.minimum((ends <= part[:, None]).sum(1), len(positions) - 1)
    begin = (part - (ends - count)[row]) * size[row]
    end = jnp.where(part < ends[-1], jnp.minimum(begin + size[row], blocks[row]), begin)
    parts = jnp.stack([row, requests[row], positions[row], begin, end], axis=-1)
    filled = -(-blocks // jnp.maximum(size, 1))  # rounding up the size may leave a row's last parts without blocks
    spans = jnp.stack([ends - count, ends - count + filled], axis=-1)
    return parts.astype(jnp.int32), spans.astype(jnp.int32)
