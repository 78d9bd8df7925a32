"""What is static in attention for Hopper GPUs: its settings, and the sizes of a call."""

import dataclasses

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.attention_shape import AttentionShape, shared_sizes
from sparsex_kernels.gpu import power_of_two
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
      staged: blocks of K or V of a narrow store in flight.
      registers: of each thread of the compute warpgroups, and of the memory warpgroup. Three warpgroups begin with
        168 each; more than that together are waited for without end.
      narrow_registers: the same where the memory warpgroup widens what it brings.
      programs: to aim at where few tiles have rows and are cut into parts; 0: never cut.
      cut_rows: calls of more rows, padding included, never cut tiles: their tiles fill the GPU by themselves.
    """

    block: int = 128
    stages: int = 2
    warpgroups: int = 2
    alternate: bool = True
    staged: int = 3
    registers: tuple[int, int] = (232, 40)
    narrow_registers: tuple[int, int] = (224, 56)
    programs: int = MULTIPROCESSORS
    cut_rows: int = 1024


DEFAULT = Config()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(AttentionShape):
    """Static sizes of one call."""

    tiles: int
    splits: Splits
    rows: int  # of one warpgroup: consecutive rows
    values: bool  # whether V is read; else only the log-sum-exp is computed
    lse: bool

    @classmethod
    def of(cls, args: AttentionArgs, values: bool, lse: bool, config: Config) -> "Shape":
        """The sizes of a call."""
        sizes, rows = shared_sizes(args), len(args.query)
        tile_rows = WGMMA_ROWS // power_of_two(sizes["share"])
        tiles = -(-rows // (tile_rows * config.warpgroups))
        programs = config.programs if rows <= config.cut_rows else 0
        splits = Splits.of(tiles, sizes["heads"], -(-args.context // config.block), programs)
        return cls(**sizes, tiles=tiles, splits=splits, rows=tile_rows, values=values, lse=lse)

    @property
    def cut(self) -> bool:
        """Whether tiles may be cut into parts. The program has what that takes only then."""
        return self.splits.lines > 0


def copies_a_block(shape: Shape, config: Config) -> int:
    """Copies that fill a block of keys: one a page, or one where pages are larger."""
    return max(config.block // shape.page_size, 1)
