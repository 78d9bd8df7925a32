"""Paged attention of few rows over many keys for Hopper GPUs, by Pallas' Mosaic GPU: a decode step's.

Reading the keys is all the work, so the keys of all rows are cut into equal shares (`shares.py`), and a program attends
to one share after the other, each with the query heads of one KV head. Its memory warpgroup goes from row to row and on
to the next share without a pause. Each piece that a share has of a row gives a result of its own (FlashDecoding), and a
second kernel (`hopper_merge.py`) merges each row's results by their log-sum-exps; how many a row has is data. Only the
row's own pieces are read, so what is not finite in one request's keys or values reaches no other row, and results that
were never written reach none.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from sparsex_kernels import mosaic
from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.attention_shape import AttentionShape, shared_sizes
from sparsex_kernels.gpu import check_attention, check_low_rank, padded_pages
from sparsex_kernels.layout import Queries
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS, Ref, Softmax
from sparsex_kernels.paged_attention.hopper_blocks import Block, BlockRing, fetch_blocks, ring_scratch, staging_scratch
from sparsex_kernels.paged_attention.hopper_low_rank import (
    RANKS,
    Expansion,
    LowRankRefs,
    first_column,
    low_rank_operands,
    matrix_scratch,
)
from sparsex_kernels.paged_attention.hopper_merge import SHARE, merge
from sparsex_kernels.paged_attention.parts import Part
from sparsex_kernels.paged_attention.shares import key_shares

BLOCK = 64  # keys a step
STAGES = 5  # blocks in flight
LOW_RANK_STAGES = 4  # with Y beside V: with heads of 64, two programs still share a multiprocessor
NARROW_STAGES, STAGED = 2, 12  # of a narrow store: blocks that were widened, and blocks of K or V in flight
PROGRAMS = 2 * MULTIPROCESSORS  # the most shares of all heads to aim at; more have more to merge
AT_ONCE = {64: 2 * MULTIPROCESSORS, 128: MULTIPROCESSORS}  # programs that run at a time, by the size of heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(AttentionShape):
    """Static sizes of one call."""

    programs: int


def decode(args: AttentionArgs) -> tuple[Queries, Float[Array, "rows q_heads"]]:
    """Output and log-sum-exp, as `sparsex_kernels.paged_attention` returns them; rows may be in any order."""
    check_attention(args, BLOCK, smallest_page=BLOCK)
    check_low_rank(args, RANKS[args.query.shape[2]])
    rows, q_heads, head_dim = args.query.shape
    sizes = shared_sizes(args)
    share, heads = sizes["share"], sizes["heads"]
    cut: dict[str, Any] = {"programs": PROGRAMS, "block": BLOCK, "window": args.window, "at_once": AT_ONCE[head_dim]}
    pieces, spans, ranges, number = key_shares(args.positions, args.requests, heads, **cut)
    shape = Shape(**sizes, programs=min(AT_ONCE[head_dim], heads * len(ranges)))
    merged = -(-heads * SHARE // WGMMA_ROWS) * WGMMA_ROWS
    query = args.query.reshape(rows, heads, share, head_dim)
    packed = jnp.pad(query, ((0, 0), (0, 0), (0, SHARE - share), (0, 0)))
    run = mosaic.kernel(
        functools.partial(_kernel, shape),
        args.backend,
        out_type=(
            jax.ShapeDtypeStruct((len(pieces), merged, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((len(pieces), merged), jnp.float32),
        ),
        grid=(shape.programs,),
        grid_names=("program",),
        num_threads=3 if shape.narrow else 2,
        scratch_types=_scratch(shape),
    )
    tables = padded_pages(args.store, args.page_tables, 1)
    operands = packed, mosaic.flat_store(args.store), mosaic.as_scalar(args.layer), tables
    partial, lse = run(*operands, pieces, ranges, mosaic.as_scalar(number), *low_rank_operands(args))
    out, lse = merge(partial, lse, spans, q_heads, share, query.dtype, args.backend)
    return out, lse.reshape(rows, -1, SHARE)[:, :heads, :share].reshape(rows, q_heads)


def _scratch(shape: Shape) -> dict[str, Any]:
    stages = NARROW_STAGES if shape.narrow else LOW_RANK_STAGES if shape.rank else STAGES
    ring = ring_scratch((stages, BLOCK, shape.head_dim), shape.dtype, pieces=1, readers=1, values=True, rank=shape.rank)
    if shape.narrow:
        ring |= staging_scratch((STAGED, BLOCK, shape.head_dim), shape.stored, pieces=1)
    return (
        ring
        | matrix_scratch(shape, 1)
        | {
            "q_smem": mosaic.tiled_smem((WGMMA_ROWS, shape.head_dim), shape.dtype),
            "out_smem": mosaic.tiled_smem((WGMMA_ROWS, shape.head_dim), jnp.float32),
            "lse_smem": plgpu.SMEM((WGMMA_ROWS,), jnp.float32),
            "q_ready": plgpu.Barrier(),
        }
    )


class Operands(NamedTuple):
    """What the kernel reads and writes in global memory."""

    query: Ref  # [rows, heads, SHARE, head_dim]
    store: Ref  # [layers * pages, 2 * kv_heads, page_size, head_dim]
    layer: Ref  # [1]
    tables: Ref  # [requests, max_pages]
    pieces: Ref  # [pieces, 5], or 6 where there is a window
    ranges: Ref  # [shares, 2]
    number: Ref  # [1]
    out: Ref  # [pieces, merged, head_dim] float32
    lse: Ref  # [pieces, merged] float32, in base 2
    low_rank: LowRankRefs | None = None  # if there are adapters

    @classmethod
    def of(cls, refs: tuple[Ref, ...]) -> "Operands":
        """These of the kernel's references: what it reads, adapters too, and then its results."""
        adapters = refs[7:-2]
        return cls(*refs[:7], *refs[-2:])._replace(low_rank=LowRankRefs(*adapters) if adapters else None)


