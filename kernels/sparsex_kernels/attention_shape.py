"""The sizes that every attention kernel for Hopper GPUs is compiled for."""

import dataclasses
from typing import Any

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.gpu import heads_a_tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Static sizes of one call. Kernels add their own.

    Attributes:
      share: query heads in a tile.
      heads: programs over the heads.
      repeat: programs that read the same KV head.
      pages: of a layer.
      dtype: of queries and of the products.
      stored: the dtype of the store; if not `dtype`, blocks of keys are widened in shared memory.
      scale: of the products of queries and keys.
      windowed: whether rows have windows. Only then has the program what those take.
      rank: of adapters' Y beside the values; 0: there are no adapters, and the program has nothing of them.
      adapters: whose matrices there are.
      interpreted: whether the kernel runs on a CPU.
    """

    share: int
    heads: int
    repeat: int
    kv_heads: int
    pages: int
    page_size: int
    head_dim: int
    dtype: Any
    stored: Any
    scale: float
    windowed: bool
    rank: int
    adapters: int
    interpreted: bool

    @property
    def narrow(self) -> bool:
        """Whether the store has fewer bits than the products take."""
        return bool(self.stored != self.dtype)


def shared_sizes(args: AttentionArgs) -> dict[str, Any]:
    """The fields of an `AttentionShape` for a call."""
    _, pages, _, kv_heads, page_size, head_dim = args.store.shape
    q_heads = args.query.shape[1]
    share = heads_a_tile(q_heads, kv_heads)
    return {
        "share": share,
        "heads": q_heads // share,
        "repeat": q_heads // share // kv_heads,
        "kv_heads": kv_heads,
        "pages": pages,
        "page_size": page_size,
        "head_dim": head_dim,
        "dtype": args.query.dtype,
        "stored": args.store.dtype,
        "scale": float(args.scale),
        "windowed": args.window is not None,
        "rank": 0 if args.low_rank is None else args.low_rank.rank,
        "adapters": 0 if args.low_rank is None else args.low_rank.matrices.shape[1],
        "interpreted": args.backend.interpreted,
    }
