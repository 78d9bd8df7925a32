"""The kernels on a real GPU, at sizes of real models: `pytest -m gpu tests/test_gpu.py`.

Sanitizers are slow, so they have shapes of their own:

    compute-sanitizer --tool memcheck python -m pytest -n 0 -m gpu tests/test_gpu.py -k small
"""

import dataclasses
import importlib.util
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from kernel_cases import (
    check_moved,
    check_nan_stays,
    check_packed,
    check_restored,
    copies,
    cut_to,
    dense,
    exact,
    exact_add_norm,
    exact_gated,
    exact_sums,
    gated_stacks,
    last_rows,
    over_whole_values,
    products_to_write,
    relative_error,
    residuals,
    restored,
    same,
    scattered,
    stacks,
    with_adapters,
    with_added,
)

import sparsex_kernels.api as kernels
from sparsex_jax import Engine, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.device.state import BatchSlot, decode_state
from sparsex_jax.model.sharding import make_mesh
from sparsex_kernels.grouped_linear import make_tiles, rows_a_tile
from sparsex_kernels.layout import as_stored
from sparsex_kernels.mailboxes import make_mailboxes, reach_one_another
from sparsex_kernels.product_parts import ProductParts, sum_parts
from sparsex_kernels.quantised import dequantise, quantise, turned

pytestmark = pytest.mark.gpu

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    max_position=4096,
    num_q_heads=8,
    num_kv_heads=4,
    head_dim=64,
)
FLOAT8 = {"stored": "float8_e4m3fn"}
REAL = [
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500}, id="dim 64"),
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500, "dim": 128}, id="dim 128"),
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500, "dim": 128, "dtype": "float16"}, id="float16"),
    pytest.param({"lengths": (3000, 900), "rows": 700, "dim": 128, "kv_heads": 4, "group": 7}, id="7 heads share"),
    pytest.param({"lengths": (3000, 900), "rows": 700, "kv_heads": 3, "group": 3}, id="3 heads share"),
    pytest.param({"lengths": (3000, 900), "rows": 700, "dim": 128, "page_size": 128}, id="pages of 128"),
    pytest.param({"lengths": (4096,), "rows": 4369, "dim": 128, "kv_heads": 8}, id="every row of a prompt"),
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500, "dim": 128} | FLOAT8, id="float8, dim 128"),
    pytest.param({"lengths": (5000, 37, 2500), "rows": 1500} | FLOAT8, id="float8, dim 64"),
]

# Few rows of a bucket, whose tiles `hopper` cuts into parts: up to 33 of these heads, and never in more than 1024 rows.
TWELVE = {"dim": 128, "kv_heads": 2, "group": 6}
FEW = [
    pytest.param({"lengths": (10340,), "rows": 1024, "live": 101} | TWELVE, id="101 of 1024 rows"),
    pytest.param({"lengths": (10340,), "rows": 1024, "live": 101, "dim": 128}, id="101 of 1024 rows, 32 heads"),
    pytest.param({"lengths": (10340, 37, 2500, 700), "rows": 512, "live": 109} | TWELVE, id="of four requests"),
    pytest.param({"lengths": (10340,), "rows": 256, "live": 50, "kv_heads": 2, "group": 7}, id="50 rows, heads of 64"),
    pytest.param({"lengths": (20000,), "rows": 64, "live": 3} | TWELVE, id="3 of 64 rows"),
    pytest.param({"lengths": (9000,), "rows": 1024, "live": 33 * 16 - 3} | TWELVE, id="33 tiles"),
    pytest.param({"lengths": (9000,), "rows": 1024, "live": 33 * 16 + 3} | TWELVE, id="34 tiles"),
    pytest.param({"lengths": (10340,), "rows": 1025, "live": 101} | TWELVE, id="101 of 1025 rows"),
    pytest.param({"lengths": (10340,), "rows": 1024, "live": 101} | TWELVE | FLOAT8, id="101 of 1024 rows, float8"),
]


SMALL_PAGES = [
    pytest.param({"lengths": (3000, 900), "rows": 700, "dim": 128, "page_size": 16}, id="pages of 16"),
    pytest.param({"lengths": (3000, 900), "rows": 700, "page_size": 32}, id="pages of 32"),
]


def skip_unless_hopper():
    if not str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9."):
        pytest.skip("needs a Hopper GPU")


@pytest.fixture(params=["hopper", "triton"])
def implementation(request):
    if request.param == "hopper":
        skip_unless_hopper()
    if request.param == "triton" and not importlib.util.find_spec("jax_triton"):
        pytest.skip("needs jax_triton")
    return request.param


