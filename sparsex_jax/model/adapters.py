"""LoRA adapters: what one adds to the products of a model's layers.

A layer's product `x W` becomes `x W + (x A) B` for the rows on which an adapter acts, with A of `[inputs, rank]` and B
of `[rank, outputs]` (Hu et al. 2021, section 4.1). The scale alpha / rank is part of B here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from sparsex_jax.config.checks import is_int, require

TARGETS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")  # weights of `Layers` that adapters may add to


class Pair(NamedTuple):
    """What an adapter adds to one weight in each layer, the scale in `b`. Heads lie side by side, as in a product."""

    a: Float32[np.ndarray, "layers inputs rank"]
    b: Float32[np.ndarray, "layers rank outputs"]


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterWeights:
    """One adapter on the host.

    Attributes:
      rank: the largest of its pairs.
      pairs: by the name of the weight, some of `TARGETS`.
      invocation: token ids behind whose last occurrence in a prompt an activated LoRA acts, from the first of them on;
        none for one that acts on all tokens.
      digest: of all of the above; what is stored under one digest is never found under another.
    """

    rank: int
    pairs: Mapping[str, Pair]
    invocation: tuple[int, ...]
    digest: str

    def __post_init__(self) -> None:
        """Raises InvalidRequestError if one of these is no such thing. Whether it fits a model is asked later."""
        require(is_int(self.rank) and self.rank >= 1, f"rank={self.rank!r:.60} must be an integer >= 1")
        are_pairs = isinstance(self.pairs, Mapping) and all(map(_is_pair, self.pairs.values()))
        require(are_pairs, f"pairs={self.pairs!r:.60} must have a Pair of arrays [layers, _, _] for each name")
        are_tokens = isinstance(self.invocation, tuple) and all(map(is_int, self.invocation))
        require(are_tokens, f"invocation={self.invocation!r:.60} must be a tuple of token ids")
        require(isinstance(self.digest, str), f"digest={self.digest!r:.60} must be a str")


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Pair) and all(np.ndim(part) == 3 for part in pair)
