"""Every implementation of every operation against its reference, on random rows, with NaN in all unused slots."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

import sparsex_kernels.api as kernels
from sparsex_kernels.key_mass import IMPLEMENTATIONS as KEY_MASS
from sparsex_kernels.paged_attention import IMPLEMENTATIONS as ATTENTION
from sparsex_kernels.write_kv import IMPLEMENTATIONS as WRITE_KV

LAYERS, PAGES, KV_HEADS, Q_HEADS, PAGE_SIZE, DIM = 2, 40, 2, 6, 16, 8


def parametrized(implementations):
    """Those for GPUs want larger pages and heads, and have `test_hopper.py` and `test_triton.py`."""
    return pytest.mark.parametrize(
        "implementation", [name for name in implementations if name not in ("hopper", "triton")]
    )


def fast(implementations):
    return parametrized([name for name in implementations if name != "reference"])


@functools.cache  # a `jax.jit` of its own for every case would compile each again
def jitted(operation):
    known = {"implementation", "power"} & inspect.signature(operation).parameters.keys()
    return jax.jit(operation, static_argnames=known)


@contextlib.contextmanager
def simulated_tpu():
    """TPU kernels run in an interpreter: memory begins as NaN, copies end when waited for, races are found."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert not interpreter.races.races_found


@pytest.fixture(autouse=True)
def simulated(request):
    """What a kernel made for another device needs to run here."""
    spec = getattr(request.node, "callspec", None)
    with simulated_tpu() if spec and spec.params.get("implementation") == "tpu" else contextlib.nullcontext():
        yield


