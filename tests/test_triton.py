"""The Triton kernels against the references, small, in Triton's interpreter. On a GPU: `test_gpu.py`.

The interpreter needs Triton but neither a GPU nor jax-triton, whose `triton_call` is replaced here; outputs begin as
NaN. Only the extra `cuda` has Triton. Without it these tests are skipped; `uv run --with triton pytest
tests/test_triton.py` runs them on any machine.
"""

import functools
import importlib.util
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    behind_windows,
    check_moved,
    check_nan_stays,
    check_packed,
    check_restored,
    copies,
    in_float32,
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
from sparsex_kernels import triton as launcher
from sparsex_kernels.backend import prefer
from sparsex_kernels.key_mass.triton import seen_by
from sparsex_kernels.paged_attention import triton as attention
from sparsex_kernels.paged_attention.triton import row_tiles

ON_GPU = jax.default_backend() == "gpu"
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported first

interpreted = pytest.mark.skipif(ON_GPU or not importlib.util.find_spec("triton"), reason="needs Triton, and no GPU")
TRITON_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "float8_e4m3fn": "fp8e4nv"}


class Pointer:
    """What Triton's interpreter wants of a tensor, for an array in place."""

    def __init__(self, array):
        self.array, self.dtype = array, TRITON_TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def new_empty(self, *_, **__):
        return self

    cpu = untyped_storage

    def set_(self, *_):
        pass

    storage_offset = size = stride = copy_ = set_


def interpret(*inputs, kernel, grid, out_type, backend_options, num_warps=4, num_stages=1, **parameters):
    """`jax_triton.triton_call` without a GPU; the last input is a reference where there is no output."""
    outputs, tree = jax.tree.flatten(out_type)
    ref = None if outputs else inputs[-1]
    inputs = inputs if outputs else (*inputs[:-1], ref[...])
    is_array = [not isinstance(x, int) for x in inputs]

    def run(*arrays):
        arrays = [np.array(x) for x in arrays]
        results = [np.full(x.shape, np.nan, x.dtype) for x in outputs]
        pointers = map(Pointer, arrays)
        operands = [next(pointers) if array else x for x, array in zip(inputs, is_array, strict=True)]
        kernel[grid](*operands, *map(Pointer, results), **parameters)
        return results or arrays[-1:]

    arrays = [x for x, array in zip(inputs, is_array, strict=True) if array]
    results = jax.pure_callback(run, outputs or [jax.typeof(inputs[-1])], *arrays)
    if ref is not None:
        ref[...] = results.pop()
    return jax.tree.unflatten(tree, results)


