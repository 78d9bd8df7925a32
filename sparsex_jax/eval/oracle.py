"""The scores of the oracle: how far each token's copied KV is from full recompute's.

scores = true_deviation(engine, prompt, namespace="docs")
engine.generate(prompt, reuse=Oracle(scores=scores, recompute_ratio=0.15), namespace="docs")
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from sparsex_jax.config import ReuseConfig
from sparsex_jax.engine import Engine
from sparsex_jax.model.store import kv_of
from sparsex_jax.reuse.methods import Full, Naive


def true_deviation(
    engine: Engine, tokens: Int32[np.ndarray, "tokens"], namespace: str = "default"
) -> Float32[np.ndarray, "tokens"]:
    """Squared error of each token's pasted K and V against full recompute's, summed over all layers.

    Each layer's K and V count by their own mean square, as their scales differ by orders of magnitude. Runs a full and
    a naive prefill, and keeps nothing.
    """
    true, pasted = (prompt_kv(engine, tokens, method, namespace) for method in (Full(), Naive(only_if_faster=False)))
    error = np.square(pasted - true).sum(axis=(3, 4))  # [layers, K or V, tokens]
    scale = np.square(true).sum(axis=(3, 4)).mean(axis=2, keepdims=True)
    return (error / scale).sum(axis=(0, 1)).astype(np.float32)


def prompt_kv(
    engine: Engine, tokens: Int32[np.ndarray, "tokens"], reuse: ReuseConfig, namespace: str = "default"
) -> Float[np.ndarray, "layers 2 tokens kv_heads head_dim"]:
    """K and V of every layer and token once a method has prefilled the prompt, in float32."""
    with engine.prefilled(tokens, reuse=reuse, namespace=namespace) as sequence:
        page, offset = np.divmod(np.arange(len(tokens)), engine.config.page_size)
        pages = jnp.asarray(np.asarray(sequence.pages)[page])
        kv = kv_of(engine.runner.store)[:, pages, :, :, jnp.asarray(offset)]  # [tokens, layers, 2, kv_heads, head_dim]
        return np.moveaxis(np.asarray(kv, np.float32), 0, 2)
