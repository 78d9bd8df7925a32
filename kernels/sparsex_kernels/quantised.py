"""Stacks of matrices in few bits, which products take in place of arrays: fp8, int8, and the blocks of GGUF files.

A weight is `scale * (code - zero) - minimum`, where a scale (and a minimum) belongs to a block of inputs of one output,
or to a square of inputs and outputs. K-quants have scales of few bits, which a scale of a larger block multiplies.

Codes of four bits, and what codes of five and six have beyond four, are packed along the inputs. A byte of a group has
codes that are a part of the group apart, the first in its lowest bits. Eight inputs, in groups of 8 with 4 bits:

inputs   0 1 2 3 4 5 6 7      bytes   0|4<<4  1|5<<4  2|6<<4  3|7<<4

Codes of eight bits may have their squares of 128 inputs and 128 outputs turned around, each where it is: the code of
input 128 a + i and output 128 b + o is then at row 128 a + o and column 128 b + i. A kernel that fetches whole squares
finds the codes of an output side by side so, and the array keeps its shape and can be divided as before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

FP8_MAX, INT8_MAX = 448.0, 127.0
SQUARE = 128  # inputs and outputs of what is turned around
_STATIC: Any = {"static": True}


@dataclasses.dataclass(frozen=True)
class Kind:
    """How weights are coded.

    Attributes:
      bits: of a code. Codes of 8 bits are numbers by themselves (float8_e4m3fn or int8) and are not packed.
      zero: the code of the weight 0, without a minimum.
      low, high: inputs of a group in which the low four bits, and the others, are packed.
      block: inputs of a scale; 0: what its array says.
      large: inputs of a scale of scales; 0: there is none.
      minimum: whether blocks have one.
    """

    bits: int
    zero: int = 0
    low: int = 0
    high: int = 0
    block: int = 0
    large: int = 0
    minimum: bool = False

    @property
    def granule(self) -> int:
        """Inputs can be divided where multiples of it end."""
        return max(self.low, self.high, 1)


KINDS = {
    "fp8": Kind(8),
    "int8": Kind(8),
    "q8_0": Kind(8, block=32),
    "q4_0": Kind(4, 8, low=32, block=32),
    "q4_1": Kind(4, low=32, block=32, minimum=True),
    "q5_0": Kind(5, 16, low=32, high=32, block=32),
    "q5_1": Kind(5, low=32, high=32, block=32, minimum=True),
    "q4_k": Kind(4, low=64, block=32, large=256, minimum=True),
    "q5_k": Kind(5, low=64, high=256, block=32, large=256, minimum=True),
    "q6_k": Kind(6, 32, low=128, high=128, block=16, large=256),
}


# The run-time check of types is off for both classes, because trees with their structure also hold shapes and more.
@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True)
class Quantised:
    """Matrices in one kind of code. Axes in front of the last two, such as layers and experts, are those of the stack.

    Attributes:
      codes: `[*stack, inputs, outputs]`, or uint8 `[*stack, inputs / 2, outputs]` where two share a byte.
      scales: `[*stack, blocks, outputs]`, or `[*stack, blocks, blocks of outputs]`: float32, float16, int8 or uint8.
      high: uint8 `[*stack, inputs * (bits - 4) / 8, outputs]`: the bits of codes beyond four.
      mins: as the scales: what is subtracted.
      large: float16 `[*stack, large blocks, outputs]`: what multiplies scales.
      large_mins: the same for minima.
      kind: a name in `KINDS`.
      dtype: what rows of it become, where it is an embedding.
      turned: whether squares of the codes are turned around.
    """

    codes: Array
    scales: Array
    high: Array | None = None
    mins: Array | None = None
    large: Array | None = None
    large_mins: Array | None = None
    kind: str = dataclasses.field(default="int8", metadata=_STATIC)
    dtype: str = dataclasses.field(default="float32", metadata=_STATIC)
    turned: bool = dataclasses.field(default=False, metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack of matrices that it stands for."""
        *stack, rows, outputs = self.codes.shape
        return (*stack, rows if KINDS[self.kind].bits == 8 else 2 * rows, outputs)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def scaled_by_output(self) -> bool:
        """Whether a product can be scaled after it was summed: codes are numbers, with one scale for each output."""
        return not KINDS[self.kind].block and self.scales.shape[-2:] == (1, self.shape[-1])

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Quantised:
        """Some of the stack: an index, or several, of its first axis. Traced ones too."""
        return jax.tree.map(lambda part: part[index], self)


