"""Sparse-query paged attention for Hopper GPUs (FlashAttention-3, sections 3.1 and 3.2), by Pallas' Mosaic GPU.

A program owns a tile of consecutive rows and the query heads of one KV head: each compute warpgroup has the rows
`[head, row]` packed into the 64 rows of its matrix products, so that a K or V block is read once for all of them.
One more warpgroup fetches K and V blocks by TMA through the page tables. A tile may hold rows of several requests:
the program folds the keys of one after the other, from the start each time, and keeps each row's result of its own
request; what is not finite in another's keys or values never reaches it. Tiles need no cutting so, and every output
tile is stored once.
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

from sparsex_kernels.layout import PageTables, Queries, RowInts, Store, pad_rows, row_a_request
from sparsex_kernels.mosaic import (
    LOG2_E,
    ROWS,
    WGMMA_ROWS,
    add_weighted,
    as_scalar,
    check_attention,
    clear_rows,
    empty_softmax,
    flat_store,
    heads_a_tile,
    kernel,
    padded_pages,
    tiled_smem,
)
from sparsex_kernels.paged_attention.hopper_decode import decode


@dataclasses.dataclass(frozen=True)
class Config:
    """What may be tuned.

    Attributes:
      block: keys a step; a multiple or a divisor of the page size.
      stages: K and V blocks in flight.
      warpgroups: that compute; each has 64 packed rows.
      alternate: two warpgroups take turns, one in its products while the other is in its softmax.
      registers: of a compute and of the memory warpgroup's threads.
    """

    block: int = 128
    stages: int = 2
    warpgroups: int = 2
    alternate: bool = True
    registers: tuple[int, int] = (232, 40)


class Shape(NamedTuple):
    """Static sizes of one call."""

    tiles: int
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


def paged_attention(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    return_lse: bool = False,
    config: Config = Config(),
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    if row_a_request(q, page_tables):
        out, out_lse = decode(q, store, layer, positions, requests, page_tables, scale)
        return (out, out_lse) if return_lse else out
    results = attend(q, store, layer, positions, requests, page_tables, scale, lse=return_lse, config=config)
    return (results["out"], results["lse"]) if return_lse else results["out"]


def attend(
    q: Queries,
    store: Store,
    layer: Int[Array, ""],
    positions: RowInts,
    requests: RowInts,
    page_tables: PageTables,
    scale: float,
    *,
    values: bool = True,
    lse: bool = False,
    config: Config = Config(),
) -> dict[str, Array]:
    """`out` as the queries, unless `values` is off, and `lse` in float32, `[rows, q_heads]`, if asked."""
    check_attention(q, store, config.block)
    shape = _shape(q, store, scale, values, lse, config)
    tile = shape.rows * config.warpgroups
    padded, count = pad_rows(q, tile), q.shape[0]
    positions, requests = pad_rows(positions, tile, -1), pad_rows(requests, tile)
    spans, ranges = tile_spans(positions, requests, tile, page_tables.shape[0], config.block)
    tables = padded_pages(store, page_tables, max(config.block // shape.page_size, 1))
    packed = _pack_rows(jnp.stack([positions, requests]), shape, config)
    types = {}
    if values:
        types["out"] = jax.ShapeDtypeStruct(padded.shape, q.dtype)
    if lse:
        types["lse"] = jax.ShapeDtypeStruct((shape.heads, shape.tiles, config.warpgroups, WGMMA_ROWS), jnp.float32)
    run = kernel(
        functools.partial(_kernel, shape, config),
        out_type=tuple(types.values()),
        grid=(shape.tiles, shape.heads),
        grid_names=("tile", "heads"),
        num_threads=config.warpgroups + 1,
        scratch_types=_scratch(shape, config),
    )
    results = dict(
        zip(types, run(padded, flat_store(store), as_scalar(layer), tables, spans, ranges, packed), strict=True)
    )
    if lse:
        results["lse"] = _unpack_lse(results["lse"], shape)
    return {name: x[:count] for name, x in results.items()}


def tile_spans(
    positions: RowInts, requests: RowInts, tile: int, num_requests: int, block: int
) -> tuple[Int[Array, "tiles requests 2"], Int[Array, "tiles 2"]]:
    """Which keys a tile of rows reads: per request the last position and the blocks that every row of the tile
    sees in full; and the first and one behind the last request of the tile, of which a tile of padding has one too."""
    positions, requests = positions.reshape(-1, tile), requests.reshape(-1, tile)
    live = positions >= 0
    own = live[..., None] & (requests[..., None] == jnp.arange(num_requests))
    last = jnp.max(jnp.where(own, positions[..., None], -1), axis=1)
    first = jnp.min(jnp.where(own, positions[..., None], 2**30), axis=1)
    full = jnp.where(own.all(axis=1), (first + 1) // block, 0)
    begin = jnp.min(jnp.where(live, requests, num_requests - 1), axis=1)
    end = jnp.max(jnp.where(live, requests, begin[:, None]), axis=1) + 1
    ranges = jnp.stack([begin, end], axis=-1)
    return jnp.stack([last, full], axis=-1).astype(jnp.int32), ranges.astype(jnp.int32)


def _shape(q: Queries, store: Store, scale: float, values: bool, lse: bool, config: Config) -> Shape:
    _, pages, _, kv_heads, page_size, head_dim = store.shape
    share = heads_a_tile(q.shape[1], kv_heads)
    rows = WGMMA_ROWS // (1 << (share - 1).bit_length())
    tiles = -(-q.shape[0] // (rows * config.warpgroups))
    heads = q.shape[1] // share
    repeat = heads // kv_heads
    sizes = (kv_heads, pages, page_size, head_dim)
    return Shape(tiles, rows, share, heads, repeat, *sizes, q.dtype, float(scale), values, lse)


def _pack_rows(
    x: Int[Array, "kinds padded_rows"], shape: Shape, config: Config
) -> Int[Array, "tiles warpgroups kinds packed"]:
    """One value for each packed row of a product."""
    x = x.reshape(-1, shape.tiles, config.warpgroups, shape.rows).transpose(1, 2, 0, 3)
    return jnp.tile(x, (1, 1, 1, WGMMA_ROWS // shape.rows)).astype(jnp.int32)


def _unpack_lse(
    lse: Float[Array, "heads tiles warpgroups packed"], shape: Shape
) -> Float[Array, "padded_rows q_heads"]:
    heads, tiles, warpgroups, _ = lse.shape
    lse = lse.reshape(heads, tiles, warpgroups, -1, shape.rows)[:, :, :, : shape.share]
    return lse.transpose(1, 2, 4, 0, 3).reshape(-1, heads * shape.share)


def _scratch(shape: Shape, config: Config) -> dict[str, Any]:
    pieces = max(config.block // shape.page_size, 1)  # copies that fill a block
    kv_block = (config.stages, config.block, shape.head_dim)
    scratch = {
        "q_smem": tiled_smem((config.warpgroups, WGMMA_ROWS, shape.head_dim), shape.dtype),
        "k_smem": tiled_smem(kv_block, shape.dtype),
        "v_smem": tiled_smem(kv_block if shape.values else (1, 8, 64), shape.dtype),
        "lse_smem": plgpu.SMEM((config.warpgroups, WGMMA_ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=shape.share, num_barriers=config.warpgroups),
        "k_ready": plgpu.Barrier(num_arrivals=pieces, num_barriers=config.stages),
        "v_ready": plgpu.Barrier(num_arrivals=pieces, num_barriers=config.stages),
        "tail_ready": plgpu.Barrier(num_arrivals=pieces),
        "k_used": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        "v_used": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        "turn": plgpu.Barrier(num_arrivals=config.warpgroups),
    }
    return scratch


def _kernel(shape: Shape, config: Config, *refs: Any, **scratch: Any) -> None:
    q_ref, kv_ref, layer_ref, tables_ref, spans_ref, ranges_ref, packed_ref, *outs = refs
    # Late tiles have the most keys: they go first, so that the short ones fill the gaps at the end.
    tile = shape.tiles - 1 - lax.axis_index("tile")
    head, wg = lax.axis_index("heads"), lax.axis_index("wg")
    begin, end = ranges_ref[tile, 0], ranges_ref[tile, 1]

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(config.registers[0], action="increase")
        _compute(shape, config, (tile, head, wg), (begin, end), q_ref, spans_ref, packed_ref, outs, scratch)

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        plgpu.set_max_registers(config.registers[1], action="decrease")
        place = (tile, head // shape.repeat, layer_ref[0] * shape.pages)
        _fetch(shape, config, place, (begin, end), kv_ref, tables_ref, spans_ref, scratch)


def _compute(
    shape: Shape,
    config: Config,
    program: tuple[Array, Array, Array],
    requests: tuple[Array, Array],
    q_ref: Any,
    spans_ref: Any,
    packed_ref: Any,
    outs: list[Any],
    scratch: dict[str, Any],
) -> None:
    tile, head, wg = program
    packed = (WGMMA_ROWS, config.block)
    q_smem, k_smem, v_smem = scratch["q_smem"].at[wg], scratch["k_smem"], scratch["v_smem"]
    lse_smem = scratch["lse_smem"].at[wg]
    row = (tile * config.warpgroups + wg) * shape.rows
    q_ready = scratch["q_ready"].at[wg]
    for h in range(shape.share):
        source = q_ref.at[pl.ds(row, shape.rows), head * shape.share + h]
        plgpu.copy_gmem_to_smem(source, q_smem.at[pl.ds(h * shape.rows, shape.rows)], q_ready)
    positions = plgpu.load(packed_ref.at[tile, wg, 0], layout=ROWS, optimized=False)
    owners = plgpu.load(packed_ref.at[tile, wg, 1], layout=ROWS, optimized=False)
    plgpu.barrier_wait(q_ready)
    alternate = config.alternate and config.warpgroups == 2

    def take_turn() -> None:
        if alternate:
            plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(scratch["turn"])

    def scores(slot: Array) -> Array:
        def product(acc: Any) -> Array:
            plgpu.wgmma(acc, q_smem, k_smem.at[slot].transpose((1, 0)))
            take_turn()
            return acc[...]

        return pl.run_scoped(product, plgpu.ACC(packed, jnp.float32))

    def over_request(request: Array, first_step: Array) -> Array:
        last, full = spans_ref[tile, request, 0], spans_ref[tile, request, 1]
        bound = jnp.where(owners == request, positions, -1)

        def step(masked: bool, i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc, top, total = state
            slot = lax.rem(first_step + i, config.stages)
            plgpu.barrier_wait(scratch["k_ready"].at[slot])
            s = scores(slot)
            plgpu.barrier_arrive(scratch["k_used"].at[slot])
            if masked:
                keys = plgpu.broadcasted_iota(jnp.int32, packed, 1, layout=plgpu.Layout.WGMMA) + i * config.block
                s = jnp.where(lax.broadcast_in_dim(bound, packed, [0]) >= keys, s, -jnp.inf)
            new_top = jnp.maximum(top, s.max(axis=1) * (shape.scale * LOG2_E))
            p = jnp.exp2(s * (shape.scale * LOG2_E) - lax.broadcast_in_dim(new_top, packed, [0]))
            decay = jnp.exp2(top - new_top)
            total = total * decay + p.sum(axis=1)
            if not shape.values:
                take_turn()
                return acc, new_top, total
            acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
            weights = p.astype(shape.dtype)
            acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))
            if alternate:
                plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(scratch["v_ready"].at[slot])
            if alternate:
                plgpu.barrier_wait(scratch["turn"])
            acc = add_weighted(acc, weights, v_smem.at[slot])
            plgpu.barrier_arrive(scratch["v_used"].at[slot])
            return acc, new_top, total

        blocks = lax.div(last + config.block, config.block)  # last is -1 where the tile has no row of the request
        state = lax.fori_loop(
            0, full, functools.partial(step, False), empty_softmax(shape.head_dim if shape.values else 8)
        )
        state = lax.fori_loop(full, blocks, functools.partial(step, True), state)
        keep_result(bound < 0, *state)
        return first_step + blocks

    def keep_result(others: Array, acc: Array, top: Array, total: Array) -> None:
        """Queries make room for the output of their rows: they are not needed any more. Padding gets 0."""
        others &= positions >= 0
        if shape.values:
            square = functools.partial(lax.broadcast_in_dim, shape=acc.shape, broadcast_dimensions=[0])
            out = jnp.where(square(total) == 0, 0.0, acc / square(total)).astype(shape.dtype)
            held = plgpu.load(q_smem, layout=plgpu.Layout.WGMMA)
            q_smem[...] = jnp.where(square(others), held, out)
        if shape.lse:
            lse_smem[...] = jnp.where(others, plgpu.load(lse_smem, layout=ROWS), (top + jnp.log2(total)) / LOG2_E)
        plgpu.commit_smem()

    if alternate:
        pl.when(wg == 1)(take_turn)
    lax.fori_loop(*requests, over_request, jnp.int32(0))
    if alternate:
        pl.when(wg == 0)(take_turn)

    if shape.values:
        for h in range(shape.share):
            target = outs[0].at[pl.ds(row, shape.rows), head * shape.share + h]
            plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(h * shape.rows, shape.rows)], target)
    if shape.lse:
        plgpu.copy_smem_to_gmem(lse_smem, outs[-1].at[head, tile, wg])
    plgpu.wait_smem_to_gmem(0)


def _fetch(
    shape: Shape,
    config: Config,
    place: tuple[Array, Array, Array],
    requests: tuple[Array, Array],
    kv_ref: Any,
    tables_ref: Any,
    spans_ref: Any,
    scratch: dict[str, Any],
) -> None:
    tile, kv_head, first_page = place
    k_smem, v_smem = scratch["k_smem"], scratch["v_smem"]
    piece = min(config.block, shape.page_size)  # keys a copy

    def copy_block(request: Array, i: Array, smem: Any, line: Array, barrier: Any) -> None:
        for n in range(config.block // piece):
            key = i * config.block + n * piece
            page = first_page + tables_ref[request, lax.div(key, shape.page_size)]
            source = kv_ref.at[page, line, pl.ds(lax.rem(key, shape.page_size), piece)]
            plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(n * piece, piece)], barrier)

    def over_request(request: Array, first_step: Array) -> Array:
        last = spans_ref[tile, request, 0]
        blocks = lax.div(last + config.block, config.block)

        def step(i: Array, _: None) -> None:
            at = first_step + i
            slot = lax.rem(at, config.stages)

            def refill(used: Any) -> None:
                pl.when(at >= config.stages)(lambda: plgpu.barrier_wait(used.at[slot]))

            def copy_values(ready: Any) -> None:
                copy_block(request, i, v_smem.at[slot], shape.kv_heads + kv_head, ready)

            def copy_last_values() -> None:
                copy_values(scratch["tail_ready"])
                plgpu.barrier_wait(scratch["tail_ready"])
                clear_rows(v_smem.at[slot], last + 1 - i * config.block)
                for _ in range(config.block // piece):
                    plgpu.barrier_arrive(scratch["v_ready"].at[slot])

            refill(scratch["k_used"])
            copy_block(request, i, k_smem.at[slot], kv_head, scratch["k_ready"].at[slot])
            if shape.values:
                refill(scratch["v_used"])
                pl.when(i < blocks - 1)(lambda: copy_values(scratch["v_ready"].at[slot]))
                pl.when(i == blocks - 1)(copy_last_values)

        lax.fori_loop(0, blocks, step, None)
        return first_step + blocks

    steps = lax.fori_loop(*requests, over_request, jnp.int32(0))

    def drain(at: Array, _: None) -> None:  # so that every phase of a barrier is seen by who waits on it
        slot = lax.rem(at, config.stages)
        plgpu.barrier_wait(scratch["k_used"].at[slot])
        if shape.values:
            plgpu.barrier_wait(scratch["v_used"].at[slot])

    lax.fori_loop(jnp.maximum(steps - config.stages, 0), steps, drain, None)
