"""What calibration tries: methods with options that matter, in the order of the operations that they should take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sparsex_jax.cache import Segment
from sparsex_jax.config import ModelConfig, ReuseConfig
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.eval.flops import predicted_fraction
from sparsex_jax.reuse.prompt import PromptMap, TokenKind

AROUND = 64  # fresh tokens on each side of the body, as a prompt has them about


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer, as a part of the model's layers."""

    part: float

    def of(self, num_layers: int) -> int:
        """
        >>> Layer(1 / 6).of(30)
        5
        """
        return round(self.part * num_layers)


_BOUNDARIES = tuple(Layer(part) for part in (0, 1 / 12, 1 / 6, 1 / 4, 1 / 3))

# Each line is a method and the values to try of its options; all combinations of them are candidates.
CHOICES: tuple[tuple[str, Mapping[str, Sequence[Any]]], ...] = (
    ("naive", {}),
    ("excerpt", {"coverage": (0.5, 0.7, 0.8, 0.9, 0.95)}),
    ("epic", {"head_tokens": (8, 32)}),
    ("cacheblend", {"recompute_ratio": (0.15, 0.3)}),
    ("sparsex", {"boundary_layer": _BOUNDARIES, "recompute_ratio": (0.05, 0.15, 0.3)}),
    ("sparsex", {"boundary_layer": _BOUNDARIES, "recompute_ratio": (0.15, 0.3), "second_boundary": (Layer(2 / 3),)}),
    ("prophetkv", {"recompute_ratio": (0.05, 0.1, 0.2, 0.35, 0.5)}),
    (
        "qcfuse",
        {"probe_layer": (Layer(1 / 3), Layer(0.54), Layer(2 / 3)), "recompute_ratio": (0.05, 0.1, 0.2, 0.35, 0.5)},
    ),
    ("focus", {"recompute_ratio": (0.05, 0.1, 0.2, 0.35), "pool_tokens": (32, 128)}),
)
METHODS = tuple(dict.fromkeys(method for method, _ in CHOICES))


def find_candidates(
    model: ModelConfig, num_tokens: int, num_segments: int, among: Sequence[str | ReuseConfig] = METHODS
) -> list[ReuseConfig]:
    """All candidates that take less than full recompute. Those that should take the fewest operations come first.

    Args:
      num_tokens, num_segments: of the reused body of a prompt.
      among: a name stands for all candidates of that method; a method with options is a candidate itself.

    Raises:
      InvalidRequestError: a name has no candidates, an option is wrong for the model, or nothing is left.
    """
    prompt = _example(num_tokens, num_segments)
    found = dict.fromkeys(itertools.chain.from_iterable(_named(each, model, prompt) for each in among))
    work = {reuse: predicted_fraction(model, reuse, prompt) for reuse in found}
    candidates = sorted((reuse for reuse in found if work[reuse] < 1), key=lambda reuse: work[reuse])
    if not candidates:
        raise InvalidRequestError(
            "methods: none of them takes less than full recompute; name others, or longer prompts"
        )
    return candidates


def _named(name: str | ReuseConfig, model: ModelConfig, prompt: PromptMap) -> Iterator[ReuseConfig]:
    if isinstance(name, ReuseConfig):
        yield name
    elif name not in METHODS:
        raise InvalidRequestError(f"methods: {name!r} has no candidates; there are: {', '.join(METHODS)}")
    else:
        for method, options in CHOICES:
            if method == name:
                yield from (each for each in _combined(method, options, model.num_layers) if _fits(each, model, prompt))


def _combined(method: str, options: Mapping[str, Sequence[Any]], num_layers: int) -> Iterator[ReuseConfig]:
    for values in itertools.product(*options.values()):
        settled = [value.of(num_layers) if isinstance(value, Layer) else value for value in values]
        yield ReuseConfig(method, **dict(zip(options, settled, strict=True)))


def _fits(reuse: ReuseConfig, model: ModelConfig, prompt: PromptMap) -> bool:
    """Whether a model has these layers, in this order: in one of few layers, two parts of it may be the same layer."""
    try:
        predicted_fraction(model, reuse, prompt)
    except InvalidRequestError:
        return False
    return True


def _example(num_tokens: int, num_segments: int) -> PromptMap:
    """A prompt of that many reused tokens in segments, with fresh ones on each side."""
    ends = np.linspace(AROUND, AROUND + num_tokens, num_segments + 1).astype(int).tolist()
    kind = np.full(num_tokens + 2 * AROUND, TokenKind.FRESH, np.uint8)
    kind[AROUND : AROUND + num_tokens] = TokenKind.REUSED
    segments = tuple(
        Segment(start, end - start, 0, np.arange(end - start), exact=True)
        for start, end in itertools.pairwise(ends)
        if end > start
    )
    return PromptMap(np.zeros(len(kind), np.int32), kind, segments)
