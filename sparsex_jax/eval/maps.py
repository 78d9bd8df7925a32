"""Maps of one prompt, by layer and position: key mass and KV deviation (the SparseX paper's Figures 5 and 6)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt8

from sparsex_jax.engine import Engine
from sparsex_jax.eval.oracle import prompt_kv
from sparsex_jax.model import decoder as model
from sparsex_jax.model.decoder import Decoder, Hidden
from sparsex_jax.model.store import AnyStore
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.methods import Full, Naive
from sparsex_jax.reuse.plan import Rows
from sparsex_jax.reuse.planner import page_tables
from sparsex_jax.reuse.prompt import TokenKind
from sparsex_kernels.layout import PageTables


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """The maps of one prompt.

    Attributes:
      kind: a `TokenKind` for each token.
      key_mass: the share of the fresh queries' attention that each token gets under full recompute. It sums to 1 in
        each layer.
      key_deviation, value_deviation: the distance of the K (V) that method `naive` copies from that of full recompute,
        divided by the norm of the latter.
    """

    kind: UInt8[np.ndarray, "tokens"]
    key_mass: Float[np.ndarray, "layers tokens"]
    key_deviation: Float[np.ndarray, "layers tokens"]
    value_deviation: Float[np.ndarray, "layers tokens"]


def make_maps(engine: Engine, prompt: Int[np.ndarray, "tokens"], namespace: str) -> Maps:
    """Measure the maps of a prompt whose segments are stored in the namespace. No KV computed here is kept."""
    naive = Naive(only_if_faster=False)
    true, pasted = (prompt_kv(engine, prompt, method, namespace) for method in (Full(), naive))
    norms, distances = (np.linalg.norm(kv, axis=(3, 4)) for kv in (true, pasted - true))  # [layers, K or V, tokens]
    deviation = distances / norms
    kind = engine.prefill(prompt, reuse=naive, namespace=namespace, keep=False).report.kind
    return Maps(kind, key_mass(engine, prompt, kind == TokenKind.FRESH, namespace), deviation[:, 0], deviation[:, 1])


def key_mass(
    engine: Engine, prompt: Int[np.ndarray, "tokens"], fresh: Bool[np.ndarray, "tokens"], namespace: str
) -> Float[np.ndarray, "layers tokens"]:
    """`Maps.key_mass`: each layer's key mass under full recompute. `fresh` marks the tokens whose queries count."""
    runner, fresh_at = engine.runner, jnp.asarray(np.flatnonzero(fresh))
    rows = _rows(jnp.asarray(prompt), jnp.arange(len(prompt)))
    masses = []
    with engine.prefilled(prompt, reuse=Full(), namespace=namespace) as sequence:
        tables = page_tables([sequence.pages], 1, len(sequence.pages))
        hidden = model.embed(runner.params, runner.model, rows.token)
        for layer in range(engine.model.num_layers):
            runner.store, hidden, mass = _layer(
                runner.params, runner.store, hidden, jnp.int32(layer), rows, fresh_at, tables, decoder=runner.decoder
            )
            masses.append(np.asarray(mass)[: len(prompt)])
    total = len(fresh_at) * engine.model.num_q_heads
    return np.stack(masses) / total


@functools.partial(jax.jit, static_argnames="decoder", donate_argnames="store")
def _layer(
    params: Params,
    store: AnyStore,
    hidden: Hidden,
    number: Int[Array, ""],
    rows: Rows,
    fresh_at: Int[Array, "fresh"],
    tables: PageTables,
    *,
    decoder: Decoder,
) -> tuple[AnyStore, Hidden, Float[Array, "context"]]:
    """Run one layer on all tokens, and sum the attention of all fresh queries and heads to each token."""
    layer = model.OneLayer.of(decoder, params, number)
    fresh = _rows(rows.token[fresh_at], fresh_at)
    q = model.queries(layer, hidden[fresh_at], fresh)
    store, hidden = model.decoder_layer(layer, store, hidden, rows, tables)
    return store, hidden, decoder.ops.key_mass(q, store, number, fresh, tables)[0]


def _rows(tokens: Int[Array, "rows"], positions: Int[Array, "rows"]) -> Rows:
    return Rows(tokens, positions, jnp.zeros_like(positions), jnp.arange(len(positions)))
