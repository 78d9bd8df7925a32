"""Mirrors of an engine: what was derived, dropped and restored has every byte that it had."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TINY, idle, same_shapes, tiny_engine

from sparsex_jax import ReuseConfig, SamplingParams
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.reuse.schedule import Phase, written_depth

FEW = SamplingParams(max_new_tokens=4)
METHODS = {
    "sparse": ReuseConfig("sparsex", boundary_layer=0, recompute_ratio=0.1, overflow_tokens=2),
    "hybrid": ReuseConfig("sparsex", boundary_layer=1, recompute_ratio=0.1, overflow_tokens=2),
    "blocks": ReuseConfig("sparsex", boundary_layer=0, recompute_ratio=0.1, pool_tokens=16, second_boundary=3),
    "naive": ReuseConfig("naive"),
    "epic": ReuseConfig("epic"),
    "cacheblend": ReuseConfig("cacheblend"),
    "qcfuse": ReuseConfig("qcfuse", recompute_ratio=0.2),
    "prophetkv": ReuseConfig("prophetkv", recompute_ratio=0.2),
}


def tokens_of(seed, length):
    return np.random.default_rng(seed).integers(1, TINY.vocab_size, length).astype(np.int32)


def agent(number, shared, seed=0):
    """A prompt of one agent: something of its own, what all read, and its question."""
    before, behind = tokens_of(100 * seed + number, 10 + 3 * number), tokens_of(500 + 100 * seed + number, 5)
    return np.concatenate([before, shared, behind])


def rows_of(engine, node, page):
    """All bytes of a node's tokens, as a page of the store has them."""
    return np.asarray(engine.runner.store[:, page])[..., : node.length, :].tobytes()


def drop_spares(engine):
    """Evict every page that a derived one can restore, and overwrite it. Returns what nodes had there."""
    cache, spares = engine.cache, np.flatnonzero(engine.cache._pool.spare).tolist()
    had = {cache.tree[page]: rows_of(engine, cache.tree[page], page) for page in spares}
    cache._evict(spares)
    engine.runner.store = engine.runner.store.at[:, jnp.array(spares)].set(jnp.nan)
    return had


def restored_alike(engine, had):
    """How many of these nodes are in the store again. They have what they had."""
    restored = [node for node in had if len(node.pages) > 1]
    assert all(rows_of(engine, node, node.pages[0]) == had[node] for node in restored)
    return len(restored)


def dropped_and_restored(engine, method):
    shared, asked = tokens_of(1, 160), [agent(number, tokens_of(1, 160)) for number in range(3)]
    assert len(shared) == 160
    answers = [engine.generate(prompt, FEW, reuse=method) for prompt in asked]
    had = drop_spares(engine)
    engine.cache.check([])
    for prompt, answer in zip(asked[1:], answers[1:], strict=True):
        engine.generate(np.concatenate([prompt, answer.token_ids, [7, 8]]).astype(np.int32), FEW, reuse=method)
    assert restored_alike(engine, had) == engine.stats()["restored_pages"] >= 10
    assert idle(engine)


@pytest.mark.parametrize("name", METHODS)
def test_what_was_dropped_is_restored_without_a_byte_that_differs(name):
    dropped_and_restored(tiny_engine(mirrors=True), METHODS[name])
