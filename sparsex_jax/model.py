"""The decoder as pure functions over the parameter pytree. Llama, Mistral, Qwen2 and Qwen3 by configuration.

`decoder_layer` is what prefill and decode share: it takes any rows, writes their K and V into the store and
attends over the store. Weights of one layer are the `layers` leaves without their first axis.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_jax.config import ModelConfig
from sparsex_jax.ops import Ops
from sparsex_jax.plan import Rows
from sparsex_jax.weights import Params
from sparsex_kernels import apply_rope
from sparsex_kernels.layout import PageTables, Store

Hidden = Float[Array, "rows hidden"]
Heads = Float[Array, "rows heads head_dim"]


class Decoder(NamedTuple):
    """What is static about the model: the same for every step."""

    config: ModelConfig
    ops: Ops


def inv_freq(config: ModelConfig) -> Float[Array, "half"]:
    """Rotary frequencies, radians a position, float32."""
    exponent = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    return frequencies if config.rope_factors is None else frequencies / jnp.asarray(config.rope_factors)


def rms_norm(x: Float[Array, "*batch dim"], scale: Float[Array, "dim"], eps: float) -> Float[Array, "*batch dim"]:
    """x / rms(x) * scale, the mean square taken in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return scale * normed.astype(x.dtype)


def embed(params: Params, tokens: Int[Array, "rows"]) -> Hidden:
    return params["embed"][tokens]


def logits(params: Params, config: ModelConfig, hidden: Hidden) -> Float[Array, "rows vocab"]:
    """Next-token logits in float32."""
    normed = rms_norm(hidden, params["final_norm"], config.rms_norm_eps)
    head = params["embed"].T if config.tied_embeddings else params["lm_head"]
    return jnp.einsum("rh,hv->rv", normed, head, preferred_element_type=jnp.float32)


def layer_weights(params: Params, layer: Int[Array, ""]) -> Params:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), params["layers"])


def queries(weights: Params, config: ModelConfig, hidden: Hidden, rows: Rows) -> Heads:
    """Rotated queries of rows from the layer's input."""
    with jax.named_scope("queries"):
        normed = rms_norm(hidden, weights["attn_norm"], config.rms_norm_eps)
        q = _project(normed, weights["wq"], weights.get("bq"))
        return _position(q, weights.get("q_norm"), config, rows)


def keys_values(weights: Params, config: ModelConfig, hidden: Hidden, rows: Rows) -> tuple[Heads, Heads]:
    """Rotated keys, and values, of rows from the layer's input."""
    with jax.named_scope("keys_values"):
        normed = rms_norm(hidden, weights["attn_norm"], config.rms_norm_eps)
        k = _project(normed, weights["wk"], weights.get("bk"))
        return _position(k, weights.get("k_norm"), config, rows), _project(normed, weights["wv"], weights.get("bv"))


def _project(x: Hidden, weight: Float[Array, "hidden heads head_dim"], bias: Array | None) -> Heads:
    projected = jnp.einsum("rh,hnd->rnd", x, weight)
    return projected if bias is None else projected + bias


def _position(heads: Heads, norm: Array | None, config: ModelConfig, rows: Rows) -> Heads:
    if norm is not None:
        heads = rms_norm(heads, norm, config.rms_norm_eps)
    return apply_rope(heads, rows.position, inv_freq(config))


def mlp(weights: Params, config: ModelConfig, hidden: Hidden) -> Hidden:
    """SwiGLU, without the residual."""
    with jax.named_scope("mlp"):
        normed = rms_norm(hidden, weights["mlp_norm"], config.rms_norm_eps)
        return (jax.nn.silu(normed @ weights["w_gate"]) * (normed @ weights["w_up"])) @ weights["w_down"]


def decoder_layer(
    decoder: Decoder,
    weights: Params,
    layer: Int[Array, ""],
    store: Store,
    hidden: Hidden,
    rows: Rows,
    tables: PageTables,
) -> tuple[Store, Hidden]:
    """One layer for some rows: their K and V go into the store, then they attend to all that is in it."""
    config, ops = decoder
    keys, values = keys_values(weights, config, hidden, rows)
    store = ops.write_kv(store, layer, keys, values, rows, tables)
    with jax.named_scope("attention"):
        attended = ops.attention(queries(weights, config, hidden, rows), store, layer, rows, tables)
        hidden = hidden + jnp.einsum("rnd,ndh->rh", attended, weights["wo"])
    return store, hidden + mlp(weights, config, hidden)
