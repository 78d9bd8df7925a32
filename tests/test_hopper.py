"""The kernels for Hopper GPUs against the references: small in the interpreter, and with `-m gpu` at real sizes.

Every slot that no row may see holds NaN. References are computed in float32 from the same rounded inputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsex_kernels as kernels
from sparsex_kernels.dispatch import prefer
from sparsex_kernels.linear import hopper as linear_hopper
from sparsex_kernels.paged_attention import hopper_decode


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
    pytest.param(
        {"lengths": (130,), "rows": 20, "dim": 128, "group": 8, "kv_heads": 1},
        id="eight heads of 128",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"lengths": (256,), "rows": 17, "group": 3, "page_size": 128},
        id="three heads, a page a block",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("shape", SMALL)
def test_attention(shape):
    case = scattered(**shape)
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, return_lse=True, implementation="hopper"))
    out, lse = attend(*case)
    expected, expected_lse = kernels.paged_attention(*in_float32(case), return_lse=True, implementation="reference")
    assert relative_error(out, expected) < 4e-3
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def last_rows(lengths, **options):
    """One row a request, at its last token; the second request has none."""
    q, store, layer, _, _, tables = scattered(lengths, len(lengths), **options)
    positions = jnp.asarray(lengths, jnp.int32).at[1].set(0) - 1
    return q, store, layer, positions, jnp.arange(len(lengths)), tables


@pytest.mark.parametrize(("dim", "group"), [pytest.param(64, 3, marks=pytest.mark.slow), (128, 8)])
def test_decode(dim, group, monkeypatch):
    monkeypatch.setattr(hopper_decode, "PROGRAMS", 4)  # few, as each is slow to interpret
    case = last_rows((300, 5, 64), dim=dim, group=group, kv_heads=1)
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


def stacks(rows, inputs, widths, dtype="bfloat16"):
    """Rows, and weights of three layers."""
    rng = np.random.default_rng(rows)
    x, *weights = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in [(rows, inputs), *((3, inputs, w) for w in widths)]
    )
    return x, tuple(weights)


def exact(x, weights, layer):
    return [np.asarray(x, np.float64) @ np.asarray(weight[layer], np.float64) for weight in weights]


@pytest.mark.parametrize(
    ("rows", "count", "inputs", "widths", "config"),
    [
        pytest.param(
            5, 5, 256, (128, 64), linear_hopper.Config(1, 64, 2, 3, 100), id="few rows, two weights, split sums"
        ),
        pytest.param(200, 70, 128, (128,), linear_hopper.Config(2, 128, 1, 2, 2), id="one of two tiles is wanted"),
        pytest.param(70, 70, 192, (128,), linear_hopper.Config(2, 64, 2, 2, 3), id="several tiles a program"),
    ],
)
def test_linear(rows, count, inputs, widths, config):
    x, weights = stacks(rows, inputs, widths)
    outs = linear_hopper.linear(x, weights, jnp.int32(1), count, config)
    for out, expected in zip(outs, exact(x, weights, 1), strict=True):
        assert out.shape == (rows, expected.shape[1])
        assert relative_error(out[:count], expected[:count]) < 4e-3


def test_linear_refuses_or_falls_back():
    x, weights = stacks(4, 64, (96,))
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        kernels.linear(x, weights, 0, implementation="hopper")
    with prefer("hopper", "xla"):
        (out,) = kernels.linear(x, weights, 2)
    assert relative_error(out, exact(x, weights, 2)[0]) < 4e-3


def same(a, b):
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_write_kv(dtype):
    _, store, layer, *rows = scattered((150, 3, 70), 40, kv_heads=3, dtype=dtype)
    keys, values = jax.random.normal(jax.random.key(0), (2, 40, 3, 64))
    written = hopper(kernels.write_kv)(store, layer, keys, values, *rows)
    assert same(written, kernels.write_kv(store, layer, keys, values, *rows, implementation="reference"))


def copies(runs):
    """Addresses of runs of `(source, target, length, shift)`; the last two tokens are padding."""
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


@pytest.mark.parametrize(
    ("kv_heads", "dim", "dtype"), [(4, 64, "bfloat16"), pytest.param(2, 128, "float32", marks=pytest.mark.slow)]
)
def test_align_and_copy(kv_heads, dim, dtype):
    store = jax.random.normal(jax.random.key(0), (4, 8, 2, kv_heads, 64, dim)).astype(dtype)
    runs = [(10, 259, 40, 77), (60, 380, 10, -500), (90, 400, 1, 3), (93, 470, 1, 900), (120, 480, 5, 1)]
    args = (*copies(runs), 10000.0 ** -jnp.linspace(0, 1, dim // 2))
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


# The rest runs on a real device, at sizes of real models.

REAL = [
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500}, id="dim 64"),
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500, "dim": 128}, id="dim 128"),
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500, "dim": 128, "dtype": "float16"}, id="float16"),
    pytest.param({"lengths": (3000, 900), "rows": 700, "dim": 128, "kv_heads": 4, "group": 7}, id="7 heads share"),
    pytest.param({"lengths": (3000, 900), "rows": 700, "kv_heads": 3, "group": 3}, id="3 heads share"),
    pytest.param({"lengths": (3000, 900), "rows": 700, "dim": 128, "page_size": 128}, id="pages of 128"),
    pytest.param({"lengths": (4096,), "rows": 4369, "dim": 128, "kv_heads": 8}, id="every row of a prompt"),
]


@jax.jit
def dense_head(q, keys, values, positions, scale):
    seen = jnp.arange(len(keys)) <= positions[:, None]
    scores = jnp.where(seen, jnp.dot(q, keys.T, precision="highest") * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.dot(weights, values, precision="highest"), jax.nn.logsumexp(scores, axis=-1), weights.sum(0)


def dense(case, scale):
    """Outputs, log-sum-exps and key mass in float32, head by head."""
    q, store, layer, positions, requests, tables = (np.asarray(x) for x in in_float32(case))
    outs, lses = np.zeros(q.shape, np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    mass = np.zeros((len(tables), tables.shape[1] * store.shape[4]))
    for request, pages in enumerate(tables):
        rows = np.flatnonzero((requests == request) & (positions >= 0))
        for head in range(q.shape[1] if len(rows) else 0):
            kv = store[layer, pages, :, head // (q.shape[1] // store.shape[3])].swapaxes(0, 1)
            keys, values = np.nan_to_num(kv.reshape(2, -1, kv.shape[-1]))
            outs[rows, head], lses[rows, head], sums = dense_head(q[rows, head], keys, values, positions[rows], scale)
            mass[request] += sums
    return outs, lses, mass


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL)
def test_attention_and_key_mass_on_the_device(shape):
    case = scattered(**{"kv_heads": 8} | shape)
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, return_lse=True, implementation="hopper"))
    expected, expected_lse, expected_mass = dense(case, case[0].shape[-1] ** -0.5)
    out, lse = attend(*case)
    assert relative_error(out, expected) < 1e-2
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    key_mass = hopper(kernels.key_mass)
    mass = key_mass(*case)
    assert relative_error(mass, expected_mass) < 1e-3
    for _ in range(5):  # a result that moves is a race
        assert same(attend(*case)[0], out)
        assert same(key_mass(*case), mass)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(5000, 37, 2500, 64, 1, 129) * 4, (16000, 1)], ids=["many", "one long"])
@pytest.mark.parametrize(("dim", "group"), [(128, 4), (64, 3)])
def test_decode_on_the_device(lengths, dim, group):
    case = last_rows(lengths, dim=dim, group=group, kv_heads=8)
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, return_lse=True, implementation="hopper"))
    expected, expected_lse, _ = dense(case, dim**-0.5)
    out, lse = attend(*case)
    assert relative_error(out, expected) < 1e-2
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    assert same(attend(*case)[0], out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (48, 48), (64, 64), (300, 300), (2048, 1300), (2048, 0)])
def test_linear_on_the_device(rows, count, dtype):
    for inputs, widths in ((1024, (1024, 256, 256)), (3584, (1024,)), (576, (1536, 1536))):
        x, weights = stacks(rows, inputs, widths, dtype)
        poisoned = x.at[count:].set(jnp.nan)
        run = jax.jit(lambda *args: kernels.linear(*args, implementation="hopper"))
        outs = run(poisoned, weights, jnp.int32(2), jnp.int32(count))
        for out, expected in zip(outs, exact(x, weights, 2), strict=True):
            assert count == 0 or relative_error(out[:count], expected[:count]) < 4e-3
        for again, out in zip(run(poisoned, weights, jnp.int32(2), jnp.int32(count)), outs, strict=True):
            assert same(again[:count], out[:count])  # a result that moves is a race


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [8, 3, 1])
def test_write_kv_on_the_device(kv_heads):
    _, store, layer, *rows = scattered((5000, 37, 2500), 1500, kv_heads=kv_heads, dim=128)
    keys, values = jax.random.normal(jax.random.key(0), (2, 1500, kv_heads, 128))
    written = hopper(kernels.write_kv)(store, layer, keys, values, *rows)
    assert same(written, kernels.write_kv(store, layer, keys, values, *rows, implementation="xla"))


@pytest.mark.gpu
@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (8, 64), (3, 64), (1, 128)])
def test_align_and_copy_on_the_device(kv_heads, dim):
    store = jax.random.normal(jax.random.key(0), (32, 128, 2, kv_heads, 64, dim)).astype("bfloat16")
    runs = [(10, 4099, 1500, 77), (1700, 5700, 1000, -500), (2800, 6800, 1, 3), (2850, 7000, 33, 900)]
    runs += [(3000 + 3 * n, 7100 + 5 * n, 1, n) for n in range(100)]
    args = (*copies(runs), 10000.0 ** -jnp.linspace(0, 1, dim // 2))
    moved = hopper(kernels.align_and_copy)(store, *args)
    expected = kernels.align_and_copy(store, *args, implementation="xla")
    assert relative_error(moved, expected) < 1e-3
    assert same(moved[:, :, 1], expected[:, :, 1])
