"""What agents that differ by a LoRA can share of their keys and values, and what that does to their answers.

Each role of `adapter_roles` is an adapter on queries and values. With X a layer's normed input and `s = alpha / rank`,
a role j computes the values `X W_v + s (X A_j) B_j`. The schemes of LRAgent (2602.01053) and PReCache, and ours, differ
in what a role whose turn it is reads of the tokens before its turn:

    isolated       keys and values that it computed itself, for all tokens
    full_shared    keys and values of whoever wrote
    base_shared    keys and X W_v of whoever wrote, and X A_j from its own hidden states over these
    pre_lr         keys, X W_v, and X A_k for all roles k, with the writer's X
    rebase         the same with X of a run without adapters, but its own X A_j for tokens that it wrote itself
    refresh        as pre_lr, but some tokens are computed again by itself, in a copy: those that its new tokens look at

Everything here is dense: a pass computes all tokens, and masks say which of them are read and which are kept. So it
measures answers, never speed. The forward pass is written out, independent of the engine.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from adapter_roles import ROLES, Trajectories
from flax import struct

from sparsex_jax import ModelConfig
from sparsex_jax.model import decoder as model
from sparsex_jax.model.weights import Layers, Params
from sparsex_kernels.rope import apply_rope

ALPHA, RANK = 16, 8
POWERS = (1, 4)  # of the attention that is summed to `Pass.mass`
NEUTRAL = -1  # the role of a run without adapters


@struct.dataclass
class Adapters:
    """The adapters of all roles, stacked over layers and roles. `v_a` has one role's if they share it."""

    q_a: jax.Array  # [layers, roles, hidden, rank]
    q_b: jax.Array  # [layers, roles, rank, heads * head_dim]
    v_a: jax.Array  # [layers, roles or 1, hidden, rank]
    v_b: jax.Array  # [layers, roles, rank, kv_heads * head_dim]


@struct.dataclass
class Written:
    """What is stored of each token in each layer."""

    keys: jax.Array  # [layers, batch, length, kv_heads, head_dim], rotated
    values: jax.Array  # as keys: without the adapter's part, or with it if `low` is zero
    low: jax.Array  # [layers, batch, length, roles, rank]: X A_k of each role


@struct.dataclass
class Pass:
    """What a forward pass computes."""

    hidden: jax.Array  # [layers, batch, length, hidden]
    written: Written
    mass: jax.Array  # [powers, batch, length]: powers 1 and 4 of the attention of the asking rows, summed


@struct.dataclass
class Reads:
    """Masks `[batch, length]`: tokens whose own keys and base values, or own X A_j, are read, not the store's."""

    base: jax.Array
    low: jax.Array


def init_adapters(config: ModelConfig, seed: int, shared_a: bool = False) -> Adapters:
    """Random A as PEFT draws it, uniform in +-1 / sqrt(hidden), and B of zeros: adapters that change nothing."""
    layers, roles, hidden = config.num_layers, len(ROLES), config.hidden_size
    key_q, key_v = jax.random.split(jax.random.key(seed))

    def uniform(key: jax.Array, roles: int) -> jax.Array:
        return jax.random.uniform(key, (layers, roles, hidden, RANK), minval=-1, maxval=1) * hidden**-0.5

    def zeros(heads: int) -> jax.Array:
        return jnp.zeros((layers, roles, RANK, heads * config.head_dim))

    v_a = uniform(key_v, 1 if shared_a else roles)
    return Adapters(uniform(key_q, roles), zeros(config.num_q_heads), v_a, zeros(config.num_kv_heads))


def expand(low: jax.Array, b: jax.Array, role: jax.Array) -> jax.Array:
    """s (X A) B of each sequence's role: `[batch, length, rank]` to `[batch, length, outputs]`. None for NEUTRAL."""
    out = jnp.einsum("blr,bro->blo", low, b[role]) * (ALPHA / RANK)
    return jnp.where((role == NEUTRAL)[:, None, None], 0, out).astype(low.dtype)


def of_role(low: jax.Array, role: jax.Array) -> jax.Array:
    """X A of each sequence's role: `[batch, length, roles, rank]` to `[batch, length, rank]`. Any for NEUTRAL."""
    return jnp.take_along_axis(low, jnp.maximum(role, 0)[:, None, None, None], axis=2)[:, :, 0]


