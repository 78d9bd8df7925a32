"""Key mass for Hopper GPUs, by Pallas' Mosaic GPU: a pass for the log-sum-exp, and one for the column sums.

In the second pass a program owns a block of keys and the query heads of one KV head. It keeps its keys in shared memory
and goes through the tiles of rows that see them, whose queries one more warpgroup fetches. Scores are transposed,
`[key, row]`, so that a column sum is a sum within a few threads. No sum is shared between programs, which makes the
result deterministic.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels import mosaic
from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.attention_shape import AttentionShape, shared_sizes
from sparsex_kernels.gpu import LOG2_E, in_float16, padded_pages, power_of_two, raised
from sparsex_kernels.layout import Power, RowInts, Window, first_seen, pad_positions, pad_rows
from sparsex_kernels.mosaic import WGMMA_ROWS, Ref
from sparsex_kernels.paged_attention.hopper import attend
from sparsex_kernels.paged_attention.tiles import tile_spans

WARPGROUPS = 2  # that compute, each with 64 keys
BLOCK = WARPGROUPS * WGMMA_ROWS  # keys of a program
COLUMNS = 128  # packed rows [head, row] a step
STAGES = 2  # tiles of rows in flight
BY_ROW = plgpu.Layout.WGMMA.reduce(0)  # one value a column of the transposed scores
BY_KEY = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(AttentionShape):
    """Static sizes of one call."""

    rows: int  # of a tile


def key_mass(args: AttentionArgs, power: Power = 1) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`."""
    args = in_float16(args)
    (lse,) = attend(args, values=False, lse=True)
    return column_sums(raised(args, power), power * LOG2_E * lse)


