"""Sparse-query paged attention for Hopper GPUs (FlashAttention-3, sections 3.1 and 3.2), by Pallas' Mosaic GPU.

A program owns a tile of consecutive rows and the query heads of one KV head. Each compute warpgroup has its rows
packed as `[head, row]` into the 64 rows of its matrix products, so that a K or V block is read once for all of them.
One more warpgroup fetches K and V blocks by TMA through the page tables (`hopper_blocks.py`).

A tile may hold rows of several requests. The program folds the keys of one request after the other, from the start
each time, and keeps each row's result of its own request. What is not finite in another request's keys or values never
reaches the row. Rows therefore need not be cut at the requests' borders, and every output tile is stored once.

Where few tiles have rows, most multiprocessors would be idle: each tile's keys are then cut into parts (`tiles.py`),
whose results are merged by their log-sum-exps (`hopper_merge.py`). How many tiles have rows is data, so a call that
might have few has the programs for their parts, and the merge, which end at once where there are many.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels import mosaic
from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.gpu import LOG2_E, check_attention, heads_a_tile, padded_pages, power_of_two
from sparsex_kernels.layout import Queries, pad_positions, pad_rows
from sparsex_kernels.mosaic import MULTIPROCESSORS, ROWS, WGMMA_ROWS, Ref, Softmax
from sparsex_kernels.paged_attention.hopper_blocks import Block, BlockRing, fetch_block, ring_scratch
from sparsex_kernels.paged_attention.hopper_decode import decode
from sparsex_kernels.paged_attention.hopper_merge import TileRows, merge_lse, merge_tiles
from sparsex_kernels.paged_attention.tiles import Splits, TilePart, tile_parts, tile_spans

PAGE_MULTIPLE = 64  # of page sizes that TMA copies fit


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
    """

    block: int = 128
    stages: int = 2
    warpgroups: int = 2
    alternate: bool = True
    registers: tuple[int, int] = (232, 40)
    programs: int = MULTIPROCESSORS


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


