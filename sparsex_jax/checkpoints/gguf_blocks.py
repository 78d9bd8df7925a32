"""The blocks of GGUF files taken apart: codes, scales and minima, each as an array of its own.

No weight is changed. Codes stay packed as they are, but for the fifth bits of Q5_0 and Q5_1, whose bits are put into
the order of the others. Scales of six bits become bytes, which makes Q4_K and Q5_K 2.8 % and 2.3 % larger.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparsex_jax.checkpoints.held import Stored

Blocks = np.ndarray  # uint8 [..., outputs, blocks, bytes of a block]


def take_apart(encoding: str, blocks: Blocks) -> Stored:
    """The weight of these blocks.

    Args:
      encoding: ggml's name of one that `is_held`, such as `Q4_K`.
      blocks: uint8 `[..., outputs, blocks, bytes]`.
    """
    return Stored(encoding.lower(), _ENCODINGS[encoding](blocks))


def is_held(encoding: str) -> bool:
    """Whether `take_apart` knows this encoding."""
    return encoding in _ENCODINGS


def _flat(blocks: Blocks, begin: int, end: int | None = None, dtype: str = "uint8") -> np.ndarray:
    """Some bytes of each block, as numbers, those of all blocks of an output behind each other."""
    part = np.ascontiguousarray(blocks[..., begin:end]).view(dtype)
    return part.reshape(*blocks.shape[:-2], -1)


def _halves(blocks: Blocks, begin: int) -> np.ndarray:
    return _flat(blocks, begin, begin + 2, "float16")


# Pairs of digits of a place below 32 that change places: how far bits move, and which of each two is the lower one.
_EXCHANGES = ((1, 0x22222222), (3, 0x0A0A0A0A), (6, 0x00CC00CC), (12, 0x0000F0F0))


def _fifth_bits(blocks: Blocks, begin: int) -> np.ndarray:
    """Of 32 codes, from the order of their places to that of `pack`: bit p of byte j is that of code 4 p + j.

    So the bit at the place with the binary digits `abcde` goes to `deabc`, in four exchanges of two digits.
    """
    bits = _flat(blocks, begin, begin + 4, "<u4")
    for distance, lower in _EXCHANGES:
        differ = (bits >> np.uint32(distance) ^ bits) & np.uint32(lower)
        bits = bits ^ differ ^ differ << np.uint32(distance)
    return bits.view(np.uint8)


def _sixes(blocks: Blocks, begin: int) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and minima of six bits each in 12 bytes, as llama.cpp packs them."""
    packed = blocks[..., begin : begin + 12]
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=-1)
    mins = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=-1)
    flat = *blocks.shape[:-2], -1
    return scales.reshape(flat), mins.reshape(flat)


def _k(blocks: Blocks) -> dict[str, np.ndarray]:
    scales, mins = _sixes(blocks, 4)
    return {"scales": scales, "mins": mins, "large": _halves(blocks, 0), "large_mins": _halves(blocks, 2)}


def _q8_0(blocks: Blocks) -> dict[str, np.ndarray]:
    return {"codes": _flat(blocks, 2, dtype="int8"), "scales": _halves(blocks, 0)}


def _q4_0(blocks: Blocks) -> dict[str, np.ndarray]:
    return {"codes": _flat(blocks, 2), "scales": _halves(blocks, 0)}


def _q4_1(blocks: Blocks) -> dict[str, np.ndarray]:
    return {"codes": _flat(blocks, 4), "scales": _halves(blocks, 0), "mins": -_halves(blocks, 2)}


def _q5_0(blocks: Blocks) -> dict[str, np.ndarray]:
    return {"codes": _flat(blocks, 6), "high": _fifth_bits(blocks, 2), "scales": _halves(blocks, 0)}


def _q5_1(blocks: Blocks) -> dict[str, np.ndarray]:
    codes = {"codes": _flat(blocks, 8), "high": _fifth_bits(blocks, 4)}
    return codes | {"scales": _halves(blocks, 0), "mins": -_halves(blocks, 2)}


def _q4_k(blocks: Blocks) -> dict[str, np.ndarray]:
    return {"codes": _flat(blocks, 16)} | _k(blocks)


def _q5_k(blocks: Blocks) -> dict[str, np.ndarray]:
    return {"codes": _flat(blocks, 48), "high": _flat(blocks, 16, 48)} | _k(blocks)


def _q6_k(blocks: Blocks) -> dict[str, np.ndarray]:
    codes = {"codes": _flat(blocks, 0, 128), "high": _flat(blocks, 128, 192)}
    return codes | {"scales": _flat(blocks, 192, 208, "int8"), "large": _halves(blocks, 208)}


_ENCODINGS: dict[str, Callable[[Blocks], dict[str, np.ndarray]]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
