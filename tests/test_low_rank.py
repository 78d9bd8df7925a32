"""What adapters add to values apart from them: attention over V and Y is that over V + Y B, and Y moves as V does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    behind_windows,
    last_rows,
    late_rows,
    over_whole_values,
    relative_error,
    restored,
    same,
    scattered,
    with_adapters,
)

import sparsex_kernels.api as kernels
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.reuse.plan import PADDING_REQUEST, Rows
from sparsex_kernels.backend import VALIDATED, Backend, FallbackWarning, report_choice

SMALL = {"page_size": 16, "dim": 16, "dtype": "float32"}
NINE, MANY = {"kv_heads": 3, "group": 3}, {"kv_heads": 8, "group": 4}
VERSIONS = ("reference", "xla")
LENGTHS = (60, 3, 40, 17)  # of adapters 0 and 1, none, and 2


@functools.cache  # so that cases of the same shape share one program
def jitted(implementation):
    return jax.jit(functools.partial(kernels.paged_attention, return_lse=True, implementation=implementation))


def attend(case, low_rank, implementation, window=None):
    return jitted(implementation)(*case, low_rank=low_rank, window=window)


def check(case, low_rank, implementation, window=None, tolerance=1e-5):
    """Output and log-sum-exp are those over V + Y B; padding stays 0."""
    out, lse = attend(case, low_rank, implementation, window)
    expected, expected_lse = attend(over_whole_values(case, low_rank), None, "reference", window)
    assert relative_error(out, expected) < tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    assert not np.asarray(out)[np.asarray(case[3]) < 0].any()


CASES = [
    pytest.param(lambda: scattered(LENGTHS, 40, **SMALL, **NINE), 16, 4, id="9 heads, rank 4"),
    pytest.param(
        lambda: scattered(LENGTHS, 40, **SMALL, **MANY), 32, None, id="32 heads, rank 32", marks=pytest.mark.slow
    ),
    pytest.param(lambda: last_rows(LENGTHS, **SMALL, **NINE), 16, None, id="decode, rank 16", marks=pytest.mark.slow),
    pytest.param(lambda: last_rows(LENGTHS, **SMALL, **MANY), 16, 8, id="decode, rank 8"),
    pytest.param(
        lambda: scattered(LENGTHS, 40, **SMALL, **NINE, stored="float8_e4m3fn"),
        16,
        None,
        id="K and V in float8",
        marks=pytest.mark.slow,
    ),
]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("implementation", ["reference", "xla", slow("gather")])
@pytest.mark.parametrize(("make", "rank", "used"), CASES)
def test_attention(make, rank, used, implementation):
    case = make()
    check(case, with_adapters(case, rank, used=used), implementation)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "gather"])
def test_attention_within_windows(implementation):
    case = behind_windows(late_rows(scattered(LENGTHS, 40, **SMALL, **NINE)), 20)
    check(case, with_adapters(case, 16), implementation, window=jnp.int32(20))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "xla", "gather"])
def test_adapters_may_share_columns(implementation):
    """Those that have the same A: one Y, and each its own B."""
    case = scattered(LENGTHS, 40, **SMALL, **NINE)
    low_rank = with_adapters(case, 16)
    column = jnp.where(low_rank.columns >= 0, 16, -1)
    shifts = [(0, 16), (1, 0), (3, -16)]  # all in the columns of adapter 1
    store = low_rank.store
    for request, by in shifts:
        pages = case[5][request]
        store = store.at[:, pages].set(jnp.roll(store[:, pages], by, axis=-1))
    shared = kernels.LowRank(store, low_rank.matrices, column, low_rank.adapters)
    np.testing.assert_array_equal(attend(case, shared, implementation)[0], attend(case, low_rank, implementation)[0])


def test_no_kernel_runs_with_adapters_before_it_is_validated_with_them(monkeypatch):
    case, gpu = scattered(LENGTHS, 40, **SMALL, **NINE), Backend("gpu", "9.0")
    attend = functools.partial(kernels.paged_attention, *case, low_rank=with_adapters(case, 16), backend=gpu)
    monkeypatch.setitem(VALIDATED, "low_rank_attention", frozenset())
    report_choice.cache_clear()  # each choice is told once
    with pytest.warns(FallbackWarning, match=r"low_rank_attention runs in plain XLA .* hopper: no version"):
        jax.eval_shape(attend)
    with pytest.raises(NotImplementedError, match="queries of float32"):
        attend(implementation="hopper")


def test_what_does_not_fit_is_refused():
    case = scattered((5,), 2, **SMALL)
    fits = with_adapters(case, 16)
    layers, pages = fits.store.shape[:2]
    for store, matrices, reason in [
        (
            fits.store[:, :3],
            fits.matrices,
            f"low_rank.store: layers, pages, page_size .{layers}, 3, 16., not .*{pages}",
        ),
        (fits.store.astype("bfloat16"), fits.matrices, "low_rank.store of bfloat16 under queries of float32"),
        (fits.store[..., :40], fits.matrices, "40 columns, which is no multiple of the rank 16"),
        (fits.store, fits.matrices[:, :, :1], "it must be .2, at least 1, 2, 16, 16."),
    ]:
        low_rank = kernels.LowRank(store, matrices, fits.columns, fits.adapters)
        with pytest.raises(ValueError, match=reason):
            kernels.paged_attention(*case, low_rank=low_rank)


def test_heads_may_be_divided_among_devices():
    """Y is whole on each device, and B has the device's KV heads."""
    q, store, layer, positions, requests, tables = case = scattered(LENGTHS, 40, **SMALL, kv_heads=4, group=2)
    low_rank = with_adapters(case, 16)
    padding = jnp.where(positions < 0, PADDING_REQUEST, requests)
    rows = Rows(jnp.zeros_like(positions), positions, padding, jnp.zeros_like(positions))

    def on(devices):
        ops = Ops.on(make_mesh(devices))
        return jax.jit(lambda *args: ops.attention(*args[:2], layer, rows, tables, low_rank=args[2]))(
            q, store, low_rank
        )

    np.testing.assert_allclose(on(2), on(1), atol=1e-6)
    assert relative_error(on(1), attend(over_whole_values(case, low_rank), None, "reference")[0]) < 1e-5


