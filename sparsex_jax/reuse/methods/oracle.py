"""The oracle: an upper bound that knows how far each token's pasted KV is from the truth.

scores = true_deviation(engine, prompt, namespace="docs")
with oracle(scores) as name:
    engine.generate(prompt, reuse=ReuseConfig(method=name, recompute_ratio=0.15), namespace="docs")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from sparsex_jax.config import ReuseConfig
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.methods.base import METHODS, Method, Phase
from sparsex_jax.reuse.methods.sparsex import sparsex, with_scores
from sparsex_jax.reuse.prompt import PromptMap

if TYPE_CHECKING:
    from sparsex_jax.engine import Engine

OPTIONS = ("coverage", "head_tokens", "per_segment", "pool_tokens")


@contextlib.contextmanager
def oracle(scores: Float32[np.ndarray, "tokens"], name: str = "oracle") -> Iterator[str]:
    """While it is open, a method of this name has SparseX's phases and chooses by these scores.

    Args:
      scores: one for each token of the prompt, not negative. A prompt of another length is refused.
    """

    def schedule(prompt: PromptMap, reuse: ReuseConfig, num_layers: int) -> list[Phase]:
        if len(prompt) != len(scores):
            raise InvalidRequestError(f"method {name!r} has {len(scores)} scores for a prompt of {len(prompt)} tokens")
        return with_scores(sparsex(prompt, reuse, num_layers), scores)

    METHODS[name] = Method(name, uses_prefix=True, uses_segments=True, schedule=schedule, options=OPTIONS)
    try:
        yield name
    finally:
        del METHODS[name]


def true_deviation(
    engine: Engine, tokens: Int32[np.ndarray, "tokens"], namespace: str = "default"
) -> Float32[np.ndarray, "tokens"]:
    """How far pasted KV is from full recompute, token by token: squared error of K and V over all layers.

    Each layer's K and V count by their own mean square, as their scales differ by orders of magnitude. Runs a full
    and a naive prefill, and keeps nothing.
    """
    true, pasted = (prompt_kv(engine, tokens, method, namespace) for method in ("full", "naive"))
    error = np.square(pasted - true).sum(axis=(3, 4))  # [layers, K or V, tokens]
    scale = np.square(true).sum(axis=(3, 4)).mean(axis=2, keepdims=True)
    return (error / scale).sum(axis=(0, 1)).astype(np.float32)


def prompt_kv(
    engine: Engine, tokens: Int32[np.ndarray, "tokens"], method: str, namespace: str = "default"
) -> Float[np.ndarray, "layers 2 tokens kv_heads head_dim"]:
    """K and V of every layer and token once a method has prefilled the prompt, in float32."""
    with engine.admitted([tokens], [], ReuseConfig(method=method), [namespace]) as [request]:
        engine.prefill_admitted([request])
        page, offset = np.divmod(np.arange(len(tokens)), engine.config.page_size)
        pages = jnp.asarray(np.asarray(request.plan.pages)[page])
        kv = engine.runner.store[:, pages, :, :, jnp.asarray(offset)]  # [tokens, layers, 2, kv_heads, head_dim]
        return np.moveaxis(np.asarray(kv, np.float32), 0, 2)
