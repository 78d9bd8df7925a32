"""The decoder as pure functions over the parameter pytree. Llama, Mistral, Qwen2 and Qwen3 by configuration.

`decoder_layer` is what prefill and decode share: it takes any rows, writes their K and V into the store and
attends over the store. Weights are the `layers` leaves, stacked over the layers, and stay so.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_jax.config import ModelConfig
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.layout import PageTables, Store
from sparsex_kernels.rope import apply_rope

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


class Layer(NamedTuple):
    """One layer of the decoder. Its matrices stay in the stack of all layers: `Ops.linear` reads them from there."""

    decoder: Decoder
    stacks: Params
    number: Int[Array, ""]

    def vector(self, name: str) -> Array | None:
        """A weight that is no matrix, if the model has it."""
        stack = self.stacks.get(name)
        return None if stack is None else jax.lax.dynamic_index_in_dim(stack, self.number, keepdims=False)

    def norm(self, name: str, x: Hidden) -> Hidden:
        scale = self.vector(name)
        assert scale is not None
        return rms_norm(x, scale, self.decoder.config.rms_norm_eps)

    def linear(self, x: Float[Array, "rows inputs"], *names: str, rows: Rows) -> tuple[Float[Array, "rows _"], ...]:
        """Products with matrices that have the same inputs, heads side by side. Those of padding are undefined."""
        matrices = [self.stacks[name].reshape(len(self.stacks[name]), x.shape[1], -1) for name in names]
        over_inputs = names[0] in ("wo", "w_down")  # divided over a mesh by their inputs: heads, and the MLP
        return self.decoder.ops.linear(x, matrices, self.number, rows, over_inputs=over_inputs)


def layer_of(decoder: Decoder, params: Params, number: Int[Array, ""]) -> Layer:
    return Layer(decoder, params["layers"], number)


def queries(layer: Layer, hidden: Hidden, rows: Rows) -> Heads:
    """Rotated queries of rows from the layer's input."""
    with jax.named_scope("queries"):
        (q,) = _heads(layer, hidden, rows, "q")
    return q


def keys_values(layer: Layer, hidden: Hidden, rows: Rows) -> tuple[Heads, Heads]:
    """Rotated keys, and values, of rows from the layer's input."""
    with jax.named_scope("keys_values"):
        keys, values = _heads(layer, hidden, rows, "kv")
    return keys, values


def _heads(layer: Layer, hidden: Hidden, rows: Rows, kinds: str) -> list[Heads]:
    """Of `q`, `k` and `v` those asked for, together: they read the same rows."""
    normed = layer.norm("attn_norm", hidden)
    projected = layer.linear(normed, *(f"w{kind}" for kind in kinds), rows=rows)
    return [_finish(layer, kind, x, rows) for kind, x in zip(kinds, projected, strict=True)]


def _finish(layer: Layer, kind: str, projected: Float[Array, "rows width"], rows: Rows) -> Heads:
    """From a product to heads: bias and norm where the model has them, and the rotation of queries and keys."""
    config = layer.decoder.config
    heads = projected.reshape(len(projected), -1, config.head_dim)
    if (bias := layer.vector(f"b{kind}")) is not None:
        heads += bias
    if (norm := layer.vector(f"{kind}_norm")) is not None:
        heads = rms_norm(heads, norm, config.rms_norm_eps)
    return heads if kind == "v" else apply_rope(heads, rows.position, inv_freq(config))


def mlp(layer: Layer, hidden: Hidden, rows: Rows) -> Hidden:
    """SwiGLU, without the residual."""
    with jax.named_scope("mlp"):
        normed, stacks = layer.norm("mlp_norm", hidden), layer.stacks
        gated = layer.decoder.ops.gated_linear(normed, stacks["w_gate"], stacks["w_up"], layer.number, rows)
        (out,) = layer.linear(gated, "w_down", rows=rows)
    return out


def decoder_layer(layer: Layer, store: Store, hidden: Hidden, rows: Rows, tables: PageTables) -> tuple[Store, Hidden]:
    """One layer for some rows: their K and V go into the store, then they attend to all that is in it."""
    ops = layer.decoder.ops
    with jax.named_scope("attention"):
        q, keys, values = _heads(layer, hidden, rows, "qkv")
        store = ops.write_kv(store, layer.number, keys, values, rows, tables)
        attended = ops.attention(q, store, layer.number, rows, tables)
        (out,) = layer.linear(attended.reshape(len(attended), -1), "wo", rows=rows)
    hidden = hidden + out
    return store, hidden + mlp(layer, hidden, rows)
