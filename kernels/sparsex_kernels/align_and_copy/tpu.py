"""Alignment on TPU: runs of slots are rotated, shifted and merged into the tiles of slots that they end in.

A *piece* is a run of consecutive tokens with one shift, within one tile of slots at its source and one at its target:
its keys take one rotation, and its slots one roll. A segment whose offset in its pages changes gives two pieces a tile;
tokens in no order give a piece each. With tiles of 16, moving slots 10..25 to 32..47 takes two pieces into one tile:
10..15 go to 32..37, and 16..25 to 38..47.

With spans, all tokens of a piece also move the same layers. The grid goes by groups of layers of the target, which are
the same for every piece, so pieces of different spans meet in one tile in VMEM. As many layers are read for each piece;
they begin higher or lower.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool

from sparsex_kernels.align_and_copy.spans import within
from sparsex_kernels.arguments import CopyArgs, Spans
from sparsex_kernels.layout import FLOAT8, Frequencies, Slots, Store, pad_rows
from sparsex_kernels.tpu import HBM, TILE, Copy, Index, Ref, check_page_size, compiler_params, next_start, slot_tile

TOKENS_A_STEP = 1024  # tokens whose slots are in SMEM at a time
HEADS_A_STEP = 64  # KV heads of as many layers as that gives, moved together: 0.5 MiB of bfloat16 a tile


class Pieces(NamedTuple):
    """What the kernel knows of the tokens of a step, in SMEM: lines of one number a token.

    Attributes:
      then: the first token at or behind each that begins a piece with a layer of the step's group.
      end: the first at or behind each that begins any piece or is padding.
      spans: first layer, first behind those, offset, and whether keys keep their bits. None: all layers, rotated.
    """

    source: Any
    target: Any
    shift: Any
    then: Any
    end: Any
    spans: Any


def align_and_copy(args: CopyArgs) -> Store:
    """See `sparsex_kernels.align_and_copy`."""
    store = args.store
    check_page_size(store)
    num_layers, _, _, kv_heads, _, head_dim = store.shape
    block = min(TOKENS_A_STEP, len(args.source) + -len(args.source) % TILE)
    layers = layers_a_step(num_layers, kv_heads)
    pieces = _pieces(args, block, layers)
    frequencies = _frequencies(args.inv_freq)
    all_layers = pl.BlockSpec((1, head_dim), lambda i, _: (0, 0))
    own_layers = pl.BlockSpec((layers, 1, head_dim), lambda i, group: (group, 0, 0))

    tile_shape = (2, layers, 2, kv_heads, slot_tile(store), head_dim)
    in_smem = pl.BlockSpec((None, 1, block), lambda i, _: (i, 0, 0), memory_space=pltpu.SMEM)
    by_group = pl.BlockSpec((None, None, 1, block), lambda i, group: (group, i, 0, 0), memory_space=pltpu.SMEM)
    inputs = [
        jax.tree.map(lambda x: in_smem if x.ndim == 3 else by_group, pieces),
        pl.BlockSpec((1, 2), lambda i, _: (0, 0), memory_space=pltpu.SMEM),
        jax.tree.map(lambda x: own_layers if x.ndim == 3 else all_layers, frequencies),
        HBM,
    ]
    return pl.pallas_call(
        _align_kernel,
        grid=(pieces.source.shape[0], num_layers // layers),
        in_specs=inputs,
        out_specs=HBM,
        scratch_shapes=[
            pltpu.VMEM(tile_shape, store.dtype),
            pltpu.VMEM(tile_shape, store.dtype),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        out_shape=jax.ShapeDtypeStruct(store.shape, store.dtype),
        input_output_aliases={len(jax.tree.leaves(inputs)) - 1: 0},
        compiler_params=compiler_params("arbitrary", "arbitrary"),
        name="pack_rows" if args.inv_freq is None else "align_and_copy",
    )(pieces, args.layers.astype(jnp.int32)[None], frequencies, store)


def _pieces(args: CopyArgs, block: int, layers: int) -> Pieces:
    """Each field as `[blocks, 1, block]`; with spans, `then` has groups of layers before that."""
    source, target, shift = (
        pad_rows(x.astype(jnp.int32), block, fill) for x, fill in ((args.source, 0), (args.target, -1), (args.shift, 0))
    )
    tile = slot_tile(args.store)
    breaks = piece_breaks(source, target, shift, block, tile)
    if args.spans is None:
        lines: Any = source, target, shift, next_start(breaks & (target >= 0), block), next_start(breaks, block), ()
        return Pieces(*jax.tree.map(lambda x: x.reshape(-1, 1, block), lines))
    spans, _ = within(args.spans, args.target, args.layers)
    spans = Spans(*(pad_rows(x.astype(jnp.int32), block) for x in spans))
    same = jnp.stack([x == jnp.roll(x, 1) for x in spans]).all(0)
    breaks |= ~same
    groups = jnp.arange(0, len(args.store), layers)[:, None]
    moved = (target >= 0) & (spans.first < jnp.minimum(spans.end, groups + layers)) & (spans.end > groups)
    then = jax.vmap(lambda own: next_start(breaks & own, block))(moved).reshape(len(groups), -1, 1, block)
    lines = source, target, shift, next_start(breaks, block), spans
    source, target, shift, end, spans = jax.tree.map(lambda x: x.reshape(-1, 1, block), lines)
    return Pieces(source, target, shift, then, end, spans)


def _frequencies(inv_freq: Frequencies | None) -> Any:
    """Of every column of a head, `[1, head_dim]` or `[layers, 1, head_dim]`; nothing where keys are not rotated."""
    if inv_freq is None:
        return ()
    frequencies = jnp.concatenate([inv_freq, inv_freq], axis=-1).astype(jnp.float32)
    return frequencies[:, None] if frequencies.ndim > 1 else frequencies[None]


def layers_a_step(num_layers: int, kv_heads: int) -> int:
    """Layers that are moved together: the largest divisor of their number that keeps to `HEADS_A_STEP`."""
    return max(n for n in range(1, num_layers + 1) if num_layers % n == 0 and (n == 1 or n * kv_heads <= HEADS_A_STEP))


def piece_breaks(source: Slots, target: Slots, shift: Slots, block: int, tile: int) -> Bool[Array, "tokens"]:
    """Which tokens begin a piece, or are padding."""

    def goes_on(x: Array, step: int) -> Array:
        return x == jnp.roll(x, 1) + step

    same = goes_on(source, 1) & goes_on(target, 1) & goes_on(shift, 0)
    at_edge = (source % tile == 0) | (target % tile == 0) | (jnp.arange(len(source)) % block == 0)
    return ~same | at_edge | (target < 0)


def _align_kernel(
    pieces: Pieces,  # [1, tokens] each, in SMEM
    layers_ref: Ref,  # [1, 2], the first layer to copy and the first behind those
    frequencies_ref: Ref,  # [1, head_dim] float32, twice the half; [layers, 1, head_dim], if layers differ; or ()
    donated_ref: Ref,  # the store; it is the output's memory
    store_ref: Ref,  # [layers, pages, 2, kv_heads, page_size, head_dim], in HBM
    old_ref: Ref,  # [2 buffers, layers, 2, kv_heads, TILE, head_dim]
    new_ref: Ref,  # the same, of target tiles
    old_sems: Ref,
    new_sems: Ref,
    write_sems: Ref,
) -> None:
    source_ref, target_ref, shift_ref, next_ref, end_ref, spans = pieces
    tokens = source_ref.shape[1]
    layers, _, kv_heads, tile, head_dim = old_ref.shape[1:]
    first_layer = pl.program_id(1) * layers
    page_size = store_ref.shape[4]

    def tile_of(slot: Index, layer: Index = first_layer) -> Ref:
        page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)
        aligned = pl.multiple_of(lax.div(offset, tile) * tile, tile)
        return store_ref.at[pl.ds(layer, layers), page, :, :, pl.ds(aligned, tile)]

    def first_read(token: Index) -> Index:
        """The first layer that is read for a piece: those that it moves in this group are in the store."""
        if not spans:
            return first_layer
        return jnp.clip(first_layer + spans.offset[0, token], 0, store_ref.shape[0] - layers)

    def read_old(token: Index, slot: Index) -> Copy:
        tile = tile_of(source_ref[0, token], first_read(token))
        return pltpu.make_async_copy(tile, old_ref.at[slot], old_sems.at[slot])

    def read_new(token: Index, slot: Index) -> Copy:
        return pltpu.make_async_copy(tile_of(target_ref[0, token]), new_ref.at[slot], new_sems.at[slot])

    def write_new(token: Index, slot: Index) -> Copy:
        return pltpu.make_async_copy(new_ref.at[slot], tile_of(target_ref[0, token]), write_sems.at[slot])

    def after(ref: Ref, token: Index) -> Index:
        return jnp.where(token + 1 < tokens, ref[0, jnp.minimum(token + 1, tokens - 1)], tokens)

    def rotation(token: Index, layer: Any) -> tuple[Array, Array]:
        angles = shift_ref[0, token].astype(jnp.float32) * frequencies_ref[layer]
        upper = lax.broadcasted_iota(jnp.int32, (1, head_dim), 1) >= head_dim // 2
        return jnp.cos(angles), jnp.where(upper, jnp.sin(angles), -jnp.sin(angles))

    def merge(token: Index, old_slot: Index, new_slot: Index) -> None:
        """Move one piece from its source tile into its target tile, all layers and heads."""
        first = lax.rem(target_ref[0, token], tile)
        past = first + after(end_ref, token) - token
        by = lax.rem(first - lax.rem(source_ref[0, token], tile) + kv_heads * tile, kv_heads * tile)
        slots = lax.rem(lax.broadcasted_iota(jnp.int32, (kv_heads * tile, head_dim), 0), tile)
        moved = (slots >= first) & (slots < past)
        rotated = not isinstance(frequencies_ref, tuple)
        by_layer = rotated and len(frequencies_ref.shape) > 2
        same = rotation(token, ...) if rotated and not by_layer else None

        def move(layer: Index, kv: int, rotated: Array) -> None:
            current = new_ref[new_slot, layer, kv].reshape(rotated.shape).astype(jnp.float32)
            at = first_layer + layer
            begin, end = (spans.first[0, token], spans.end[0, token]) if spans else (layers_ref[0, 0], layers_ref[0, 1])
            copied = moved & (at >= begin) & (at < end)
            if new_ref.dtype == FLOAT8:  # its largest number is what becomes of larger ones
                most = float(jnp.finfo(FLOAT8).max)
                rotated = jnp.minimum(jnp.maximum(rotated, -most), most)
            merged = jnp.where(copied, pltpu.roll(rotated, by, 0), current)
            new_ref[new_slot, layer, kv] = merged.astype(new_ref.dtype).reshape(kv_heads, tile, head_dim)

        def turn(layer: Index, keys: Array) -> None:
            cos, sin = same or rotation(token, layer)
            halves = jnp.concatenate([keys[:, head_dim // 2 :], keys[:, : head_dim // 2]], axis=1)
            move(layer, 0, keys * cos + halves * sin)

        def move_keys(layer: Index, keys: Array) -> None:
            if rotated and spans:
                as_is = spans.as_is[0, token] > 0
                pl.when(as_is)(lambda: move(layer, 0, keys))
                pl.when(~as_is)(lambda: turn(layer, keys))
            elif rotated:
                turn(layer, keys)
            else:
                move(layer, 0, keys)

        def move_layer(layer: Index, _: None) -> None:
            at = layer
            if spans:
                at = jnp.clip(first_layer + layer + spans.offset[0, token] - first_read(token), 0, layers - 1)
            keys, values = (
                old_ref[old_slot, at, kv].reshape(kv_heads * tile, head_dim).astype(jnp.float32) for kv in (0, 1)
            )
            move_keys(layer, keys)
            move(layer, 1, values)

        lax.fori_loop(0, layers, move_layer, None)

    def step(state: tuple[Index, Index, Index, Index]) -> tuple[Index, Index, Index, Index]:
        """Move a piece, the first of its tile if it `opens`. Before it were `count` pieces and `tiles` target tiles."""
        token, count, tiles, opens = state
        old_slot, new_slot, then = lax.rem(count, 2), lax.rem(tiles, 2), after(next_ref, token)
        upcoming = target_ref[0, jnp.minimum(then, tokens - 1)]
        closes = (then >= tokens) | (lax.div(upcoming, tile) != lax.div(target_ref[0, token], tile))

        # The tile that is read next may be the one that was written last.
        pl.when(opens & (tiles >= 1))(lambda: write_new(token, 1 - new_slot).wait())

        @pl.when(then < tokens)
        def prefetch() -> None:
            read_old(then, 1 - old_slot).start()
            pl.when(closes)(lambda: read_new(then, 1 - new_slot).start())

        read_old(token, old_slot).wait()
        pl.when(opens)(lambda: read_new(token, new_slot).wait())
        merge(token, old_slot, new_slot)
        pl.when(closes)(lambda: write_new(token, new_slot).start())
        return then, count + 1, tiles + closes.astype(jnp.int32), closes

    first = next_ref[0, 0]

    @pl.when(first < tokens)
    def run() -> None:
        read_old(first, 0).start()
        read_new(first, 0).start()
        start = first, jnp.int32(0), jnp.int32(0), jnp.bool_(True)
        _, _, tiles, _ = lax.while_loop(lambda state: state[0] < tokens, step, start)
        write_new(first, lax.rem(tiles - 1, 2)).wait()
