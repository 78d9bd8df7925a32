"""How decode kernels cut the keys of few rows among programs (FlashDecoding)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.layout import RowInts, Window, first_seen


class Part(NamedTuple):
    """One row's keys in blocks `begin .. end`, as a line of the table that `key_parts` makes."""

    row: Any
    request: Any
    position: Any
    begin: Any
    end: Any
    first: Any = None  # the first key that the row sees, where there is a window


def seen_blocks(positions: RowInts, block: int, window: Window | None) -> tuple[RowInts | None, Int[Array, "rows"]]:
    """Of each row, the first block of keys that it sees, and how many it sees; 0 of padding. The first is None where
    there is no window, since it is 0."""
    end = (positions + block) // block
    if window is None:
        return None, end
    first = first_seen(positions, window) // block
    return first, end - first


def key_parts(
    positions: RowInts,
    requests: RowInts,
    heads: int,
    *,
    programs: int,
    block: int,
    window: Window | None = None,
) -> tuple[Int[Array, "parts fields"], Int[Array, "rows 2"]]:
    """Cut each row's keys into parts of about one size over all rows.

    The table has room for a part a row and `programs / heads` more. A part is at least a `programs / heads`-th of all
    blocks, except where a row has fewer, so there are never more parts. Lines that are left over have no blocks.

    Args:
      heads: programs over the heads that each part has.
      programs: how many programs to aim at.
      block: keys of a block.
      window: blocks before it are in no part.

    Returns:
      A line for each part, its `Part` without what is None; and for each row its first part and the one behind its
      last.
    """
    # Positions 9, -1 and 3, blocks of 2 keys, 1 head, 4 programs:
    #   blocks 5 0 2, 7 in all, so a part has at most ceil(7 / 4) = 2
    #   parts  3 0 1 of the rows, of 2, -, 2 blocks: row 0's are blocks [0, 2), [2, 4), [4, 5), row 2's [0, 2)
    #   spans  [0, 3] [3, 3] [3, 4]
    skipped, blocks = seen_blocks(positions, block, window)
    largest = jnp.maximum(-(-blocks.sum() * heads // programs), 1)
    count = -(-blocks // largest)
    size = -(-blocks // jnp.maximum(count, 1))  # of each row's parts
    ends = jnp.cumsum(count)
    part = jnp.arange(len(positions) + -(-programs // heads))
    row = jnp.minimum((ends <= part[:, None]).sum(1), len(positions) - 1)
    begin = (part - (ends - count)[row]) * size[row]
    end = jnp.where(part < ends[-1], jnp.minimum(begin + size[row], blocks[row]), begin)
    fields: tuple[Any, ...] = Part(row, requests[row], positions[row], begin, end)[:5]
    if window is not None and skipped is not None:
        fields = (*fields[:3], begin + skipped[row], end + skipped[row], first_seen(positions, window)[row])
    parts = jnp.stack(fields, axis=-1)
    filled = -(-blocks // jnp.maximum(size, 1))  # rounding up the size may leave a row's last parts without blocks
    spans = jnp.stack([ends - count, ends - count + filled], axis=-1)
    return parts.astype(jnp.int32), spans.astype(jnp.int32)