@pytest.mark.parametrize("shape", REAL + FEW + SMALL_PAGES)
def test_attention_and_key_mass(shape, implementation):
    if implementation == "hopper" and shape.get("page_size", 64) % 64:
        pytest.skip("pages are multiples of 64 there")
    case = scattered(**{"kv_heads": 8} | shape)
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, return_lse=True, implementation=implementation))
    expected, expected_lse, expected_mass = dense(case, case[0].shape[-1] ** -0.5)
    out, lse = attend(*case)
    assert relative_error(out, expected) < 1e-2
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    key_mass = jax.jit(partial(kernels.key_mass, implementation=implementation))
    mass = key_mass(*case)
    assert relative_error(mass, expected_mass) < 1e-3
    for _ in range(5):  # a result that moves is a race
        assert same(attend(*case)[0], out)
        assert same(key_mass(*case), mass)
    focus = jax.jit(partial(kernels.key_mass, power=4, implementation=implementation))(*case)
    assert relative_error(focus, kernels.key_mass(*case, power=4, implementation="xla")) < 2e-3


@pytest.mark.parametrize("lengths", [(5000, 37, 2500, 64, 1, 129) * 4, (16000, 1)], ids=["many", "one long"])
@pytest.mark.parametrize(("dim", "group"), [(128, 4), (64, 3)])
@pytest.mark.parametrize("stored", ["bfloat16", "float8_e4m3fn"])
def test_decode(lengths, dim, group, stored, implementation):
    case = last_rows(lengths, dim=dim, group=group, kv_heads=8, stored=stored)
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, return_lse=True, implementation=implementation))
    expected, expected_lse, _ = dense(case, dim**-0.5)
    out, lse = attend(*case)
    assert relative_error(out, expected) < 1e-2
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)
    assert same(attend(*case)[0], out)


ADAPTERS = [
    pytest.param(lambda: scattered((5000, 37, 2500, 900), 1500, kv_heads=8, dim=128), 16, None, id="dim 128"),
    pytest.param(lambda: scattered((5000, 37, 2500, 900), 1500, kv_heads=8, dim=128), 32, None, id="rank 32"),
    pytest.param(lambda: scattered((5000, 37, 2500, 900), 1500, kv_heads=3, group=3), 16, 4, id="rank 4, 9 heads"),
    pytest.param(lambda: scattered((3000, 900), 700, kv_heads=8), 64, None, id="rank 64, dim 64"),
    pytest.param(
        lambda: scattered((3000, 900), 700, kv_heads=4, dim=128, dtype="float16", page_size=128), 16, 8, id="float16"
    ),
    pytest.param(lambda: scattered((4096,), 4369, kv_heads=8, dim=128), 16, None, id="every row of a prompt"),
    pytest.param(lambda: scattered((10340, 37, 2500, 700), 512, live=109, **TWELVE), 16, None, id="in parts"),
    pytest.param(lambda: scattered((10340,), 1024, live=101, **TWELVE), 32, None, id="in parts, rank 32"),
    pytest.param(lambda: last_rows((5000, 37, 2500, 64, 1, 129) * 4, kv_heads=8, dim=128), 16, None, id="decode"),
    pytest.param(lambda: last_rows((16000, 1), kv_heads=8, dim=128), 32, None, id="decode, one long"),
    pytest.param(lambda: last_rows((5000, 37, 2500, 64), kv_heads=3, group=3), 64, None, id="decode, dim 64"),
]


@pytest.mark.parametrize(("make", "rank", "used"), ADAPTERS)
def test_low_rank(make, rank, used, implementation):
    check_low_rank(make(), rank, used, None, implementation)


@pytest.mark.parametrize("make", [ADAPTERS[at].values[0] for at in (0, 6, 8)], ids=["tiles", "in parts", "decode"])
def test_low_rank_within_windows(make, implementation):
    check_low_rank(make(), 16, None, 100, implementation)


def check_low_rank(case, rank, used, window, implementation):
    """Attention over V and Y is that over V + Y B. All columns of Y but those of a request's adapter hold NaN."""
    low_rank, window = with_adapters(case, rank, used=used), None if window is None else jnp.int32(window)
    attend = jax.jit(partial(kernels.paged_attention, return_lse=True, implementation=implementation))
    attend = partial(attend, window=window)
    out, lse = attend(*case, low_rank=low_rank)
    reference = jax.jit(partial(kernels.paged_attention, return_lse=True, implementation="xla"))
    expected, expected_lse = reference(*over_whole_values(case, low_rank), window=window)
    assert relative_error(out, expected) < 1e-2
    np.testing.assert_allclose(lse, expected_lse, atol=1e-2)
    for _ in range(5):  # a result that moves is a race
        assert same(attend(*case, low_rank=low_rank)[0], out)
    plain, positions, requests = attend(*case)[0], *map(np.asarray, case[3:5])
    without = (positions < 0) | (np.asarray(low_rank.columns)[requests] < 0)
    out, plain = (np.asarray(x, np.float32)[without] for x in (out, plain))
    if implementation == "hopper":  # the same sums, to which 0 is added
        np.testing.assert_array_equal(out, plain)
    np.testing.assert_allclose(out, plain, atol=2e-2)


