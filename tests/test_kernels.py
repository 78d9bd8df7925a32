"""Every implementation of every operation against its reference, on random rows, with NaN in all unused slots."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from kernel_cases import (
    check_moved,
    check_packed,
    check_restored,
    copies,
    in_float32,
    jitted,
    relative_error,
    restored,
    scattered,
)

import sparsex_kernels.api as kernels
from sparsex_kernels.align_and_copy import xla as align_xla
from sparsex_kernels.align_and_copy.runs import by_runs, run_ends
from sparsex_kernels.arguments import CopyArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.key_mass import IMPLEMENTATIONS as KEY_MASS
from sparsex_kernels.key_mass import tpu as tpu_key_mass
from sparsex_kernels.layout import FLOAT8, as_stored
from sparsex_kernels.paged_attention import IMPLEMENTATIONS as ATTENTION
from sparsex_kernels.paged_attention import gather
from sparsex_kernels.paged_attention import tpu as tpu_attention
from sparsex_kernels.paged_attention import xla as xla_attention
from sparsex_kernels.write_kv import IMPLEMENTATIONS as WRITE_KV

LAYERS, PAGES, KV_HEADS, Q_HEADS, PAGE_SIZE, DIM = 2, 40, 2, 6, 16, 8


def parametrized(implementations):
    """Those for GPUs want larger pages and heads, and have `test_hopper.py` and `test_triton.py`. Those for TPUs have
    `test_tpu.py` too, and an interpreter that takes some seconds."""
    slow = pytest.param("tpu", marks=pytest.mark.slow)
    rest = [name for name in implementations if name not in ("hopper", "triton")]
    return pytest.mark.parametrize("implementation", [slow if name == "tpu" else name for name in rest])


def fast(implementations):
    return parametrized([name for name in implementations if name != "reference"])


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


def in_windows(case: Case, window: int, decode: bool) -> Case:
    """The later rows of each request, or its last, and NaN in all slots that the window hides from them."""
    own = [np.flatnonzero(case.requests[: case.used] == request) for request in range(3)]
    own = [rows[-1:] if decode else rows[len(rows) // 3 :] for rows in own]
    for rows in own:
        hidden = np.arange(max(case.positions[rows[0]] - window + 1, 0))
        page = case.tables[case.requests[rows[0]], hidden // PAGE_SIZE]
        case.store = case.store.at[:, page, :, :, hidden % PAGE_SIZE].set(jnp.nan)
    kept, rows = np.concatenate(own), 3 if decode else len(case.q)
    padding = (0, rows - len(kept))
    case.positions = np.pad(case.positions[kept], padding, constant_values=-1)
    case.requests = np.pad(case.requests[kept], padding)
    case.q, case.used = case.q[:rows], len(kept)
    return case


def brute_force_attention(case: Case, window: int = 1 << 30) -> np.ndarray:
    """Row by row in float64, reading only the slots that the row may see."""
    store, out = np.asarray(case.store[1], np.float64), np.zeros(case.q.shape)
    for row in range(case.used):
        seen = np.arange(max(case.positions[row] - window + 1, 0), case.positions[row] + 1)
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


WINDOWS = [1, 20, 77, 2**31 - 1]  # data: each implementation is compiled once for all of them


@pytest.fixture
def small_blocks(monkeypatch):
    """Steps of 32 keys, so that windows hide whole blocks."""
    monkeypatch.setattr(xla_attention, "CPU_TILE", (64, 32))
    monkeypatch.setattr(gather, "KEYS_A_STEP", 32)
    monkeypatch.setattr(tpu_attention, "pages_a_block", lambda *_: 2)
    monkeypatch.setattr(tpu_key_mass, "pages_a_block", lambda *_: 2)
    monkeypatch.setattr(tpu_attention, "ROW_TILE", 64)


@parametrized(ATTENTION)
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.usefixtures("small_blocks")
def test_attention_within_windows(decode, implementation):
    attend = jax.jit(functools.partial(kernels.paged_attention, implementation=implementation))
    for seed, window in enumerate(WINDOWS):
        case = in_windows(Case(seed), window, decode)
        out = attend(*case.rows(), window=jnp.int32(window))
        np.testing.assert_allclose(out, brute_force_attention(case, window), atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "gather"])
@pytest.mark.usefixtures("small_blocks")
def test_log_sum_exps_within_windows(implementation):
    case, window = in_windows(Case(1), 50, decode=True), jnp.int32(50)
    _, lse = jitted(kernels.paged_attention)(
        *case.rows(), window=window, return_lse=True, implementation=implementation
    )
    _, expected = jitted(kernels.paged_attention)(
        *case.rows(), window=window, return_lse=True, implementation="reference"
    )
    np.testing.assert_allclose(lse, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "module", "name"), [("xla", xla_attention, "context"), ("gather", gather, "_read")]
)
@pytest.mark.usefixtures("small_blocks")
def test_blocks_outside_of_a_window_are_not_read(implementation, module, name, monkeypatch):
    read, original = [], getattr(module, name)

    def recording(*args):
        jax.debug.callback(lambda pages: read.extend(pages.ravel().tolist()), args[-1])
        return original(*args)

    monkeypatch.setattr(module, name, recording)
    case = Case(0)
    row = jnp.array([150]), jnp.array([1])
    attend = functools.partial(
        kernels.paged_attention, case.q[:1], case.store, jnp.int32(0), *row, jnp.asarray(case.tables)
    )
    jax.block_until_ready(attend(window=jnp.int32(40), implementation=implementation))
    jax.effects_barrier()
    assert sorted(read) == sorted(case.tables[1, 6:10])  # keys 111 to 150 are on pages 6 to 9, blocks 3 and 4


@fast(ATTENTION)
def test_attention_in_bfloat16(implementation):
    case = Case(7, dtype="bfloat16")
    out = np.asarray(jitted(kernels.paged_attention)(*case.rows(), implementation=implementation), np.float64)
    expected = brute_force_attention(case)
    assert np.linalg.norm(out - expected) < 1e-2 * np.linalg.norm(expected)


@fast(KEY_MASS)
@pytest.mark.parametrize("seed", range(4))
def test_key_mass_matches_the_reference_and_sums_to_the_rows(seed, implementation):
    case = Case(seed)
    mass = jitted(kernels.key_mass)(*case.rows(), implementation=implementation)
    np.testing.assert_allclose(mass, jitted(kernels.key_mass)(*case.rows(), implementation="reference"), rtol=1e-5)
    np.testing.assert_allclose(mass.sum(), case.used * Q_HEADS, rtol=1e-5)


@fast(KEY_MASS)
@pytest.mark.parametrize("power", [2, 4])
def test_key_mass_of_powers_matches_the_reference(power, implementation):
    case = Case(0)
    mass = jitted(kernels.key_mass)(*case.rows(), power=power, implementation=implementation)
    expected = jitted(kernels.key_mass)(*case.rows(), power=power, implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-7)
    assert 0 < mass.sum() < case.used * Q_HEADS


@fast(KEY_MASS)
def test_one_program_serves_key_mass_of_all_powers(implementation):
    rows = Case(0).rows()
    of_power = jax.jit(lambda power, *rows: kernels.key_mass(*rows, power=power, implementation=implementation))
    for power in (1, 2, 4):
        expected = jitted(kernels.key_mass)(*rows, power=power, implementation="reference")
        np.testing.assert_allclose(of_power(jnp.int32(power), *rows), expected, rtol=1e-4, atol=1e-7)


def clean(store):
    """NaN compares unequal to itself; the slots that hold it must still be the same ones."""
    return np.nan_to_num(np.asarray(store, np.float32), nan=1e9)


@parametrized(["xla", "tpu"])
@pytest.mark.parametrize("power", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("small_blocks")
def test_key_mass_within_windows(power, implementation):
    mass = jax.jit(functools.partial(kernels.key_mass, power=power, implementation=implementation))
    for seed, window in enumerate(WINDOWS):
        case = in_windows(Case(seed), window, decode=False)
        found = np.asarray(mass(*case.rows(), window=jnp.int32(window)))
        expected = jitted(kernels.key_mass)(
            *case.rows(), window=jnp.int32(window), power=power, implementation="reference"
        )
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found.sum(), case.used * Q_HEADS, rtol=1e-5 if power == 1 else np.inf)
        for request in range(3):  # what is in no window gets nothing
            first = case.positions[: case.used][case.requests[: case.used] == request].min() - window + 1
            assert not found[request, : max(first, 0)].any()


@fast(WRITE_KV)
def test_write_kv_writes_the_rows_and_nothing_else(implementation):
    case = Case(3)
    keys, values = (jnp.asarray(case.rng.normal(size=(len(case.q), KV_HEADS, DIM)), jnp.float32) for _ in "kv")
    args = (case.store, jnp.int32(1), keys, values, *map(jnp.asarray, (case.positions, case.requests, case.tables)))
    written = jitted(kernels.write_kv)(*args, implementation=implementation)
    np.testing.assert_array_equal(clean(written), clean(jitted(kernels.write_kv)(*args, implementation="reference")))
    assert (clean(written) != clean(case.store)).any(axis=(0, 2, 3, 5)).sum() == case.used


@pytest.mark.parametrize(
    ("implementation", "tokens"),  # tokens in no order are slow to simulate
    [("xla", 1), ("xla", 100), ("xla", 300), pytest.param("tpu", 1, marks=pytest.mark.slow), ("tpu", 40)],
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
    moved = jitted(kernels.align_and_copy)(*args, implementation=implementation)
    np.testing.assert_allclose(moved, jitted(kernels.align_and_copy)(*args, implementation="reference"), atol=3e-3)
    np.testing.assert_array_equal(moved[:, :, 1].sum(), jitted(kernels.align_and_copy)(*args)[:, :, 1].sum())


@parametrized(["xla", "tpu"])
def test_align_and_copy_rotates_each_layer_by_its_own_frequencies(implementation):
    """Layer 0 with a base of 10000, layer 1 with another and in its first pair only."""
    rng = np.random.default_rng(0)
    store = jnp.asarray(rng.normal(size=(LAYERS, PAGES, 2, KV_HEADS, PAGE_SIZE, DIM)), jnp.float32)
    source, target, shift = (jnp.asarray(x, jnp.int32) for x in (np.arange(20), np.arange(35, 55), np.full(20, -1234)))
    frequencies = jnp.stack([10000.0 ** -jnp.linspace(0, 1, DIM // 2), jnp.array([0.5] + [0.0] * (DIM // 2 - 1))])
    align = functools.partial(kernels.align_and_copy, store, source, target, shift)
    moved = np.asarray(align(frequencies, implementation=implementation))
    for layer in range(LAYERS):
        alone = align(frequencies[layer], implementation="reference")[layer]
        np.testing.assert_allclose(moved[layer], alone, atol=1e-3)
    np.testing.assert_allclose(moved, align(frequencies, implementation="reference"), atol=1e-3)
    old, new = (x.swapaxes(1, 2).reshape(-1, KV_HEADS, DIM) for x in (np.asarray(store)[1, :, 0], moved[1, :, 0]))
    still = np.r_[1 : DIM // 2, DIM // 2 + 1 : DIM]  # pairs of frequency 0
    np.testing.assert_array_equal(new[35:55, :, still], old[:20, :, still])


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("xla", "bfloat16"),
        pytest.param("xla", "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("xla", "float32", marks=pytest.mark.slow),
        pytest.param("reference", "float8_e4m3fn", marks=pytest.mark.slow),
        pytest.param("tpu", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_copies_with_a_patch(implementation, dtype):
    """Frequencies that differ by layer, and not all layers; then the way in."""
    store, moves, patch = restored(dtype, kv_heads=1, dim=8, page_size=16)
    frequencies = 10000.0 ** -jnp.linspace(0, 1, 4) * jnp.array([1.0, 1.0, 0.1, 1.0])[:, None]
    align, pack = (
        functools.partial(jitted(operation), implementation=implementation)
        for operation in (kernels.align_and_copy, kernels.pack_rows)
    )
    check_restored(align, store, moves, frequencies, (1, 4), patch)
    check_packed(pack, store, moves, patch)


def test_patched_copies_update_the_store_in_place():
    """Temporary memory is that of a step of tokens, on a CPU too."""
    store, moves, patch = restored("float32", kv_heads=1, dim=8, runs=40)
    align = jax.jit(functools.partial(kernels.align_and_copy, implementation="xla", patch=patch), donate_argnums=0)
    memory = align.lower(store, *moves, jnp.ones(4)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == store.nbytes
    assert memory.temp_size_in_bytes < store.nbytes / 2


def test_runs_of_layers_with_the_same_frequencies():
    rng = np.random.default_rng(0)
    store = jnp.asarray(rng.normal(size=(7, 4, 2, 1, PAGE_SIZE, DIM)), jnp.float32)
    frequencies = jnp.asarray(rng.normal(size=(2, DIM // 2)), jnp.float32)[jnp.array([0, 0, 1, 0, 0, 0, 1])]
    np.testing.assert_array_equal(run_ends(frequencies), [2, 2, 3, 6, 6, 6, 7])
    slots = (jnp.arange(20), jnp.arange(35, 55), jnp.arange(20) - 9)
    args = CopyArgs(store, *slots, frequencies, jnp.array([1, 6]), Backend("cpu"))
    calls = []
    moved = by_runs(args, lambda run: calls.append(run) or align_xla.align_and_copy(run))
    np.testing.assert_allclose(moved, align_xla.align_and_copy(args), atol=1e-6)
    assert calls[0].inv_freq.ndim == 1


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
    expected = jitted(kernels.paged_attention)(q, store, *rest, implementation=implementation)
    poisoned = store.at[:, case.tables[1, 0]].set(jnp.nan)
    out = np.asarray(jitted(kernels.paged_attention)(q, poisoned, *rest, implementation=implementation))
    others = (case.requests != 1) | (case.positions < 0)
    np.testing.assert_array_equal(out[others], np.asarray(expected)[others])
    assert np.isnan(out[~others]).any(axis=(1, 2)).all()


@pytest.mark.parametrize("implementation", ["xla", "gather", pytest.param("tpu", marks=pytest.mark.slow)])
def test_attention_over_float8_is_that_over_its_numbers_in_float32(implementation):
    """With NaN in all unused slots."""
    case = scattered((70, 5, 40), 30, page_size=32, dim=16, group=2, dtype="float32", stored=FLOAT8)
    out = jitted(kernels.paged_attention)(*case, implementation=implementation)
    assert relative_error(out, jitted(kernels.paged_attention)(*in_float32(case), implementation="reference")) < 1e-6
    if implementation in KEY_MASS:
        mass = jitted(kernels.key_mass)(*case, implementation=implementation)
        assert relative_error(mass, jitted(kernels.key_mass)(*in_float32(case), implementation="reference")) < 1e-6


@pytest.mark.parametrize("implementation", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])
def test_float8_is_written_and_moved(implementation):
    """Numbers beyond the largest become the largest, also where a rotation makes them."""
    _, store, layer, *rows = scattered((70, 5, 40), 30, page_size=32, dim=16, stored=FLOAT8)
    keys, values = 300 * jax.random.normal(jax.random.key(0), (2, 30, 2, 16))
    written = jitted(kernels.write_kv)(store, layer, keys, values, *rows, implementation=implementation)
    expected = jitted(kernels.write_kv)(store, layer, keys, values, *rows, implementation="reference")
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (written, expected)))
    assert np.nanmax(np.asarray(written, np.float32)) == 448
    moves = (*copies([(0, 130, 20, 77), (40, 161, 4, -500)]), 10000.0 ** -jnp.linspace(0, 1, 8))
    full = as_stored(300 * jax.random.normal(jax.random.key(1), store.shape), FLOAT8)
    moved = jitted(kernels.align_and_copy)(full, *moves, implementation=implementation)
    check_moved(moved, jitted(kernels.align_and_copy)(full, *moves, implementation="reference"))


def test_float8_keeps_what_is_not_finite_as_nan():
    given = jnp.array([1e9, -1e9, 448.0, 460.0, 0.3, 1e-9, jnp.inf, -jnp.inf, jnp.nan])
    stored = np.asarray(as_stored(given, FLOAT8), np.float32)
    np.testing.assert_array_equal(stored, [448, -448, 448, 448, 0.3125, 0, np.nan, np.nan, np.nan])