def splat(_, block_type, scalar):
    """Triton 3.9's interpreter has int32 in a block of one truth value, which is no mask then."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.full(block_type.shape, scalar.data, scalar.data.dtype), scalar.dtype.scalar)


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setattr("triton.runtime.interpreter.InterpreterBuilder.create_splat", splat)
    fake = types.ModuleType("jax_triton")
    fake.triton_call = interpret
    monkeypatch.setitem(sys.modules, "jax_triton", fake)
    monkeypatch.setattr(launcher, "check_available", lambda backend: None)
    monkeypatch.setattr(attention, "DECODE_PROGRAMS", 16)  # few, as each is slow to interpret


def triton(operation):
    return jax.jit(lambda *args, **options: operation(*args, implementation="triton", **options))


def check_attention(case, tolerance, **window):
    attend = functools.partial(kernels.paged_attention, return_lse=True)
    expected, expected_lse = attend(*in_float32(case), implementation="reference", **window)
    out, lse = jax.jit(functools.partial(attend, implementation="triton"))(*case, **window)
    assert relative_error(out, expected) < tolerance
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


SMALL = [  # in float16: the interpreter's products know no bfloat16
    pytest.param({"lengths": (150, 3, 70), "rows": 48}, id="several requests"),
    pytest.param({"lengths": (400, 1), "rows": 150, "dim": 128, "group": 8, "kv_heads": 1}, id="eight heads of 128"),
    pytest.param({"lengths": (256,), "rows": 100, "group": 3, "page_size": 128}, id="three heads, large pages"),
    pytest.param({"lengths": (90, 200), "rows": 70, "page_size": 16, "group": 1}, id="one head, small pages"),
    pytest.param({"lengths": (70, 5, 64, 1, 33), "rows": 8}, id="hardly a row each"),
]


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", SMALL)
def test_attention(shape):
    check_attention(scattered(**shape, dtype="float16"), 1e-3)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("dim", "group", "page_size"), [(64, 3, 64), (128, 8, 16), (128, 4, 128)])
def test_decode(dim, group, page_size):
    check_attention(
        last_rows((300, 5, 64, 1), dim=dim, group=group, kv_heads=2, page_size=page_size, dtype="float16"), 1e-3
    )


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(
    ("make", "rank", "used"),
    [
        pytest.param(lambda: scattered((150, 3, 70, 90), 48, group=3, dtype="float16"), 16, 4, id="tiles"),
        pytest.param(
            lambda: scattered((130, 5, 64, 40), 40, dim=128, page_size=16, dtype="float16"), 32, None, id="small pages"
        ),
        pytest.param(lambda: last_rows((300, 5, 64, 90), dim=128, dtype="float16"), 16, None, id="decode"),
    ],
)
def test_low_rank(make, rank, used, window):
    """Tiles have one request each, with an adapter of its own or none; all other columns of Y hold NaN."""
    case, window = make(), None if window is None else jnp.int32(window)
    low_rank = with_adapters(case, rank, used=used)
    attend = functools.partial(kernels.paged_attention, window=window, return_lse=True)
    out, lse = jax.jit(functools.partial(attend, implementation="triton"))(*case, low_rank=low_rank)
    expected, expected_lse = attend(*over_whole_values(case, low_rank), implementation="reference")
    assert relative_error(out, expected) < 1.5e-3
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
    case = scattered((20,), 4, dtype="float16")
    with pytest.raises(NotImplementedError, match="adapters of rank 8; kernels take 16, 32, 64"):
        kernels.paged_attention(*case, low_rank=with_adapters(case, 8), implementation="triton")


FLOAT8 = {"dtype": "float16", "stored": "float8_e4m3fn"}


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_a_store_of_float8():
    case = scattered((150, 3, 70), 48, group=3, **FLOAT8)
    check_attention(case, 1e-3)
    check_attention(last_rows((300, 5, 64, 1), dim=128, **FLOAT8), 1e-3)
    mass = triton(kernels.key_mass)(*case)
    np.testing.assert_allclose(
        mass, kernels.key_mass(*in_float32(case), implementation="reference"), rtol=1e-4, atol=1e-6
    )
    _, store, layer, *rows = case
    keys, values = 300 * jax.random.normal(jax.random.key(0), (2, 48, 2, 64))  # some are larger than the largest
    written = triton(kernels.write_kv)(store, layer, keys, values, *rows)
    assert same(written, kernels.write_kv(store, layer, keys, values, *rows, implementation="reference"))
    moves = (*copies([(10, 259, 40, 77), (60, 380, 10, -500)]), 10000.0 ** -jnp.linspace(0, 1, 32))
    moved = triton(kernels.align_and_copy)(written, *moves)
    check_moved(moved, kernels.align_and_copy(written, *moves, implementation="reference"))


WINDOWS = [1, 64, 130, 2**31 - 1]


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SMALL[:2])
def test_attention_and_key_mass_within_windows(shape, window):
    case = behind_windows(late_rows(scattered(**shape, dtype="float16")), window)
    check_attention(case, 1e-3, window=jnp.int32(window))
    mass = triton(kernels.key_mass)(*case, window=jnp.int32(window))
    expected = kernels.key_mass(*in_float32(case), window=jnp.int32(window), implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-6)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("window", WINDOWS)
def test_decode_within_windows(window):
    case = behind_windows(last_rows((300, 5, 64, 1), group=3, page_size=16, dtype="float16"), window)
    check_attention(case, 1e-3, window=jnp.int32(window))


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_align_and_copy_rotates_each_layer_by_its_own_frequencies():
    store = jax.random.normal(jax.random.key(0), (3, 8, 2, 2, 64, 64)).astype("float32")
    frequencies = 10000.0 ** -jnp.linspace(0, 1, 32) * jnp.array([1.0, 1.0, 0.1])[:, None]
    moves = (*copies([(10, 259, 40, 77), (60, 380, 10, -500)]), frequencies)
    moved = triton(kernels.align_and_copy)(store, *moves)
    expected = kernels.align_and_copy(store, *moves, implementation="reference")
    np.testing.assert_allclose(moved, expected, atol=1e-4)


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("shape", SMALL)
def test_key_mass(shape):
    case = scattered(**shape, dtype="float16")
    mass = triton(kernels.key_mass)(*case)
    expected = kernels.key_mass(*in_float32(case), implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-6)


@interpreted
@pytest.mark.usefixtures("interpreter")
def test_key_mass_of_powers():
    case = scattered((150, 70), 60, kv_heads=1, dtype="float16")
    key_mass = jax.jit(lambda power, *args: kernels.key_mass(*args, power=power, implementation="triton"))
    mass = key_mass(jnp.int32(4), *case)
    expected = kernels.key_mass(*in_float32(case), power=4, implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mass, triton(functools.partial(kernels.key_mass, power=4))(*case))


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("rows", [48, 4])  # tiles of rows, and a row's keys split
def test_nan_of_a_request_stays_with_it(rows):
    check_nan_stays(scattered((150, 3, 70, 2), rows, dtype="float16"), "triton")


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_write_kv(dtype):
    _, store, layer, *rows = scattered((150, 3, 70), 40, kv_heads=3, dtype=dtype)
    keys, values = jax.random.normal(jax.random.key(0), (2, 40, 3, 64))
    written = triton(kernels.write_kv)(store, layer, keys, values, *rows)
    assert same(written, kernels.write_kv(store, layer, keys, values, *rows, implementation="reference"))


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("kv_heads", "dim", "dtype"), [(4, 64, "float16"), (3, 128, "float32")])
def test_align_and_copy(kv_heads, dim, dtype):
    store = jax.random.normal(jax.random.key(0), (3, 8, 2, kv_heads, 64, dim)).astype(dtype)
    runs = [(10, 259, 40, 77), (60, 380, 10, -500), (90, 400, 1, 3), (93, 470, 1, 900), (120, 480, 5, 1)]
    args = (*copies(runs), 10000.0 ** -jnp.linspace(0, 1, dim // 2), jnp.array([1, 3]))
    moved = triton(kernels.align_and_copy)(store, *args)
    expected = kernels.align_and_copy(store, *args, implementation="reference")
    error = 4e-3 if dtype == "float16" else 1e-4
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (moved, expected)), atol=error)
    assert same(moved[:, :, 1], expected[:, :, 1])


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("dtype", "dim"), [("float16", 64), ("float32", 128), ("float8_e4m3fn", 64)])
def test_copies_with_a_patch(dtype, dim):
    store, moves, patch = restored(dtype, kv_heads=3, dim=dim)
    frequencies = 10000.0 ** -jnp.linspace(0, 1, dim // 2) * jnp.array([1.0, 1.0, 0.1, 1.0])[:, None]
    for inv_freq, layers in ((frequencies[0], (0, 4)), (frequencies, (1, 3))):
        check_restored(triton(kernels.align_and_copy), store, moves, inv_freq, layers, patch)
    check_packed(triton(kernels.pack_rows), store, moves, patch)


def test_tiles_cover_each_row_once_and_hold_one_request_each():
    requests = np.array([0] * 5 + [2] * 9 + [3] + [0] * 4)
    positions = np.array([*range(0, 50, 10), *range(7, 16), 63, *[-1] * 4])
    tiles = np.asarray(row_tiles(jnp.asarray(positions), jnp.asarray(requests), 4, 5, 8))
    kept = [tile for tile in tiles.tolist() if tile[0] < tile[1]]
    # The first row and one behind the last, the request, the last position, blocks of 8 keys that all rows see.
    assert kept == [
        [0, 4, 0, 30, 0],
        [4, 5, 0, 40, 5],
        [5, 9, 2, 10, 1],
        [9, 13, 2, 14, 1],
        [13, 14, 2, 15, 2],
        [14, 15, 3, 63, 8],
        [15, 19, 0, -1, 0],
    ]


def test_rows_that_see_a_block_of_keys():
    requests, positions = np.array([0, 0, 0, 2, 2, 0, 0]), np.array([2, 7, 9, 0, 15, -1, -1])
    seen = seen_by(jnp.asarray(positions), jnp.asarray(requests), 3, 2, 8)
    # The first row that sees anything, the first that sees all of the block, one behind the request's last.
    np.testing.assert_array_equal(seen, [[[0, 1, 3], [2, 3, 3]], [[3, 3, 3], [3, 3, 3]], [[3, 4, 5], [4, 4, 5]]])


@pytest.mark.skipif(ON_GPU, reason="would run there")
def test_what_cannot_be_done_falls_back_or_raises(monkeypatch):
    case = scattered((20,), 4)
    with pytest.raises(NotImplementedError, match=r"jax_triton is not installed|Triton kernels on a cpu"):
        kernels.paged_attention(*case, implementation="triton")
    with prefer("triton", "xla"):
        out = kernels.paged_attention(*case)
    assert same(out, kernels.paged_attention(*case, implementation="xla"))
    monkeypatch.setattr(launcher, "check_available", lambda backend: None)
    for options, reason in [
        ({"dim": 32}, "head_dim 32"),
        ({"page_size": 192}, "page_size 192"),
        ({"dtype": "float32"}, "queries of float32"),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            kernels.key_mass(*scattered((20,), 4, **options), implementation="triton")
    store = jnp.zeros((1, 2, 2, 1, 16, 80))
    with pytest.raises(NotImplementedError, match="head_dim 80"):
        kernels.align_and_copy(store, *[jnp.zeros(3, int)] * 3, jnp.ones(40), implementation="triton")