def choose(mask: jax.Array, own: jax.Array, stored: jax.Array) -> jax.Array:
    """`own` where `[batch, length]` says so, else `stored`."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (own.ndim - 2)), own, stored)


def one_layer(
    config: ModelConfig,
    weights: Layers,
    adapters: Adapters,
    hidden: jax.Array,
    role: jax.Array,
    stored: tuple[Written, Reads] | None,
    asks: jax.Array | None,
) -> Pass:
    """One layer of `run`. Arrays that have an axis of layers there have none here."""
    shape = (*hidden.shape[:2], -1, config.head_dim)
    x = model.rms_norm(hidden, weights.attn_norm, config.rms_norm_eps)
    plain = [jnp.einsum("bld,dhe->blhe", x, weight) for weight in (weights.wq, weights.wk, weights.wv)]
    q_low = jnp.einsum("bld,bdr->blr", x, adapters.q_a[role])
    roles = len(adapters.v_b)
    low = jnp.einsum("bld,ndr->blnr", x, jnp.broadcast_to(adapters.v_a, (roles, *adapters.v_a.shape[1:])))
    position, frequencies = jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2]), model.inv_freq(config)
    query = plain[0] + expand(q_low, adapters.q_b, role).reshape(shape)
    query, key = (apply_rope(heads, position, frequencies) for heads in (query, plain[1]))
    written = Written(key, plain[2], low)
    read_keys, read_base, read_low = key, plain[2], of_role(low, role)
    if stored is not None:
        store, reads = stored
        read_keys, read_base = choose(reads.base, key, store.keys), choose(reads.base, plain[2], store.values)
        read_low = choose(reads.low, read_low, of_role(store.low, role))
    values = read_base + expand(read_low, adapters.v_b, role).reshape(shape)
    attended, mass = attention(query, read_keys, values, asks)
    hidden = hidden + jnp.einsum("blhe,hed->bld", attended, weights.wo)
    x = model.rms_norm(hidden, weights.mlp_norm, config.rms_norm_eps)
    hidden = hidden + (jax.nn.silu(x @ weights.w_gate) * (x @ weights.w_up)) @ weights.w_down
    return Pass(hidden, written, mass)


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, asks: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Causal attention of grouped heads, and `Pass.mass` of this layer if there are asking rows."""
    batch, length, heads, dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, dim)
    scores = jnp.einsum("blgie,bmge->bgilm", grouped, key, preferred_element_type=jnp.float32) * dim**-0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bgilm,bmge->blgie", shares.astype(value.dtype), value).reshape(batch, length, heads, dim)
    if asks is None:
        return out, None
    return out, jnp.stack([jnp.einsum("bgilm,bl->bm", shares**power, asks.astype(jnp.float32)) for power in POWERS])


def run(
    params: Params,
    config: ModelConfig,
    adapters: Adapters,
    tokens: jax.Array,
    role: jax.Array,
    stored: tuple[Written, Reads] | None = None,
    asks: jax.Array | None = None,
) -> Pass:
    """Run sequences `[batch, length]`, each under the adapter of its role.

    Args:
      role: `[batch]` int32: numbers of `ROLES`, or NEUTRAL.
      stored: keys and values of earlier passes, and which tokens read their own instead. None: all read their own.
      asks: `[batch, length]` bool: rows whose attention is summed to `Pass.mass`. None: there is no mass.
    """
    store, reads = stored if stored is not None else (None, None)

    def layer(hidden: jax.Array, of: tuple[Any, ...]) -> tuple[jax.Array, Pass]:
        weights, adapters, own = of
        found = one_layer(config, weights, adapters, hidden, role, None if own is None else (own, reads), asks)
        return found.hidden, found

    hidden = model.embed(params, config, tokens.reshape(-1)).reshape(*tokens.shape, -1)
    passed = jax.lax.scan(jax.checkpoint(layer), hidden, (params.layers, adapters, store))[1]
    return passed if asks is None else passed.replace(mass=passed.mass.sum(0))


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """The logits of hidden states `[..., hidden]`."""
    return model.logits(params, config, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:-1], -1)


