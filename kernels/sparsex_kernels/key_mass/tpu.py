"""Key mass on TPU: two passes over the keys, for the log-sum-exp and for the column sums; K alone is read."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.layout import Power
from sparsex_kernels.paged_attention.tpu import LANES, first_keys, head_scores, pack_rows, row_tile, spans
from sparsex_kernels.tpu import HBM, TILE, Copy, Index, Ref, check_page_size, compiler_params, each_page, pages_a_block


def key_mass(args: AttentionArgs, power: Power = 1) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`. Sums in a fixed order, so the result is deterministic.

    The grid goes over requests and tiles of rows: one request's sums stay in VMEM while its tiles add to them. Tiles
    that have none of the request's rows are not fetched.
    """
    store = args.store
    check_page_size(store)
    num_requests, max_pages = args.page_tables.shape
    tile = row_tile(len(args.query))
    packed, own, owner = pack_rows(args, tile)
    last, _ = spans(args, tile)
    windows = () if args.window is None else (first_keys(args, tile, args.window), args.window.reshape(1))
    fixed, powers = (power, ()) if isinstance(power, int) else (None, (power.reshape(1),))
    kv_heads, all_rows, head_dim = packed.shape
    tile_rows = tile * (args.query.shape[1] // kv_heads)
    num_tiles = all_rows // tile_rows
    keys = pages_a_block(store, max_pages) * store.shape[4]
    num_blocks = -(-args.context // keys)

    live = (last >= 0).reshape(num_tiles, num_requests)
    first_tile = jnp.argmax(live, axis=0).astype(jnp.int32)
    last_tile = (num_tiles - 1 - jnp.argmax(live[::-1], axis=0)).astype(jnp.int32)

    def tile_of(r: Index, i: Index, *refs: Ref) -> Index:
        return jnp.clip(i, refs[3][r], refs[4][r])

    column = pl.BlockSpec((tile_rows, 1), lambda *at: (tile_of(*at), 0))
    out = pl.pallas_call(
        functools.partial(_key_mass_kernel, scale=args.scale, power=fixed, windowed=bool(windows)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5 + len(windows) + len(powers),
            grid=(num_requests, num_tiles),
            in_specs=[
                pl.BlockSpec((kv_heads, tile_rows, head_dim), lambda *at: (0, tile_of(*at), 0)),
                column,
                column,
                HBM,
            ],
            out_specs=pl.BlockSpec((None, num_blocks, 1, keys), lambda r, i, *_: (r, 0, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, kv_heads, keys, head_dim), store.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((kv_heads, tile_rows, LANES), jnp.float32),
                pltpu.VMEM((kv_heads, tile_rows, LANES), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((num_requests, num_blocks, 1, keys), jnp.float32),
        compiler_params=compiler_params("parallel", "arbitrary"),
        name="key_mass",
    )(
        *(args.layer.reshape(1), args.page_tables.reshape(-1), last, first_tile, last_tile, *windows, *powers),
        *(packed, own, owner, store),
    )
    return out.reshape(num_requests, -1)[:, : args.context]


def _key_mass_kernel(
    layer_ref: Ref,  # [1]
    tables_ref: Ref,  # [requests * max_pages]
    last_ref: Ref,  # [tiles * requests]
    first_tile_ref: Ref,  # [requests]
    last_tile_ref: Ref,  # [requests]
    *refs: Ref,
    scale: float,
    power: int | None,
    windowed: bool,
) -> None:
    """The other `refs`, in this order:

    first_ref: [tiles * requests], and `window_ref`, [1], if there are windows.
    power_ref: [1], if `power` is None.
    q_ref: [kv_heads, tile_rows, head_dim].
    own_ref: [tile_rows, 1].
    owner_ref: [tile_rows, 1].
    store_ref: [layers, pages, 2, kv_heads, page_size, head_dim], in HBM.
    out_ref: [blocks, 1, keys] float32.
    keys_ref: [2 buffers, kv_heads, keys, head_dim], and `sems`, its two semaphores.
    top_ref: [kv_heads, tile_rows, LANES] float32, running maximum, then the log-sum-exp.
    total_ref: the same of the running sum.
    """
    scalars, (q_ref, own_ref, owner_ref, store_ref, out_ref, keys_ref, sems, top_ref, total_ref) = refs[:-9], refs[-9:]
    first_ref, window_ref = scalars[:2] if windowed else (None, None)
    power = scalars[-1][0] if power is None else power
    request, tile = pl.program_id(0), pl.program_id(1)
    num_requests = pl.num_programs(0)
    kv_heads, tile_rows, _ = q_ref.shape
    page_size, keys = store_ref.shape[4], keys_ref.shape[2]
    last = last_ref[tile * num_requests + request]
    blocks = (last + keys) // keys
    skipped = lax.div(first_ref[tile * num_requests + request], keys) if windowed else 0
    blocks = blocks - skipped if windowed else blocks

    def block_of(step: Index) -> Index:
        return skipped + lax.rem(step, blocks) if windowed else lax.rem(step, blocks)

    def transfer(step: Index, slot: Index, act: str) -> None:
        first = block_of(step) * (keys // page_size)

        def copy_of(page: Index) -> Copy:
            number = tables_ref[request * (tables_ref.shape[0] // num_requests) + first + page]
            target = keys_ref.at[slot, :, pl.ds(pl.multiple_of(page * page_size, TILE), page_size)]
            return pltpu.make_async_copy(store_ref.at[layer_ref[0], number, 0], target, sems.at[slot])

        each_page(jnp.minimum(last // page_size + 1 - first, keys // page_size), copy_of, act)

    def masked_scores(head: Index, block: Index, slot: Index) -> Array:
        own = jnp.where(owner_ref[...] == request, own_ref[...], -1)
        visible = block * keys + lax.broadcasted_iota(jnp.int32, (tile_rows, keys), 1) <= own
        if windowed:
            oldest = own - window_ref[0] + 1
            visible &= block * keys + lax.broadcasted_iota(jnp.int32, (tile_rows, keys), 1) >= oldest
        return jnp.where(visible, head_scores(q_ref[head], keys_ref[slot, head], scale), -jnp.inf)

    def add_to_lse(block: Index, slot: Index) -> None:
        def add(head: Index, _: None) -> None:
            scores = masked_scores(head, block, slot)
            top = top_ref[head, :, :1]
            new_top = jnp.maximum(top, scores.max(1, keepdims=True))
            finite_top = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            added = jnp.exp(scores - finite_top).sum(1, keepdims=True)
            total = total_ref[head, :, :1] * jnp.exp(top - finite_top) + added
            top_ref[head] = jnp.broadcast_to(new_top, (tile_rows, LANES))
            total_ref[head] = jnp.broadcast_to(total, (tile_rows, LANES))

        lax.fori_loop(0, kv_heads, add, None)

    def finish_lse() -> None:
        """Rows of other requests see no key. Any finite number gives them weights of 0."""
        lse = top_ref[...] + jnp.log(total_ref[...])
        top_ref[...] = jnp.where(total_ref[...] > 0, lse, 0.0)

    def add_column_sums(block: Index, slot: Index) -> None:
        def add(head: Index, sums: Array) -> Array:
            weights = jnp.exp(power * (masked_scores(head, block, slot) - top_ref[head, :, :1]))
            return sums + weights.sum(0, keepdims=True)

        out_ref[block] += lax.fori_loop(0, kv_heads, add, jnp.zeros((1, keys), jnp.float32))

    def step(i: Index, _: None) -> None:
        block, slot = block_of(i), lax.rem(i, 2)
        pl.when(i + 1 < 2 * blocks)(lambda: transfer(i + 1, 1 - slot, "start"))
        transfer(i, slot, "wait")
        pl.when(i < blocks)(lambda: add_to_lse(block, slot))
        pl.when(i == blocks)(finish_lse)
        pl.when(i >= blocks)(lambda: add_column_sums(block, slot))

    @pl.when(tile == 0)
    def clear() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(last >= 0)
    def run() -> None:
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        transfer(jnp.int32(0), jnp.int32(0), "start")
        lax.fori_loop(0, 2 * blocks, step, None)