class Case:
    """A store in which some requests' slots are written, and rows scattered over those requests."""

    def __init__(self, seed: int, rows: int = 300, dtype: str = "float32"):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 12 * PAGE_SIZE, 3)
        self.tables = rng.permutation(PAGES)[: 3 * 12].reshape(3, 12).astype(np.int32)
        store = np.full((LAYERS, PAGES, 2, KV_HEADS, PAGE_SIZE, DIM), np.nan)
        for request, length in enumerate(lengths):
            for position in range(length):
                page, offset = self.tables[request, position // PAGE_SIZE], position % PAGE_SIZE
                store[:, page, :, :, offset] = rng.normal(size=(LAYERS, 2, KV_HEADS, DIM))
        chosen = [
            (request, position)
            for request, length in enumerate(lengths)
            for position in np.sort(rng.permutation(length)[: rng.integers(1, length + 1)])
        ][:rows]
        self.requests = np.array([c[0] for c in chosen] + [0] * (rows - len(chosen)), np.int32)
        self.positions = np.array([c[1] for c in chosen] + [-1] * (rows - len(chosen)), np.int32)
        self.q = jnp.asarray(rng.normal(size=(rows, Q_HEADS, DIM)), dtype)
        self.store = jnp.asarray(store, dtype)
        self.used = len(chosen)
        self.rng = rng

    def rows(self):
        return self.q, self.store, jnp.int32(1), *map(jnp.asarray, (self.positions, self.requests, self.tables))


def brute_force_attention(case: Case) -> np.ndarray:
    """Row by row in float64, reading only the slots that the row may see."""
    store, out = np.asarray(case.store[1], np.float64), np.zeros(case.q.shape)
    for row in range(case.used):
        seen = np.arange(case.positions[row] + 1)
        pages = case.tables[case.requests[row], seen // PAGE_SIZE]
        keys, values = (store[pages, kv, :, seen % PAGE_SIZE] for kv in (0, 1))
        for head in range(Q_HEADS):
            kv_head = head // (Q_HEADS // KV_HEADS)
            scores = keys[:, kv_head] @ np.asarray(case.q[row, head], np.float64) / np.sqrt(DIM)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values[:, kv_head]
    return out


@parametrized(ATTENTION)
@pytest.mark.parametrize("seed", range(4))
def test_attention_of_scattered_rows_is_causal_by_true_position(seed, implementation):
    case = Case(seed)
    out = jitted(kernels.paged_attention)(*case.rows(), implementation=implementation)
    np.testing.assert_allclose(out, brute_force_attention(case), atol=2e-6)


@fast(ATTENTION)
def test_attention_in_bfloat16(implementation):
    case = Case(7, dtype="bfloat16")
    out = np.asarray(kernels.paged_attention(*case.rows(), implementation=implementation), np.float64)
    expected = brute_force_attention(case)
    assert np.linalg.norm(out - expected) < 1e-2 * np.linalg.norm(expected)


@fast(KEY_MASS)
@pytest.mark.parametrize("seed", range(4))
def test_key_mass_matches_the_reference_and_sums_to_the_rows(seed, implementation):
    case = Case(seed)
    mass = jitted(kernels.key_mass)(*case.rows(), implementation=implementation)
    np.testing.assert_allclose(mass, kernels.key_mass(*case.rows(), implementation="reference"), rtol=1e-5)
    np.testing.assert_allclose(mass.sum(), case.used * Q_HEADS, rtol=1e-5)


@fast(KEY_MASS)
@pytest.mark.parametrize("power", [2, 4])
def test_key_mass_of_powers_matches_the_reference(power, implementation):
    case = Case(0)
    mass = jitted(kernels.key_mass)(*case.rows(), power=power, implementation=implementation)
    expected = kernels.key_mass(*case.rows(), power=power, implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-7)
    assert 0 < mass.sum() < case.used * Q_HEADS


def clean(store):
    """NaN compares unequal to itself; the slots that hold it must still be the same ones."""
    return np.nan_to_num(np.asarray(store, np.float32), nan=1e9)


@fast(WRITE_KV)
def test_write_kv_writes_the_rows_and_nothing_else(implementation):
    case = Case(3)
    keys, values = (jnp.asarray(case.rng.normal(size=(len(case.q), KV_HEADS, DIM)), jnp.float32) for _ in "kv")
    args = (case.store, jnp.int32(1), keys, values, *map(jnp.asarray, (case.positions, case.requests, case.tables)))
    written = kernels.write_kv(*args, implementation=implementation)
    np.testing.assert_array_equal(clean(written), clean(kernels.write_kv(*args, implementation="reference")))
    assert (clean(written) != clean(case.store)).any(axis=(0, 2, 3, 5)).sum() == case.used


@pytest.mark.parametrize(
    ("implementation", "tokens"),  # tokens in no order are slow to simulate
    [("xla", 1), ("xla", 100), ("xla", 300), ("tpu", 1), ("tpu", 40)],
)
def test_align_and_copy_matches_the_reference(implementation, tokens):
    rng = np.random.default_rng(tokens)
    store = jnp.asarray(rng.normal(size=(LAYERS, PAGES, 2, KV_HEADS, PAGE_SIZE, DIM)), jnp.float32)
    slots = rng.permutation(PAGES * PAGE_SIZE).astype(np.int32)
    source, target = slots[:tokens], slots[tokens : 2 * tokens].copy()
    target[tokens - tokens // 3 :] = -1
    shift = rng.integers(-4000, 4000, tokens).astype(np.int32)
    args = (store, *map(jnp.asarray, (source, target, shift)), 10000.0 ** -jnp.linspace(0, 1, DIM // 2))
    if tokens > 1:
        args = (*args, jnp.array([1, LAYERS]))
    moved = kernels.align_and_copy(*args, implementation=implementation)
    np.testing.assert_allclose(moved, kernels.align_and_copy(*args, implementation="reference"), atol=3e-3)
    np.testing.assert_array_equal(moved[:, :, 1].sum(), kernels.align_and_copy(*args)[:, :, 1].sum())


def test_rotations_compose():
    rng = np.random.default_rng(0)
    keys = jnp.asarray(rng.normal(size=(50, KV_HEADS, DIM)), jnp.float32)
    inv_freq = 10000.0 ** -jnp.linspace(0, 1, DIM // 2)
    old, new = rng.integers(0, 5000, (2, 50))
    moved = kernels.apply_rope(kernels.apply_rope(keys, jnp.asarray(old), inv_freq), jnp.asarray(new - old), inv_freq)
    np.testing.assert_allclose(moved, kernels.apply_rope(keys, jnp.asarray(new), inv_freq), atol=2e-3)


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="no implementation 'cudnn'; it has: reference, xla"):
        kernels.paged_attention(*Case(0).rows(), implementation="cudnn")


@pytest.mark.parametrize("implementation", ["reference", "xla", "gather"])
def test_nan_of_a_request_stays_with_it(implementation):
    case = Case(seed=5)
    q, store, *rest = case.rows()
    expected = kernels.paged_attention(q, store, *rest, implementation=implementation)
    poisoned = store.at[:, case.tables[1, 0]].set(jnp.nan)
    out = np.asarray(kernels.paged_attention(q, poisoned, *rest, implementation=implementation))
    others = (case.requests != 1) | (case.positions < 0)
    np.testing.assert_array_equal(out[others], np.asarray(expected)[others])
    assert np.isnan(out[~others]).any(axis=(1, 2)).all()
