"""Sparse-query paged attention for Hopper GPUs (FlashAttention-3, sections 3.1 and 3.2), by Pallas' Mosaic GPU.

A program owns a tile of consecutive rows and the query heads of one KV head. Each compute warpgroup has its rows
packed as `[head, row]` into the 64 rows of its matrix products, so that a K or V block is read once for all of them.
One more warpgroup fetches K and V blocks by TMA through the page tables (`hopper_blocks.py`).

A tile may hold rows of several requests. The program folds the keys of one request after the other, from the start
each time, and keeps each row's result of its own request. What is not finite in another request's keys or values never
reaches the row. Rows therefore need not be cut at the requests' borders, and every output tile is stored once.
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
from sparsex_kernels.gpu import LOG2_E, check_attention, heads_a_tile, padded_pages, power_of_two
from sparsex_kernels.layout import Queries, RowInts, pad_positions, pad_rows
from sparsex_kernels.mosaic import ROWS, WGMMA_ROWS, Ref, Softmax
from sparsex_kernels.paged_attention.hopper_blocks import Block, BlockRing, fetch_block, ring_scratch
from sparsex_kernels.paged_attention.hopper_decode import decode

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
    tables = padded_pages(args.store, args.page_tables, _pieces(shape, config))
    packed = _pack_rows(jnp.stack([positions, requests]), shape, config)
    types = []
    if values:
        types.append(jax.ShapeDtypeStruct(query.shape, query.dtype))
    if lse:
        types.append(jax.ShapeDtypeStruct((shape.heads, shape.tiles, config.warpgroups, WGMMA_ROWS), jnp.float32))
    run = mosaic.kernel(
        functools.partial(_kernel, shape, config),
        args.backend,
        out_type=tuple(types),
        grid=(shape.tiles, shape.heads),
        grid_names=("tile", "heads"),
        num_threads=config.warpgroups + 1,
        scratch_types=_scratch(shape, config),
    )
    layer = mosaic.as_scalar(args.layer)
    results = run(query, mosaic.flat_store(args.store), layer, tables, spans, ranges, packed)
    outs = results[:values] + tuple(_unpack_lse(x, shape) for x in results[values:])
    return tuple(x[:count] for x in outs)


def tile_spans(
    positions: RowInts, requests: RowInts, tile: int, num_requests: int, block: int
) -> tuple[Int[Array, "tiles requests 2"], Int[Array, "tiles 2"]]:
    """Which keys a tile of rows reads.

    Returns:
      For each tile and request, the last position among the tile's rows of the request (-1 if it has none), and how
      many key blocks every row of the tile sees in full; and for each tile its first request and the one behind its
      last. A tile of padding has one request, too.
    """
    # With tiles of 4 rows and blocks of 2 keys,
    #   requests   0  0  1  1 | 1  1  1  1     tile 0 reads keys 0..9 of request 0 and 0..3 of request 1, none of
    #   positions  4  9  0  3 | 5  6  8  9     them for all rows; tile 1 reads blocks 0, 1 and 2 without a mask
    # gives spans [[[9, 0], [3, 0]], [[-1, 0], [9, 3]]] and ranges [[0, 2], [1, 2]].
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


def _shape(args: AttentionArgs, values: bool, lse: bool, config: Config) -> Shape:
    _, pages, _, kv_heads, page_size, head_dim = args.store.shape
    rows, q_heads, _ = args.query.shape
    share = heads_a_tile(q_heads, kv_heads)
    tile_rows = WGMMA_ROWS // power_of_two(share)
    heads = q_heads // share
    return Shape(
        tiles=-(-rows // (tile_rows * config.warpgroups)),
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


def _unpack_lse(
    lse: Float[Array, "heads tiles warpgroups packed"], shape: Shape
) -> Float[Array, "padded_rows q_heads"]:
    heads, tiles, warpgroups, _ = lse.shape
    lse = lse.reshape(heads, tiles, warpgroups, -1, shape.rows)[:, :, :, : shape.share]
    return lse.transpose(1, 2, 4, 0, 3).reshape(-1, heads * shape.share)


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
    spans: Ref  # [tiles, requests, 2]
    ranges: Ref  # [tiles, 2]
    packed: Ref  # [tiles, warpgroups, 2, 64], positions and requests


def _kernel(shape: Shape, config: Config, *refs: Ref, **scratch: Ref) -> None:
    operands, outs = Operands(*refs[: len(Operands._fields)]), refs[len(Operands._fields) :]
    # Late tiles have the most keys: they go first, so that the short ones fill the gaps at the end.
    tile = shape.tiles - 1 - lax.axis_index("tile")
    head, wg = lax.axis_index("heads"), lax.axis_index("wg")
    requests = operands.ranges[tile, 0], operands.ranges[tile, 1]

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(config.registers[0], action="increase")
        _compute(shape, config, (tile, head, wg), requests, operands, outs, scratch)

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        plgpu.set_max_registers(config.registers[1], action="decrease")
        _fetch(shape, config, (tile, head), requests, operands, BlockRing.of(scratch))


def _compute(
    shape: Shape,
    config: Config,
    program: tuple[Array, Array, Array],
    requests: tuple[Array, Array],
    operands: Operands,
    outs: tuple[Ref, ...],
    scratch: dict[str, Ref],
) -> None:
    tile, head, wg = program
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

    def over_request(request: Array, first_step: Array) -> Array:
        last, full = operands.spans[tile, request, 0], operands.spans[tile, request, 1]
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

        blocks = lax.div(last + config.block, config.block)  # last is -1 where the tile has no row of the request
        state = mosaic.empty_softmax(shape.head_dim if shape.values else 8)
        # 1. Blocks that every row of the tile sees in full.
        state = lax.fori_loop(0, full, functools.partial(step, False), state)
        # 2. Blocks that some row sees in part or not at all.
        state = lax.fori_loop(full, blocks, functools.partial(step, True), state)
        keep_result(bound < 0, state)
        return first_step + blocks

    def keep_result(others: Array, state: Softmax) -> None:
        """Write the results of one request's rows over their queries, which are not needed any more. Padding gets 0."""
        acc, top, total = state
        others &= positions >= 0
        if shape.values:
            square = functools.partial(lax.broadcast_in_dim, shape=acc.shape, broadcast_dimensions=[0])
            out = jnp.where(square(total) == 0, 0.0, acc / square(total)).astype(shape.dtype)
            held = plgpu.load(q_smem, layout=plgpu.Layout.WGMMA)
            q_smem[...] = jnp.where(square(others), held, out)
        if shape.lse:
            lse_smem[...] = jnp.where(others, plgpu.load(lse_smem, layout=ROWS), (top + jnp.log2(total)) / LOG2_E)
        plgpu.commit_smem()

    # Warpgroup 0 starts. Both take as many turns: 1 waits for its first, and 0 takes one more at the end.
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
    program: tuple[Array, Array],
    requests: tuple[Array, Array],
    operands: Operands,
    ring: BlockRing,
) -> None:
    tile, kv_head = program[0], lax.div(program[1], shape.repeat)
    first_page = operands.layer[0] * shape.pages
    pieces, keys = _pieces(shape, config), min(config.block, shape.page_size)  # keys a copy

    def copy_block(request: Array, i: Array, line: Array, smem: Ref, barrier: Ref) -> None:
        for n in range(pieces):
            key = i * config.block + n * keys
            page = first_page + operands.tables[request, lax.div(key, shape.page_size)]
            source = operands.store.at[page, line, pl.ds(lax.rem(key, shape.page_size), keys)]
            plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(n * keys, keys)], barrier)

    def over_request(request: Array, first_step: Array) -> Array:
        last = operands.spans[tile, request, 0]
        blocks = lax.div(last + config.block, config.block)

        def step(i: Array, _: None) -> None:
            block = Block(
                step=first_step + i,
                copy_keys=functools.partial(copy_block, request, i, kv_head),
                copy_values=functools.partial(copy_block, request, i, shape.kv_heads + kv_head),
                is_last=i == blocks - 1,
                seen=last + 1 - i * config.block,
            )
            fetch_block(ring, block, pieces=pieces, values=shape.values)

        lax.fori_loop(0, blocks, step, None)
        return first_step + blocks

    steps = lax.fori_loop(*requests, over_request, jnp.int32(0))
    mosaic.drain((ring.k_used, ring.v_used) if shape.values else (ring.k_used,), 0, steps, config.stages)
