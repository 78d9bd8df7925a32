"""The ring of K and V blocks in shared memory that both attention kernels for Hopper GPUs read their keys from.

One warpgroup fills it by TMA, the others read it. A buffer goes round like this, where each arrow is a barrier:

    filled  --k_ready / v_ready-->  read by every compute warpgroup  --k_used / v_used-->  filled again

The last V block of a request goes through `trim_ready` first. It may hold slots behind the request's last position,
which may hold NaN; the memory warpgroup waits for its copy, zeroes those rows, and arrives at `v_ready` itself. With a
window, so does the first block, which may hold slots that the window hides from all rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array, lax

from sparsex_kernels.mosaic import Ref, clear_rows, tiled_smem


class BlockRing(NamedTuple):
    """Buffers and barriers, `stages` of each but `trim_ready`."""

    k_smem: Ref  # [stages, block, head_dim]
    v_smem: Ref
    k_ready: Ref
    v_ready: Ref
    trim_ready: Ref
    k_used: Ref
    v_used: Ref

    @classmethod
    def of(cls, scratch: dict[str, Any]) -> "BlockRing":
        """The ring among a kernel's scratch references."""
        return cls(*(scratch[name] for name in cls._fields))

    @property
    def stages(self) -> int:
        return self.k_smem.shape[0]


def ring_scratch(block: tuple[int, int, int], dtype: Any, *, pieces: int, readers: int, values: bool) -> dict[str, Any]:
    """Scratch types of a ring.

    Args:
      block: stages, keys and head_dim.
      pieces: copies that fill a buffer: one for each page where a block spans several.
      readers: warpgroups that read each buffer.
      values: whether V is read; else its buffers are as small as they can be.
    """
    stages = block[0]
    return {
        "k_smem": tiled_smem(block, dtype),
        "v_smem": tiled_smem(block if values else (1, 8, 64), dtype),
        "k_ready": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        "trim_ready": plgpu.Barrier(num_arrivals=pieces),
        "k_used": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        "v_used": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    }


class Block(NamedTuple):
    """One block of keys to fetch.

    `copy_keys(smem, barrier)` and `copy_values(smem, barrier)` start its copies. Of its V rows, `seen` are at positions
    that some row sees, those before `hidden` apart; the rest is zeroed if it `is_trimmed`.
    """

    step: Array  # blocks that were fetched before it
    copy_keys: Callable[[Ref, Ref], None]
    copy_values: Callable[[Ref, Ref], None]
    is_trimmed: Array
    seen: Array
    hidden: Array | None = None  # where there is a window


def fetch_block(ring: BlockRing, block: Block, *, pieces: int, values: bool) -> None:
    """Fill the ring's next buffers, once their last readers are done with them."""
    slot = lax.rem(block.step, ring.stages)

    def wait_for_readers(used: Ref) -> None:
        pl.when(block.step >= ring.stages)(lambda: plgpu.barrier_wait(used.at[slot]))

    def copy_trimmed() -> None:
        block.copy_values(ring.v_smem.at[slot], ring.trim_ready)
        plgpu.barrier_wait(ring.trim_ready)
        clear_rows(ring.v_smem.at[slot], block.seen, block.hidden)
        for _ in range(pieces):
            plgpu.barrier_arrive(ring.v_ready.at[slot])

    wait_for_readers(ring.k_used)
    block.copy_keys(ring.k_smem.at[slot], ring.k_ready.at[slot])
    if values:
        wait_for_readers(ring.v_used)
        pl.when(~block.is_trimmed)(lambda: block.copy_values(ring.v_smem.at[slot], ring.v_ready.at[slot]))
        pl.when(block.is_trimmed)(copy_trimmed)