@pytest.mark.parametrize("columns", [slow(None), (32, -1, 0, 16)])
def test_rows_are_written(columns):
    """Of all adapters or of each request's, and nothing else; no program may write what is not finite elsewhere."""
    case = scattered(LENGTHS, 40, **SMALL)
    store = jax.random.normal(jax.random.key(0), with_adapters(case, 16).store.shape)
    width = 48 if columns is None else 16
    values = jax.random.normal(jax.random.key(1), (40, width), jnp.float32)
    of = None if columns is None else jnp.asarray(columns)
    args = (store, jnp.int32(1), values, *case[3:], of)
    written, other = (
        jax.jit(functools.partial(kernels.write_low_rank, implementation=name))(*args) for name in VERSIONS
    )
    np.testing.assert_array_equal(written, other)
    positions, requests, tables = map(np.asarray, case[3:])
    expected = np.array(store)
    for row in np.flatnonzero(positions >= 0):
        first = 0 if columns is None else columns[requests[row]]
        page, offset = tables[requests[row], positions[row] // 16], positions[row] % 16
        if first >= 0:
            expected[1, page, offset, first : first + width] = values[row]
    np.testing.assert_array_equal(written, expected)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ["write", "copy"])
def test_the_store_is_changed_in_place(operation):
    low, ints = jax.ShapeDtypeStruct((4, 512, 16, 128), jnp.float32), jax.ShapeDtypeStruct((40,), jnp.int32)
    calls = {
        "write": (kernels.write_low_rank, (jax.ShapeDtypeStruct((40, 128), jnp.float32), ints, ints)),
        "copy": (kernels.copy_low_rank, (ints, ints)),
    }
    call, args = calls[operation]
    if operation == "write":
        args = (jnp.int32(1), *args, jax.ShapeDtypeStruct((4, 4), jnp.int32))
    run = jax.jit(functools.partial(call, implementation="xla"), donate_argnums=0)
    memory = run.lower(low, *args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == low.size * 4
    assert memory.temp_size_in_bytes < low.size


def test_rows_that_do_not_fit_are_refused():
    case = scattered((5,), 2, **SMALL)
    store = with_adapters(case, 16).store
    for width, columns in ((40, None), (64, jnp.zeros(1, jnp.int32))):
        with pytest.raises(ValueError, match=f"values of {width} columns for a store of 48"):
            kernels.write_low_rank(store, jnp.int32(0), jnp.zeros((2, width)), *case[3:], columns)


@pytest.mark.slow
def test_copies_take_the_rows_that_keys_and_values_take():
    """Y that is V of one head goes where V goes: plain copies of some layers, with a patch, and packed."""
    store, (source, target, _), patch = restored("float32", kv_heads=1, dim=16, page_size=16)
    low, moves = store[:, :, 1, 0], (source, target, jnp.zeros_like(source))
    frequencies, layers = jnp.ones(8), jnp.array([1, 4])

    def check(expected, operation, *args):
        for implementation in VERSIONS:
            run = functools.partial(operation, implementation=implementation)
            assert same(jax.jit(run)(low, *args), expected[:, :, 1, 0])

    check(kernels.align_and_copy(store, *moves, frequencies, layers), kernels.copy_low_rank, *moves[:2], layers)
    check(
        kernels.align_and_copy(store, *moves, frequencies, layers, patch),
        kernels.copy_low_rank,
        *(*moves[:2], layers, patch),
    )
    check(kernels.pack_rows(store, source, *patch[:3]), kernels.pack_low_rank, source, *patch[:3])