def column_sums(args: AttentionArgs, lse: Float[Array, "rows q_heads"]) -> Float[Array, "requests context"]:
    """The sum of `exp2(score * LOG2_E - lse)` over rows and heads, for each key."""
    shape, num_requests = _shape(args), len(args.page_tables)
    query, lse = pad_rows(args.query, shape.rows), pad_rows(lse, shape.rows)
    positions, requests = pad_positions(args.positions, args.requests, shape.rows)
    blocks = -(-args.context // BLOCK)
    run = mosaic.kernel(
        functools.partial(_kernel, shape),
        args.backend,
        out_type=jax.ShapeDtypeStruct((shape.heads, num_requests, blocks * BLOCK), jnp.float32),
        grid=(blocks, num_requests, shape.heads),
        grid_names=("block", "request", "heads"),
        num_threads=WARPGROUPS + 1,
        scratch_types=_scratch(shape),
    )
    tables = padded_pages(args.store, args.page_tables, max(BLOCK // shape.page_size, 1))
    ranges = seen_by(positions, requests, shape, num_requests, blocks, args.window)
    windows = [] if args.window is None else [first_seen(positions, args.window)]
    columns = _pack(jnp.stack([positions, requests, *windows])[:, :, None], shape)[0]
    columns = jnp.where(jnp.arange(COLUMNS) < shape.share * shape.rows, columns, -1).astype(jnp.int32)
    by_head = _pack(lse[None], shape)[:, :, 0]
    mass = run(query, mosaic.flat_store(args.store), mosaic.as_scalar(args.layer), tables, ranges, columns, by_head)
    return mass.sum(axis=0)[:, : args.context]


def seen_by(
    positions: RowInts, requests: RowInts, shape: Shape, num_requests: int, blocks: int, window: Window | None = None
) -> Int[Array, "requests blocks 4"]:
    """Which tiles of rows see each request's blocks of keys.

    Returns four tile numbers for each block, the ranges of three loops: tiles `[0] .. [1]` see it with some rows or in
    part, `[1] .. [2]` see all of it with every row and need no mask, `[2] .. [3]` again see it with some rows. The
    last come about where a tile straddles two requests, or holds padding, or where windows end.
    """
    spans, _ = tile_spans(positions, requests, shape.rows, num_requests, 1, window)
    last, full = spans[..., 0, None], spans[..., 1, None]  # with blocks of one key, `full` counts keys all rows see
    tile, begin = jnp.arange(len(spans))[:, None, None], jnp.arange(blocks) * BLOCK
    seen = last >= 0
    if window is not None:
        seen &= spans[..., 2, None] < begin + BLOCK
    end = jnp.max(jnp.where(seen, tile + 1, 0), axis=0)
    first = jnp.min(jnp.where(last >= begin, tile, end), axis=0)
    if shape.share & (shape.share - 1):  # some columns have no head: always masked
        clear = clear_end = jnp.broadcast_to(end, first.shape)
    else:
        whole = full >= begin + BLOCK
        if window is not None:
            whole &= spans[..., 3, None] <= begin
        clear = jnp.min(jnp.where(whole, tile, end), axis=0)
        clear_end = jnp.maximum(jnp.max(jnp.where(whole, tile + 1, 0), axis=0), clear)
    return jnp.stack([first, clear, clear_end, jnp.broadcast_to(end, first.shape)], axis=-1).astype(jnp.int32)


def _shape(args: AttentionArgs) -> Shape:
    sizes = shared_sizes(args)
    rows = COLUMNS // power_of_two(sizes["share"])
    return Shape(**sizes, rows=rows)


def _pack(x: Array, shape: Shape) -> Array:
    """From `[kinds, rows, heads]`, of one or all heads, to `[head programs, tiles, kinds, columns]`.

    A tile's columns are `[head, row]`: with 4 heads, columns 0..31 are the tile's 32 rows with its first head.
    """
    kinds, rows, heads = x.shape
    if heads == 1:
        x = jnp.broadcast_to(x, (kinds, rows, COLUMNS // shape.rows))
    else:
        x = x.reshape(kinds, rows, shape.heads, shape.share)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, COLUMNS // shape.rows - shape.share)))
    x = x.reshape(kinds, rows // shape.rows, shape.rows, -1, COLUMNS // shape.rows)
    return x.transpose(3, 1, 0, 4, 2).reshape(x.shape[3], x.shape[1], kinds, COLUMNS)


def _scratch(shape: Shape) -> dict[str, Any]:
    keys = (WARPGROUPS, WGMMA_ROWS, shape.head_dim)
    narrow = {"k_narrow": mosaic.tiled_smem(keys, shape.stored)} if shape.narrow else {}
    return narrow | {
        "k_smem": mosaic.tiled_smem(keys, shape.dtype),
        "q_smem": mosaic.tiled_smem((STAGES, COLUMNS, shape.head_dim), shape.dtype),
        "columns_smem": plgpu.SMEM((STAGES, 3 if shape.windowed else 2, COLUMNS), jnp.int32),
        "lse_smem": plgpu.SMEM((STAGES, COLUMNS), jnp.float32),
        "mass_smem": plgpu.SMEM((WARPGROUPS, WGMMA_ROWS), jnp.float32),
        "k_ready": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "q_ready": plgpu.Barrier(num_arrivals=shape.share + 2, num_barriers=STAGES),
        "q_used": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    }


class Operands(NamedTuple):
    """What the kernel reads in global memory."""

    query: Ref  # [padded_rows, q_heads, head_dim]
    store: Ref  # [layers * pages, 2 * kv_heads, page_size, head_dim]
    layer: Ref  # [1]
    tables: Ref  # [requests, pages]
    ranges: Ref  # [requests, blocks, 4]
    columns: Ref  # [tiles, 2, COLUMNS], positions and requests; where there are windows, also first keys
    lse: Ref  # [heads, tiles, COLUMNS] float32, in base 2


class Program(NamedTuple):
    """What one program works on: a block of keys, and the tiles of rows that see it (see `seen_by`)."""

    block: Array
    request: Array
    head: Array
    first: Array
    clear: Array
    clear_end: Array
    end: Array


def _kernel(shape: Shape, *refs: Ref, **scratch: Ref) -> None:
    operands, mass_ref = Operands(*refs[:-1]), refs[-1]
    block, request, head = lax.axis_index("block"), lax.axis_index("request"), lax.axis_index("heads")
    program = Program(block, request, head, *(operands.ranges[request, block, n] for n in range(4)))
    wg = lax.axis_index("wg")

    @pl.when(wg < WARPGROUPS)
    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        _sum(shape, program, wg, mass_ref, scratch)

    @pl.when(wg == WARPGROUPS)
    def fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")
        pl.when(program.first < program.end)(lambda: _fetch(shape, program, operands, scratch))


def _sum(shape: Shape, program: Program, wg: Array, mass_ref: Ref, scratch: dict[str, Ref]) -> None:
    block, request, head, first, clear, clear_end, end = program
    scores = (WGMMA_ROWS, COLUMNS)
    key = block * BLOCK + wg * WGMMA_ROWS

    @pl.when(first < end)
    def wait_for_keys() -> None:
        plgpu.barrier_wait(scratch["k_ready"])
        if shape.narrow:
            mosaic.copy_wide(scratch["k_narrow"].at[wg], scratch["k_smem"].at[wg])

    def step(masked: bool, tile: Array, total: Array) -> Array:
        stage = lax.rem(tile - first, STAGES)
        plgpu.barrier_wait(scratch["q_ready"].at[stage])
        s = mosaic.products(scratch["k_smem"].at[wg], scratch["q_smem"].at[stage])
        lse = plgpu.load(scratch["lse_smem"].at[stage], layout=BY_ROW, optimized=False)
        p = jnp.exp2(s * (shape.scale * LOG2_E) - lax.broadcast_in_dim(lse, scores, [1]))
        if masked:
            positions, owners, *first_keys = (
                plgpu.load(scratch["columns_smem"].at[stage, n], layout=BY_ROW, optimized=False)
                for n in range(3 if shape.windowed else 2)
            )
            bound = jnp.where(owners == request, positions, -1)
            keys = plgpu.broadcasted_iota(jnp.int32, scores, 0, layout=plgpu.Layout.WGMMA) + key
            seen = lax.broadcast_in_dim(bound, scores, [1]) >= keys
            for first_key in first_keys:
                seen &= lax.broadcast_in_dim(first_key, scores, [1]) <= keys
            p = jnp.where(seen, p, 0.0)
        plgpu.barrier_arrive(scratch["q_used"].at[stage])
        return total + p.sum(axis=1)

    total = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), BY_KEY)
    # 1. Tiles before those that see the whole block. 2. Tiles that see it with every row. 3. Tiles behind them.
    total = lax.fori_loop(first, clear, functools.partial(step, True), total)
    total = lax.fori_loop(clear, clear_end, functools.partial(step, False), total)
    total = lax.fori_loop(clear_end, end, functools.partial(step, True), total)
    scratch["mass_smem"].at[wg][...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["mass_smem"].at[wg], mass_ref.at[head, request, pl.ds(key, WGMMA_ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _fetch(shape: Shape, program: Program, operands: Operands, scratch: dict[str, Ref]) -> None:
    head, first, end = program.head, program.first, program.end
    for wg in range(WARPGROUPS):
        key = program.block * BLOCK + wg * WGMMA_ROWS
        page = operands.layer[0] * shape.pages + operands.tables[program.request, lax.div(key, shape.page_size)]
        keys = pl.ds(lax.rem(key, shape.page_size), WGMMA_ROWS)
        source = operands.store.at[page, lax.div(head, shape.repeat), keys]
        target = scratch["k_narrow" if shape.narrow else "k_smem"].at[wg]
        plgpu.copy_gmem_to_smem(source, target, scratch["k_ready"])

    def step(tile: Array, _: None) -> None:
        stage = lax.rem(tile - first, STAGES)

        pl.when(tile - first >= STAGES)(lambda: plgpu.barrier_wait(scratch["q_used"].at[stage]))
        ready = scratch["q_ready"].at[stage]
        for h in range(shape.share):
            source = operands.query.at[pl.ds(tile * shape.rows, shape.rows), head * shape.share + h]
            plgpu.copy_gmem_to_smem(source, scratch["q_smem"].at[stage, pl.ds(h * shape.rows, shape.rows)], ready)
        plgpu.copy_gmem_to_smem(operands.columns.at[tile], scratch["columns_smem"].at[stage], ready)
        plgpu.copy_gmem_to_smem(operands.lse.at[head, tile], scratch["lse_smem"].at[stage], ready)

    lax.fori_loop(first, end, step, None)
    mosaic.drain((scratch["q_used"],), first, end, STAGES)
