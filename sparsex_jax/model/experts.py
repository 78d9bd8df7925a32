"""Mixtures of experts: each row goes through a few of many small MLPs, which a router chooses for it.

Rows are laid out in tiles, each of one expert's rows, and the tiles multiplied with their experts' matrices. So the
weights of experts that no row has chosen are not read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_jax.config import ModelConfig
from sparsex_kernels import api as kernels
from sparsex_kernels.arguments import Groups
from sparsex_kernels.backend import Backend
from sparsex_kernels.grouped_linear import Tiles, make_tiles, rows_a_tile


class Routing(NamedTuple):
    """The experts of each row, and what their results are multiplied with before they are added."""

    experts: Int[Array, "rows chosen"]
    weights: Float[Array, "rows chosen"]


class ExpertStacks(NamedTuple):
    """The experts of all layers, or a device's share of them."""

    gate: Groups  # [layers, experts, hidden, width]
    up: Groups
    down: Groups  # [layers, experts, width, hidden]


def route(hidden: Float[Array, "rows hidden"], router: Float[Array, "hidden experts"], config: ModelConfig) -> Routing:
    """The experts of highest probability for each row. Products are summed, and probabilities taken, in float32."""
    assert config.experts_per_token is not None
    logits = jnp.dot(hidden, router, preferred_element_type=jnp.float32)
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits), config.experts_per_token)
    if config.normalise_top_k:
        weights /= weights.sum(axis=1, keepdims=True)
    return Routing(experts, weights)


def run_experts(
    hidden: Float[Array, "rows hidden"],
    routing: Routing,
    stacks: ExpertStacks,
    layer: Int[Array, ""] | int,
    count: Int[Array, ""],
    *,
    first: Int[Array, ""] | int,
    num_experts: int,
    backend: Backend,
) -> Float[Array, "rows hidden"]:
    """What these experts of one layer add to rows; nothing for experts that are not among them.

    Args:
      count: how many rows are wanted. The others go through no expert, and get zeros.
      first: the number of the first of these experts.
      num_experts: of the model.
    """
    tiles = _tiles(routing, count, first, stacks.gate.shape[1], num_experts)
    x = hidden[tiles.members // routing.experts.shape[1]]
    gated = kernels.gated_grouped_linear(x, stacks.gate, stacks.up, layer, tiles.groups, backend=backend)
    out = kernels.grouped_linear(gated, stacks.down, layer, tiles.groups, backend=backend)
    return _sum(out, tiles, routing.weights).astype(hidden.dtype)


def _tiles(routing: Routing, count: Int[Array, ""], first: Int[Array, ""] | int, local: int, num_experts: int) -> Tiles:
    """Tiles whose members are pairs of a row and an expert: member m is row `m // chosen`."""
    rows, chosen = routing.experts.shape
    wanted = jnp.arange(rows)[:, None] < count
    group = jnp.where(wanted, routing.experts - first, -1)
    return make_tiles(group.reshape(-1), local, rows_a_tile(rows * chosen, num_experts))


def _sum(
    out: Float[Array, "places hidden"], tiles: Tiles, weights: Float[Array, "rows chosen"]
) -> Float[Array, "rows hidden"]:
    """The weighted sum of each row's results, in float32. Places of nobody, and weights of padding, may be NaN."""
    places = tiles.places.reshape(weights.shape)
    weighted = out[places].astype(jnp.float32) * weights[..., None]
    return jnp.where(places[..., None] >= 0, weighted, 0).sum(axis=1)