# Schemes -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How roles share.

    Attributes:
      kind: a name of the module's list.
      share: refresh: of the tokens before a turn, as many are computed again.
      power: refresh: of the attention that is summed to choose them: 1, the key mass, or 4.
    """

    kind: str
    share: float = 0.0
    power: int = 1

    @property
    def name(self) -> str:
        power = "" if self.power == 1 else f", power {self.power}"
        return f"{self.kind}, {self.share:.0%}{power}" if self.share else self.kind


SCHEMES = (
    *(Scheme(kind) for kind in ("isolated", "full_shared", "base_shared", "pre_lr", "rebase")),
    *(Scheme("refresh", share) for share in (0.05, 0.1, 0.15)),
    *(Scheme("refresh", share, 4) for share in (0.05, 0.1, 0.15)),
)


@struct.dataclass
class Memory:
    """What is shared when a turn begins."""

    store: Written
    unseen: jax.Array  # [batch, length, roles] bool: tokens of which a role has no X A_k of its own


@struct.dataclass
class Turn:
    """One turn of each trajectory of a batch."""

    tokens: jax.Array  # [batch, length]
    role: jax.Array  # [batch]: whose turn it is
    new: jax.Array  # [batch, length] bool: tokens of this turn
    past: jax.Array  # [batch, length] bool: tokens of the turns before
    foreign: jax.Array  # [batch, length] bool: those of the past that other roles wrote
    asks: jax.Array  # [batch, length] bool: new tokens that are in the prompt, so not of the answer

    @classmethod
    def of(cls, batch: Trajectories, number: int) -> Turn:
        role, new = batch.roles[:, number], batch.turn == number
        past = (batch.turn >= 0) & (batch.turn < number)
        foreign = past & (batch.writer != role[:, None])
        return cls(*map(jnp.asarray, (batch.tokens, role, new, past, foreign, new & ~batch.answer)))


@dataclasses.dataclass(frozen=True)
class Team:
    """A model and the adapters of its roles."""

    params: Params
    config: ModelConfig
    adapters: Adapters

    def expected(self, scheme: Scheme, batch: Trajectories) -> np.ndarray:
        """The token that the role whose turn it is expects behind each token, `[batch, length]`, of given texts."""
        expected = jnp.zeros(batch.tokens.shape, jnp.int32)
        for turn, hidden in self.play(scheme, batch):
            expected = jnp.where(turn.new, best(self.params, self.config, hidden), expected)
        return np.asarray(expected)

    def play(self, scheme: Scheme, batch: Trajectories) -> Iterator[tuple[Turn, jax.Array]]:
        """Each turn with the last layer's output `[batch, length, hidden]`. Only that of new tokens means anything."""
        memory = self._nothing(batch)
        for number in range(batch.roles.shape[1]):
            turn = Turn.of(batch, number)
            reads = self._reads(scheme, turn, memory)
            found = self._run(turn, turn.role, memory, reads)
            yield turn, found.hidden[-1]
            memory = self._shared(scheme, turn, memory, reads, found.written)

    def _nothing(self, batch: Trajectories) -> Memory:
        config, (rows, length) = self.config, batch.tokens.shape
        heads = jnp.zeros((config.num_layers, rows, length, config.num_kv_heads, config.head_dim))
        low = jnp.zeros((config.num_layers, rows, length, len(ROLES), RANK))
        return Memory(Written(heads, heads, low), jnp.ones((rows, length, len(ROLES)), bool))

    def _run(self, turn: Turn, role: jax.Array, memory: Memory, reads: Reads, asks: jax.Array | None = None) -> Pass:
        return _run(self.params, self.config, self.adapters, turn.tokens, role, (memory.store, reads), asks)

    def _reads(self, scheme: Scheme, turn: Turn, memory: Memory) -> Reads:
        """What the role computes itself in this turn."""
        match scheme.kind:
            case "isolated":
                return Reads(turn.new | turn.past, turn.new | turn.past)
            case "base_shared":
                unseen = jnp.take_along_axis(memory.unseen, turn.role[:, None, None], axis=2)[..., 0]
                return Reads(turn.new, turn.new | (turn.past & unseen))
            case "refresh":
                own = turn.new | self._looked_at(scheme, turn, memory)
                return Reads(own, own)
        return Reads(turn.new, turn.new)

    def _looked_at(self, scheme: Scheme, turn: Turn, memory: Memory) -> jax.Array:
        """The foreign tokens with the most mass, `[batch, length]`: a share of all that stand before the turn."""
        found = self._run(turn, turn.role, memory, Reads(turn.new, turn.new), turn.asks)
        scores = jnp.where(turn.foreign, found.mass[POWERS.index(scheme.power)], -1.0)
        place = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)
        budget = jnp.ceil(scheme.share * turn.past.sum(axis=1, keepdims=True))
        return turn.foreign & (place < budget)

    def _shared(self, scheme: Scheme, turn: Turn, memory: Memory, reads: Reads, own: Written) -> Memory:
        """What is shared after the turn."""
        store, new, is_own = memory.store, turn.new, jax.nn.one_hot(turn.role, len(ROLES), dtype=bool)[:, None]
        match scheme.kind:
            case "isolated":
                return memory
            case "full_shared":
                return memory.replace(store=_update(store, self._with_adapter(own, turn.role), new))
            case "base_shared":
                mine = reads.low[..., None] & is_own
                low = jnp.where(mine[None, ..., None], own.low, store.low)
                return Memory(_update(store, own, new).replace(low=low), memory.unseen & ~mine)
            case "rebase":
                neutral = self._run(turn, jnp.full_like(turn.role, NEUTRAL), memory, Reads(new, new)).written
                low = jnp.where(is_own[None, ..., None], own.low, neutral.low)
                return memory.replace(store=_update(store, neutral.replace(low=low), new))
        return memory.replace(store=_update(store, own, new))

    def _with_adapter(self, own: Written, role: jax.Array) -> Written:
        """The values with the adapter's part, and nothing apart."""
        whole = own.values + parts(self.adapters, own, role)
        return own.replace(values=whole, low=jnp.zeros_like(own.low))


