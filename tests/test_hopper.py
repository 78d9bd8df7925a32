"""The kernels for Hopper GPUs against the references: small in the interpreter, and with `-m gpu` at real sizes.

Every slot that no row may see holds NaN. References are computed in float32 from the same rounded inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsex_kernels as kernels
from sparsex_kernels.dispatch import prefer


def scattered(lengths, rows, *, kv_heads=2, group=4, dim=64, page_size=64, layers=2, dtype="bfloat16", seed=0):
    """Queries, store and addresses of `rows` rows, spread over requests of these lengths, padding behind."""
    rng = np.random.default_rng(seed)
    max_pages = -(-max(lengths) // page_size)
    pages = len(lengths) * max_pages + 3
    tables = rng.permutation(pages)[: len(lengths) * max_pages].reshape(len(lengths), max_pages).astype(np.int32)
    store = np.full((layers, pages, 2, kv_heads, page_size, dim), np.nan, np.float32)
    for request, length in enumerate(lengths):
        for begin in range(0, length, page_size):
            used = min(page_size, length - begin)
            shape = (layers, 2, kv_heads, used, dim)
            store[:, tables[request, begin // page_size], :, :, :used] = rng.normal(size=shape)
    tokens = [(request, position) for request, length in enumerate(lengths) for position in range(length)]
    used = min(rows - rows // 16, len(tokens))
    chosen = np.array(tokens)[np.sort(rng.permutation(len(tokens))[:used])]
    requests, positions = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    requests[:used], positions[:used] = chosen.T
    q = jnp.asarray(rng.normal(size=(rows, kv_heads * group, dim)), dtype)
    arrays = (jnp.asarray(x) for x in (positions, requests, tables))
    return q, jnp.asarray(store, dtype), jnp.int32(layers - 1), *arrays


def in_float32(case):
    return *(x.astype(jnp.float32) for x in case[:2]), *case[2:]


def relative_error(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def hopper(operation):
    return jax.jit(lambda *args, **options: operation(*args, implementation="hopper", **options))


SMALL = [
    pytest.param({"lengths": (150, 3, 70), "rows": 48}, id="tiles straddle requests"),
    pytest.param({"lengths": (130,), "rows": 20, "dim": 128, "group": 8, "kv_heads": 1}, id="eight heads of 128"),
    pytest.param({"lengths": (256,), "rows": 17, "group": 3, "page_size": 128}, id="three heads, a page a block"),
]


@pytest.mark.parametrize("shape", SMALL)
def test_attention(shape):
    case = scattered(**shape)
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, return_lse=True, implementation="hopper"))
    out, lse = attend(*case)
    expected, expected_lse = kernels.paged_attention(*in_float32(case), return_lse=True, implementation="reference")
    assert relative_error(out, expected) < 4e-3
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@pytest.mark.parametrize("shape", SMALL[::2])
def test_key_mass(shape):
    case = scattered(**shape)
    mass = hopper(kernels.key_mass)(*case)
    expected = kernels.key_mass(*in_float32(case), implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-6)


def same(a, b):
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_write_kv(dtype):
    _, store, layer, *rows = scattered((150, 3, 70), 40, kv_heads=3, dtype=dtype)
    keys, values = jax.random.normal(jax.random.key(0), (2, 40, 3, 64))
    written = hopper(kernels.write_kv)(store, layer, keys, values, *rows)
    assert same(written, kernels.write_kv(store, layer, keys, values, *rows, implementation="reference"))


def copies(shape, runs, page_size):
    """Runs of `(source, target, length, shift)`, then a few scattered tokens, then padding."""
    source, target, shift = (
        np.concatenate([first + step * np.arange(length) for first, step, length in column])
        for column in (
            [(source, 1, length) for source, _, length, _ in runs],
            [(target, 1, length) for _, target, length, _ in runs],
            [(by, 0, length) for _, _, length, by in runs],
        )
    )
    target[-2:] = -1
    return tuple(jnp.asarray(x, jnp.int32) for x in (source, target, shift))


@pytest.mark.parametrize(("kv_heads", "dim", "dtype"), [(4, 64, "bfloat16"), (2, 128, "float32")])
def test_align_and_copy(kv_heads, dim, dtype):
    store = jax.random.normal(jax.random.key(0), (4, 8, 2, kv_heads, 64, dim)).astype(dtype)
    runs = [(10, 259, 40, 77), (60, 380, 10, -500), (90, 400, 1, 3), (93, 470, 1, 900), (120, 480, 5, 1)]
    args = (*copies(store.shape, runs, 64), 10000.0 ** -jnp.linspace(0, 1, dim // 2))
    moved = hopper(kernels.align_and_copy)(store, *args)
    expected = kernels.align_and_copy(store, *args, implementation="reference")
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (moved, expected)), atol=2e-2 if dim == 64 else 1e-4
    )
    assert same(moved[:, :, 1], expected[:, :, 1])


def test_what_cannot_be_done_falls_back_or_raises():
    case = scattered((20,), 4, dim=32)
    with pytest.raises(NotImplementedError, match="head_dim 32"):
        kernels.paged_attention(*case, implementation="hopper")
    with prefer("hopper"), pytest.raises(NotImplementedError, match="hopper: head_dim 32"):
        kernels.paged_attention(*case)
    with prefer("hopper", "xla"):
        out = kernels.paged_attention(*case)
    assert same(out, kernels.paged_attention(*case, implementation="xla"))
