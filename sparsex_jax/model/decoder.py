"""The decoder as pure functions over its parameters. The configuration makes it Llama, Mistral, Qwen, Phi or Gemma, or
with experts Mixtral, Qwen3-MoE or OLMoE.

Prefill and decode share `decoder_layer`: it takes any rows, writes their K and V into the store and attends over the
store. The weights of all layers stay stacked: `Ops.linear` reads one layer's matrices from the stack without a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from sparsex_jax.config import ModelConfig
from sparsex_jax.model.experts import ExpertStacks, route
from sparsex_jax.model.low_rank import LowRank, ValuesApart
from sparsex_jax.model.ops import DeviceParts, NewKV, Ops, low_rank_of
from sparsex_jax.model.store import AnyStore, SharedStore
from sparsex_jax.model.weights import Layers, Params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.arguments import Matrices
from sparsex_kernels.layout import Frequencies, PageTables, Window
from sparsex_kernels.mailboxes import Mailboxes
from sparsex_kernels.norm import rms_norm
from sparsex_kernels.product_parts import one_part, sum_parts
from sparsex_kernels.quantised import Mixed, Quantised, dequantise, lookup
from sparsex_kernels.rope import apply_rope

Hidden = Float[Array, "rows hidden"]
Heads = Float[Array, "rows heads head_dim"]

type AnyParts = Any  # ProductParts or PartsToExchange; where sums over a mesh come later, DeviceParts

_ALL_KEYS = 2**31 - 1
_IN_FLOAT32: Any = {"preferred_element_type": jnp.float32}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What is static about the model: a static argument of every jitted step."""

    config: ModelConfig
    ops: Ops


