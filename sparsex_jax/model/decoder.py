"""The decoder as pure functions over its parameters. The configuration makes it Llama, Mistral, Qwen2 or
Qwen3, or with experts Mixtral, Qwen3-MoE or OLMoE.

Prefill and decode share `decoder_layer`: it takes any rows, writes their K and V into the store and attends over the
store. The weights of all layers stay stacked: `Ops.linear` reads one layer's matrices from the stack without a copy.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_jax.config import ModelConfig
from sparsex_jax.model.experts import ExpertStacks, route
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.weights import Layers, Params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.layout import PageTables, Store
from sparsex_kernels.rope import apply_rope

Hidden = Float[Array, "rows hidden"]
Heads = Float[Array, "rows heads head_dim"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What is static about the model: a static argument of every jitted step."""

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
    """The embeddings of token ids: the input of layer 0."""
    return params.embed[tokens]


def logits(params: Params, config: ModelConfig, hidden: Hidden) -> Float[Array, "rows vocab"]:
    """Next-token logits in float32."""
    normed = rms_norm(hidden, params.final_norm, config.rms_norm_eps)
    head = params.embed.T if params.lm_head is None else params.lm_head
    return jnp.einsum("rh,hv->rv", normed, head, preferred_element_type=jnp.float32)


class OneLayer(NamedTuple):
    """One layer of the decoder. `layers` holds the weights of all layers, of which this one is `number`."""

    decoder: Decoder
    layers: Layers
    number: Int[Array, ""]

    def own(self, stacked: Float[Array, "layers *rest"]) -> Float[Array, "*rest"]:
        """This layer's part of a small stacked weight: a copy."""
        return jax.lax.dynamic_index_in_dim(stacked, self.number, keepdims=False)

    def norm(self, scale: Float[Array, "layers dim"], x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return rms_norm(x, self.own(scale), self.decoder.config.rms_norm_eps)

    def linear(
        self, x: Float[Array, "rows inputs"], *weights: Array, rows: Rows, over_inputs: bool = False
    ) -> tuple[Float[Array, "rows _"], ...]:
        """Products of the rows with this layer's matrices, heads side by side. Products of padding are undefined.

        Args:
          weights: stacked weights whose axes between the layers and the outputs multiply to `inputs`.
          over_inputs: a mesh divides the matrices by their inputs, not by their outputs.
        """
        matrices = [weight.reshape(len(weight), x.shape[1], -1) for weight in weights]
        return self.decoder.ops.linear(x, matrices, self.number, rows, over_inputs=over_inputs)


class Projection(NamedTuple):
    """Stacked weights that make queries, keys or values. The rotation applies to queries and keys.

    `norm` is that of each head; `wide_norm` is that of all heads together.
    """

    weight: Float[Array, "layers hidden heads head_dim"]
    bias: Float[Array, "layers heads head_dim"] | None
    norm: Float[Array, "layers head_dim"] | None
    wide_norm: Float[Array, "layers heads head_dim"] | None
    rotated: bool


def _query(layers: Layers) -> Projection:
    return Projection(layers.wq, layers.bq, layers.q_norm, layers.wide_q_norm, rotated=True)


def _key(layers: Layers) -> Projection:
    return Projection(layers.wk, layers.bk, layers.k_norm, layers.wide_k_norm, rotated=True)


def _value(layers: Layers) -> Projection:
    return Projection(layers.wv, layers.bv, norm=None, wide_norm=None, rotated=False)


def queries(layer: OneLayer, hidden: Hidden, rows: Rows) -> Heads:
    """Rotated queries of rows from the layer's input."""
    with jax.named_scope("queries"):
        (q,) = _project(layer, hidden, rows, _query(layer.layers))
    return q


def keys_values(layer: OneLayer, hidden: Hidden, rows: Rows) -> tuple[Heads, Heads]:
    """Rotated keys, and values, of rows from the layer's input."""
    with jax.named_scope("keys_values"):
        keys, values = _project(layer, hidden, rows, _key(layer.layers), _value(layer.layers))
    return keys, values


def _project(layer: OneLayer, hidden: Hidden, rows: Rows, *projections: Projection) -> list[Heads]:
    """The heads of each projection. One operation makes all products, because they read the same rows."""
    normed = layer.norm(layer.layers.attn_norm, hidden)
    products = layer.linear(normed, *(projection.weight for projection in projections), rows=rows)
    return [_finish(layer, *pair, rows) for pair in zip(projections, products, strict=True)]


def _finish(layer: OneLayer, projection: Projection, product: Float[Array, "rows width"], rows: Rows) -> Heads:
    """From a product to heads: add the bias and apply the norms where the model has them, then rotate."""
    config = layer.decoder.config
    if projection.wide_norm is not None:
        product = layer.norm(projection.wide_norm.reshape(config.num_layers, -1), product)
    heads = product.reshape(len(product), -1, config.head_dim)
    if projection.bias is not None:
        heads += layer.own(projection.bias)
    if projection.norm is not None:
        heads = layer.norm(projection.norm, heads)
    return apply_rope(heads, rows.position, inv_freq(config)) if projection.rotated else heads


def mlp(layer: OneLayer, hidden: Hidden, rows: Rows) -> Hidden:
    """SwiGLU, of one MLP or of the experts of each row, without the residual."""
    with jax.named_scope("mlp"):
        normed, router = layer.norm(layer.layers.mlp_norm, hidden), layer.layers.router
        return _one_mlp(layer, normed, rows) if router is None else _experts(layer, router, normed, rows)


def _one_mlp(layer: OneLayer, normed: Hidden, rows: Rows) -> Hidden:
    layers = layer.layers
    gated = layer.decoder.ops.gated_linear(normed, layers.w_gate, layers.w_up, layer.number, rows)
    (out,) = layer.linear(gated, layers.w_down, rows=rows, over_inputs=True)
    return out


def _experts(layer: OneLayer, router: Float[Array, "layers hidden experts"], normed: Hidden, rows: Rows) -> Hidden:
    layers = layer.layers
    routing = route(normed, layer.own(router), layer.decoder.config)
    stacks = ExpertStacks(layers.expert_gate, layers.expert_up, layers.expert_down)
    return layer.decoder.ops.experts(normed, routing, stacks, layer.number, rows)


def decoder_layer(
    layer: OneLayer, store: Store, hidden: Hidden, rows: Rows, tables: PageTables
) -> tuple[Store, Hidden]:
    """Run one layer for some rows: write their K and V into the store, then attend to all that is in it."""
    ops, layers = layer.decoder.ops, layer.layers
    with jax.named_scope("attention"):
        q, keys, values = _project(layer, hidden, rows, _query(layers), _key(layers), _value(layers))
        store = ops.write_kv(store, layer.number, keys, values, rows, tables)
        attended = ops.attention(q, store, layer.number, rows, tables)
        (out,) = layer.linear(attended.reshape(len(attended), -1), layers.wo, rows=rows, over_inputs=True)
    hidden = hidden + out
    return store, hidden + mlp(layer, hidden, rows)