def test_low_rank_of_small_shapes(implementation):
    """For sanitizers."""
    for case in (
        scattered((150, 3, 70, 20), 90, dim=128),
        scattered((700, 9, 300), 90, live=20, kv_heads=1),
        last_rows((300, 5, 130, 20), kv_heads=1),
    ):
        low_rank = with_adapters(case, 16)
        out = jax.jit(partial(kernels.paged_attention, implementation=implementation))(*case, low_rank=low_rank)
        assert relative_error(out, dense(over_whole_values(case, low_rank), case[0].shape[-1] ** -0.5)[0]) < 1e-2


@pytest.mark.parametrize("columns", [None, (16, -1, 0)])
def test_low_rank_rows_are_written(columns):
    case = scattered((5000, 37, 2500), 1500, kv_heads=8, dim=128)
    layer, *rows = case[2:]
    low, width = jnp.nan_to_num(with_adapters(case, 16).store), 48 if columns is None else 16
    values = jax.random.normal(jax.random.key(0), (1500, width), jnp.bfloat16)
    of = None if columns is None else jnp.asarray(columns)
    written, expected = (
        jax.jit(partial(kernels.write_low_rank, implementation=name))(low, layer, values, *rows, of)
        for name in ("xla", "reference")
    )
    assert same(written, expected)


WINDOWED = [
    pytest.param(lambda: scattered((5000, 37, 2500), 1500, kv_heads=8), id="prefill, dim 64"),
    pytest.param(lambda: scattered((5000, 37, 2500), 1500, kv_heads=8, dim=128), id="prefill, dim 128"),
    pytest.param(lambda: scattered((10340,), 1024, live=101, **TWELVE), id="prefill in parts"),
    pytest.param(lambda: last_rows((5000, 37, 2500, 64, 1, 129), kv_heads=8, dim=128), id="decode, dim 128"),
    pytest.param(lambda: last_rows((16000, 1), kv_heads=3, group=3), id="decode, dim 64"),
]


@pytest.mark.parametrize("window", [1, 64, 100, 1024, 2**31 - 1])
@pytest.mark.parametrize("make", WINDOWED)
def test_windows(make, window, implementation):
    case, within = make(), jnp.int32(window)

    def both(operation, **options):
        run = jax.jit(partial(operation, implementation=implementation, **options))
        expected = jax.jit(partial(operation, implementation="xla", **options))(*case, window=within)
        out = run(*case, window=within)
        for _ in range(3):  # a result that moves is a race
            assert jax.tree.all(jax.tree.map(same, run(*case, window=within), out))
        return out, expected

    (out, lse), (expected, expected_lse) = both(kernels.paged_attention, return_lse=True)
    assert relative_error(out, expected) < 1e-2
    np.testing.assert_allclose(lse, expected_lse, atol=1e-2)
    assert relative_error(*both(kernels.key_mass)) < 2e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (8, 5), (48, 48), (64, 64), (300, 300), (2048, 1300), (2048, 0)])
def test_linear(rows, count, dtype):
    skip_unless_hopper()
    for inputs, widths in ((1024, (1024, 256, 256)), (3584, (1024,)), (576, (1536, 1536))):
        x, weights = stacks(rows, inputs, widths, dtype)
        poisoned = x.at[count:].set(jnp.nan)
        run = jax.jit(lambda *args: kernels.linear(*args, implementation="hopper"))
        outs = run(poisoned, weights, jnp.int32(2), jnp.int32(count))
        for out, expected in zip(outs, exact(x, weights, 2), strict=True):
            assert count == 0 or relative_error(out[:count], expected[:count]) < 4e-3
        for again, out in zip(run(poisoned, weights, jnp.int32(2), jnp.int32(count)), outs, strict=True):
            assert same(again[:count], out[:count])  # a result that moves is a race


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (8, 5), (64, 64), (300, 300), (2048, 1300), (2048, 0)])
def test_linear_goes_on_with_what_is_added(rows, count, dtype):
    """In split and whole sums, to all products or to some; what is added to the others changes no bit of theirs."""
    skip_unless_hopper()
    run = jax.jit(lambda *args, added: kernels.linear(*args, added=added, implementation="hopper"))
    for inputs, widths, ranks in (
        (1024, (1024, 256, 256), (128, 128, 128)),
        (1024, (1024, 256), (64, 0)),
        (576, (1536,), (256,)),
    ):
        x, weights = stacks(rows, inputs, widths, dtype)
        weights = [weight * inputs**-0.5 for weight in weights]
        added = with_added(rows, widths, ranks, dtype)
        args = x.at[count:].set(jnp.nan), weights, jnp.int32(2), jnp.int32(count)
        outs = run(*args, added=added)
        for out, expected in zip(outs, exact_sums(x, weights, added, 2), strict=True):
            assert count == 0 or relative_error(out[:count], expected[:count]) < 4e-3
        for _ in range(3):
            for again, out in zip(run(*args, added=added), outs, strict=True):
                assert same(again[:count], out[:count])  # a result that moves is a race
        others = [
            more and dataclasses.replace(more, stack=more.stack[::-1]) for more in added
        ]  # to rows of adapters only
        for other, out in zip(run(*args, added=others), outs, strict=True):
            assert same(other[:count:3], out[:count:3])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (8, 5), (64, 64), (300, 300), (2048, 1300), (2048, 0)])
