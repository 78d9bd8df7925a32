"""Host arrays on their way to the devices: all of them in one buffer, which is placed once and taken apart there.

Each array that is placed costs the host some 20 us, on a mesh for each device anew, and a plan has about twenty. So
`packed` lays their bytes behind each other in int32 words, and the jitted step that takes the buffer begins with
`Packed.tree`, which compiles to slices of it:

    words      0 ... 63      64 ... 127       128 ... 143
    holds      token, int32  scores, float32  fresh, 64 bools of a byte each
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Int

_WORD = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays of a tree are in a buffer. It is static: programs are compiled for it.

    Attributes:
      shapes, dtypes: of each leaf, in the order of the tree.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@struct.dataclass
class Packed[Tree]:
    """A pytree of arrays of 4 bytes a number, or of bools.

    Attributes:
      words: the bytes of all leaves behind each other; those of each begin with a word.
    """

    words: Int[Array | np.ndarray, "words"]
    layout: Layout = struct.field(pytree_node=False)

    def tree(self) -> Tree:
        """The tree, inside a jitted step."""
        leaves, at = [], 0
        for shape, dtype in zip(self.layout.shapes, self.layout.dtypes, strict=True):
            size = _num_words(shape, dtype)
            leaves.append(_leaf(jnp.asarray(self.words)[at : at + size], shape, dtype))
            at += size
        tree: Tree = jax.tree.unflatten(self.layout.structure, leaves)
        return tree


def packed[Tree](tree: Tree) -> Packed[Tree]:
    """A tree of NumPy arrays as one buffer, which is on the host still.

    Raises:
      ValueError: an array is neither of bools nor of 4 bytes a number.
    """
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    layout = Layout(structure, tuple(each.shape for each in arrays), tuple(each.dtype.name for each in arrays))
    sizes = [_num_words(each.shape, each.dtype) for each in arrays]
    words, at = np.zeros(sum(sizes), np.int32), 0
    for array, size in zip(arrays, sizes, strict=True):
        words[at : at + size].view(_storable(array.dtype))[: array.size] = array.reshape(-1)
        at += size
    return Packed(words, layout)


def _num_words(shape: tuple[int, ...], dtype: str | np.dtype[Any]) -> int:
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // _WORD)


def _storable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The same type. Raises ValueError if the device could not read it out of words."""
    if dtype.kind != "b" and dtype.itemsize != _WORD:
        raise ValueError(f"an array of {dtype} cannot be packed; numbers must have {_WORD} bytes")
    return dtype


def _leaf(words: Int[Array, "words"], shape: tuple[int, ...], dtype: str) -> Array:
    if dtype != "bool":
        return jax.lax.bitcast_convert_type(words, jnp.dtype(dtype)).reshape(shape)
    flags = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)
    return flags[: math.prod(shape)].reshape(shape).astype(bool)
