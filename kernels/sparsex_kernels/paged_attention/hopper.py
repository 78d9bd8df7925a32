"""Sparse-query paged attention for Hopper GPUs (FlashAttention-3, sections 3.1 and 3.2), by Pallas' Mosaic GPU.

A program owns a tile of consecutive rows and the query heads of one KV head (`hopper_tile.py`). Where few tiles have
rows, most multiprocessors would be idle: each tile's keys are then cut into parts (`tiles.py`), whose results are
merged by their log-sum-exps (`hopper_merge.py`). How many tiles have rows is data. So a call of few rows, padding
included, has programs for the parts, and the merge, which end at once where many tiles have rows. A call of many rows
has neither.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels import mosaic
from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.gpu import check_attention, check_low_rank, in_float16, padded_pages
from sparsex_kernels.layout import Queries, first_seen, pad_positions, pad_rows
from sparsex_kernels.mosaic import WGMMA_ROWS
from sparsex_kernels.paged_attention.hopper_decode import decode
from sparsex_kernels.paged_attention.hopper_low_rank import RANKS, low_rank_operands
from sparsex_kernels.paged_attention.hopper_merge import Parts, TileRows, merge_tiles
from sparsex_kernels.paged_attention.hopper_shape import DEFAULT, Config, Shape, copies_a_block
from sparsex_kernels.paged_attention.hopper_tile import kernel, scratch_types
from sparsex_kernels.paged_attention.tiles import tile_parts, tile_spans

PAGE_MULTIPLE = 64  # of page sizes that TMA copies fit


def paged_attention(
    args: AttentionArgs, return_lse: bool = False, config: Config = DEFAULT
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    inner = in_float16(args)
    results = decode(inner) if args.is_decode else attend(inner, lse=return_lse, config=config)
    out = results[0].astype(args.query.dtype)
    return (out, results[1]) if return_lse else out


def attend(
    args: AttentionArgs, *, values: bool = True, lse: bool = False, config: Config = DEFAULT
) -> tuple[Array, ...]:
    """The output `[rows, q_heads, head_dim]`, unless `values` is off, and then, if `lse` is on, the log-sum-exp in
    float32, `[rows, q_heads]`."""
    check_attention(args, config.block, PAGE_MULTIPLE)
    check_low_rank(args, RANKS[args.query.shape[2]])
    shape = Shape.of(args, values, lse, config)
    tile = shape.rows * config.warpgroups
    query, count = pad_rows(args.query, tile), len(args.query)
    positions, requests = pad_positions(args.positions, args.requests, tile)
    spans, ranges = tile_spans(positions, requests, tile, len(args.page_tables), config.block, args.window)
    tables = padded_pages(args.store, args.page_tables, copies_a_block(shape, config))
    windows = [] if args.window is None else [first_seen(positions, args.window)]
    packed = _pack_rows(jnp.stack([positions, requests, *windows]), shape, config)
    layer = mosaic.as_scalar(args.layer)
    operands = [query, mosaic.flat_store(args.store), layer, tables, spans, ranges, packed]
    adapters = low_rank_operands(args)
    if shape.cut:
        parts, lines = tile_parts(spans, config.block, shape.splits)
        outs = _launch(shape, config, [*operands, parts, *adapters], len(parts), args.backend)
        outs = _merge(shape, config, outs, lines[: shape.splits.tiles], args.backend)
    else:
        outs = _launch(shape, config, [*operands, *adapters], shape.tiles, args.backend)
    if lse:
        outs["lse"] = _unpack_lse(outs["lse"], shape)
    return tuple(outs[name][:count] for name in ("out", "lse") if name in outs)


def _launch(shape: Shape, config: Config, operands: list[Array], programs: int, backend: Backend) -> dict[str, Array]:
    """What `_results` names, by this many programs for each of `shape.heads`."""
    types = _results(shape, config, operands[0])
    run = mosaic.kernel(
        functools.partial(kernel, shape, config, tuple(types)),
        backend,
        out_type=tuple(types.values()),
        grid=(programs, shape.heads),
        grid_names=("program", "heads"),
        num_threads=config.warpgroups + 1,
        scratch_types=scratch_types(shape, config),
    )
    return dict(zip(types, run(*operands), strict=True))


def _results(shape: Shape, config: Config, query: Queries) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes: results of whole tiles, log-sum-exps in base e; and of parts of others, in base 2.

    The packed rows of a part's head programs and warpgroups lie one after the other in `merged`.
    """
    merged, lines = shape.heads * config.warpgroups * WGMMA_ROWS, shape.splits.lines
    wanted = {
        "out": (shape.values, query.shape, query.dtype),
        "lse": (shape.lse, (shape.heads, shape.tiles, config.warpgroups, WGMMA_ROWS), jnp.float32),
        "partial": (shape.cut and shape.values, (lines, merged, shape.head_dim), query.dtype),
        "partial_lse": (shape.cut, (lines, merged), jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct(size, dtype) for name, (on, size, dtype) in wanted.items() if on}


def _merge(
    shape: Shape, config: Config, outs: dict[str, Array], lines: Int[Array, "few 2"], backend: Backend
) -> dict[str, Array]:
    """The results of all tiles, from those of whole tiles and of parts."""
    parts = Parts(outs.pop("partial", None), outs.pop("partial_lse"), lines)
    return merge_tiles(parts, outs, TileRows(shape.heads, config.warpgroups, shape.rows, shape.share), backend)


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
