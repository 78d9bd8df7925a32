"""The ring of K and V blocks in shared memory that both attention kernels for Hopper GPUs read their keys from.

One warpgroup fills it by TMA, the others read it. A buffer goes round like this, where each arrow is a barrier:

    filled  --k_ready / v_ready-->  read by every compute warpgroup  --k_used / v_used-->  filled again

The last V block of a request goes through `trim_ready` first. It may hold slots behind the request's last position,
which may hold NaN; the memory warpgroup waits for its copy, zeroes those rows, and arrives at `v_ready` itself. With a
window, so does the first block, which may hold slots that the window hides from all rows.

Where adapters add to the values, a block of Y comes with that of V: they share their barriers.

Of a store in float8 the copies go to buffers of their own, some blocks ahead. The memory warpgroup waits for each,
widens it into the ring's buffer, and arrives there: tensor cores multiply float16 with float16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels.mosaic import Ref, add_all_weighted, add_weighted, clear_rows, copy_wide, tiled_smem


class Staging(NamedTuple):
    """Where blocks of a narrow store arrive for one warpgroup: K of a block, then its V, then K of the next.

    It has `slots` buffers from `first` on.
    """

    narrow: Ref  # [slots of all, block, head_dim]
    arrived: Ref
    first: int
    slots: int


class BlockRing(NamedTuple):
    """Buffers and barriers, `stages` of each but `trim_ready`."""

    k_smem: Ref  # [stages, block, head_dim]
    v_smem: Ref
    k_ready: Ref
    v_ready: Ref
    trim_ready: Ref
    k_used: Ref
    v_used: Ref
    y_smem: Ref | None = None  # [stages, block, rank], where there are adapters
    staging: Staging | None = None  # of a narrow store

    @classmethod
    def of(cls, scratch: dict[str, Any], part: int = 0, parts: int = 1) -> "BlockRing":
        """The ring among a kernel's scratch references, for one of the warpgroups that fill it."""
        staging = None
        if "narrow" in scratch:
            slots = scratch["narrow"].shape[0] // parts
            staging = Staging(scratch["narrow"], scratch["arrived"], part * slots, slots)
        return cls(**{name: scratch[name] for name in cls._fields if name in scratch}, staging=staging)

    @property
    def stages(self) -> int:
        return self.k_smem.shape[0]

    def add_values(
        self, slot: Array, acc: Array, low: Array | None, weights: Array, interpreted: bool
    ) -> tuple[Array, Array | None]:
        """The accumulators with the weighted sum of a block's V and, where there are adapters, its Y."""
        values = self.v_smem.at[slot]
        if low is None or self.y_smem is None:
            return add_weighted(acc, weights, values, interpreted), None
        acc, low = add_all_weighted((acc, low), weights, (values, self.y_smem.at[slot]), interpreted)
        return acc, low


def staging_scratch(block: tuple[int, int, int], dtype: Any, *, pieces: int) -> dict[str, Any]:
    """Scratch types of a staging; `block` is its slots, keys and head_dim."""
    return {
        "narrow": tiled_smem(block, dtype),
        "arrived": plgpu.Barrier(num_arrivals=pieces, num_barriers=block[0]),
    }


def ring_scratch(
    block: tuple[int, int, int], dtype: Any, *, pieces: int, readers: int, values: bool, rank: int = 0
) -> dict[str, Any]:
    """Scratch types of a ring.

    Args:
      block: stages, keys and head_dim.
      dtype: of the products.
      pieces: copies that fill a buffer: one for each page where a block spans several.
      readers: warpgroups that read each buffer.
      values: whether V is read; else its buffers are as small as they can be.
      rank: of Y that is read with V; 0: there is none.
    """
    stages, v_pieces = block[0], 2 * pieces if rank else pieces
    low_rank = {"y_smem": tiled_smem((*block[:2], rank), dtype)} if rank else {}
    return low_rank | {
        "k_smem": tiled_smem(block, dtype),
        "v_smem": tiled_smem(block if values else (1, 8, 64), dtype),
        "k_ready": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=v_pieces, num_barriers=stages),
        "trim_ready": plgpu.Barrier(num_arrivals=v_pieces),
        "k_used": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        "v_used": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    }


class Block(NamedTuple):
    """One block of keys to fetch.

    `copy_keys(smem, barrier)`, `copy_values(smem, barrier)` and, where there are adapters, `copy_low_rank` start its
    copies. Of its V rows, `seen` are at positions that some row sees, those before `hidden` apart; the rest is zeroed
    if it `is_trimmed`, and so is Y.
    """

    step: Array  # blocks that were fetched before it
    copy_keys: Callable[[Ref, Ref], None]
    copy_values: Callable[[Ref, Ref], None]
    is_trimmed: Array
    seen: Array
    hidden: Array | None = None  # where there is a window
    copy_low_rank: Callable[[Ref, Ref], None] | None = None


def fetch_blocks(
    ring: BlockRing,
    begin: Array | int,
    end: Array,
    block_at: Callable[[Array], Block],
    *,
    pieces: int,
    kinds: tuple[int, ...],
) -> None:
    """Fill the ring's buffers with blocks `begin .. end`, one after the other, of K (kind 0), V (1) or both.

    V alone can be had of a narrow store only.
    """
    if ring.staging is None:
        lax.fori_loop(begin, end, lambda i, _: _fetch(ring, block_at(i), pieces=pieces, values=1 in kinds), None)
    else:
        _fetch_narrow(ring, ring.staging, (begin, end), block_at, kinds)


def _fetch_narrow(
    ring: BlockRing,
    staging: Staging,
    blocks: tuple[Array | int, Array],
    block_at: Callable[[Array], Block],
    kinds: tuple[int, ...],
) -> None:
    """The same of a narrow store, by way of the staging."""
    begin, end = blocks

    def slot_of(i: Array, number: int) -> Array:
        return staging.first + lax.rem((i - begin) * len(kinds) + number, staging.slots)

    def stage(i: Array, number: int) -> None:
        """Begin to copy what comes `number` places behind block i's first, if there is such a block."""
        at, number = jnp.int32(i + number // len(kinds)), number % len(kinds)

        @pl.when(at < end)
        def copy() -> None:
            slot, block = slot_of(at, number), block_at(at)
            start = block.copy_values if kinds[number] else block.copy_keys
            start(staging.narrow.at[slot], staging.arrived.at[slot])

    def step(i: Array, _: None) -> None:
        for number, kind in enumerate(kinds):
            _widen(ring, staging, block_at(i), slot_of(i, number), kind)
            stage(i, number + staging.slots)

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

    def copy(ready: Ref) -> None:
        block.copy_values(ring.v_smem.at[slot], ready)
        if ring.y_smem is not None and block.copy_low_rank is not None:
            block.copy_low_rank(ring.y_smem.at[slot], ready)

    def copy_trimmed() -> None:
        copy(ring.trim_ready)
        plgpu.barrier_wait(ring.trim_ready)
        clear_rows(ring.v_smem.at[slot], block.seen, block.hidden)
        if ring.y_smem is not None:
            clear_rows(ring.y_smem.at[slot], block.seen, block.hidden)
        for _ in range(pieces if ring.y_smem is None else 2 * pieces):
            plgpu.barrier_arrive(ring.v_ready.at[slot])

    _wait_for_readers(ring, block, ring.k_used)
    block.copy_keys(ring.k_smem.at[slot], ring.k_ready.at[slot])
    if values:
        _wait_for_readers(ring, block, ring.v_used)
        pl.when(~block.is_trimmed)(lambda: copy(ring.v_ready.at[slot]))
        pl.when(block.is_trimmed)(copy_trimmed)
