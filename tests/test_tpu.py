"""TPU kernels in the simulator, at shapes of a TPU: loops over several blocks, heads of 64 and 128, bfloat16, holes.

`test_kernels.py` has them beside all other implementations, with small shapes.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    check_packed,
    check_restored,
    jitted,
    last_rows,
    over_whole_values,
    restored,
    scattered,
    with_adapters,
)
from test_kernels import clean, simulated, simulated_tpu  # noqa: F401  (a fixture)

import sparsex_kernels.api as kernels
from sparsex_jax.reuse.plan import PADDING_REQUEST
from sparsex_kernels.align_and_copy import tpu as align_tpu
from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.key_mass import tpu as key_mass_tpu
from sparsex_kernels.paged_attention import tpu as attention_tpu
from sparsex_kernels.write_kv import tpu as write_tpu

LAYERS, PAGES, KV_HEADS, PAGE_SIZE, LENGTHS = 2, 16, 2, 32, (140, 50, 1)

LARGE, SMALL = ("bfloat16", 8, 128), ("float32", 6, 64)

tpu = pytest.mark.parametrize("implementation", ["tpu"])
shapes = pytest.mark.parametrize(
    ("dtype", "q_heads", "head_dim"), [LARGE, pytest.param(*SMALL, marks=pytest.mark.slow)]
)
shapes_and_rows = pytest.mark.parametrize(
    ("dtype", "q_heads", "head_dim", "decode"),
    [(*LARGE, False), pytest.param(*SMALL, False, marks=pytest.mark.slow), (*LARGE, True)],
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Loops go round more than once: 64 keys a block, 16 rows a tile, 32 tokens of an alignment."""
    monkeypatch.setattr(attention_tpu, "pages_a_block", lambda *_: 2)
    monkeypatch.setattr(key_mass_tpu, "pages_a_block", lambda *_: 2)
    monkeypatch.setattr(attention_tpu, "ROW_TILE", 16)
    monkeypatch.setattr(write_tpu, "ROWS_A_STEP", 32)
    monkeypatch.setattr(align_tpu, "TOKENS_A_STEP", 32)
    monkeypatch.setattr(align_tpu, "HEADS_A_STEP", 2)