def inv_freq(config: ModelConfig) -> Frequencies:
    """Rotary frequencies, radians a position, float32: of each layer where layers differ. Pairs that are not rotated
    have the frequency 0."""
    whole = _frequencies(config, config.rope_theta)
    if config.rope_factors is not None:
        whole = whole / np.asarray(config.rope_factors, np.float32)
    unrotated = (0, config.head_dim // 2 - config.num_rotated_pairs)
    if config.rope_local_theta is None:
        return jnp.asarray(np.pad(whole, unrotated))
    is_local = np.array([window is not None for window in config.windows])
    by_layer = np.where(is_local[:, None], _frequencies(config, config.rope_local_theta), whole)
    return jnp.asarray(np.pad(by_layer, ((0, 0), unrotated)))


def _frequencies(config: ModelConfig, theta: float) -> Float[np.ndarray, "pairs"]:
    """By NumPy, so that programs have them as constants and compute them in no layer. Rounded once."""
    dim = 2 * config.num_rotated_pairs
    return (1.0 / theta ** (np.arange(0, dim, 2) / dim)).astype(np.float32)


def query_scale(config: ModelConfig) -> Float[np.ndarray, "head_dim"] | None:
    """What multiplies queries beside the kernels' 1 / sqrt(head_dim), by dimension; None: nothing.

    transformers multiplies the rotated part of queries and of keys with `rope_attention_factor`.
    """
    whole = (config.head_dim / (config.query_scalar or config.head_dim)) ** 0.5
    rotated = np.arange(config.head_dim) % (config.head_dim // 2) < config.num_rotated_pairs
    scale = whole * np.where(rotated, config.rope_attention_factor**2, 1.0)
    return None if (scale == 1).all() else scale.astype(np.float32)


def embed(params: Params, config: ModelConfig, tokens: Int[Array, "rows"]) -> Hidden:
    """The embeddings of token ids: the input of layer 0. Each device of a mesh may have a part of each, until they are
    replicated."""
    table = params.embed
    hidden = lookup(table, tokens) if isinstance(table, Quantised) else table[tokens]
    return hidden if config.embedding_scale is None else hidden * jnp.asarray(config.embedding_scale, hidden.dtype)


def logits(params: Params, config: ModelConfig, hidden: Hidden) -> Float[Array, "rows vocab"]:
    """Next-token logits in float32."""
    normed = rms_norm(hidden, params.final_norm, config.rms_norm_eps)
    raw, cap = jnp.einsum("rh,hv->rv", normed, _head(params, hidden.dtype), **_IN_FLOAT32), config.final_softcap
    return raw if cap is None else jnp.tanh(raw / cap) * cap


def _head(params: Params, dtype: Any) -> Float[Array, "hidden vocab"]:
    """The matrix that makes logits, dequantised."""
    if params.lm_head is None:
        return dequantise(params.embed, dtype) if isinstance(params.embed, Quantised) else params.embed.T
    return dequantise(params.lm_head, dtype) if isinstance(params.lm_head, Quantised) else params.lm_head


class OneLayer(NamedTuple):
    """One layer of the decoder. `layers` holds the weights of all layers, of which this one is `number`, and `adapters`
    what is added to them, by the weights' names. `values_apart` is what attention adds to values, and by `mailboxes` a
    mesh sums few rows."""

    decoder: Decoder
    layers: Layers
    number: Int[Array, ""]
    adapters: dict[str, LowRank] | None = None
    values_apart: ValuesApart | None = None
    mailboxes: Mailboxes | None = None

    @classmethod
    def of(cls, decoder: Decoder, params: Params, number: Int[Array, ""]) -> OneLayer:
        return cls(decoder, params.layers, number, params.adapters, params.values_apart, params.mailboxes)

    @property
    def leaving_parts(self) -> OneLayer:
        """The same, whose products over inputs stay in the parts of the devices."""
        return self._replace(decoder=dataclasses.replace(self.decoder, ops=self.decoder.ops.later))

    def own(self, stacked: Float[Array, "layers *rest"]) -> Float[Array, "*rest"]:
        """This layer's part of a small stacked weight: a copy."""
        return jax.lax.dynamic_index_in_dim(stacked, self.number, keepdims=False)

    @property
    def window(self) -> Window | None:
        """How many keys a row sees in this layer. The largest int32 where it sees all, and another layer does not."""
        windows = self.decoder.config.layer_windows
        if windows is None:
            return None
        return jnp.array([_ALL_KEYS if size is None else size for size in windows], jnp.int32)[self.number]

    @property
    def inv_freq(self) -> Float[Array, "half"]:
        frequencies = inv_freq(self.decoder.config)
        return frequencies if frequencies.ndim == 1 else self.own(frequencies)

    def norm(self, scale: Float[Array, "layers dim"], x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return rms_norm(x, self.own(scale), self.decoder.config.rms_norm_eps)

    def add_norm(
        self, product: AnyParts, hidden: Hidden, scale: Float[Array, "layers dim"], rows: Rows, *, ahead: int = 0
    ) -> tuple[Hidden, Hidden]:
        """A product added to the residual, and the norm of the sum: this layer's, or that of a layer `ahead`."""
        number = jnp.minimum(self.number + ahead, len(scale) - 1)
        return self.decoder.ops.add_norm(product, hidden, scale, number, rows, self.decoder.config.rms_norm_eps)

    def linear(
        self,
        x: Float[Array, "rows inputs"],
        *names: str,
        rows: Rows,
        over_inputs: bool = False,
        apart: ValuesApart | None = None,
    ) -> tuple[Float[Array, "... rows _"], ...]:
        """Products of the rows with this layer's matrices, heads side by side, each with what the row's adapter adds.
        Products of padding are undefined.

        Args:
          names: of weights whose axes between the layers and the outputs multiply to `inputs`. Quantised ones are
            matrices already.
          over_inputs: a mesh divides the matrices by their inputs, not by their outputs.
          apart: their Y comes behind the products.
        """
        low_rank, about = self.added(*names, rows=rows), (self.matrices(x, names), self.number, rows)
        return self.decoder.ops.linear(x, *about, over_inputs=over_inputs, low_rank=low_rank, apart=apart)

    def linear_parts(self, x: Float[Array, "rows inputs"], name: str, rows: Rows) -> AnyParts:
        """The product of `linear`, over inputs that a mesh divides, for an operation that adds its parts."""
        if self.added(name, rows=rows):
            return self.as_parts(self.linear(x, name, rows=rows, over_inputs=True)[0])
        (matrix,) = self.matrices(x, [name])
        return self.decoder.ops.linear_parts(x, matrix, self.number, rows, self.mailboxes)

    def as_parts(self, product: Float[Array, "rows width"] | DeviceParts) -> AnyParts:
        """A product over inputs as parts, which it is already where sums over the mesh come later."""
        return product if self.decoder.ops.sums_later else one_part(product)

    def matrices(self, x: Float[Array, "rows inputs"], names: Sequence[str]) -> list[Matrices]:
        """The stacked weights of these names as matrices for the rows."""
        weights = [getattr(self.layers, name) for name in names]
        return [
            weight if isinstance(weight, Quantised | Mixed) else weight.reshape(len(weight), x.shape[1], -1)
            for weight in weights
        ]

    def added(self, *names: str, rows: Rows) -> list[LowRank | None]:
        """What adapters add to products of these rows. Empty where there are none, or the rows are the base model's."""
        return [self.adapters.get(name) for name in names] if self.adapters and rows.adapter is not None else []


class Projection(NamedTuple):
    """What makes queries, keys or values. Queries and keys are rotated, and queries may be scaled.

    `weight` is the name of the stacked weights; `norm` is that of each head; `wide_norm` is that of all heads together.
    """

    weight: str
    bias: Float[Array, "layers heads head_dim"] | None
    norm: Float[Array, "layers head_dim"] | None
    wide_norm: Float[Array, "layers heads head_dim"] | None
    rotated: bool
    scale: Float[np.ndarray, "head_dim"] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the product is the heads, but for the rotation."""
        return all(each is None for each in (self.bias, self.norm, self.wide_norm, self.scale))


def _query(layer: OneLayer) -> Projection:
    layers, scale = layer.layers, query_scale(layer.decoder.config)
    return Projection("wq", layers.bq, layers.q_norm, layers.wide_q_norm, rotated=True, scale=scale)


def _key(layers: Layers) -> Projection:
    return Projection("wk", layers.bk, layers.k_norm, layers.wide_k_norm, rotated=True)


def _value(layers: Layers) -> Projection:
    return Projection("wv", layers.bv, norm=None, wide_norm=None, rotated=False)


def _projections(layer: OneLayer) -> tuple[Projection, Projection, Projection]:
    return _query(layer), _key(layer.layers), _value(layer.layers)


def _write(layer: OneLayer, store: AnyStore, normed: Hidden, rows: Rows, tables: PageTables) -> tuple[Heads, AnyStore]:
    """The rows' rotated queries, and the store with their K and V."""
    ops, projections = layer.decoder.ops, _projections(layer)
    names = [each.weight for each in projections]
    plain = all(each.is_plain for each in projections) and not layer.added(*names, rows=rows) and rows.unseen is None
    q_heads = layer.decoder.config.num_q_heads
    if plain and not isinstance(store, SharedStore) and ops.fuses_rotation(normed, q_heads, store):
        matrices = layer.matrices(normed, names)
        return ops.project_and_write(normed, matrices, store, layer.number, rows, tables, layer.inv_freq)
    (q, keys, values), y = _project(layer, normed, rows, *projections, apart=layer.values_apart)
    return q, ops.write_kv(store, layer.number, NewKV(keys, values, y), rows, tables)


def queries(layer: OneLayer, hidden: Hidden, rows: Rows) -> Heads:
    """Rotated queries of rows from the layer's input."""
    with jax.named_scope("queries"):
        ((q,), _) = _project(layer, layer.norm(layer.layers.attn_norm, hidden), rows, _query(layer))
    return q


def keys_values(layer: OneLayer, hidden: Hidden, rows: Rows) -> NewKV:
    """Rotated keys, and values, of rows from the layer's input."""
    with jax.named_scope("keys_values"):
        normed = layer.norm(layer.layers.attn_norm, hidden)
        projections, apart = (_key(layer.layers), _value(layer.layers)), layer.values_apart
        (keys, values), low_rank = _project(layer, normed, rows, *projections, apart=apart)
        return NewKV(keys, values, low_rank)


def _project(
    layer: OneLayer, normed: Hidden, rows: Rows, *projections: Projection, apart: ValuesApart | None = None
) -> tuple[list[Heads], Float[Array, "rows ranks"] | None]:
    """The heads of each projection, and Y of `apart`. One operation makes all, because they read the same rows."""
    names = (projection.weight for projection in projections)
    products = layer.linear(normed, *names, rows=rows, apart=apart)
    heads = [_finish(layer, *pair, rows) for pair in zip(projections, products, strict=False)]
    return heads, None if apart is None else products[-1]


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
    if not projection.rotated:
        return heads
    scaled = heads if projection.scale is None else heads * projection.scale  # in float32, to be rounded once
    return apply_rope(scaled, rows.position, layer.inv_freq).astype(heads.dtype)


def mlp(layer: OneLayer, hidden: Hidden, rows: Rows) -> Hidden:
    """The gated MLP or the experts of each row, without the residual."""
    parts = mlp_product(layer, layer.norm(layer.layers.mlp_norm, hidden), rows)
    return mlp_sum(layer, parts, hidden.dtype)


def mlp_product(layer: OneLayer, normed: Hidden, rows: Rows) -> AnyParts:
    """The last product of the MLP or the experts, of normalised rows."""
    router = layer.layers.router
    with jax.named_scope("mlp"):
        if router is None:
            gated, scale = _gated(layer, normed, rows), layer.layers.post_mlp_norm
            return _last_product(layer, gated, "w_down", scale, rows)
        return layer.as_parts(_experts(layer, router, normed, rows))


def mlp_addend(layer: OneLayer, parts: AnyParts, dtype: Any) -> AnyParts:
    """What the MLP adds to the residual."""
    return _normed_parts(layer, layer.layers.post_mlp_norm, parts, dtype)


def mlp_sum(layer: OneLayer, parts: AnyParts, dtype: Any) -> Hidden:
    """The same in one part."""
    return sum_parts(mlp_addend(layer, parts, dtype), dtype)


def attention_addend(layer: OneLayer, parts: AnyParts, dtype: Any) -> AnyParts:
    """What attention adds to the residual."""
    return _normed_parts(layer, layer.layers.post_attn_norm, parts, dtype)


def _normed_parts(layer: OneLayer, scale: Float[Array, "layers dim"] | None, parts: AnyParts, dtype: Any) -> AnyParts:
    """A sum normalised, in models with norms behind attention and MLP; without, the parts."""
    return parts if scale is None else one_part(layer.norm(scale, sum_parts(parts, dtype)))


def _last_product(
    layer: OneLayer, x: Float[Array, "rows inputs"], name: str, scale: Float[Array, "layers dim"] | None, rows: Rows
) -> AnyParts:
    """The last product of attention or of the MLP. Its parts are left for a kernel that adds the residual; a norm
    behind it wants their sum."""
    if scale is None or layer.decoder.ops.sums_later:
        return layer.linear_parts(x, name, rows)
    (product,) = layer.linear(x, name, rows=rows, over_inputs=True)
    return one_part(product)


def _gated(layer: OneLayer, normed: Hidden, rows: Rows) -> Float[Array, "rows width"]:
    """The gated product, what adapters add to both of its factors in it."""
    gates = layer.layers.w_gate, layer.layers.w_up, layer.number, rows
    low_rank = layer.added("w_gate", "w_up", rows=rows)
    activation = layer.decoder.config.activation
    return layer.decoder.ops.gated_linear(normed, *gates, activation=activation, low_rank=low_rank)


def _experts(
    layer: OneLayer, router: Float[Array, "layers hidden experts"], normed: Hidden, rows: Rows
) -> Hidden | DeviceParts:
    layers = layer.layers
    routing = route(normed, layer.own(router), layer.decoder.config)
    stacks = ExpertStacks(layers.expert_gate, layers.expert_up, layers.expert_down)
    return layer.decoder.ops.experts(normed, routing, stacks, layer.number, rows)


class Stream(NamedTuple):
    """The input of a layer.

    Attributes:
      hidden: the residual.
      normed: the same, normalised for the layer's attention.
    """

    hidden: Hidden
    normed: Hidden


def stream_of(layer: OneLayer, hidden: Hidden) -> Stream:
    """The input of this layer."""
    return Stream(hidden, layer.norm(layer.layers.attn_norm, hidden))


def decoder_layer(
    layer: OneLayer, store: AnyStore, hidden: Hidden, rows: Rows, tables: PageTables
) -> tuple[AnyStore, Hidden]:
    """Run one layer for some rows: write their K and V into the store, then attend to all that is in it."""
    store, stream = chained_layer(layer, store, stream_of(layer, hidden), rows, tables)
    return store, stream.hidden


def chained_layer(
    layer: OneLayer, store: AnyStore, stream: Stream, rows: Rows, tables: PageTables
) -> tuple[AnyStore, Stream]:
    """`decoder_layer`, and the norm of the layer after it: a kernel that adds the residual of up to 2048 rows does it,
    too. What is normalised behind the last layer has no use."""
    store, hidden, out = _run_layer(layer, store, stream, rows, tables)
    return store, Stream(*layer.add_norm(out, hidden, layer.layers.attn_norm, rows, ahead=1))


def _run_layer(
    layer: OneLayer, store: AnyStore, stream: Stream, rows: Rows, tables: PageTables
) -> tuple[AnyStore, Hidden, AnyParts]:
    """The store, the residual behind attention, and what the MLP adds to it."""
    dtype = stream.hidden.dtype
    store, out = attention_product(layer, store, stream.normed, rows, tables)
    added = attention_addend(layer, out, dtype)
    hidden, normed = layer.add_norm(added, stream.hidden, layer.layers.mlp_norm, rows)
    return store, hidden, mlp_addend(layer, mlp_product(layer, normed, rows), dtype)


def attention_product(
    layer: OneLayer, store: AnyStore, normed: Hidden, rows: Rows, tables: PageTables
) -> tuple[AnyStore, AnyParts]:
    """The store with the K and V of normalised rows, and the last product of their attention."""
    ops = layer.decoder.ops
    with jax.named_scope("attention"):
        q, store = _write(layer, store, normed, rows, tables)
        low_rank = low_rank_of(store, layer.values_apart, rows, len(tables))
        attended = ops.attention(q, store, layer.number, rows, tables, layer.window, low_rank)
        heads = attended.reshape(len(attended), -1)
        return store, _last_product(layer, heads, "wo", layer.layers.post_attn_norm, rows)