class Piece(NamedTuple):
    """What a program does at a time: a share's piece of a row, for one group of query heads."""

    number: Array
    head: Array
    part: Part
    done: Array  # blocks that the program was given before it


def _over_pieces(shape: Shape, operands: Operands, body: Callable[[Piece], None]) -> Array:
    """Call `body` for each of the program's pieces that has blocks. Returns the number of their blocks."""
    program, items = lax.axis_index("program"), operands.number[0] * shape.heads

    def item(i: Array, done: Array) -> Array:
        at = program + i * shape.programs
        share, head = lax.div(at, shape.heads), lax.rem(at, shape.heads)

        def step(number: Array, done: Array) -> Array:
            part = Part(*(operands.pieces[number, n] for n in range(operands.pieces.shape[1])))
            pl.when(part.begin < part.end)(lambda: body(Piece(number, head, part, done)))
            return done + part.end - part.begin

        return lax.fori_loop(operands.ranges[share, 0], operands.ranges[share, 1], step, done)

    rounds = lax.div(items - program + shape.programs - 1, shape.programs)
    return lax.fori_loop(0, rounds, item, jnp.int32(0))


def _kernel(shape: Shape, *refs: Ref, **scratch: Ref) -> None:
    operands, wg = Operands.of(refs), lax.axis_index("wg")

    @pl.when(wg == 0)
    def compute() -> None:
        _over_pieces(shape, operands, lambda piece: _compute(shape, piece, operands, scratch))
        plgpu.wait_smem_to_gmem(0)

    # Widening blocks takes longer than reading them: a narrow store has a warpgroup for K and another for V.
    sides = ((0,), (1,)) if shape.narrow else ((0, 1),)
    for side, kinds in enumerate(sides):

        @pl.when(wg == 1 + side)
        def fetch(side: int = side, kinds: tuple[int, ...] = kinds) -> None:
            ring = BlockRing.of(scratch, side, len(sides))
            blocks = _over_pieces(shape, operands, lambda piece: _fetch(shape, piece, operands, ring, kinds))
            mosaic.drain([(ring.k_used, ring.v_used)[kind] for kind in kinds], 0, blocks, ring.stages)