def test_gated_linear_goes_on_with_what_is_added(rows, count, dtype):
    skip_unless_hopper()
    run = jax.jit(lambda *args, added: kernels.gated_linear(*args, added=added, implementation="hopper"))
    for inputs, width, ranks in ((1024, 12288, (128, 128)), (3584, 192, (64, 64)), (576, 1536, (0, 128))):
        x, *weights = gated_stacks(rows, inputs, width, dtype)
        added = with_added(rows, (width, width), ranks, dtype)
        args = x.at[count:].set(jnp.nan), *weights, jnp.int32(2), jnp.int32(count)
        out = run(*args, added=added)
        gate, up = exact_sums(x, weights, added, 2)
        assert count == 0 or relative_error(out[:count], (gate / (1 + np.exp(-gate)) * up)[:count]) < 8e-3
        for _ in range(5):
            assert same(run(*args, added=added)[:count], out[:count])  # a result that moves is a race


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (8, 5), (24, 24), (64, 64), (300, 300), (2048, 1300), (2048, 0)])
def test_gated_linear(rows, count, dtype):
    skip_unless_hopper()
    for inputs, width in ((1024, 12288), (3584, 192), (576, 1536)):  # of few rows, the kernel gates the first alone
        x, *weights = gated_stacks(rows, inputs, width, dtype)
        poisoned = x.at[count:].set(jnp.nan)
        run = jax.jit(lambda *args: kernels.gated_linear(*args, implementation="hopper"))
        out = run(poisoned, *weights, jnp.int32(2), jnp.int32(count))
        expected = exact_gated(x, *weights, 2)
        assert count == 0 or relative_error(out[:count], expected[:count]) < 8e-3
        for _ in range(5):  # a result that moves is a race
            assert same(run(poisoned, *weights, jnp.int32(2), jnp.int32(count))[:count], out[:count])


@pytest.mark.parametrize("scaled", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("rows", "width", "parts"), [(1, 4096, 8), (8, 4096, 8), (64, 4096, 1), (32, 3072, 4), (5, 512, 2)]
)
def test_add_norm(rows, width, parts, scaled):
    skip_unless_hopper()
    case = *residuals(rows, width, parts, scaled=scaled), jnp.int32(2)
    run = jax.jit(partial(kernels.add_norm, eps=1e-5, implementation="hopper"))
    outs = run(*case)
    for out, expected in zip(outs, exact_add_norm(*case, 1e-5), strict=True):
        assert relative_error(out, expected) < 4e-3
    for _ in range(5):  # a result that moves is a race
        assert all(map(same, run(*case), outs))


@pytest.mark.parametrize(("width", "parts", "scaled"), [(4096, 8, "bfloat16"), (3072, 3, "float32")])
def test_add_norm_of_few_of_many_rows(width, parts, scaled):
    """Parts that are not used, and rows that are not wanted, hold NaN."""
    skip_unless_hopper()
    product, residual, scales = residuals(1024, width, parts, scaled=scaled)
    run = jax.jit(partial(kernels.add_norm, eps=1e-5, implementation="hopper"))
    for count, used in ((1, parts), (205, 2), (1024, 1), (0, 1)):
        case = cut_to(used, product), residual.at[count:].set(jnp.nan), scales, jnp.int32(2)
        outs = run(*case, jnp.int32(count))
        for out, expected in zip(outs, exact_add_norm(*case, 1e-5), strict=True):
            assert count == 0 or relative_error(out[:count], expected[:count]) < 4e-3
        for _ in range(5):  # a result that moves is a race
            assert all(same(a[:count], b[:count]) for a, b in zip(run(*case, jnp.int32(count)), outs, strict=True))


def sums_over_gpus(mesh, about):
    """A program that makes sums of products, `[sums, devices * parts, rows, width]`, one after the other. It gives what
    each device has of all: `[devices, sums, rows, width]`."""
    by_device = PartitionSpec("tensor")

    def run(products, used, residual, scales, count, mailboxes):
        outs = []
        for product in products:
            outs.append(kernels.add_norm(ProductParts(product, used), residual, scales, 1, count, mailboxes, **about))
        return jax.tree.map(lambda *each: jnp.stack(each)[None], *outs)

    specs = PartitionSpec(None, "tensor"), *[PartitionSpec()] * 4, by_device
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=by_device, check_vma=False))


