"""How programs that go from one row to the next share the keys of few rows: equally, wherever a row begins."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.layout import RowInts, Window, first_seen
from sparsex_kernels.paged_attention.parts import seen_blocks

ITEM = 1  # blocks in whose time a program ends a share and begins the next


class Shares(NamedTuple):
    """Blocks of keys of all rows, one row behind the other, cut where a share ends and where a row does.

    Attributes:
      pieces: a line for each piece, its `Part` without what is None; some have no blocks.
      spans: of each row, its first piece and the one behind its last.
      ranges: the same of each share. Some pieces in a range may have no blocks; none in a span has.
      number: how many shares there are, the first ones.
    """

    pieces: Int[Array, "pieces fields"]
    spans: Int[Array, "rows 2"]
    ranges: Int[Array, "shares 2"]
    number: Int[Array, ""]


def key_shares(
    positions: RowInts,
    requests: RowInts,
    heads: int,
    *,
    programs: int,
    block: int,
    at_once: int,
    window: Window | None = None,
) -> Shares:
    """Cut the keys of all rows into shares that differ by a block at most.

    Each share is there for each of `heads`, and a program has several of those if there are more than run at a time.

    Args:
      programs: the most to aim at, over all heads.
      block: keys of a block.
      at_once: how many programs run at a time. There are as many shares as end soonest in rounds of these.
      window: blocks before it are in no share.
    """
    # Positions 9, -1 and 3, blocks of 2 keys: 5 0 2 of them, 7 in all. Of 2 shares the first has 3, the second 4:
    #   ends    3 5 5 7 7, sorted: of shares 3 and 7, of rows 5, 5 and 7
    #   pieces  blocks [0, 3) and [3, 5) of row 0, none, [0, 2) of row 2, none
    #   spans   [0, 2) of row 0, none, [3, 4) of row 2
    #   ranges  [0, 1) and [1, 4)
    skipped, blocks = seen_blocks(positions, block, window)
    total, rows_end = blocks.sum(), jnp.cumsum(blocks)
    number = _number(total, heads, max(programs // heads, 1), at_once)
    cuts = jnp.minimum(jnp.arange(max(programs // heads, 1) + 1) * total // number, total)
    ends = jnp.sort(jnp.concatenate([rows_end, cuts[1:]]))
    begins = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    row = jnp.minimum(_place(rows_end, begins, "right"), len(positions) - 1)
    first = (rows_end - blocks)[row] - (0 if skipped is None else skipped[row])
    fields: tuple[Any, ...] = row, requests[row], positions[row], begins - first, ends - first
    if window is not None:
        fields = (*fields, first_seen(positions, window)[row])
    pieces = jnp.stack(fields, axis=-1).astype(jnp.int32)
    return Shares(pieces, _within(ends, rows_end - blocks, rows_end), _within(ends, cuts[:-1], cuts[1:]), number)


def _number(total: Int[Array, ""], heads: int, most: int, at_once: int) -> Int[Array, ""]:
    """Of how many shares, each for all heads, the last one ends soonest."""
    # 129 blocks, 8 heads, 132 programs at a time:
    #   33 shares of 4 blocks   264 in 2 rounds of 4 + 1
    #   15 shares of 9 blocks   120 in 1 round of 9 + 1: as soon, and with fewer pieces to merge
    numbers = jnp.arange(1, most + 1)
    rounds = -(-numbers * heads // at_once)
    time = rounds * (-(-total // numbers) + ITEM)
    return 1 + jnp.argmin(jnp.where((numbers > 1) & (numbers > total), jnp.iinfo(time.dtype).max, time))


def _within(ends: Int[Array, "pieces"], low: Int[Array, "spans"], high: Int[Array, "spans"]) -> Int[Array, "spans 2"]:
    """The first piece of those that lie between two blocks, and the first behind them."""
    found = jnp.stack([_place(ends, low, "right"), _place(ends, high, "left") + 1], axis=-1)
    return jnp.where((low < high)[:, None], found, 0).astype(jnp.int32)


def _place(ends: Int[Array, "pieces"], blocks: Int[Array, "asked"], side: str) -> Int[Array, "asked"]:
    return jnp.searchsorted(ends, blocks, side=side, method="compare_all")