@jax.tree_util.register_dataclass
@no_type_check
@dataclasses.dataclass(frozen=True)
class Mixed:
    """A stack whose layers are of several kinds, as files that give more bits to what needs them have it.

    Attributes:
      parts: stacks, each of some layers.
      places: the part and the place there of each layer.
    """

    parts: tuple[Quantised | Array, ...]
    places: tuple[tuple[int, int], ...] = dataclasses.field(metadata=_STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.places), *self.parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        return self.parts[0].ndim

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def __len__(self) -> int:
        return len(self.places)

    def switch[T](self, layer: Int[Array, ""] | int, product: Callable[[Any, Array], T]) -> T:
        """`product(part, place)` of the part that has the layer, and its place there."""
        part, place = jnp.asarray(self.places, jnp.int32)[jnp.asarray(layer)]
        branches = [lambda place, part=part: product(part, place) for part in self.parts]
        return jax.lax.switch(part, branches, place)


def same_kind(weights: Sequence[Any]) -> bool:
    """Whether all are arrays, or quantised in one kind. One that is mixed is like no other."""
    kinds = {getattr(weight, "kind", None) for weight in weights}
    return len(kinds) == 1 and not any(isinstance(weight, Mixed) for weight in weights)


def merged(stack: Any) -> Any:
    """A stack with the first two axes as one. No copy."""
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), stack)


def floats(weight: Array | Quantised, dtype: Any) -> Array:
    """The weight as an array of this dtype."""
    return dequantise(weight, dtype) if isinstance(weight, Quantised) else weight.astype(dtype)


def dequantise(weight: Quantised, dtype: Any) -> Float[Array, "*stack inputs outputs"]:
    """The matrices as floats, computed in float32 and then rounded."""
    kind, shape = KINDS[weight.kind], weight.shape
    scales = weight.scales.astype(jnp.float32)
    if weight.large is not None:
        scales *= _spread(weight.large, scales.shape)
    values = _codes(weight, kind).astype(jnp.float32) - kind.zero
    blocks = _split(values, scales.shape) * scales[..., :, None, :, None]
    if weight.mins is not None:
        mins = weight.mins.astype(jnp.float32)
        if weight.large_mins is not None:
            mins *= _spread(weight.large_mins, mins.shape)
        blocks -= mins[..., :, None, :, None]
    return blocks.reshape(shape).astype(dtype)


def lookup(weight: Quantised, outputs: Int[Array, "rows"]) -> Float[Array, "rows inputs"]:
    """Columns of one matrix whose blocks lie within a column, as rows: the embeddings of tokens."""
    columns = jax.tree.map(lambda part: part[:, outputs], weight)
    return dequantise(columns, weight.dtype).T


