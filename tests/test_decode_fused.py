"""A decode step whose launches are fused, by kernels in the interpreter, against one of XLA's operations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from kernel_cases import relative_error

from sparsex_jax.device.decode import DecodeState, forward
from sparsex_jax.device.state import sampling_arrays
from sparsex_jax.model.decoder import Decoder, OneLayer, decoder_layer
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.reuse.plan import PADDING_REQUEST, Rows
from sparsex_kernels.add_norm import hopper as add_norm
from sparsex_kernels.backend import FUSIONS, Backend
from sparsex_kernels.linear import hopper as linear
from sparsex_kernels.rotate_and_write import hopper as rotate_and_write

CONFIG = dataclasses.replace(
    TINY, num_layers=2, hidden_size=512, intermediate_size=64, num_q_heads=8, num_kv_heads=4, head_dim=64
)
TABLES = jnp.arange(3)[:, None]


class Fused(Backend):
    """Only what fuses operations runs in kernels: all of them would take the interpreter minutes."""

    def order(self, operation):
        return ("hopper", "xla") if operation in FUSIONS else ("xla",)


def two_steps(devices, backend):
    """The store and the logits after two steps of three requests, of which one is done."""
    mesh = make_mesh(devices)
    decoder = Decoder(CONFIG, Ops(mesh, backend))
    params = random_params(CONFIG, "bfloat16", mesh)
    store = jnp.zeros((2, 3, 2, 4, 64, 64), jnp.bfloat16)
    position = jnp.array([0, -1, 0])
    state = DecodeState(
        token=jnp.array([3, 5, 7]),
        position=position,
        remaining=position + 9,
        stops=jnp.full((3, 1), -1),
        page_tables=jnp.arange(3)[:, None],
        sampling=sampling_arrays([], 3, CONFIG.vocab_size),
    )
    step = jax.jit(forward.__wrapped__, static_argnames="decoder")
    store, _ = step(params, store, state, decoder=decoder)
    later = dataclasses.replace(state, position=jnp.where(position >= 0, 1, -1))
    store, scores = step(params, store, later, decoder=decoder)
    return np.asarray(store, np.float32), np.asarray(scores)[[0, 2]]


def check_steps(devices):
    store, scores = two_steps(devices, Fused("cpu"))
    expected_store, expected = two_steps(1, Backend("cpu"))
    assert relative_error(store, expected_store) < 1e-2
    assert relative_error(scores, expected) < 2e-2


@pytest.mark.slow
def test_a_fused_step_is_that_of_separate_operations():
    check_steps(1)


class FewOfMany(Backend):
    """Products whose parts are data, and what adds them, run in kernels; attention and the others would take longer."""

    def order(self, operation):
        return ("hopper", "xla") if operation in {"linear", *FUSIONS} else ("xla",)


@pytest.mark.slow
def test_a_layer_of_few_of_many_rows_is_that_of_separate_operations(monkeypatch):
    """Of 136 rows 3 are wanted, in one of two tiles. The others hold NaN."""
    monkeypatch.setattr(linear, "MULTIPROCESSORS", 8)  # few, so that the interpreter is done soon
    mesh, position = make_mesh(1), jnp.full(136, -1).at[:3].set(jnp.arange(3))
    rows = Rows(jnp.zeros(136, int), position, jnp.where(position < 0, PADDING_REQUEST, 0), jnp.arange(136))
    params = random_params(CONFIG, "bfloat16", mesh)
    hidden = jax.random.normal(jax.random.key(0), (136, 512)).astype("bfloat16").at[3:].set(jnp.nan)
    store, results = jnp.zeros((2, 3, 2, 4, 64, 64), jnp.bfloat16), []
    for backend in (FewOfMany("cpu"), Backend("cpu")):
        layer = OneLayer.of(Decoder(CONFIG, Ops(mesh, backend)), params, jnp.int32(1))
        run = jax.jit(lambda store, hidden, layer=layer: decoder_layer(layer, store, hidden, rows, TABLES))
        results.append(run(store, hidden))
    (stored, out), (expected_store, expected) = results
    assert relative_error(out[:3], expected[:3]) < 1e-2
    assert relative_error(stored, expected_store) < 1e-2


@pytest.mark.slow
def test_a_mesh_divides_what_is_fused_by_heads(monkeypatch):
    """The interpreter has no kernels on two devices at a time. What runs in their place takes the same shares."""
    monkeypatch.setattr(add_norm, "MOST_ROWS", 0)
    monkeypatch.setattr(rotate_and_write, "MOST_ROWS", 0)
    check_steps(2)
