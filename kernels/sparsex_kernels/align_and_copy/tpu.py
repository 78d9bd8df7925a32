"""Alignment on TPU: runs of slots are rotated, shifted and merged into the tiles of slots that they end in.

A *piece* is a run of consecutive tokens with one shift, within one tile of slots at its source and one at its target:
its keys take one rotation, and its slots one roll. A segment whose offset in its pages changes gives two pieces a tile;
tokens in no order give a piece each. With tiles of 16, moving slots 10..25 to 32..47 takes two pieces into one tile:
10..15 go to 32..37, and 16..25 to 38..47.

With spans, all tokens of a piece also move the same layers. The grid goes by groups of layers of the target, which are
the same for every piece, so pieces of different spans meet in one tile in VMEM. As many layers are read for each piece;
they begin higher or lower.
"""

import dataclasses
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
    first_layer = pl.program_id(1) * old_ref.shape[1]
    one = _Step(
        pieces, layers_ref, frequencies_ref, store_ref, old_ref, new_ref, old_sems, new_sems, write_sems, first_layer
    )
    first = pieces.then[0, 0]
    pl.when(first < one.tokens)(lambda: one.run(first))


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step of the grid: a block of tokens, in a group of layers from `first_layer` on.

    While a piece is moved between tiles in VMEM, the source tile of the next one comes. Target tiles come and go with
    the first and the last piece that ends in them.
    """

    pieces: Pieces
    layers_ref: Ref
    frequencies: Ref
    store: Ref
    old: Ref
    new: Ref
    old_sems: Ref
    new_sems: Ref
    write_sems: Ref
    first_layer: Index

    @property
    def tokens(self) -> int:
        return self.pieces.source.shape[1]

    @property
    def layers(self) -> int:
        return self.old.shape[1]

    @property
    def tile(self) -> int:
        return self.old.shape[4]

    def run(self, first: Index) -> None:
        """Move all pieces, from that of this token on."""
        self.read_old(first, 0).start()
        self.read_new(first, 0).start()
        start = first, jnp.int32(0), jnp.int32(0), jnp.bool_(True)
        _, _, tiles, _ = lax.while_loop(lambda state: state[0] < self.tokens, self.next, start)
        self.write_new(first, lax.rem(tiles - 1, 2)).wait()

    def next(self, state: tuple[Index, Index, Index, Index]) -> tuple[Index, Index, Index, Index]:
        """Move a piece, the first of its tile if it `opens`. Before it were `count` pieces and `tiles` target tiles."""
        token, count, tiles, opens = state
        old_slot, new_slot, then = lax.rem(count, 2), lax.rem(tiles, 2), self.after(self.pieces.then, token)
        upcoming, target = self.pieces.target[0, jnp.minimum(then, self.tokens - 1)], self.pieces.target
        closes = (then >= self.tokens) | (lax.div(upcoming, self.tile) != lax.div(target[0, token], self.tile))

        # The tile that is read next may be the one that was written last.
        pl.when(opens & (tiles >= 1))(lambda: self.write_new(token, 1 - new_slot).wait())

        @pl.when(then < self.tokens)
        def prefetch() -> None:
            self.read_old(then, 1 - old_slot).start()
            pl.when(closes)(lambda: self.read_new(then, 1 - new_slot).start())

        self.read_old(token, old_slot).wait()
        pl.when(opens)(lambda: self.read_new(token, new_slot).wait())
        _Merge.of(self, token, old_slot, new_slot).run()
        pl.when(closes)(lambda: self.write_new(token, new_slot).start())
        return then, count + 1, tiles + closes.astype(jnp.int32), closes

    def after(self, ref: Ref, token: Index) -> Index:
        """What `ref` says behind a token."""
        return jnp.where(token + 1 < self.tokens, ref[0, jnp.minimum(token + 1, self.tokens - 1)], self.tokens)

    # Tiles --------------------------------------------------------------------------------------------------

    def tile_of(self, slot: Index, layer: Index) -> Ref:
        """The tile of the store that a slot is in, in as many layers from this one on as move together."""
        page_size = self.store.shape[4]
        page, offset = lax.div(slot, page_size), lax.rem(slot, page_size)
        aligned = pl.multiple_of(lax.div(offset, self.tile) * self.tile, self.tile)
        return self.store.at[pl.ds(layer, self.layers), page, :, :, pl.ds(aligned, self.tile)]

    def first_read(self, token: Index) -> Index:
        """The first layer that is read for a piece: those that it moves in this group are in the store."""
        spans = self.pieces.spans
        if not spans:
            return self.first_layer
        return jnp.clip(self.first_layer + spans.offset[0, token], 0, self.store.shape[0] - self.layers)

    def read_old(self, token: Index, slot: Index) -> Copy:
        tile = self.tile_of(self.pieces.source[0, token], self.first_read(token))
        return pltpu.make_async_copy(tile, self.old.at[slot], self.old_sems.at[slot])

    def read_new(self, token: Index, slot: Index) -> Copy:
        return pltpu.make_async_copy(self._target(token), self.new.at[slot], self.new_sems.at[slot])

    def write_new(self, token: Index, slot: Index) -> Copy:
        return pltpu.make_async_copy(self.new.at[slot], self._target(token), self.write_sems.at[slot])

    def _target(self, token: Index) -> Ref:
        return self.tile_of(self.pieces.target[0, token], self.first_layer)


@dataclasses.dataclass(frozen=True)
class _Merge:
    """A piece on its way from its source tile into its target tile, all layers and heads.

    Attributes:
      by: how far its rows are rolled.
      moved: which rows of the target tile are its own, the same for each head.
      rotation: cosines and sines, where all layers have the same. None: each has its own, or keys are not rotated.
    """

    step: _Step
    token: Index
    old_slot: Index
    new_slot: Index
    by: Index
    moved: Bool[Array, "rows head_dim"]
    rotation: tuple[Array, Array] | None

    @classmethod
    def of(cls, step: _Step, token: Index, old_slot: Index, new_slot: Index) -> "_Merge":
        pieces, tile, (kv_heads, _, head_dim) = step.pieces, step.tile, step.old.shape[3:]
        first = lax.rem(pieces.target[0, token], tile)
        past = first + step.after(pieces.end, token) - token
        by = lax.rem(first - lax.rem(pieces.source[0, token], tile) + kv_heads * tile, kv_heads * tile)
        slots = lax.rem(lax.broadcasted_iota(jnp.int32, (kv_heads * tile, head_dim), 0), tile)
        moved = (slots >= first) & (slots < past)
        rotates = not isinstance(step.frequencies, tuple)
        same = _rotation(step, token, ...) if rotates and len(step.frequencies.shape) == 2 else None
        return cls(step, token, old_slot, new_slot, by, moved, same)

    def run(self) -> None:
        lax.fori_loop(0, self.step.layers, self.move_layer, None)

    def move_layer(self, layer: Index, _: None) -> None:
        step, at = self.step, layer
        spans = step.pieces.spans
        if spans:
            at = step.first_layer + layer + spans.offset[0, self.token] - step.first_read(self.token)
            at = jnp.clip(at, 0, step.layers - 1)
        keys, values = (step.old[self.old_slot, at, kv].reshape(self.moved.shape).astype(jnp.float32) for kv in (0, 1))
        self.move_keys(layer, keys)
        self.move(layer, 1, values)

    def move_keys(self, layer: Index, keys: Array) -> None:
        """Rotated, but for those that move as they are."""
        spans = self.step.pieces.spans
        if isinstance(self.step.frequencies, tuple):
            self.move(layer, 0, keys)
        elif spans:
            as_is = spans.as_is[0, self.token] > 0
            pl.when(as_is)(lambda: self.move(layer, 0, keys))
            pl.when(~as_is)(lambda: self.turn(layer, keys))
        else:
            self.turn(layer, keys)

    def turn(self, layer: Index, keys: Array) -> None:
        cos, sin = self.rotation or _rotation(self.step, self.token, layer)
        half = keys.shape[1] // 2
        halves = jnp.concatenate([keys[:, half:], keys[:, :half]], axis=1)
        self.move(layer, 0, keys * cos + halves * sin)

    def move(self, layer: Index, kv: int, rotated: Array) -> None:
        """Write rows of K or V into the target tile, in a layer that the piece is copied in."""
        new_ref = self.step.new
        current = new_ref[self.new_slot, layer, kv].reshape(rotated.shape).astype(jnp.float32)
        copied = self._copied(self.step.first_layer + layer)
        if new_ref.dtype == FLOAT8:  # its largest number is what becomes of larger ones
            most = float(jnp.finfo(FLOAT8).max)
            rotated = jnp.minimum(jnp.maximum(rotated, -most), most)
        merged = jnp.where(copied, pltpu.roll(rotated, self.by, 0), current)
        new_ref[self.new_slot, layer, kv] = merged.astype(new_ref.dtype).reshape(new_ref.shape[3:])

    def _copied(self, layer: Index) -> Bool[Array, "rows head_dim"]:
        """Which rows of the target tile change in this layer of the store."""
        spans, layers = self.step.pieces.spans, self.step.layers_ref
        begin, end = (spans.first[0, self.token], spans.end[0, self.token]) if spans else (layers[0, 0], layers[0, 1])
        return self.moved & (layer >= begin) & (layer < end)


def _rotation(step: _Step, token: Index, layer: Any) -> tuple[Array, Array]:
    """Cosines and sines of a piece, by column; the sines with the sign of their half."""
    angles = step.pieces.shift[0, token].astype(jnp.float32) * step.frequencies[layer]
    half = step.old.shape[5] // 2
    upper = lax.broadcasted_iota(jnp.int32, (1, 2 * half), 1) >= half
    return jnp.cos(angles), jnp.where(upper, jnp.sin(angles), -jnp.sin(angles))
