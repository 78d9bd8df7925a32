"""Key mass for Hopper GPUs, by Pallas' Mosaic GPU: a pass for the log-sum-exp, and one for the column sums.

In the second pass a program owns a block of keys and the query heads of one KV head. It keeps its keys in shared
memory and goes through the tiles of rows that see them, whose queries one more warpgroup fetches. Scores are
transposed, `[key, row]`, so that a column sum is a sum within a few threads; no sum is shared between programs,
which makes the result deterministic.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store, pad_rows
from sparsex_kernels.mosaic import (
    LOG2_E,
    WGMMA_ROWS,
    as_scalar,
    flat_store,
    heads_a_tile,
    kernel,
    padded_pages,
    tiled_smem,
)
from sparsex_kernels.paged_attention.hopper import attend, tile_spans

WARPGROUPS = 2  # that compute, each with 64 keys
BLOCK = WARPGROUPS * WGMMA_ROWS  # keys of a program
COLUMNS = 128  # packed rows [head, row] a step
STAGES = 2  # tiles of rows in flight
BY_ROW = plgpu.Layout.WGMMA.reduce(0)  # one value a column of the transposed scores
BY_KEY = plgpu.Layout.WGMMA.reduce(1)


class Shape(NamedTuple):
    """Static sizes of one call."""

    rows: int  # of a tile
    share: int  # query heads in a tile
    heads: int  # programs over the heads
    repeat: int  # programs that read the same KV head
    pages: int  # of a layer
    page_size: int
    head_dim: int
    dtype: Any
    scale: float


def key_mass(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    power: int = 1,
) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`."""
    args = (q, store, layer, positions, requests, page_tables, scale)
    return column_sums(*args, attend(*args, values=False, lse=True)["lse"], power)


