"""Which keys a tile of rows reads on a Hopper GPU, and how few tiles are cut into parts (FlashDecoding) to fill one."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.layout import RowInts, Window, first_seen

SMALLEST_PART = 2  # key blocks: a part costs a start, an end and a share of the merge


def tile_spans(
    positions: RowInts, requests: RowInts, tile: int, num_requests: int, block: int, window: Window | None = None
) -> tuple[Int[Array, "tiles requests fields"], Int[Array, "tiles 2"]]:
    """Which keys a tile of rows reads.

    Returns:
      For each tile and request, the last position among the tile's rows of the request (-1 if it has none), and the
      key block behind the last that every row of the tile sees in full; and with a window, the first key that some row
      sees, and the first block of which the window hides nothing from any row. For each tile, its first request and
      the one behind its last. A tile of padding has one request, too.
    """
    # With tiles of 4 rows and blocks of 2 keys,
    #   requests   0  0  1  1 | 1  1  1  1     tile 0 reads keys 0..9 of request 0 and 0..3 of request 1, none of
    #   positions  4  9  0  3 | 5  6  8  9     them for all rows; tile 1 reads blocks 0, 1 and 2 without a mask
    # gives spans [[[9, 0], [3, 0]], [[-1, 0], [9, 3]]] and ranges [[0, 2], [1, 2]]. With a window of 4, tile 1 reads
    # keys 2..9, and nothing of blocks 3 and on is hidden from a row: its span of request 1 is [9, 3, 2, 3].
    positions, requests = positions.reshape(-1, tile), requests.reshape(-1, tile)
    live = positions >= 0
    own = live[..., None] & (requests[..., None] == jnp.arange(num_requests))
    last = jnp.max(jnp.where(own, positions[..., None], -1), axis=1)
    first = jnp.min(jnp.where(own, positions[..., None], 2**30), axis=1)
    full = jnp.where(own.all(axis=1), (first + 1) // block, 0)
    begin = jnp.min(jnp.where(live, requests, num_requests - 1), axis=1)
    end = jnp.max(jnp.where(live, requests, begin[:, None]), axis=1) + 1
    ranges = jnp.stack([begin, end], axis=-1)
    fields = [last, full]
    if window is not None:
        fields.append(jnp.where(last >= 0, first_seen(first, window), 0))
        fields.append(-(-first_seen(last, window) // block))
    return jnp.stack(fields, axis=-1).astype(jnp.int32), ranges.astype(jnp.int32)


class TilePart(NamedTuple):
    """A tile's key blocks `begin .. end`, counted over its requests, as a line of the table that `tile_parts` makes."""

    tile: Any  # -1 in lines that are not used
    begin: Any
    end: Any
    whole: Any  # 1 if these are all the tile's blocks


class Splits(NamedTuple):
    """Static bounds of how tiles may be cut into parts.

    Attributes:
      parts: that fill the GPU: programs / heads. Tiles are cut if there are no more than half as many with rows.
      tiles: the most tiles that are cut. They are the first ones.
      lines: the most parts that these have together, and the first lines of the table. 0: no tile is ever cut.
    """

    parts: int
    tiles: int
    lines: int

    @classmethod
    def of(cls, tiles: int, heads: int, blocks: int, programs: int) -> "Splits":
        """The bounds for `tiles` tiles of up to `blocks` key blocks of one request, with programs for `heads` heads."""
        parts = programs // heads
        few = min(tiles, parts // 2)
        if not few or blocks < 2 * SMALLEST_PART:
            return cls(1, 0, 0)
        return cls(parts, few, parts + few)


def tile_parts(
    spans: Int[Array, "tiles requests fields"], block: int, splits: Splits
) -> tuple[Int[Array, "lines 4"], Int[Array, "tiles 2"]]:
    """Cut each tile's key blocks into parts of about one size, if few tiles have rows; else a tile is one part.

    The table has a line for each tile and `splits.parts` more. Late tiles, which have the most keys, go first, so that
    short ones fill the gaps at the end, and tiles of padding last.

    Returns:
      A line for each part (`TilePart`); and for each tile its first line and the one behind its last.
    """
    # Tiles of 7, 3 and 0 blocks, 4 parts to aim at:
    #   counts 7 * 4 // 10 = 2, 3 * 4 // 10 = 1, and 1 for the tile of padding
    #   lines  [1, 0, 3, whole] [0, 0, 4, part] [0, 4, 7, part] [2, 0, 0, whole]
    #   tiles  [1, 3] [0, 1] [3, 4]
    blocks = (spans[..., 0] + block) // block  # the last position is -1 where there are no rows
    if spans.shape[-1] > 2:  # with a window
        blocks -= spans[..., 2] // block
    blocks = blocks.sum(axis=1)
    live, tiles = (blocks > 0).sum(), jnp.arange(len(blocks))
    tile = jnp.where(tiles < live, live - 1 - tiles, tiles)  # in the order of the lines
    blocks = blocks[tile]
    wanted = blocks * splits.parts // jnp.maximum(blocks.sum(), 1)
    count = jnp.where(live <= splits.tiles, jnp.clip(wanted, 1, jnp.maximum(blocks // SMALLEST_PART, 1)), 1)
    size = -(-blocks // count)
    # Rounding up the size may leave no blocks for the last parts.
    count = jnp.maximum(-(-blocks // jnp.maximum(size, 1)), 1)
    ends = jnp.cumsum(count)
    line = jnp.arange(len(blocks) + (splits.parts if splits.lines else 0))
    at = jnp.minimum((ends <= line[:, None]).sum(1), len(blocks) - 1)
    begin = (line - (ends - count)[at]) * size[at]
    number = jnp.where(line < ends[-1], tile[at], -1)
    parts = jnp.stack(TilePart(number, begin, jnp.minimum(begin + size[at], blocks[at]), count[at] == 1), axis=-1)
    ranges = jnp.stack([ends - count, ends], axis=-1)[tile]  # `tile` is its own inverse
    return parts.astype(jnp.int32), ranges.astype(jnp.int32)