def _split(values: Array, blocks: tuple[int, ...]) -> Array:
    """Matrices as `[*stack, blocks, inputs of a block, blocks of outputs, outputs of a block]`."""
    *stack, inputs, outputs = values.shape
    rows, columns = blocks[-2:]
    return values.reshape(*stack, rows, inputs // rows, columns, outputs // columns)


def _spread(large: Array, shape: tuple[int, ...]) -> Array:
    """Scales of large blocks for each of their blocks, in float32."""
    return jnp.repeat(large.astype(jnp.float32), shape[-2] // large.shape[-2], axis=-2)


def _codes(weight: Quantised, kind: Kind) -> Array:
    if kind.bits == 8:
        return numbers(weight)
    low = unpack(weight.codes, kind.low, 4)
    return low if weight.high is None else low | unpack(weight.high, kind.high, kind.bits - 4) << 4


def numbers(weight: Quantised) -> Array:
    """Codes of 8 bits, at the places of the weights that they stand for."""
    return turn(weight.codes) if weight.turned else weight.codes


def turn(codes: Array) -> Array:
    """The codes `[*stack, inputs, outputs]`, both multiples of 128, with their squares turned around, or back."""
    *stack, inputs, outputs = codes.shape
    squares = codes.reshape(*stack, inputs // SQUARE, SQUARE, outputs // SQUARE, SQUARE)
    return squares.swapaxes(-3, -1).reshape(codes.shape)


def turned(weight: Quantised) -> Quantised:
    """The same matrices in the other order of codes."""
    return dataclasses.replace(weight, codes=turn(weight.codes), turned=not weight.turned)


def unpack(packed: Array, group: int, bits: int) -> Array:
    """Codes of 1, 2 or 4 bits, from bytes `[*stack, inputs * bits / 8, outputs]` packed in groups of inputs."""
    *stack, rows, outputs = packed.shape
    parts = 8 // bits
    grouped = packed.reshape(*stack, -1, 1, group // parts, outputs)
    shifts = (jnp.arange(parts, dtype=jnp.uint8) * bits)[:, None, None]
    return ((grouped >> shifts) & jnp.uint8(2**bits - 1)).reshape(*stack, rows * parts, outputs)


def pack(codes: Array, group: int, bits: int) -> Array:
    """The inverse of `unpack`."""
    *stack, rows, outputs = codes.shape
    parts = 8 // bits
    grouped = codes.astype(jnp.uint8).reshape(*stack, rows // group, parts, group // parts, outputs)
    shifts = (jnp.arange(parts, dtype=jnp.uint8) * bits)[:, None, None]
    return (grouped << shifts).sum(-3, dtype=jnp.uint8).reshape(*stack, rows // parts, outputs)


def quantise(matrices: Float[Array, "*stack inputs outputs"], kind: str) -> Quantised:
    """Round matrices to the nearest of what a kind can hold: for fp8 and int8 with a scale for each output, which the
    largest weight of the output sets.

    Raises:
      ValueError: none are made of this kind, or its blocks do not divide the inputs.
    """
    wide, about, inputs = matrices.astype(jnp.float32), KINDS[kind], matrices.shape[-2]
    if kind not in _MAKERS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(_MAKERS)}")
    if inputs % max(about.large, about.block, 1):
        raise ValueError(f"{inputs} inputs are no multiple of {max(about.large, about.block)}, as {kind} needs")
    return _MAKERS[kind](wide, about, kind)


def _to_numbers(wide: Array, about: Kind, kind: str) -> Quantised:
    """Codes that are numbers: 8 bits each."""
    blocks = wide.shape[-2] // about.block if about.block else 1
    split = wide.reshape(*wide.shape[:-2], blocks, -1, wide.shape[-1])
    largest = FP8_MAX if kind == "fp8" else INT8_MAX
    scales = jnp.abs(split).max(-2) / largest
    scales = scales.astype(jnp.float16 if about.block else jnp.float32)
    exact = _over(split, scales[..., None, :].astype(jnp.float32))
    if kind == "fp8":
        codes = jnp.clip(exact, -largest, largest).astype(jnp.float8_e4m3fn)
    else:
        codes = jnp.clip(jnp.round(exact), -largest, largest).astype(jnp.int8)
    return Quantised(codes.reshape(wide.shape), scales, kind=kind)


def _to_k(wide: Array, about: Kind, kind: str) -> Quantised:
    """K-quants, without llama.cpp's search for the scales that lose least."""
    *stack, inputs, outputs = wide.shape
    split = wide.reshape(*stack, inputs // about.block, about.block, outputs)
    top = 2**about.bits - 1
    mins: Array | None
    large_mins: Array | None
    if about.minimum:
        mins, large_mins = _in_few_bits(jnp.maximum(-split.min(-2), 0), about, 63, jnp.uint8)
        low = mins.astype(jnp.float32) * _spread(large_mins, mins.shape)
        spans, largest, dtype = (split.max(-2) + low) / top, 63, jnp.uint8
    else:
        mins, large_mins = None, None
        low, spans, largest, dtype = jnp.float32(0), jnp.abs(split).max(-2) / about.zero, 127, jnp.int8
    scales, large = _in_few_bits(jnp.maximum(spans, 0), about, largest, dtype)
    steps = scales.astype(jnp.float32) * _spread(large, scales.shape)
    shifted = split + jnp.broadcast_to(low, steps.shape)[..., None, :]
    codes = jnp.clip(jnp.round(_over(shifted, steps[..., None, :])) + about.zero, 0, top).reshape(wide.shape)
    codes = codes.astype(jnp.uint8)
    high = pack(codes >> 4, about.high, about.bits - 4) if about.high else None
    return Quantised(pack(codes & 15, about.low, 4), scales, high, mins, large, large_mins, kind=kind)


def _in_few_bits(scales: Array, about: Kind, largest: int, dtype: Any) -> tuple[Array, Array]:
    """Scales as integers up to the largest, and what multiplies those of each large block."""
    *stack, blocks, outputs = scales.shape
    split = scales.reshape(*stack, -1, about.large // about.block, outputs)
    large = (split.max(-2) / largest).astype(jnp.float16)
    codes = jnp.clip(jnp.round(_over(split, large.astype(jnp.float32)[..., None, :])), 0, largest)
    return codes.astype(dtype).reshape(*stack, blocks, outputs), large


def _over(values: Array, scales: Array) -> Array:
    """The quotient; 0 where the scale is 0."""
    return values / jnp.where(scales == 0, 1, scales)


_MAKERS = {"fp8": _to_numbers, "int8": _to_numbers, "q8_0": _to_numbers, "q4_k": _to_k, "q6_k": _to_k}


def finer(scales: Array, axis: int, blocks: int) -> Array:
    """Scales for more, smaller blocks along an axis, which have those of the blocks that they are parts of."""
    return jnp.repeat(scales, blocks // scales.shape[axis], axis=axis)


def blocks_within(size: int, block: int, shards: int) -> int:
    """How many equal blocks divide `size` inputs or outputs so that none crosses the end of a block or of a shard.

    >>> blocks_within(192, 128, 1), blocks_within(512, 128, 8)
    (3, 8)
    """
    return size // math.gcd(size // shards, block)
