"""KV write on TPU: each tile of slots that rows fall into is read, changed and put back, double-buffered."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sparsex_kernels.arguments import WriteArgs
from sparsex_kernels.layout import Store, as_stored, pad_rows, row_addresses
from sparsex_kernels.tpu import HBM, TILE, Copy, Index, Ref, check_page_size, compiler_params, next_start, slot_tile

ROWS_A_STEP = 256  # rows in VMEM at a time


def write_kv(args: WriteArgs) -> Store:
    """See `sparsex_kernels.write_kv`. Rows of the same tile must follow each other, as sorted rows do."""
    store = args.store
    check_page_size(store)
    tile, (rows, kv_heads, head_dim) = slot_tile(store), args.keys.shape
    block = min(ROWS_A_STEP, rows + -rows % TILE)
    page, offset = row_addresses(store, args.positions, args.requests, args.page_tables)
    # Rows at slots 14 15 of a page's first tile of 16 and 16 18 of its second are of the tiles 0 0 1 1; the tiles' rows
    # begin at 0 and 2.
    number = jnp.where(args.positions >= 0, page * (store.shape[4] // tile) + offset // tile, -1)
    number = pad_rows(number.astype(jnp.int32), block, -1)
    at_block = jnp.arange(len(number)) % block == 0
    starts = (number >= 0) & (at_block | (number != jnp.roll(number, 1)))
    scalars = number, next_start(starts, block), pad_rows((offset % tile).astype(jnp.int32), block)
    rows_of_heads = pad_rows(jnp.concatenate([args.keys, args.values], axis=1), block).transpose(1, 0, 2)

    tile_shape = (2, 2, kv_heads, tile, head_dim)
    in_smem = pl.BlockSpec((None, 1, block), lambda i, _: (i, 0, 0), memory_space=pltpu.SMEM)
    return pl.pallas_call(
        _write_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(number) // block,),
            in_specs=[
                in_smem,
                in_smem,
                in_smem,
                pl.BlockSpec((2 * kv_heads, block, head_dim), lambda i, _: (0, i, 0)),
                HBM,
            ],
            out_specs=HBM,
            scratch_shapes=[
                pltpu.VMEM(tile_shape, store.dtype),
                pltpu.VMEM(tile_shape, store.dtype),
                pltpu.VMEM((2 * kv_heads, block, head_dim), jnp.float32),
                pltpu.VMEM((2 * kv_heads, tile, head_dim), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(store.shape, store.dtype),
        input_output_aliases={5: 0},
        compiler_params=compiler_params("arbitrary"),
        name="write_kv",
    )(args.layer.reshape(1), *(x.reshape(-1, 1, block) for x in scalars), as_stored(rows_of_heads, store.dtype), store)


def _write_kernel(
    layer_ref: Ref,  # [1]
    number_ref: Ref,  # [1, rows], each row's tile, counted over all pages of a layer; -1 for padding
    next_ref: Ref,  # [1, rows], the first row at or behind each that begins a tile
    offset_ref: Ref,  # [1, rows], slot in the tile
    rows_ref: Ref,  # [2 * kv_heads, rows, head_dim]
    donated_ref: Ref,  # the store; it is the output's memory
    store_ref: Ref,  # [layers, pages, 2, kv_heads, page_size, head_dim], in HBM
    read_ref: Ref,  # [2 buffers, 2, kv_heads, TILE, head_dim]
    written_ref: Ref,  # the same
    wide_ref: Ref,  # [2 * kv_heads, rows, head_dim] float32
    tile_ref: Ref,  # [2 * kv_heads, TILE, head_dim] float32
    read_sems: Ref,
    write_sems: Ref,
) -> None:
    rows = rows_ref.shape[1]
    tile = tile_ref.shape[1]
    tiles_a_page = store_ref.shape[4] // tile

    def tile_at(row: Index) -> Ref:
        page = lax.div(number_ref[0, row], tiles_a_page)
        offset = pl.multiple_of(lax.rem(number_ref[0, row], tiles_a_page) * tile, tile)
        return store_ref.at[layer_ref[0], page, :, :, pl.ds(offset, tile)]

    def read(row: Index, slot: Index) -> Copy:
        return pltpu.make_async_copy(tile_at(row), read_ref.at[slot], read_sems.at[slot])

    def write(row: Index, slot: Index) -> Copy:
        return pltpu.make_async_copy(written_ref.at[slot], tile_at(row), write_sems.at[slot])

    def next_after(row: Index) -> Index:
        return jnp.where(row + 1 < rows, next_ref[0, jnp.minimum(row + 1, rows - 1)], rows)

    def put(first: Index, row: Index) -> Index:
        tile_ref[:, pl.ds(offset_ref[0, row], 1)] = wide_ref[:, pl.ds(row, 1)]
        return row + 1

    def of_tile(first: Index, row: Index) -> Index:
        return (row < rows) & (number_ref[0, jnp.minimum(row, rows - 1)] == number_ref[0, first])

    def step(state: tuple[Index, Index]) -> tuple[Index, Index]:
        row, count = state
        slot, then = lax.rem(count, 2), next_after(row)
        pl.when(then < rows)(lambda: read(then, 1 - slot).start())
        read(row, slot).wait()
        tile_ref[...] = read_ref[slot].reshape(tile_ref.shape).astype(jnp.float32)
        lax.while_loop(lambda at: of_tile(row, at), lambda at: put(row, at), row)
        pl.when(count >= 2)(lambda: write(row, slot).wait())
        written_ref[slot] = tile_ref[...].astype(written_ref.dtype).reshape(written_ref.shape[1:])
        write(row, slot).start()
        return then, count + 1

    wide_ref[...] = rows_ref[...].astype(jnp.float32)
    first = next_ref[0, 0]
    pl.when(first < rows)(lambda: read(first, 0).start())
    _, count = lax.while_loop(lambda state: state[0] < rows, step, (first, jnp.int32(0)))
    # A copy's size is all that waiting for it needs; `first` stands for any tile.
    pl.when(count >= 1)(lambda: write(first, lax.rem(count - 1, 2)).wait())
    pl.when(count >= 2)(lambda: write(first, lax.rem(count, 2)).wait())