@pytest.mark.parametrize(
    ("rows", "width", "parts", "counts"),
    [
        (8, 4096, 8, (None,)),
        (64, 4096, 1, (None,)),
        (32, 8192, 2, (None,)),
        (5, 512, 2, (None,)),
        (300, 4096, 8, (300, 205, 1, 0, 270)),
        (1536, 4096, 2, (1536, 1319, 1)),
        (2048, 4096, 1, (2048, 0, 1, 1300, 264, 265)),
    ],
)
def test_add_norm_sums_over_gpus(rows, width, parts, counts):
    """Many sums in a row, each of other numbers: what is left of one must not pass for the next. Few rows and many
    take turns."""
    skip_unless_hopper()
    mesh = make_mesh(len(jax.devices()))
    if mesh.size < 2 or not reach_one_another(jax.devices()):
        pytest.skip("needs GPUs that reach one another")
    mailboxes, sums, rng = make_mailboxes(mesh, max(rows, 8), width), 5, np.random.default_rng(rows)
    run = sums_over_gpus(mesh, {"eps": 1e-5, "implementation": "hopper"})
    dtype = jnp.bfloat16 if parts == 1 else jnp.float32
    repeated = [(rows, each) for each in counts * (3 if len(counts) == 1 else 1)]
    for size, count in itertools.chain.from_iterable((each, (5, None)) for each in repeated):
        products = jnp.asarray(rng.normal(size=(sums, mesh.size * parts, size, width)), dtype)
        _, residual, scales = residuals(size, width, 1)
        used = jnp.int32(max(parts - 1, 1)) if count is not None and parts > 1 else None
        hidden, normed = run(products, used, residual, scales, count, mailboxes)
        own = np.asarray(products, np.float64).reshape(sums, mesh.size, parts, size, width)
        rounded = jnp.asarray(own[:, :, : used if used is None else int(used)].sum(2), residual.dtype).swapaxes(0, 1)
        for n in range(sums):
            expected = exact_add_norm(ProductParts(rounded[:, n]), residual, scales, 1, 1e-5)
            for out, exactly in zip((hidden, normed), expected, strict=True):
                assert count == 0 or relative_error(out[0, n, :count], exactly[:count]) < 4e-3
        assert all(same(hidden[0, :, :count], other[:, :count]) for other in hidden[1:])  # all GPUs have the same


@pytest.mark.parametrize(
    ("rows", "count", "inputs", "widths"),
    [(1, 1, 4096, (4096, 1024, 1024)), (8, 5, 4096, (4096, 1024, 1024)), (64, 64, 4096, (4096, 1024, 1024))]
    + [(1536, count, 14336, (4096,)) for count in (1536, 1319, 1025)],
)
def test_linear_parts(rows, count, inputs, widths):
    skip_unless_hopper()
    x, weights = stacks(rows, inputs, widths)
    run = jax.jit(lambda *args: kernels.linear_parts(*args, implementation="hopper").parts.sum(0))
    expected = np.concatenate(exact(x, weights, 2), axis=1)
    assert relative_error(run(x, weights, jnp.int32(2), jnp.int32(count))[:count], expected[:count]) < 4e-3


