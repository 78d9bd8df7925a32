"""What is static in attention for Hopper GPUs: its settings, and the sizes of a call."""

import dataclasses
from typing import Any, NamedTuple

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.gpu import heads_a_tile, power_of_two
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS
from sparsex_kernels.paged_attention.tiles import Splits


@dataclasses.dataclass(frozen=True)
class Config:
    """What may be tuned.

    Attributes:
      block: keys a step; a multiple or a divisor of the page size.
      stages: K and V blocks in flight.
      warpgroups: that compute; each has 64 packed rows.
      alternate: two warpgroups take turns, one in its products while the other is in its softmax.
      registers: of each thread of the compute warpgroups, and of the memory warpgroup.
      programs: to aim at where few tiles have rows and are cut into parts; 0: never cut.
      cut_rows: calls of more rows, padding included, never cut tiles: their tiles fill the GPU by themselves.
    """

    block: int = 128
    stages: int = 2
    warpgroups: int = 2
    alternate: bool = True
    registers: tuple[int, int] = (232, 40)
    programs: int = MULTIPROCESSORS
    cut_rows: int = 1024


DEFAULT = Config()


class Shape(NamedTuple):
    """Static sizes of one call."""

    tiles: int
    splits: Splits
    rows: int  # of one warpgroup: consecutive rows
    share: int  # query heads in a tile
    heads: int  # programs over the heads
    repeat: int  # programs that read the same KV head
    kv_heads: int
    pages: int  # of a layer
    page_size: int
    head_dim: int
    dtype: Any
    scale: float
    values: bool  # whether V is read; else only the log-sum-exp is computed
    lse: bool
    interpreted: bool

    @classmethod
    def of(cls, args: AttentionArgs, values: bool, lse: bool, config: Config) -> "Shape":
        """The sizes of a call."""
        _, pages, _, kv_heads, page_size, head_dim = args.store.shape
        rows, q_heads, _ = args.query.shape
        share = heads_a_tile(q_heads, kv_heads)
        tile_rows = WGMMA_ROWS // power_of_two(share)
        heads, tiles = q_heads // share, -(-rows // (tile_rows * config.warpgroups))
        programs = config.programs if rows <= config.cut_rows else 0
        return cls(
            tiles=tiles,
            splits=Splits.of(tiles, heads, -(-args.context // config.block), programs),
            rows=tile_rows,
            share=share,
            heads=heads,
            repeat=heads // kv_heads,
            kv_heads=kv_heads,
            pages=pages,
            page_size=page_size,
            head_dim=head_dim,
            dtype=args.query.dtype,
            scale=float(args.scale),
            values=values,
            lse=lse,
            interpreted=args.backend.interpreted,
        )

    @property
    def cut(self) -> bool:
        """Whether tiles may be cut into parts. The program has what that takes only then."""
        return self.splits.lines > 0


def copies_a_block(shape: Shape, config: Config) -> int:
    """Copies that fill a block of keys: one a page, or one where pages are larger."""
    return max(config.block // shape.page_size, 1)