def paged_store(rng, dtype, head_dim):
    """A store with KV at the first `LENGTHS` positions of three requests, NaN elsewhere, and their page tables."""
    tables = rng.permutation(PAGES)[:15].reshape(3, 5).astype(np.int32)
    store = np.full((LAYERS, PAGES, 2, KV_HEADS, PAGE_SIZE, head_dim), np.nan)
    for table, length in zip(tables, LENGTHS, strict=True):
        at = np.arange(length)
        kv = rng.normal(size=(length, LAYERS, 2, KV_HEADS, head_dim))
        store[:, table[at // PAGE_SIZE], :, :, at % PAGE_SIZE] = kv
    return jnp.asarray(store, dtype), jnp.asarray(tables)


def scattered_rows(rng, padding=5):
    """A fifth of all positions, the last ones among them."""
    chosen = [
        (request, position)
        for request, length in enumerate(LENGTHS)
        for position in range(length)
        if position == length - 1 or rng.random() < 1 / 5
    ]
    requests, positions = np.array(chosen + [(PADDING_REQUEST, -1)] * padding, np.int32).T
    return jnp.asarray(positions), jnp.asarray(requests)


def decode_rows():
    """One row each of two requests, and between them one that is done."""
    return jnp.array([LENGTHS[0] - 1, -1, 0]), jnp.array([0, PADDING_REQUEST, 2])


def assert_close(a, b, dtype):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.isfinite(a).all()
    assert np.linalg.norm(a - b) <= (1e-2 if dtype == "bfloat16" else 1e-6) * np.linalg.norm(b)


@tpu
@shapes_and_rows
def test_attention(implementation, dtype, q_heads, head_dim, decode):
    rng = np.random.default_rng(0)
    store, tables = paged_store(rng, dtype, head_dim)
    rows = decode_rows() if decode else scattered_rows(rng)
    q = jnp.asarray(rng.normal(size=(len(rows[0]), q_heads, head_dim)), dtype)
    args = q, store, jnp.int32(1), *rows, tables
    out = jitted(kernels.paged_attention)(*args, implementation=implementation)
    assert_close(out, jitted(kernels.paged_attention)(*args, implementation="reference"), dtype)
    assert not out[rows[0] < 0].any()


@tpu
@pytest.mark.slow
@pytest.mark.parametrize(("adapters", "rank"), [(3, 16), (9, 32)])  # 48 lanes, or one line of 128 of 288
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("dtype", "decode"), [("float32", False), ("float32", True), ("bfloat16", False)])
def test_low_rank(implementation, dtype, decode, window, adapters, rank):
    """Rows of one tile have adapters of their own or none."""
    make = last_rows if decode else scattered
    more = () if decode else (40,)
    case = make((70, 5, 40, 33), *more, page_size=32, dim=64, group=2, dtype=dtype)
    low_rank = with_adapters(case, rank, adapters=adapters)
    window = None if window is None else jnp.int32(window)
    attend = partial(kernels.paged_attention, window=window, return_lse=True)
    out, lse = attend(*case, low_rank=low_rank, implementation=implementation)
    expected, expected_lse = attend(*over_whole_values(case, low_rank), implementation="reference")
    assert_close(out, expected, dtype)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@tpu
@pytest.mark.parametrize("power", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(("dtype", "q_heads", "head_dim"), [LARGE])
def test_key_mass(implementation, dtype, q_heads, head_dim, power):
    rng = np.random.default_rng(1)
    store, tables = paged_store(rng, dtype, head_dim)
    positions, requests = scattered_rows(rng)
    q = jnp.asarray(rng.normal(size=(len(positions), q_heads, head_dim)), dtype)
    args = q, store, jnp.int32(1), positions, requests, tables
    mass = jitted(kernels.key_mass)(*args, power=power, implementation=implementation)
    assert_close(mass, jitted(kernels.key_mass)(*args, power=power, implementation="reference"), dtype)
    if power == 1:
        np.testing.assert_allclose(mass.sum(), (positions >= 0).sum() * q_heads, rtol=1e-3)


@tpu
@shapes_and_rows
def test_write_kv(implementation, dtype, q_heads, head_dim, decode):
    rng = np.random.default_rng(2)
    store, tables = paged_store(rng, dtype, head_dim)
    rows = decode_rows() if decode else scattered_rows(rng)
    kv = jnp.asarray(rng.normal(size=(2, len(rows[0]), KV_HEADS, head_dim)), dtype)
    args = store, jnp.int32(1), kv[0], kv[1], *rows, tables
    written = jitted(kernels.write_kv)(*args, implementation=implementation)
    np.testing.assert_array_equal(clean(written), clean(jitted(kernels.write_kv)(*args, implementation="reference")))


@tpu
@shapes
def test_align_and_copy_of_runs(implementation, dtype, q_heads, head_dim):
    """Segments of two requests go to a third's free pages, at other offsets in their pages."""
    rng = np.random.default_rng(3)
    store, tables = paged_store(rng, dtype, head_dim)
    slots = np.asarray(tables)[:, :, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
    runs = [(0, 3, 40, 1, 500), (0, 100, 33, 41, -7), (1, 10, 16, 80, 0), (1, 40, 7, 96, 123456)]
    source, target, shift = np.zeros((3, 110), np.int32)
    target[:] = -1
    done = 0
    for request, start, length, goal, by in runs:
        source[done : done + length] = slots[request].ravel()[start : start + length]
        target[done : done + length] = slots[2].ravel()[goal : goal + length]
        shift[done : done + length] = by
        done += length
    inv_freq = 500000.0 ** -jnp.linspace(0, 1, head_dim // 2)
    args = store, *map(jnp.asarray, (source, target, shift)), inv_freq, jnp.array([1, len(store)])
    moved, expected = (
        clean(jitted(kernels.align_and_copy)(*args, implementation=name)) for name in (implementation, "reference")
    )
    tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(moved, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(moved[:, :, 1], expected[:, :, 1])  # values are copied, not computed


@tpu
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "heads_a_step"), [("bfloat16", 4), ("float32", 1), ("float8_e4m3fn", 6)])
def test_copies_with_a_patch(implementation, dtype, heads_a_step, monkeypatch):
    """Groups of two layers, of one and of three, of six; patch rows come out of another group than they go to."""
    monkeypatch.setattr(align_tpu, "HEADS_A_STEP", heads_a_step)
    store, moves, patch = restored(dtype, layers=6, dim=128)
    inv_freq = 10000.0 ** -jnp.linspace(0, 1, 64)
    align, pack = (
        partial(jitted(operation), implementation=implementation)
        for operation in (kernels.align_and_copy, kernels.pack_rows)
    )
    check_restored(align, store, moves, inv_freq, (1, 6), patch)
    check_packed(pack, store, moves, patch)


@tpu
def test_odd_pages_are_refused(implementation):
    store = jnp.zeros((1, 4, 2, 1, 24, 128))
    rows = jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(NotImplementedError, match="page_size=24 must be a multiple of 16"):
        kernels.paged_attention(jnp.zeros((1, 1, 128)), store, jnp.int32(0), *rows, implementation=implementation)


def test_log_sum_exp():
    rng = np.random.default_rng(4)
    store, tables = paged_store(rng, "float32", 64)
    q = jnp.asarray(rng.normal(size=(3, 4, 64)), jnp.float32)
    args = AttentionArgs(q, store, jnp.int32(1), *decode_rows(), tables, scale=0.125, backend=Backend("tpu"))
    with simulated_tpu():
        _, lse = attention_tpu.paged_attention(args, return_lse=True)
    assert np.isneginf(lse[1]).all()
    keys = np.asarray(store)[1, tables[0], 0].transpose(1, 0, 2, 3).reshape(KV_HEADS, -1, 64)[:, : LENGTHS[0]]
    scores = np.einsum("hd,htd->ht", np.asarray(q[0]), np.repeat(keys, 2, axis=0)) / 8
    np.testing.assert_allclose(lse[0], np.logaddexp.reduce(scores, axis=1), rtol=1e-5)