@pytest.mark.parametrize(("inputs", "width", "most"), [(14336, 4096, 8), (4096, 4096, 8), (8192, 8192, 4)])
def test_linear_parts_of_few_of_many_rows(inputs, width, most):
    """As many as fill one round of programs. Rows that are not wanted hold NaN."""
    skip_unless_hopper()
    x, weights = stacks(1024, inputs, (width,))
    (expected,) = exact(x, weights, 2)
    run = jax.jit(partial(kernels.linear_parts, implementation="hopper"))
    for count in (1, 128, 129, 205, 300, 410, 512, 1024, 0):
        args = x.at[count:].set(jnp.nan), weights, jnp.int32(2), jnp.int32(count)
        product, row_tiles = run(*args), max(-(-count // 128), 1)
        assert product.used == max(min(132 // (width // 256 * row_tiles), most), 1)
        out = sum_parts(cut_to(int(product.used), product), jnp.float32)[:count]
        assert count == 0 or relative_error(out, expected[:count]) < 4e-5  # sums of 14336 in the tensor cores
        for _ in range(5):  # a result that moves is a race
            assert same(sum_parts(run(*args), jnp.float32)[:count], out)


@pytest.mark.parametrize("kv_heads", [8, 3, 1])
def test_write_kv(kv_heads, implementation):
    _, store, layer, *rows = scattered((5000, 37, 2500), 1500, kv_heads=kv_heads, dim=128)
    keys, values = jax.random.normal(jax.random.key(0), (2, 1500, kv_heads, 128))
    written = jax.jit(partial(kernels.write_kv, implementation=implementation))(store, layer, keys, values, *rows)
    assert same(written, kernels.write_kv(store, layer, keys, values, *rows, implementation="xla"))


@pytest.mark.parametrize("parts", [5, 1])
@pytest.mark.parametrize(("rows", "live", "kv_heads", "group", "dim"), [(8, 1, 8, 4, 128), (64, 50, 4, 7, 64)])
def test_rotate_and_write(rows, live, kv_heads, group, dim, parts):
    skip_unless_hopper()
    case = scattered((5000, 37, 2500), rows, live=live, kv_heads=kv_heads, group=group, dim=dim)
    product, inv_freq = products_to_write(parts, case)
    run = partial(kernels.rotate_and_write, product, *case[1:], inv_freq, dtype=jnp.bfloat16)
    (q, store), (expected, expected_store) = run(implementation="hopper"), run(implementation="xla")
    assert relative_error(q, expected) < 4e-3  # cosines may differ in the last bit, and so may what is rounded
    unwritten, written = (np.nan_to_num(np.asarray(x, np.float32)) for x in (case[1], expected_store))
    got = np.nan_to_num(np.asarray(store, np.float32))
    # Parts may be added in another order, which one rounding in some millions shows.
    np.testing.assert_allclose(got[:, :, 1], written[:, :, 1], rtol=2**-7 if parts > 1 else 0)
    np.testing.assert_array_equal((got != unwritten).any(-1), (written != unwritten).any(-1))
    np.testing.assert_allclose(got[:, :, 0], written[:, :, 0], rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize(("live", "used"), [(1, 5), (205, 2), (1024, 1)])
@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(8, 4, 128), (4, 7, 64)])
def test_rotate_and_write_of_few_of_many_rows(live, used, kv_heads, group, dim):
    """Parts that are not used, and products of padding, hold NaN."""
    skip_unless_hopper()
    case = scattered((5000, 37, 2500), 1024, live=live, kv_heads=kv_heads, group=group, dim=dim)
    product, inv_freq = products_to_write(5, case)
    product = cut_to(used, product._replace(parts=product.parts.at[:, live:].set(jnp.nan)))
    run = partial(kernels.rotate_and_write, product, *case[1:], inv_freq, jnp.int32(live), dtype=jnp.bfloat16)
    (q, store), (expected, expected_store) = run(implementation="hopper"), run(implementation="xla")
    assert relative_error(q[:live], expected[:live]) < 4e-3
    unwritten, got, written = (np.nan_to_num(np.asarray(x, np.float32)) for x in (case[1], store, expected_store))
    np.testing.assert_array_equal((got != unwritten).any(-1), (written != unwritten).any(-1))
    np.testing.assert_allclose(got, written, rtol=2**-6, atol=2**-8)
    for _ in range(5):  # a result that moves is a race
        again, stored = run(implementation="hopper")
        assert same(again[:live], q[:live])
        assert same(stored, store)


@pytest.mark.parametrize(
    ("kv_heads", "dim", "layers"), [(8, 128, (0, 32)), (8, 64, (3, 29)), (3, 64, (30, 32)), (1, 128, (5, 5))]
)
def test_align_and_copy(kv_heads, dim, layers, implementation):
    store = jax.random.normal(jax.random.key(0), (32, 128, 2, kv_heads, 64, dim)).astype("bfloat16")
    runs = [(10, 4099, 1500, 77), (1700, 5700, 1000, -500), (2800, 6800, 1, 3), (2850, 7000, 33, 900)]
    runs += [(3000 + 3 * n, 7100 + 5 * n, 1, n) for n in range(100)]
    args = (*copies(runs), 10000.0 ** -jnp.linspace(0, 1, dim // 2), jnp.array(layers))
    moved = jax.jit(partial(kernels.align_and_copy, implementation=implementation))(store, *args)
    expected = kernels.align_and_copy(store, *args, implementation="xla")
    assert relative_error(moved, expected) < 1e-3
    assert same(moved[:, :, 1], expected[:, :, 1])


def test_each_layer_aligned_by_its_own_frequencies(implementation):
    store = jax.random.normal(jax.random.key(0), (6, 128, 2, 8, 64, 128)).astype("bfloat16")
    bases = jnp.array([1e4, 1e4, 1e6, 1e4, 1e4, 1e6])
    args = (*copies([(10, 4099, 1500, 77), (1700, 5700, 1000, -500)]), bases[:, None] ** -jnp.linspace(0, 1, 64))
    moved = jax.jit(partial(kernels.align_and_copy, implementation=implementation))(store, *args)
    expected = kernels.align_and_copy(store, *args, implementation="xla")
    assert relative_error(moved, expected) < 1e-3
    assert same(moved[:, :, 1], expected[:, :, 1])


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "dim"),
    [
        ("bfloat16", 8, 128),
        ("bfloat16", 3, 64),
        ("bfloat16", 1, 128),
        ("float16", 8, 64),
        ("float32", 2, 128),
        ("float8_e4m3fn", 8, 128),
        ("float8_e4m3fn", 2, 64),
    ],
)
def test_copies_with_a_patch(dtype, kv_heads, dim, implementation):
    """No bit differs from rows copied on their own: with blocks of patch rows, few layers of some, and pages of 64."""
    store, moves, patch = restored(dtype, layers=8, kv_heads=kv_heads, dim=dim, runs=4)
    align, pack = (
        jax.jit(partial(operation, implementation=implementation))
        for operation in (kernels.align_and_copy, kernels.pack_rows)
    )
    inv_freq = 10000.0 ** -jnp.linspace(0, 1, dim // 2)
    check_restored(align, store, moves, inv_freq, (0, 8), patch)
    by_layer = inv_freq * jnp.where(jnp.arange(8) % 3 < 2, 1.0, 0.1)[:, None]
    check_restored(align, store, moves, by_layer, (1, 7), patch)
    check_packed(pack, store, moves, patch)


@pytest.mark.parametrize(("kv_heads", "dim"), [(8, 128), (8, 64), (2, 64)])
def test_float8_is_written_and_moved(kv_heads, dim, implementation):
    _, store, layer, *rows = scattered((5000, 37), 1500, kv_heads=kv_heads, dim=dim, layers=8, **FLOAT8)
    keys, values = 300 * jax.random.normal(jax.random.key(0), (2, 1500, kv_heads, dim))
    written = jax.jit(partial(kernels.write_kv, implementation=implementation))(store, layer, keys, values, *rows)
    assert same(written, kernels.write_kv(store, layer, keys, values, *rows, implementation="xla"))
    full = as_stored(300 * jax.random.normal(jax.random.key(1), store.shape), store.dtype)
    moves = (*copies([(10, 4099, 1500, 77), (1700, 5700, 1, 3)]), 10000.0 ** -jnp.linspace(0, 1, dim // 2))
    moved = jax.jit(partial(kernels.align_and_copy, implementation=implementation))(full, *moves)
    check_moved(moved, kernels.align_and_copy(full, *moves, implementation="xla"))


@pytest.mark.parametrize("dim", [64, 128])
def test_nan_of_a_request_stays_with_it(dim, implementation):
    """The others' tiles may hold rows of several requests."""
    check_nan_stays(scattered((700, 30, 250, 2), 400, dim=dim, kv_heads=8), implementation)


@pytest.mark.parametrize("lengths", [(5000, 37, 2500, 64), (70, 1, 16000, 129, 2500) * 2], ids=["few", "more"])
def test_nan_of_a_request_stays_with_it_in_decode(lengths, implementation):
    check_nan_stays(last_rows(lengths, dim=128, kv_heads=8), implementation)


def test_small_shapes(implementation):
    """Every operation once: prefill with several requests a tile, and in parts, decode, key mass, write, align."""

    def run(operation, **options):
        return jax.jit(partial(operation, implementation=implementation, **options))

    few = scattered((700, 9, 300), 90, live=20, kv_heads=1)
    for case in (scattered((150, 3, 70), 90, dim=128), few, last_rows((300, 5, 130), kv_heads=1)):
        out, _ = run(kernels.paged_attention, return_lse=True)(*case)
        assert relative_error(out, dense(case, case[0].shape[-1] ** -0.5)[0]) < 1e-2
    q, store, layer, *rows = case = scattered((150, 3, 70), 90)
    for power in (1, 4):
        mass = run(kernels.key_mass, power=power)(*case)
        assert relative_error(mass, kernels.key_mass(*case, power=power, implementation="xla")) < 2e-3
    new = jax.random.normal(jax.random.key(0), (2, len(q), *store.shape[3:6:2]))
    written = run(kernels.write_kv)(store, layer, *new, *rows)
    assert same(written, kernels.write_kv(store, layer, *new, *rows, implementation="xla"))
    moves = (*copies([(10, 400, 70, 77)]), 10000.0 ** -jnp.linspace(0, 1, store.shape[-1] // 2))
    store = jnp.nan_to_num(store)
    moved = run(kernels.align_and_copy)(store, *moves)
    assert relative_error(moved, kernels.align_and_copy(store, *moves, implementation="xla")) < 1e-3
    store, moves, patch = restored("bfloat16")
    inv_freq = 10000.0 ** -jnp.linspace(0, 1, 32)
    check_restored(run(kernels.align_and_copy), store, moves, inv_freq, (0, 4), patch)
    check_packed(run(kernels.pack_rows), store, moves, patch)


@pytest.mark.parametrize("kind", ["fp8", "int8", "squares", "q4_k", "q6_k"])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (8, 5), (64, 64), (300, 200)])
def test_linear_of_quantised_weights(rows, count, kind):
    skip_unless_hopper()
    x, dense = stacks(rows, 1024, (1024, 256, 256))
    weights = [quantise(weight, "fp8" if kind == "squares" else kind) for weight in dense]
    if kind in ("fp8", "int8", "squares"):
        weights = [turned(weight) for weight in weights]
    if kind == "squares":
        scale = jnp.linspace(0.01, 1, 8)[None, :, None]
        squares = (scale * jnp.ones((len(weight), 1, weight.shape[2] // 128)) for weight in weights)
        weights = [dataclasses.replace(weight, scales=each) for weight, each in zip(weights, squares, strict=True)]
    run = jax.jit(lambda *args: kernels.linear(*args, implementation="hopper"))
    outs = run(x.at[count:].set(jnp.nan), weights, jnp.int32(2), jnp.int32(count))
    plain = [dequantise(weight, jnp.float32) for weight in weights]
    for out, expected in zip(outs, exact(x, plain, 2), strict=True):
        assert relative_error(out[:count], expected[:count]) < 8e-3


def test_small_linear_shapes():
    skip_unless_hopper()
    x, weights = stacks(40, 256, (384, 128))
    for out, expected in zip(
        kernels.linear(x, weights, jnp.int32(2), jnp.int32(33)), exact(x, weights, 2), strict=True
    ):
        assert relative_error(out[:33], expected[:33]) < 4e-3


@pytest.mark.parametrize("rows", [8, 1024])
def test_grouped_linear(rows):
    """A layer of Qwen3-30B-A3B: few rows, in tiles of 8, and many, in tiles of 64."""
    skip_unless_hopper()
    keys = jax.random.split(jax.random.key(rows), 5)
    group = jax.random.randint(keys[0], (8 * rows,), 0, 128).at[-5:].set(-1)
    tiles = make_tiles(group, 128, rows_a_tile(8 * rows, 128))
    x = jax.random.normal(keys[1], (8 * rows, 2048), jnp.bfloat16)[tiles.members]
    gate, up, down = (
        jax.random.normal(key, (2, 128, *size), jnp.bfloat16) * size[0] ** -0.5
        for key, size in zip(keys[2:], ((2048, 768), (2048, 768), (768, 2048)), strict=True)
    )
    places = tiles.places[:-5]
    gated = {
        name: jax.jit(partial(kernels.gated_grouped_linear, implementation=name))(x, gate, up, 1, tiles.groups)
        for name in ("hopper", "xla")
    }
    assert relative_error(gated["hopper"][places], gated["xla"][places]) < 1e-2
    out, expected = (
        jax.jit(partial(kernels.grouped_linear, implementation=name))(gated["hopper"], down, 1, tiles.groups)[places]
        for name in ("hopper", "xla")
    )
    assert relative_error(out, expected) < 4e-3


@pytest.mark.parametrize("rows", [8, 300, 8192])
def test_grouped_linear_in_tiles_of_each_size(rows):
    skip_unless_hopper()
    tile = rows_a_tile(rows, 16)
    group = jax.random.randint(jax.random.key(0), (rows,), -1, 17)
    tiles = make_tiles(group, 16, tile)
    x = jax.random.normal(jax.random.key(1), (rows, 512), jnp.bfloat16)[tiles.members]
    weights = jax.random.normal(jax.random.key(2), (3, 16, 512, 320), jnp.bfloat16)
    out, expected = (
        kernels.grouped_linear(x, weights, 2, tiles.groups, implementation=name) for name in ("hopper", "xla")
    )
    here = tiles.places[tiles.places >= 0]
    assert relative_error(out[here], expected[here]) < 4e-3


def test_two_gpus_give_the_logits_of_one():
    """Kernels under `shard_map`: every phase of a sparse prefill, with key mass summed over the mesh."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    single, double = (_answers(SMALL, devices) for devices in (1, 2))
    for name, logits in single.items():
        assert relative_error(double[name], logits) < 2e-2, name


def test_decode_on_two_gpus_gives_the_logits_of_one():
    """Token after token, each with the keys of those before it; parts are exchanged by mailboxes."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    tokens = np.random.default_rng(0).integers(1, SMALL.vocab_size, 40)
    single, double = (_decoded(SMALL, devices, tokens) for devices in (1, 2))
    assert relative_error(double, single) < 2e-2


def _decoded(model, devices, tokens):
    """The logits behind each token of two requests, of which one is three tokens ahead."""
    runner = Engine.from_config(model, dtype="bfloat16", mesh=make_mesh(devices), store_tokens=8192).runner
    assert devices == 1 or runner.params.mailboxes is not None or not reach_one_another(jax.devices()[:devices])

    def slot(at, page):
        return BatchSlot(tokens[:at], [int(tokens[at])], SamplingParams(), pages=[page])

    logits = []
    for at in range(3, len(tokens)):
        state = decode_state([slot(at, 1), slot(at - 3, 2)], runner.shapes.max_pages, model.vocab_size)
        logits.append(np.asarray(runner.start_forward(state)))
    return np.concatenate(logits)


def _answers(model, devices):
    engine = Engine.from_config(model, dtype="bfloat16", mesh=make_mesh(devices), store_tokens=8192)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 512, (2, 700))
    for document in (first, second):
        engine.remember(document)
    prompt = np.concatenate(
        [rng.integers(0, 512, 60), second, rng.integers(0, 512, 9), first, rng.integers(0, 512, 40)]
    )
    methods = [ReuseConfig("full"), ReuseConfig("naive"), ReuseConfig(boundary_layer=1), ReuseConfig("focus")]
    return {reuse.method: engine.prefill(prompt, reuse=reuse, keep=False).logits for reuse in methods}