def paged_attention(
    args: AttentionArgs, return_lse: bool = False, config: Config = Config()
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    results = decode(args) if args.is_decode else attend(args, lse=return_lse, config=config)
    return (results[0], results[1]) if return_lse else results[0]


def attend(
    args: AttentionArgs, *, values: bool = True, lse: bool = False, config: Config = Config()
) -> tuple[Array, ...]:
    """One launch of the kernel: the output `[rows, q_heads, head_dim]`, unless `values` is off, and then, if `lse` is
    on, the log-sum-exp in float32, `[rows, q_heads]`."""
    check_attention(args, config.block, PAGE_MULTIPLE)
    shape = _shape(args, values, lse, config)
    tile = shape.rows * config.warpgroups
    query, count = pad_rows(args.query, tile), len(args.query)
    positions, requests = pad_positions(args.positions, args.requests, tile)
    spans, ranges = tile_spans(positions, requests, tile, len(args.page_tables), config.block)
    parts, lines = tile_parts(spans, config.block, shape.splits)
    tables = padded_pages(args.store, args.page_tables, _pieces(shape, config))
    packed = _pack_rows(jnp.stack([positions, requests]), shape, config)
    types = _results(shape, config, query)
    run = mosaic.kernel(
        functools.partial(_kernel, shape, config, tuple(types)),
        args.backend,
        out_type=tuple(types.values()),
        grid=(len(parts), shape.heads),
        grid_names=("part", "heads"),
        num_threads=config.warpgroups + 1,
        scratch_types=_scratch(shape, config),
    )
    layer = mosaic.as_scalar(args.layer)
    outs = run(query, mosaic.flat_store(args.store), layer, tables, parts, spans, ranges, packed)
    results = _merge(shape, config, dict(zip(types, outs, strict=True)), lines, args.backend)
    return tuple(x[:count] for x in results)


def _results(shape: Shape, config: Config, query: Queries) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes: results of whole tiles, and of the parts of others. Log-sum-exps are in base 2.

    The 64 packed rows of each warpgroup and head program lie one after the other in `merged`.
    """
    merged, lines = shape.heads * config.warpgroups * WGMMA_ROWS, shape.splits.lines
    wanted = {
        "out": (shape.values, query.shape, query.dtype),
        "lse": (shape.lse, (shape.tiles, merged), jnp.float32),
        "partial": (shape.values and lines, (lines, merged, shape.head_dim), query.dtype),
        "partial_lse": (lines, (lines, merged), jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct(size, dtype) for name, (on, size, dtype) in wanted.items() if on}


def _merge(
    shape: Shape, config: Config, outs: dict[str, Array], lines: Int[Array, "tiles 2"], backend: Backend
) -> Iterator[Array]:
    """The output, if it is wanted, and the log-sum-exp, if it is wanted, of all rows."""
    lines = lines[: shape.splits.tiles]
    if "partial" in outs:
        layout = TileRows(shape.heads, config.warpgroups, shape.rows, shape.share)
        outs["out"] = merge_tiles(outs["partial"], outs["partial_lse"], lines, outs["out"], layout, backend)
    if shape.values:
        yield outs["out"]
    if shape.lse:
        merged = merge_lse(outs["partial_lse"], lines, outs["lse"]) if shape.splits.lines else outs["lse"]
        yield _unpack_lse(merged, shape, config)


def _shape(args: AttentionArgs, values: bool, lse: bool, config: Config) -> Shape:
    _, pages, _, kv_heads, page_size, head_dim = args.store.shape
    rows, q_heads, _ = args.query.shape
    share = heads_a_tile(q_heads, kv_heads)
    tile_rows = WGMMA_ROWS // power_of_two(share)
    heads, tiles = q_heads // share, -(-rows // (tile_rows * config.warpgroups))
    return Shape(
        tiles=tiles,
        splits=Splits.of(tiles, heads, -(-args.context // config.block), config.programs),
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


def _pieces(shape: Shape, config: Config) -> int:
    """Copies that fill a block of keys: one a page, or one where pages are larger."""
    return max(config.block // shape.page_size, 1)


def _pack_rows(
    x: Int[Array, "kinds padded_rows"], shape: Shape, config: Config
) -> Int[Array, "tiles warpgroups kinds packed"]:
    """One value for each packed row of a product.

    The 64 rows of a product are `[head, row]`. With 4 heads and the rows 0..15 of a warpgroup, packed rows 0..15 are
    those of head 0, 16..31 the same rows of head 1, and so on; 3 heads leave the last 16 without use.
    """
    x = x.reshape(-1, shape.tiles, config.warpgroups, shape.rows).transpose(1, 2, 0, 3)
    return jnp.tile(x, (1, 1, 1, WGMMA_ROWS // shape.rows)).astype(jnp.int32)


def _unpack_lse(lse: Float[Array, "tiles merged"], shape: Shape, config: Config) -> Float[Array, "padded_rows q_heads"]:
    """From base 2 to base e, and from packed rows to rows."""
    lse = lse.reshape(shape.tiles, shape.heads, config.warpgroups, -1, shape.rows)[:, :, :, : shape.share] / LOG2_E
    return lse.transpose(0, 2, 4, 1, 3).reshape(-1, shape.heads * shape.share)


def _scratch(shape: Shape, config: Config) -> dict[str, Any]:
    block = (config.stages, config.block, shape.head_dim)
    ring = ring_scratch(
        block, shape.dtype, pieces=_pieces(shape, config), readers=config.warpgroups, values=shape.values
    )
    return ring | {
        "q_smem": mosaic.tiled_smem((config.warpgroups, WGMMA_ROWS, shape.head_dim), shape.dtype),
        "lse_smem": plgpu.SMEM((config.warpgroups, WGMMA_ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=shape.share, num_barriers=config.warpgroups),
        "turn": plgpu.Barrier(num_arrivals=config.warpgroups),
    }


class Operands(NamedTuple):
    """What the kernel reads in global memory."""

    query: Ref  # [padded_rows, q_heads, head_dim]
    store: Ref  # [layers * pages, 2 * kv_heads, page_size, head_dim]
    layer: Ref  # [1]
    tables: Ref  # [requests, pages]
    parts: Ref  # [lines, 4]
    spans: Ref  # [tiles, requests, 2]
    ranges: Ref  # [tiles, 2]
    packed: Ref  # [tiles, warpgroups, 2, 64], positions and requests


class Program(NamedTuple):
    """What a program works on, and what it writes.

    Attributes:
      line: number of its part.
      requests: the tile's first request and the one behind its last.
      outs: references to what `_results` names.
    """

    line: Array
    part: TilePart
    head: Array
    requests: tuple[Array, Array]
    operands: Operands
    outs: dict[str, Ref]


def _kernel(shape: Shape, config: Config, names: tuple[str, ...], *refs: Ref, **scratch: Ref) -> None:
    operands = Operands(*refs[: len(Operands._fields)])
    outs = dict(zip(names, refs[len(Operands._fields) :], strict=True))
    line, head, wg = lax.axis_index("part"), lax.axis_index("heads"), lax.axis_index("wg")
    part = TilePart(*(operands.parts[line, n] for n in range(4)))
    tile = jnp.maximum(part.tile, 0)
    requests = operands.ranges[tile, 0], operands.ranges[tile, 1]
    program = Program(line, part, head, requests, operands, outs)

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(config.registers[0], action="increase")
        pl.when(part.tile >= 0)(lambda: _compute(shape, config, program, wg, scratch))

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        plgpu.set_max_registers(config.registers[1], action="decrease")
        pl.when(part.tile >= 0)(lambda: _fetch(shape, config, program, BlockRing.of(scratch)))


def _over_requests(config: Config, program: Program, body: Callable[[Array, Array, Array, Array, Array], None]) -> None:
    """Call `body(request, first_step, begin, end, blocks)` for each of the tile's requests.

    Of the request's key blocks `0 .. blocks`, the part has `begin .. end`, and block i is its step `first_step + i`.
    """
    part, spans = program.part, program.operands.spans

    def over_request(request: Array, first_step: Array) -> Array:
        blocks = lax.div(spans[part.tile, request, 0] + config.block, config.block)  # the last position is -1 if no row
        begin, end = (jnp.clip(at, 0, blocks) for at in (-first_step, part.end - part.begin - first_step))
        body(request, first_step, begin, end, blocks)
        return first_step + blocks

    lax.fori_loop(*program.requests, over_request, -part.begin)


def _compute(shape: Shape, config: Config, program: Program, wg: Array, scratch: dict[str, Ref]) -> None:
    _, part, head, _, operands, outs = program
    tile = part.tile
    ring, packed = BlockRing.of(scratch), (WGMMA_ROWS, config.block)
    q_smem, lse_smem, q_ready = (scratch[name].at[wg] for name in ("q_smem", "lse_smem", "q_ready"))
    row = (tile * config.warpgroups + wg) * shape.rows
    for h in range(shape.share):
        source = operands.query.at[pl.ds(row, shape.rows), head * shape.share + h]
        plgpu.copy_gmem_to_smem(source, q_smem.at[pl.ds(h * shape.rows, shape.rows)], q_ready)
    positions = plgpu.load(operands.packed.at[tile, wg, 0], layout=ROWS, optimized=False)
    owners = plgpu.load(operands.packed.at[tile, wg, 1], layout=ROWS, optimized=False)
    plgpu.barrier_wait(q_ready)
    alternate = config.alternate and config.warpgroups == 2

    def take_turn() -> None:
        """Let the other warpgroup start its product, and wait until it lets this one start the next."""
        if alternate:
            plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(scratch["turn"])

    def over_request(request: Array, first_step: Array, begin: Array, end: Array, _: Array) -> None:
        full = jnp.clip(operands.spans[tile, request, 1], begin, end)
        bound = jnp.where(owners == request, positions, -1)

        def step(masked: bool, i: Array, state: Softmax) -> Softmax:
            acc, top, total = state
            slot = lax.rem(first_step + i, config.stages)
            plgpu.barrier_wait(ring.k_ready.at[slot])
            s = mosaic.products(q_smem, ring.k_smem.at[slot], meanwhile=take_turn)
            plgpu.barrier_arrive(ring.k_used.at[slot])
            if masked:
                keys = plgpu.broadcasted_iota(jnp.int32, packed, 1, layout=plgpu.Layout.WGMMA) + i * config.block
                s = jnp.where(lax.broadcast_in_dim(bound, packed, [0]) >= keys, s, -jnp.inf)
            new_top, p, decay = mosaic.softmax_weights(s, top, shape.scale)
            total = total * decay + p.sum(axis=1)
            if not shape.values:
                take_turn()
                return Softmax(acc, new_top, total)
            acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
            weights = p.astype(shape.dtype)
            # The softmax must be done before the other warpgroup is let into its own: the compiler may not move it.
            acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))
            if alternate:
                plgpu.barrier_arrive(scratch["turn"])
            plgpu.barrier_wait(ring.v_ready.at[slot])
            if alternate:
                plgpu.barrier_wait(scratch["turn"])
            acc = mosaic.add_weighted(acc, weights, ring.v_smem.at[slot], shape.interpreted)
            plgpu.barrier_arrive(ring.v_used.at[slot])
            return Softmax(acc, new_top, total)

        state = mosaic.empty_softmax(shape.head_dim if shape.values else 8)
        # 1. Blocks that every row of the tile sees in full.
        state = lax.fori_loop(begin, full, functools.partial(step, False), state)
        # 2. Blocks that some row sees in part or not at all.
        state = lax.fori_loop(full, end, functools.partial(step, True), state)
        keep_result(bound < 0, state)

    def keep_result(others: Array, state: Softmax) -> None:
        """Write the results of one request's rows over their queries, which are not needed any more. Padding gets 0."""
        acc, top, total = state
        others &= positions >= 0
        if shape.values:
            square = functools.partial(lax.broadcast_in_dim, shape=acc.shape, broadcast_dimensions=[0])
            out = jnp.where(square(total) == 0, 0.0, acc / square(total)).astype(shape.dtype)
            held = plgpu.load(q_smem, layout=plgpu.Layout.WGMMA)
            q_smem[...] = jnp.where(square(others), held, out)
        if shape.lse or shape.splits.lines:
            lse_smem[...] = jnp.where(others, plgpu.load(lse_smem, layout=ROWS), top + jnp.log2(total))
        plgpu.commit_smem()

    # Warpgroup 0 starts. Both take as many turns: 1 waits for its first, and 0 takes one more at the end.
    if alternate:
        pl.when(wg == 1)(take_turn)
    _over_requests(config, program, over_request)
    if alternate:
        pl.when(wg == 0)(take_turn)

    packed_rows = pl.ds((head * config.warpgroups + wg) * WGMMA_ROWS, WGMMA_ROWS)

    def store_whole() -> None:
        if shape.values:
            for h in range(shape.share):
                target = outs["out"].at[pl.ds(row, shape.rows), head * shape.share + h]
                plgpu.copy_smem_to_gmem(q_smem.at[pl.ds(h * shape.rows, shape.rows)], target)
        if shape.lse:
            plgpu.copy_smem_to_gmem(lse_smem, outs["lse"].at[tile, packed_rows])

    def store_part() -> None:
        if shape.values:
            plgpu.copy_smem_to_gmem(q_smem, outs["partial"].at[program.line, packed_rows])
        plgpu.copy_smem_to_gmem(lse_smem, outs["partial_lse"].at[program.line, packed_rows])

    if shape.splits.lines:
        pl.when(part.whole == 1)(store_whole)
        pl.when(part.whole == 0)(store_part)
    else:
        store_whole()
    plgpu.wait_smem_to_gmem(0)


def _fetch(shape: Shape, config: Config, program: Program, ring: BlockRing) -> None:
    operands, kv_head = program.operands, lax.div(program.head, shape.repeat)
    first_page = operands.layer[0] * shape.pages
    pieces, keys = _pieces(shape, config), min(config.block, shape.page_size)  # keys a copy

    def copy_block(request: Array, i: Array, line: Array, smem: Ref, barrier: Ref) -> None:
        for n in range(pieces):
            key = i * config.block + n * keys
            page = first_page + operands.tables[request, lax.div(key, shape.page_size)]
            source = operands.store.at[page, line, pl.ds(lax.rem(key, shape.page_size), keys)]
            plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(n * keys, keys)], barrier)

    def over_request(request: Array, first_step: Array, begin: Array, end: Array, blocks: Array) -> None:
        last = operands.spans[program.part.tile, request, 0]

        def step(i: Array, _: None) -> None:
            block = Block(
                step=first_step + i,
                copy_keys=functools.partial(copy_block, request, i, kv_head),
                copy_values=functools.partial(copy_block, request, i, shape.kv_heads + kv_head),
                is_last=i == blocks - 1,
                seen=last + 1 - i * config.block,
            )
            fetch_block(ring, block, pieces=pieces, values=shape.values)

        lax.fori_loop(begin, end, step, None)

    _over_requests(config, program, over_request)
    steps = program.part.end - program.part.begin
    mosaic.drain((ring.k_used, ring.v_used) if shape.values else (ring.k_used,), 0, steps, config.stages)