def parts(adapters: Adapters, written: Written, role: jax.Array) -> jax.Array:
    """What each sequence's adapter adds to the values of its tokens, of the shape of `Written.values`."""
    added = jax.vmap(lambda low, b: expand(of_role(low, role), b, role))(written.low, adapters.v_b)
    return added.reshape(written.values.shape)


def _update(store: Written, own: Written, mask: jax.Array) -> Written:
    """The store with what was computed of the tokens of the mask."""
    return jax.tree.map(lambda new, old: jnp.where(mask[None, :, :, None, None], new, old), own, store)


_run = jax.jit(run, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1)
def best(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """The likeliest next tokens, `[batch, length]` int32."""
    return logits(params, config, hidden).argmax(-1).astype(jnp.int32)


# Likeness ----------------------------------------------------------------------------------------------------


def likeness(team: Team, batch: Trajectories) -> dict[str, float]:
    """How alike the roles' keys and values of one text are: the mean over all tokens, layers and pairs of roles.

    Returns:
      The cosines of keys, base values, values and the adapters' parts, and the L1 norm of the adapters' parts as a
      share of that of the base values.
    """
    rows, real = len(batch.tokens), jnp.asarray(batch.turn >= 0)
    by_role: list[dict[str, jax.Array]] = []
    for number in range(len(ROLES)):
        role = jnp.full(rows, number)
        found = _run(team.params, team.config, team.adapters, batch.tokens, role).written
        part = parts(team.adapters, found, role)
        named = {"keys": found.keys, "base values": found.values, "values": found.values + part, "adapter parts": part}
        by_role.append({name: x.reshape(*x.shape[:3], -1) for name, x in named.items()})
    pairs = list(itertools.combinations(by_role, 2))
    means = {f"cosine of {name}": _mean([_cosine(a[name], b[name]) for a, b in pairs], real) for name in by_role[0]}
    ratios = [jnp.abs(part["adapter parts"]).sum(-1) / jnp.abs(part["base values"]).sum(-1) for part in by_role]
    return means | {"adapter part / base values": _mean(ratios, real)}


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / jnp.maximum(norms, 1e-9)


def _mean(found: list[jax.Array], real: jax.Array) -> float:
    """The mean of `[layers, batch, length]` arrays over the tokens that are no padding."""
    return float(jnp.mean(jnp.stack(found)[..., real]))
