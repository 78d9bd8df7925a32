"""The ring of K and V blocks in shared memory that both attention kernels for Hopper GPUs read their keys from.

One warpgroup fills it by TMA, the others read it. A buffer goes round like this, where each arrow is a barrier:

    filled  --k_ready / v_ready-->  read by every compute warpgroup  --k_used / v_used-->  filled again

The last V block of a request goes through `trim_ready` first. It may hold slots behind the request's last position,
which may hold NaN; the memory warpgroup waits for its copy, zeroes those rows, and arrives at `v_ready` itself. With a
window, so does the first block, which may hold slots that the window hides from all rows.

Of a store in float8 the copies go to buffers of their own, some blocks ahead. The memory warpgroup waits for each,
widens it into the ring's buffer, and arrives there: tensor cores multiply float16 with float16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.mosaic import Ref, clear_rows, copy_wide, tiled_smem


class Staging(NamedTuple):
    """Where blocks of a narrow store arrive: K of a block, then its V, then K of the next."""

    narrow: Ref  # [slots, block, head_dim]
    arrived: Ref

    @property
    def slots(self) -> int:
        return self.narrow.shape[0]


class BlockRing(NamedTuple):
    """Buffers and barriers, `stages` of each but `trim_ready`."""

    k_smem: Ref  # [stages, block, head_dim]
    v_smem: Ref
    k_ready: Ref
    v_ready: Ref
    trim_ready: Ref
    k_used: Ref
    v_used: Ref
    staging: Staging | None = None  # of a narrow store

    @classmethod
    def of(cls, scratch: dict[str, Any]) -> "BlockRing":
        """The ring among a kernel's scratch references."""
        staging = Staging(*(scratch[name] for name in Staging._fields)) if "narrow" in scratch else None
        return cls(**{name: scratch[name] for name in cls._fields[:-1]}, staging=staging)

    @property
    def stages(self) -> int:
        return self.k_smem.shape[0]


def staging_scratch(block: tuple[int, int, int], dtype: Any, *, pieces: int) -> dict[str, Any]:
    """Scratch types of a staging; `block` is its slots, keys and head_dim."""
    return {
        "narrow": tiled_smem(block, dtype),
        "arrived": plgpu.Barrier(num_arrivals=pieces, num_barriers=block[0]),
    }


def ring_scratch(block: tuple[int, int, int], dtype: Any, *, pieces: int, readers: int, values: bool) -> dict[str, Any]:
    """Scratch types of a ring.

    Args:
      block: stages, keys and head_dim.
      dtype: of the products.
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


def fetch_blocks(
    ring: BlockRing, begin: Array | int, end: Array, block_at: Callable[[Array], Block], *, pieces: int, values: bool
) -> None:
    """Fill the ring's buffers with blocks `begin .. end`, one after the other."""
    if ring.staging is None:
        lax.fori_loop(begin, end, lambda i, _: _fetch(ring, block_at(i), pieces=pieces, values=values), None)
    else:
        _fetch_narrow(ring, ring.staging, (begin, end), block_at, kinds=2 if values else 1)


def _fetch_narrow(
    ring: BlockRing,
    staging: Staging,
    blocks: tuple[Array | int, Array],
    block_at: Callable[[Array], Block],
    *,
    kinds: int,
) -> None:
    """The same of a narrow store, K alone or (2 kinds) K and V."""
    begin, end = blocks

    def slot_of(i: Array, kind: int) -> Array:
        return lax.rem((i - begin) * kinds + kind, staging.slots)

    def stage(i: Array, number: int) -> None:
        """Begin to copy what comes `number` places behind the K of block i, if there is such a block."""
        at, kind = jnp.int32(i + number // kinds), number % kinds

        @pl.when(at < end)
        def copy() -> None:
            slot, block = slot_of(at, kind), block_at(at)
            start = block.copy_values if kind else block.copy_keys
            start(staging.narrow.at[slot], staging.arrived.at[slot])

    def step(i: Array, _: None) -> None:
        for kind in range(kinds):
            _widen(ring, staging, block_at(i), slot_of(i, kind), kind)
            stage(i, kind + staging.slots)

    for number in range(staging.slots):
        stage(jnp.int32(begin), number)
    lax.fori_loop(begin, end, step, None)


def _wait_for_readers(ring: BlockRing, block: Block, used: Ref) -> None:
    at = used.at[lax.rem(block.step, ring.stages)]
    pl.when(block.step >= ring.stages)(lambda: plgpu.barrier_wait(at))


def _widen(ring: BlockRing, staging: Staging, block: Block, arrived: Array, kind: int) -> None:
    """Fill the ring's next buffer of K (kind 0) or V from the one that it arrived in."""
    slot = lax.rem(block.step, ring.stages)
    wide, used, ready = ((ring.k_smem, ring.k_used, ring.k_ready), (ring.v_smem, ring.v_used, ring.v_ready))[kind]
    plgpu.barrier_wait(staging.arrived.at[arrived])
    _wait_for_readers(ring, block, used)
    copy_wide(staging.narrow.at[arrived], wide.at[slot])
    if kind == 1:
        pl.when(block.is_trimmed)(lambda: clear_rows(wide.at[slot], block.seen, block.hidden))
    plgpu.barrier_arrive(ready.at[slot])


def _fetch(ring: BlockRing, block: Block, *, pieces: int, values: bool) -> None:
    """Fill the ring's next buffers, once their last readers are done with them."""
    slot = lax.rem(block.step, ring.stages)

    def copy_trimmed() -> None:
        block.copy_values(ring.v_smem.at[slot], ring.trim_ready)
        plgpu.barrier_wait(ring.trim_ready)
        clear_rows(ring.v_smem.at[slot], block.seen, block.hidden)
        for _ in range(pieces):
            plgpu.barrier_arrive(ring.v_ready.at[slot])

    _wait_for_readers(ring, block, ring.k_used)
    block.copy_keys(ring.k_smem.at[slot], ring.k_ready.at[slot])
    if values:
        _wait_for_readers(ring, block, ring.v_used)
        pl.when(~block.is_trimmed)(lambda: block.copy_values(ring.v_smem.at[slot], ring.v_ready.at[slot]))
        pl.when(block.is_trimmed)(copy_trimmed)