def column_sums(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    lse: Float[Array, "rows q_heads"],
    power: int,
) -> Float[Array, "requests context"]:
    """The key mass, given the log-sum-exp of each row and head."""
    shape = _shape(q, store, power * scale)
    q, lse = pad_rows(q, shape.rows), pad_rows(lse, shape.rows)
    positions, requests = pad_rows(positions, shape.rows, -1), pad_rows(requests, shape.rows)
    num_requests, context = page_tables.shape[0], page_tables.shape[1] * shape.page_size
    blocks = -(-context // BLOCK)
    run = kernel(
        functools.partial(_kernel, shape),
        out_type=jax.ShapeDtypeStruct((shape.heads, num_requests, blocks * BLOCK), jnp.float32),
        grid=(blocks, num_requests, shape.heads),
        grid_names=("block", "request", "heads"),
        num_threads=WARPGROUPS + 1,
        scratch_types=_scratch(shape),
    )
    tables = padded_pages(store, page_tables, max(BLOCK // shape.page_size, 1))
    ranges = seen_by(positions, requests, shape, num_requests, blocks)
    columns = _pack(jnp.stack([positions, requests])[:, :, None], shape)[0]
    columns = jnp.where(jnp.arange(COLUMNS) < shape.share * shape.rows, columns, -1).astype(jnp.int32)
    by_head = _pack((power * LOG2_E * lse)[None], shape)[:, :, 0]
    mass = run(q, flat_store(store), as_scalar(layer), tables, ranges, columns, by_head)
    return mass.sum(axis=0)[:, :context]


def seen_by(
    positions: RowInts, requests: RowInts, shape: Shape, num_requests: int, blocks: int
) -> Int[Array, "requests blocks 4"]:
    """Tiles of rows that see anything of a key block: the first; the first and one behind the last of those that
    see all of it with every row; one behind the last."""
    spans, _ = tile_spans(positions, requests, shape.rows, num_requests, 1)
    last, full = spans[..., 0, None], spans[..., 1, None]  # with blocks of one key, `full` counts keys all rows see
    tile, begin = jnp.arange(len(spans))[:, None, None], jnp.arange(blocks) * BLOCK
    end = jnp.max(jnp.where(last >= 0, tile + 1, 0), axis=0)
    first = jnp.min(jnp.where(last >= begin, tile, end), axis=0)
    if shape.share & (shape.share - 1):  # some columns have no head: always masked
        clear = clear_end = jnp.broadcast_to(end, first.shape)
    else:
        whole = full >= begin + BLOCK
        clear = jnp.min(jnp.where(whole, tile, end), axis=0)
        clear_end = jnp.maximum(jnp.max(jnp.where(whole, tile + 1, 0), axis=0), clear)
    return jnp.stack([first, clear, clear_end, jnp.broadcast_to(end, first.shape)], axis=-1).astype(jnp.int32)


def _shape(q: Queries, store: Store, scale: float) -> Shape:
    _, pages, _, kv_heads, page_size, head_dim = store.shape
    share = heads_a_tile(q.shape[1], kv_heads)
    rows = COLUMNS // (1 << (share - 1).bit_length())
    heads = q.shape[1] // share
    return Shape(rows, share, heads, heads // kv_heads, pages, page_size, head_dim, q.dtype, float(scale))


def _pack(x: Array, shape: Shape) -> Array:
    """From `[kinds, rows, heads]`, of one or all heads, to `[head programs, tiles, kinds, columns]`."""
    kinds, rows, heads = x.shape
    if heads == 1:
        x = jnp.broadcast_to(x, (kinds, rows, COLUMNS // shape.rows))
    else:
        x = x.reshape(kinds, rows, shape.heads, shape.share)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, COLUMNS // shape.rows - shape.share)))
    x = x.reshape(kinds, rows // shape.rows, shape.rows, -1, COLUMNS // shape.rows)
    return x.transpose(3, 1, 0, 4, 2).reshape(x.shape[3], x.shape[1], kinds, COLUMNS)


def _scratch(shape: Shape) -> dict[str, Any]:
    return {
        "k_smem": tiled_smem((WARPGROUPS, WGMMA_ROWS, shape.head_dim), shape.dtype),
        "q_smem": tiled_smem((STAGES, COLUMNS, shape.head_dim), shape.dtype),
        "columns_smem": plgpu.SMEM((STAGES, 2, COLUMNS), jnp.int32),
        "lse_smem": plgpu.SMEM((STAGES, COLUMNS), jnp.float32),
        "mass_smem": plgpu.SMEM((WARPGROUPS, WGMMA_ROWS), jnp.float32),
        "k_ready": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "q_ready": plgpu.Barrier(num_arrivals=shape.share + 2, num_barriers=STAGES),
        "q_used": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    }


def _kernel(shape: Shape, *refs: Any, **scratch: Any) -> None:
    q_ref, kv_ref, layer_ref, tables_ref, ranges_ref, columns_ref, lse_ref, mass_ref = refs
    block, request, head = lax.axis_index("block"), lax.axis_index("request"), lax.axis_index("heads")
    ranges = tuple(ranges_ref[request, block, n] for n in range(4))
    wg = lax.axis_index("wg")

    @pl.when(wg < WARPGROUPS)
    def compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        _sum(shape, (block, request, head, wg), ranges, mass_ref, scratch)

    @pl.when(wg == WARPGROUPS)
    def fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")
        pl.when(ranges[0] < ranges[3])(
            lambda: _fetch(
                shape,
                (block, request, head),
                ranges,
                (q_ref, kv_ref, layer_ref, tables_ref, columns_ref, lse_ref),
                scratch,
            )
        )


def _sum(
    shape: Shape,
    program: tuple[Array, Array, Array, Array],
    ranges: tuple[Array, ...],
    mass_ref: Any,
    scratch: dict[str, Any],
) -> None:
    block, request, head, wg = program
    first, clear, clear_end, end = ranges
    scores = (WGMMA_ROWS, COLUMNS)
    key = block * BLOCK + wg * WGMMA_ROWS
    pl.when(first < end)(lambda: plgpu.barrier_wait(scratch["k_ready"]))

    def step(masked: bool, tile: Array, total: Array) -> Array:
        stage = lax.rem(tile - first, STAGES)
        plgpu.barrier_wait(scratch["q_ready"].at[stage])

        def product(acc: Any) -> Array:
            plgpu.wgmma(acc, scratch["k_smem"].at[wg], scratch["q_smem"].at[stage].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(product, plgpu.ACC(scores, jnp.float32))
        lse = plgpu.load(scratch["lse_smem"].at[stage], layout=BY_ROW, optimized=False)
        p = jnp.exp2(s * (shape.scale * LOG2_E) - lax.broadcast_in_dim(lse, scores, [1]))
        if masked:
            positions, owners = (
                plgpu.load(scratch["columns_smem"].at[stage, n], layout=BY_ROW, optimized=False) for n in range(2)
            )
            bound = jnp.where(owners == request, positions, -1)
            keys = plgpu.broadcasted_iota(jnp.int32, scores, 0, layout=plgpu.Layout.WGMMA) + key
            p = jnp.where(lax.broadcast_in_dim(bound, scores, [1]) >= keys, p, 0.0)
        plgpu.barrier_arrive(scratch["q_used"].at[stage])
        return total + p.sum(axis=1)

    total = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), BY_KEY)
    total = lax.fori_loop(first, clear, functools.partial(step, True), total)
    total = lax.fori_loop(clear, clear_end, functools.partial(step, False), total)
    total = lax.fori_loop(clear_end, end, functools.partial(step, True), total)
    scratch["mass_smem"].at[wg][...] = total
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["mass_smem"].at[wg], mass_ref.at[head, request, pl.ds(key, WGMMA_ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _fetch(
    shape: Shape,
    program: tuple[Array, Array, Array],
    ranges: tuple[Array, ...],
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
) -> None:
    q_ref, kv_ref, layer_ref, tables_ref, columns_ref, lse_ref = refs
    block, request, head = program
    for wg in range(WARPGROUPS):
        key = block * BLOCK + wg * WGMMA_ROWS
        page = layer_ref[0] * shape.pages + tables_ref[request, lax.div(key, shape.page_size)]
        source = kv_ref.at[page, lax.div(head, shape.repeat), pl.ds(lax.rem(key, shape.page_size), WGMMA_ROWS)]
        plgpu.copy_gmem_to_smem(source, scratch["k_smem"].at[wg], scratch["k_ready"])

    def step(tile: Array, _: None) -> None:
        stage = lax.rem(tile - ranges[0], STAGES)

        pl.when(tile - ranges[0] >= STAGES)(lambda: plgpu.barrier_wait(scratch["q_used"].at[stage]))
        ready = scratch["q_ready"].at[stage]
        for h in range(shape.share):
            source = q_ref.at[pl.ds(tile * shape.rows, shape.rows), head * shape.share + h]
            plgpu.copy_gmem_to_smem(source, scratch["q_smem"].at[stage, pl.ds(h * shape.rows, shape.rows)], ready)
        plgpu.copy_gmem_to_smem(columns_ref.at[tile], scratch["columns_smem"].at[stage], ready)
        plgpu.copy_gmem_to_smem(lse_ref.at[head, tile], scratch["lse_smem"].at[stage], ready)

    lax.fori_loop(ranges[0], ranges[3], step, None)

    def drain(tile: Array, _: None) -> None:  # so that every phase of a barrier is seen by who waits on it
        plgpu.barrier_wait(scratch["q_used"].at[lax.rem(tile - ranges[0], STAGES)])

    lax.fori_loop(jnp.maximum(ranges[3] - STAGES, ranges[0]), ranges[3], drain, None)
