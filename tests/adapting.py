"""Small LoRA adapters for `TINY`, what the dense reference makes of them, and engines that load them."""

import functools

import numpy as np
from conftest import TINY, same_shapes, tiny_params
from dense import Dense

from sparsex_jax import EngineConfig
from sparsex_jax.model.adapters import AdapterWeights, Pair

SIZES = {
    "wq": (32, 32),
    "wk": (32, 16),
    "wv": (32, 16),
    "wo": (32, 32),
    "w_gate": (32, 48),
    "w_up": (32, 48),
    "w_down": (48, 32),
}

# One row bucket does for what is short, and four sequences share each program.
DEVICE = EngineConfig(
    store_tokens=1024,
    page_size=16,
    max_num_seqs=4,
    max_prefill_seqs=4,
    chunk_rows=128,
    max_adapters=3,
    max_adapter_rank=8,
)


def make_adapter(seed, rank=4, targets=tuple(SIZES), invocation=(), strength=0.3):
    """Random weights, strong enough that no answer stays what it was."""
    rng = np.random.default_rng(seed)

    def matrices(*shape):
        return (strength * rng.normal(size=(TINY.num_layers, *shape))).astype(np.float32)

    pairs = {name: Pair(matrices(SIZES[name][0], rank), matrices(rank, SIZES[name][1])) for name in targets}
    return AdapterWeights(rank, pairs, tuple(invocation), f"digest of {seed}")


def merged(weights, params=None):
    """Parameters with an adapter in them."""
    params = tiny_params() if params is None else params
    layers, added = params.layers, {}
    for name, pair in weights.pairs.items():
        weight = np.asarray(getattr(layers, name))
        added[name] = weight + np.einsum("lir,lro->lio", *pair).reshape(weight.shape)
    return params.replace(layers=layers.replace(**added))


@functools.cache
def dense_of(weights):
    """The reference with an adapter; None: without."""
    return Dense(TINY, tiny_params() if weights is None else merged(weights))


class Adapted(Dense):
    """The reference where an adapter acts from a token on."""

    def __init__(self, weights, start=0):
        super().__init__(TINY, tiny_params())
        self.with_it, self.start = dense_of(weights), start

    def qkv(self, layer, hidden, positions):
        of_base, of_adapter = super().qkv(layer, hidden, positions), self.with_it.qkv(layer, hidden, positions)
        acts = np.asarray(positions)[:, None, None] >= self.start
        return tuple(np.where(acts, *pair) for pair in zip(of_adapter, of_base, strict=True))

    def finish_layer(self, layer, hidden, q, keys, values, rows):
        about = layer, hidden, q, keys, values, rows
        acts = np.asarray(rows)[:, None] >= self.start
        return np.where(acts, self.with_it.finish_layer(*about), super().finish_layer(*about))


def greedy(dense, prompt, number):
    """The logits behind a prompt, and the tokens of highest logits that follow."""
    tokens, first = list(prompt), None
    for _ in range(number):
        logits = dense.full(np.array(tokens))[0][-1]
        first = logits if first is None else first
        tokens.append(int(logits.argmax()))
    return first, tokens[len(prompt) :]


def adapting_engine(**changes):
    """An engine with slots for adapters, on the programs of all such engines, and none loaded."""
    return same_shapes(TINY, tiny_params(), DEVICE, **changes)


# Adapters that share KV -------------------------------------------------------------------------------------

SHARED = dict(vars(DEVICE), share_adapters=True)
TARGETS = ("wq", "wv", "wo", "w_gate", "w_up", "w_down")
ONE, TWO = make_adapter(1, targets=TARGETS), make_adapter(2, rank=8, targets=("wq", "wv"))
LATER = make_adapter(5, targets=TARGETS)


def sharing_engine(**changes):
    """An engine whose adapters share KV, on the programs of all such engines."""
    device = type(DEVICE)(**SHARED)
    engine = same_shapes(TINY, tiny_params(), device, **changes)
    for name, weights in (("one", ONE), ("two", TWO)):
        engine.load_adapter(name, weights)
    return engine