def _compute(shape: Shape, piece: Piece, operands: Operands, scratch: dict[str, Ref]) -> None:
    number, head, part, done = piece
    ring, stored = BlockRing.of(scratch), pl.ds(0, SHARE)
    q_smem, square = scratch["q_smem"], (WGMMA_ROWS, BLOCK)
    # Only the first rows are filled. The others keep what they held; nothing of them is stored.
    plgpu.copy_gmem_to_smem(operands.query.at[part.row, head], q_smem.at[stored], scratch["q_ready"])
    low_rank, expansion = operands.low_rank, Expansion.of(scratch, lax.axis_index("wg")) if shape.rank else None
    if low_rank is not None and expansion is not None:
        expansion.fetch(shape, low_rank, operands.layer[0], part.request, lax.div(head, shape.repeat))
    plgpu.barrier_wait(scratch["q_ready"])

    def step(masked: bool, i: Array, state: Softmax) -> Softmax:
        acc, top, total, low = state
        slot = lax.rem(done + i - part.begin, ring.stages)
        plgpu.barrier_wait(ring.k_ready.at[slot])
        s = mosaic.products(q_smem, ring.k_smem.at[slot])
        plgpu.barrier_arrive(ring.k_used.at[slot])
        if masked:
            keys = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=plgpu.Layout.WGMMA) + i * BLOCK
            seen = keys <= part.position
            s = jnp.where(seen & (keys >= part.first) if shape.windowed else seen, s, -jnp.inf)
        new_top, p, decay = mosaic.softmax_weights(s, top, shape.scale)
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        if low is not None:
            low *= lax.broadcast_in_dim(decay, low.shape, [0])
        plgpu.barrier_wait(ring.v_ready.at[slot])
        acc, low = ring.add_values(slot, acc, low, p.astype(shape.dtype), shape.interpreted)
        plgpu.barrier_arrive(ring.v_used.at[slot])
        return Softmax(acc, new_top, total * decay + p.sum(axis=1), low)

    clear = part.begin
    if shape.windowed:
        clear = jnp.clip(lax.div(part.first + BLOCK - 1, BLOCK), part.begin, part.end)
    full = jnp.clip(lax.div(part.position + 1, BLOCK), clear, part.end)
    state = mosaic.empty_softmax(shape.head_dim, shape.rank)
    if shape.windowed:
        # 0. The block that the window begins in, if that is in this part and some of it is hidden.
        state = lax.fori_loop(part.begin, clear, functools.partial(step, True), state)
    # 1. Blocks that the row sees in full. 2. The one that its position lies in, if that is in this part.
    state = lax.fori_loop(clear, full, functools.partial(step, False), state)
    acc, top, total, low = lax.fori_loop(full, part.end, functools.partial(step, True), state)
    out = acc / lax.broadcast_in_dim(total, acc.shape, [0])
    if low is not None and low_rank is not None and expansion is not None:
        sums = low / lax.broadcast_in_dim(total, low.shape, [0])
        out = expansion.add(out, sums, low_rank.columns[part.request] >= 0, shape)
    plgpu.wait_smem_to_gmem(0)  # the results of the piece before
    scratch["out_smem"][...] = out
    scratch["lse_smem"][...] = top + jnp.log2(total)
    plgpu.commit_smem()
    rows = pl.ds(head * SHARE, SHARE)
    plgpu.copy_smem_to_gmem(scratch["out_smem"].at[stored], operands.out.at[number, rows])
    plgpu.copy_smem_to_gmem(scratch["lse_smem"].at[stored], operands.lse.at[number, rows])


def _fetch(shape: Shape, piece: Piece, operands: Operands, ring: BlockRing, kinds: tuple[int, ...]) -> None:
    _, head, part, done = piece
    kv_head, first_page = lax.div(head, shape.repeat), operands.layer[0] * shape.pages
    last, low_rank = lax.div(part.position, BLOCK), operands.low_rank
    column = None if low_rank is None else first_column(low_rank, part.request, shape.rank)

    def block_at(i: Array) -> Block:
        page = first_page + operands.tables[part.request, lax.div(i * BLOCK, shape.page_size)]
        keys = pl.ds(lax.rem(i * BLOCK, shape.page_size), BLOCK)

        def copy(line: Array, smem: Ref, barrier: Ref) -> None:
            plgpu.copy_gmem_to_smem(operands.store.at[page, line, keys], smem, barrier)

        def copy_low_rank(refs: LowRankRefs, smem: Ref, barrier: Ref) -> None:
            plgpu.copy_gmem_to_smem(refs.store.at[page, keys, pl.ds(column, shape.rank)], smem, barrier)

        return Block(
            step=done + i - part.begin,
            copy_keys=functools.partial(copy, kv_head),
            copy_values=functools.partial(copy, shape.kv_heads + kv_head),
            is_trimmed=(i == last) | (i * BLOCK < part.first) if shape.windowed else i == last,
            seen=part.position + 1 - i * BLOCK,
            hidden=part.first - i * BLOCK if shape.windowed else None,
            copy_low_rank=None if low_rank is None else functools.partial(copy_low_rank, low_rank),
        )

    fetch_blocks(ring, part.begin, part.end, block_at, pieces=1, kinds=kinds)
