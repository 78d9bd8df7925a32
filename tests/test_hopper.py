"""The kernels for Hopper GPUs against the references, small, in Mosaic GPU's interpreter. On a GPU: `test_gpu.py`."""

import dataclasses
import functools
import itertools

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
    cut_to,
    exact,
    exact_add_norm,
    exact_gated,
    exact_sums,
    gated_stacks,
    in_float32,
    jitted,
    last_rows,
    late_rows,
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
from sparsex_kernels import hopper_products
from sparsex_kernels.add_norm import hopper as hopper_add_norm
from sparsex_kernels.arguments import AttentionArgs, Heads, LinearArgs
from sparsex_kernels.backend import Backend, prefer
from sparsex_kernels.layout import as_stored
from sparsex_kernels.linear import hopper as linear_hopper
from sparsex_kernels.paged_attention import hopper as hopper_attention
from sparsex_kernels.paged_attention import hopper_decode, hopper_merge
from sparsex_kernels.paged_attention.hopper_shape import DEFAULT, Config, Shape
from sparsex_kernels.paged_attention.shares import key_shares
from sparsex_kernels.paged_attention.tiles import Splits, tile_parts
from sparsex_kernels.product_parts import sum_parts
from sparsex_kernels.quantised import Quantised, dequantise, quantise, turned
from sparsex_kernels.rotate_and_write import hopper as hopper_rotation
from sparsex_kernels.rotate_and_write import is_one_kernel

CPU = Backend("cpu")
EIGHT = Config(programs=8)


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
    expected, expected_lse = jitted(kernels.paged_attention)(
        *in_float32(case), return_lse=True, implementation="reference"
    )
    assert relative_error(out, expected) < 4e-3
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@pytest.fixture
def few_programs(monkeypatch):
    """Decode in few and large programs, as each is slow to interpret."""
    monkeypatch.setattr(hopper_decode, "PROGRAMS", 4)
    monkeypatch.setattr(hopper_decode, "AT_ONCE", {64: 2, 128: 2})
    monkeypatch.setattr(hopper_merge, "MULTIPROCESSORS", 1)


def arguments(case, window=None):
    return AttentionArgs(*case, scale=case[0].shape[-1] ** -0.5, backend=CPU, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [{"kv_heads": 1, "group": 8}, {"dim": 128, "group": 3}])
def test_few_rows_are_cut_into_parts(heads, few_programs):
    """Of 2 tiles the second is padding; the parts of the first begin and end within requests. Memory begins as NaN."""
    case = scattered((600, 9, 300), 30, live=10, **heads)
    attend = jax.jit(lambda *case: hopper_attention.paged_attention(arguments(case), True, EIGHT))
    out, lse = attend(*case)
    expected, expected_lse = jitted(kernels.paged_attention)(
        *in_float32(case), return_lse=True, implementation="reference"
    )
    assert relative_error(out, expected) < 4e-3
    assert not np.asarray(out[10:]).any()
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@pytest.mark.slow
def test_log_sum_exps_of_few_rows_are_cut_into_parts(few_programs):
    case = scattered((600, 9, 300), 30, live=10, kv_heads=1, group=8)
    only_lse = jax.jit(lambda *case: hopper_attention.attend(arguments(case), values=False, lse=True, config=EIGHT))
    _, expected = jitted(kernels.paged_attention)(*in_float32(case), return_lse=True, implementation="reference")
    np.testing.assert_allclose(only_lse(*case)[0], expected, atol=1e-4)


@pytest.mark.parametrize(("rows", "length", "cut"), [(1024, 1000, True), (1025, 1000, False), (1024, 300, False)])
def test_no_program_of_many_rows_or_few_keys_cuts_tiles(rows, length, cut):
    assert Shape.of(arguments(scattered((length,), rows, layers=1)), True, False, DEFAULT).cut is cut


@pytest.mark.parametrize("lengths", [(8193,), (32768,), (8200,) * 32, (100,), (9000, 0, 64, 65, 0, 4096), (0, 0)])
@pytest.mark.parametrize("heads", [8, 4])
@pytest.mark.parametrize("window", [None, 1000])
def test_shares_of_keys_are_equal_and_have_each_block_once(lengths, heads, window):
    """A GPU runs 132 programs at a time."""
    positions = np.array([*lengths, 0, 0, 0]) - 1  # the last ones are padding
    on = jnp.asarray(positions), jnp.arange(len(positions)), heads
    cut = {"programs": 264, "block": 64, "at_once": 132, "window": window and jnp.int32(window)}
    pieces, spans, ranges, number = map(np.asarray, key_shares(*on, **cut))

    def blocks(begin, end):
        """Rows and their blocks, of pieces."""
        return [(row, at) for row, _, _, first, last, *_ in pieces[begin:end] for at in range(first, last)]

    ends = positions + 1
    firsts = np.maximum(ends - (window or max(ends)), 0) // 64
    expected = [[(row, at) for at in range(firsts[row], -(-end // 64))] for row, end in enumerate(ends)]
    assert [blocks(*each) for each in spans] == expected
    assert all(first < last for begin, end in spans for _, _, _, first, last, *_ in pieces[begin:end])
    assert (pieces[:, 2] == positions[pieces[:, 0]]).all()
    shares = [blocks(*each) for each in ranges]
    assert list(itertools.chain(*shares)) == list(itertools.chain(*expected))
    sizes = [len(share) for share in shares[:number]]
    assert max(sizes) - min(sizes) <= 1
    rounds = -(-int(number) * heads // 132)
    assert rounds * (max(sizes) + 1) <= 1.02 * sum(sizes) * heads / 132 + 3


def check_windows(case, windows, attend):
    """One program for all windows. What no row sees holds NaN, so a block too many that is read would be seen."""
    attend = jax.jit(attend)
    for window in windows:
        poisoned = behind_windows(case, window)
        out, lse = attend(*poisoned, jnp.int32(window))
        expected, expected_lse = jitted(kernels.paged_attention)(
            *in_float32(poisoned), window=jnp.int32(window), return_lse=True, implementation="reference"
        )
        assert relative_error(out, expected) < 4e-3
        np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def attend(*args):
    *case, window = args
    return kernels.paged_attention(*case, window=window, return_lse=True, implementation="hopper")


EVERYTHING = 2**31 - 1  # no limit


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        pytest.param(
            {"lengths": (600, 3, 70), "rows": 40, "kv_heads": 1, "group": 2},
            (150, EVERYTHING),
            id="tiles straddle requests",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"lengths": (900, 300), "rows": 100, "dim": 128, "group": 8, "kv_heads": 1},
            (1, 128, 200),
            id="eight heads of 128",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_attention_within_windows(shape, windows):
    check_windows(late_rows(scattered(**shape)), windows, attend)


@pytest.mark.slow
def test_few_rows_within_windows_are_cut_into_parts(few_programs):
    case = late_rows(scattered((1200, 9, 300), 30, live=20, kv_heads=1, group=8))

    def attend(*args):
        *case, window = args
        return hopper_attention.paged_attention(arguments(case, window), True, EIGHT)

    check_windows(case, (300,), attend)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [(1, 64, 100, EVERYTHING)])
def test_decode_within_windows(windows, few_programs):
    check_windows(last_rows((260, 5, 64), kv_heads=1), windows, attend)


def parts_by_hand(blocks, splits):
    """What `tile_parts` returns for tiles of these numbers of key blocks: its lines that are used, and the ranges."""
    live = [tile for tile, n in enumerate(blocks) if n]
    lines, ranges = [], {}
    for tile in live[::-1] + [tile for tile, n in enumerate(blocks) if not n]:
        n, count = blocks[tile], 1
        if len(live) <= splits.tiles:
            count = max(min(n * splits.parts // max(sum(blocks), 1), n // 2), 1)
        size = max(-(-n // count), 1)
        begins = range(0, max(n, 1), size)
        ranges[tile] = [len(lines), len(lines) + len(begins)]
        lines += [[tile, begin, min(begin + size, n), count == 1] for begin in begins]
    return np.array(lines), np.array([ranges[tile] for tile in range(len(blocks))])


@pytest.mark.parametrize("heads", [4, 20])  # up to 33 parts of 12 tiles, or 6 parts of 3
def test_tile_parts(heads):
    splits = Splits.of(12, heads, 90, 132)
    cut = jax.jit(lambda spans: tile_parts(spans, 128, splits))
    for seed in range(30):
        rng = np.random.default_rng(seed)
        live = int(rng.integers(0, 13)) if seed % 2 else int(rng.integers(0, 4))
        last = rng.integers(-1, [10, 600, 12000][seed % 3], (12, 2))
        last[:, 0] = last[:, 0].clip(min=0)  # some row
        last[live:] = -1  # padding
        blocks = ((last + 128) // 128).sum(axis=1)
        lines, ranges = (np.asarray(x) for x in cut(jnp.asarray(np.stack([last, last], axis=-1), jnp.int32)))
        expected, expected_ranges = parts_by_hand(blocks.tolist(), splits)
        np.testing.assert_array_equal(lines[: len(expected)], expected)
        assert (lines[len(expected) :, 0] == -1).all()
        np.testing.assert_array_equal(ranges, expected_ranges)
        for tile, (begin, end) in enumerate(ranges):
            own = lines[begin:end]
            assert [block for _, *ends, _ in own for block in range(*ends)] == list(range(blocks[tile]))
            assert len(own) == 1 or (tile < splits.tiles and end <= splits.lines)  # there is room for their results


@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        pytest.param((300, 5, 64), {"dim": 128, "group": 8, "kv_heads": 1}, id="eight heads of 128"),
        pytest.param(
            (700, 5, 3), {"group": 3, "kv_heads": 3}, id="three heads, lengths differ", marks=pytest.mark.slow
        ),
    ],
)
def test_decode(lengths, heads, few_programs):
    case = last_rows(lengths, **heads)
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, return_lse=True, implementation="hopper"))
    out, lse = attend(*case)
    expected, expected_lse = jitted(kernels.paged_attention)(
        *in_float32(case), return_lse=True, implementation="reference"
    )
    assert relative_error(out, expected) < 4e-3
    assert not np.asarray(out[1]).any()  # padding
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


@pytest.mark.slow
def test_merge_reads_a_rows_own_parts_only():
    """Two tiles of query heads; a row of many parts, one of none, one of one. All that is nobody's holds NaN."""
    rng = np.random.default_rng(0)
    partial, lse = np.full((40, 128, 16), np.nan, np.float32), np.full((40, 128), np.nan, np.float32)
    partial[:37, :72], lse[:37, :72] = rng.normal(size=(37, 72, 16)), 20 * rng.normal(size=(37, 72))
    spans = np.array([[0, 36], [36, 36], [36, 37]], np.int32)
    merge = jax.jit(lambda *args: hopper_merge.merge(*args, q_heads=27, share=3, dtype=jnp.bfloat16, backend=CPU))
    out, out_lse = merge(partial, lse, spans)
    heads = np.arange(72).reshape(9, 8)[:, :3].ravel()
    partial, lse = partial[:, heads].astype(np.float64), lse[:, heads].astype(np.float64)
    weights = np.exp2(lse[:36] - lse[:36].max(0))
    expected = (partial[:36] * weights[..., None]).sum(0) / weights.sum(0)[:, None]
    assert relative_error(out[0], expected) < 4e-3
    assert not np.asarray(out[1]).any()
    assert relative_error(out[2], partial[36]) < 4e-3
    sums = [lse[:36].max(0) + np.log2(weights.sum(0)), np.full(27, -np.inf), lse[36]]
    np.testing.assert_allclose(out_lse[:, heads], np.log(2) * np.stack(sums), rtol=1e-5)


@pytest.mark.slow
def test_merge_of_tiles_changes_those_of_several_parts_only():
    """Tiles of 40 parts, of one, and of two, of 3 heads and 16 rows; one behind them. Nobody's parts hold NaN."""
    rng = np.random.default_rng(0)
    layout = hopper_merge.TileRows(heads=1, warpgroups=2, rows=16, share=3)
    partial, lse = np.full((45, 128, 16), np.nan, np.float32), np.full((45, 128), np.nan, np.float32)
    spans = np.array([[0, 40], [40, 41], [41, 43]], np.int32)
    for begin, end in spans[[0, 2]]:
        partial[begin:end], lse[begin:end] = (
            rng.normal(size=(end - begin, 128, 16)),
            rng.normal(size=(end - begin, 128)),
        )
    lse[1:40, 5], lse[:40, 6] = -np.inf, -np.inf  # a row that sees the keys of one part, and padding
    partial[:40, 6] = 0
    before = {"out": np.ones((128, 3, 16), np.float32), "lse": np.ones((1, 4, 2, 64), np.float32)}
    merge = jax.jit(lambda parts, results: hopper_merge.merge_tiles(parts, results, layout, CPU))
    after = merge(hopper_merge.Parts(partial, lse, spans), before)
    for tile, (begin, end) in enumerate([*spans, (0, 0)]):
        out, sums = (np.asarray(after[name]).reshape(4, -1)[tile] for name in ("out", "lse"))
        if end - begin < 2:
            assert (out == 1).all()
            assert (sums == 1).all()
            continue
        weights = np.exp2(lse[begin:end].astype(np.float64))
        total = weights.sum(0)
        own = (partial[begin:end] * weights[..., None]).sum(0) / np.maximum(total, 1e-30)[:, None]
        own = own.reshape(2, 4, 16, 16)[:, :3].transpose(0, 2, 1, 3)  # [warpgroup, row, head]
        np.testing.assert_allclose(out, own.ravel(), atol=1e-5)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(sums, np.log(total), atol=1e-5)
    only_lse = merge(hopper_merge.Parts(None, lse, spans), {"lse": before["lse"]})
    np.testing.assert_allclose(only_lse["lse"], after["lse"], atol=1e-6)


@pytest.mark.slow
def test_nan_of_a_request_stays_with_it_in_decode(few_programs):
    check_nan_stays(last_rows((130, 5, 70, 20), kv_heads=1), "hopper")


@pytest.mark.slow
def test_nan_of_a_request_stays_with_it_where_tiles_are_shared():
    check_nan_stays(scattered((150, 3, 70, 2), 60, kv_heads=1), "hopper")


@pytest.mark.parametrize("shape", SMALL[::2])
def test_key_mass(shape):
    case = scattered(**shape)
    mass = hopper(kernels.key_mass)(*case)
    expected = jitted(kernels.key_mass)(*in_float32(case), implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [(1, 64, 150, EVERYTHING)])
def test_key_mass_within_windows(windows):
    case = late_rows(scattered((500, 3, 70), 60, kv_heads=1))
    key_mass = jax.jit(lambda window, *case: kernels.key_mass(*case, window=window, implementation="hopper"))
    for window in map(jnp.int32, windows):
        poisoned = behind_windows(case, int(window))
        expected = jitted(kernels.key_mass)(*in_float32(poisoned), window=window, implementation="reference")
        np.testing.assert_allclose(key_mass(window, *poisoned), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_key_mass_of_powers():
    case = scattered((150, 70), 60, kv_heads=1)
    key_mass = jax.jit(lambda power, *args: kernels.key_mass(*args, power=power, implementation="hopper"))
    mass = key_mass(jnp.int32(4), *case)
    expected = jitted(kernels.key_mass)(*in_float32(case), power=4, implementation="reference")
    np.testing.assert_allclose(mass, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(mass, hopper(functools.partial(kernels.key_mass, power=4))(*case))


@pytest.mark.parametrize(
    ("rows", "count", "inputs", "widths", "config"),
    [
        pytest.param(
            5, 5, 256, (128, 64), linear_hopper.Config(1, 64, 2, 3, 100), id="few rows, two weights, split sums"
        ),
        pytest.param(200, 70, 128, (128,), linear_hopper.Config(2, 128, 1, 2, 2), id="one of two tiles is wanted"),
        pytest.param(
            *(70, 70, 192, (128,), linear_hopper.Config(2, 64, 2, 2, 3)),
            id="several tiles a program",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_linear(rows, count, inputs, widths, config):
    x, weights = stacks(rows, inputs, widths)
    outs = linear_hopper.linear(LinearArgs(x, weights, jnp.int32(1), count, CPU), config)
    for out, expected in zip(outs, exact(x, weights, 1), strict=True):
        assert out.shape == (rows, expected.shape[1])
        assert relative_error(out[:count], expected[:count]) < 4e-3


@pytest.mark.parametrize(
    ("rows", "count"),
    [(1, 1), (5, 3), (8, 8), *(pytest.param(*many, marks=pytest.mark.slow) for many in ((24, 9), (64, 50)))],
)
def test_linear_of_few_rows_copies_no_others(rows, count):
    """The rest of a block holds what it held, NaN at first in the interpreter, and reaches nobody."""
    x, weights = stacks(rows, 192, (64,))
    x = x.at[count:].set(jnp.nan)
    args = LinearArgs(x, weights, jnp.int32(2), count, CPU)
    (out,) = linear_hopper.linear(args, linear_hopper.Config(1, 64, 1, 2, 1))
    assert out.shape == (rows, 64)
    assert relative_error(out[:count], exact(x, weights, 2)[0][:count]) < 4e-3


@pytest.mark.parametrize(
    ("rows", "count", "inputs", "width", "config"),
    [
        pytest.param(5, 3, 192, 128, linear_hopper.Config(1, 128, 1, 2, 1), id="few rows, two tiles a program"),
        pytest.param(64, 64, 64, 64, linear_hopper.Config(1, 128, 1, 3, 9), id="as many as are few"),
        pytest.param(
            *(200, 70, 128, 128, linear_hopper.Config(2, 256, 1, 2, 2)),
            id="one of two tiles is wanted",
            marks=pytest.mark.slow,
        ),
        pytest.param(70, 70, 128, 192, linear_hopper.Config(2, 128, 1, 2, 2), id="several tiles a program"),
    ],
)
def test_gated_linear(rows, count, inputs, width, config):
    x, *weights = gated_stacks(rows, inputs, width)
    x = x.at[count:].set(jnp.nan)
    out = linear_hopper.gated_linear(LinearArgs(x, tuple(weights), jnp.int32(1), count, CPU), config)
    assert out.shape == (rows, width)
    assert relative_error(out[:count], exact_gated(x, *weights, 1)[:count]) < 4e-3


@pytest.mark.parametrize(
    ("rows", "count", "inputs", "widths", "ranks", "config"),
    [
        pytest.param(5, 3, 128, (128, 64), (128, 0), linear_hopper.Config(1, 64, 2, 3, 100), id="to one of two"),
        pytest.param(
            70,
            70,
            64,
            (64,),
            (192,),
            linear_hopper.Config(2, 64, 3, 2, 3),
            id="a split of these alone",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            200,
            70,
            128,
            (128, 128),
            (64, 64),
            linear_hopper.Config(2, 128, 1, 2, 2),
            id="many rows",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_linear_goes_on_with_what_is_added(rows, count, inputs, widths, ranks, config):
    x, weights = stacks(rows, inputs, widths)
    added = with_added(rows, widths, ranks)
    args = LinearArgs(x, tuple(w * inputs**-0.5 for w in weights), jnp.int32(1), count, CPU, added=tuple(added))
    for out, expected in zip(linear_hopper.linear(args, config), exact_sums(x, args.weights, added, 1), strict=True):
        assert relative_error(out[:count], expected[:count]) < 4e-3


@pytest.mark.parametrize(
    ("rows", "count", "ranks", "config"),
    [
        pytest.param(5, 3, (128, 64), linear_hopper.Config(1, 128, 1, 2, 1), id="few rows, two tiles a program"),
        pytest.param(
            150, 140, (0, 64), linear_hopper.Config(2, 256, 1, 3, 2), id="many rows, to one", marks=pytest.mark.slow
        ),
        pytest.param(
            5, 5, (64, 64), linear_hopper.Config(1, 128, 2, 2, 9), id="split, and gated later", marks=pytest.mark.slow
        ),
    ],
)
def test_gated_linear_goes_on_with_what_is_added(rows, count, ranks, config):
    x, *weights = gated_stacks(rows, 128, 128)
    added = with_added(rows, (128, 128), ranks)
    args = LinearArgs(x.at[count:].set(jnp.nan), tuple(weights), jnp.int32(1), count, CPU, added=tuple(added))
    gate, up = exact_sums(x, weights, added, 1)
    out = linear_hopper.gated_linear(args, config)
    assert relative_error(out[:count], (gate / (1 + np.exp(-gate)) * up)[:count]) < 8e-3


def test_gated_linear_sums_before_it_gates():
    x, *weights = gated_stacks(3, 512, 64)
    assert linear_hopper.choose_config(3, 512, (128,)).splits == 2
    out = hopper(kernels.gated_linear)(x, *weights, jnp.int32(1))
    assert relative_error(out, exact_gated(x, *weights, 1)) < 8e-3  # rounded before it is gated


def test_gated_linear_refuses_or_falls_back():
    x, *weights = gated_stacks(4, 64, 96)
    with pytest.raises(NotImplementedError, match="outputs in tiles of 32"):
        kernels.gated_linear(x, *weights, 0, implementation="hopper")
    with prefer("hopper", "xla"):
        out = kernels.gated_linear(x, *weights, 2)
    assert same(out, kernels.gated_linear(x, *weights, 2, implementation="xla"))
    assert relative_error(out, exact_gated(x, *weights, 2)) < 1e-2


def test_linear_refuses_or_falls_back():
    x, weights = stacks(4, 64, (96,))
    with pytest.raises(NotImplementedError, match="multiples of 64"):
        kernels.linear(x, weights, 0, implementation="hopper")
    with prefer("hopper", "xla"):
        (out,) = kernels.linear(x, weights, 2)
    assert relative_error(out, exact(x, weights, 2)[0]) < 4e-3


def test_parts_of_a_product_add_up_to_it():
    x, weights = stacks(3, 512, (64,))
    parts, used = hopper(kernels.linear_parts)(x, weights, jnp.int32(1))
    assert (parts.shape, parts.dtype, used) == ((2, 3, 64), jnp.float32, None)
    whole, used = kernels.linear_parts(x, weights, jnp.int32(1), implementation="xla")
    assert (whole.shape, whole.dtype, used) == ((1, 3, 64), x.dtype, None)
    assert relative_error(parts.sum(0), whole[0]) < 4e-3


@pytest.mark.parametrize(
    ("rows", "inputs", "splits"),
    [(1536, 14336, 2), (1536, 7168, 2), (1536, 4096, 1), (2048, 14336, 1), (4096, 14336, 1), (1024, 14336, 8)],
)
def test_long_sums_of_many_rows_have_two_parts_where_a_round_of_programs_would_be_half_empty(rows, inputs, splits):
    config = linear_hopper.choose_config(rows, inputs, (4096,), fits=True)
    assert (config.splits, config.fits) == (splits, rows == 1024)
    assert linear_hopper.choose_config(rows, inputs, (4096,)).splits == 1  # for who adds no parts


def test_parts_of_few_of_many_rows_are_as_many_as_fit():
    """One program. Rows that are not wanted hold NaN."""
    x, weights = stacks(300, 512, (64,))
    config = linear_hopper.Config(2, 64, 4, 2, 4, fits=True)
    run = jax.jit(lambda x, count: linear_hopper.linear_parts(LinearArgs(x, weights, 1, count, CPU), config))
    (expected,) = exact(x, weights, 1)
    for count, used in ((100, 4), (129, 2), (300, 1), (0, 4)):
        product = run(x.at[count:].set(jnp.nan), jnp.int32(count))
        assert (product.parts.shape, product.used) == ((4, 300, 64), used)
        out = sum_parts(cut_to(used, product), x.dtype)
        assert not count or relative_error(out[:count], expected[:count]) < 4e-3


@pytest.mark.parametrize(
    ("inputs", "widths", "ranks"),
    [(14336, (4096,), 0), (576, (576,), 0), (896, (512, 128, 128), 128)],
    ids=str,
)
def test_items_are_each_step_of_each_tile_once(inputs, widths, ranks):
    """Of 1 to 1024 wanted rows, in one round if one part is."""
    config = linear_hopper.choose_config(1024, inputs, widths, fits=True)
    added = with_added(1, widths, [ranks] + [0] * (len(widths) - 1))
    tiles = hopper_products.RowTiles(128, None, jnp.zeros(8, int), together=True)
    shape = hopper_products._shape(jnp.zeros((1, inputs)), added, widths, tiles, config)
    columns = sum(widths) // config.columns
    steps = inputs // 64 + np.where(np.arange(columns) < widths[0] // config.columns, ranks // 64, 0)
    numbers = jnp.arange(max(132, 8 * columns))
    for row_tiles in range(1, 9):
        fitting = hopper_products._fitting(shape, config, jnp.int32(row_tiles))
        items = row_tiles * columns * int(fitting)
        assert items <= max(132, row_tiles * columns)
        work = hopper_products.Wanted(jnp.int32(row_tiles), jnp.int32(fitting), None)
        item = (np.asarray(each)[:items] for each in hopper_products._item(shape, work, numbers))
        covered = np.zeros((row_tiles, columns, max(steps)), int)
        for row, column, split, begin, end in zip(*item, strict=True):
            assert 0 <= split < fitting
            assert end - begin >= min(4, steps[column])
            covered[row, column, begin:end] += 1
        np.testing.assert_array_equal(covered, np.broadcast_to(np.arange(max(steps)) < steps[:, None], covered.shape))


def test_parts_that_are_not_used_are_not_added():
    product, *_ = residuals(3, 64, 4)
    for used in (1, 3):
        expected = np.asarray(product.parts)[:used].sum(0)
        np.testing.assert_allclose(sum_parts(cut_to(used, product), jnp.float32), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "width", "parts", "scaled"), [(3, 1024, 2, "bfloat16"), (1, 512, 1, "float32")], ids=str
)
def test_add_norm(rows, width, parts, scaled):
    """Where nothing is fused, roundings are those of XLA's version."""
    case = *residuals(rows, width, parts, scaled=scaled), jnp.int32(1)
    outs = hopper(functools.partial(kernels.add_norm, eps=1e-5))(*case)
    for out, plain, expected in zip(
        outs, kernels.add_norm(*case, eps=1e-5, implementation="xla"), exact_add_norm(*case, 1e-5), strict=True
    ):
        assert same(out, plain)
        assert relative_error(out, expected) < 4e-3


def test_add_norm_of_few_of_many_rows(monkeypatch):
    """Three programs take turns, each of two warpgroups. Parts that are not used, and rows not wanted, hold NaN."""
    monkeypatch.setattr(hopper_add_norm, "AT_ONCE", 3)
    product, residual, scales = residuals(70, 1024, 3)
    run = hopper(functools.partial(kernels.add_norm, eps=1e-5))
    for count, used in ((3, 1), (7, 2), (2, 3), (0, 3)):
        case = cut_to(used, product), residual.at[count:].set(jnp.nan), scales, jnp.int32(1)
        outs = run(*case, jnp.int32(count))
        for out, expected in zip(outs, exact_add_norm(*case, 1e-5), strict=True):
            assert out.shape == (70, 1024)
            assert not count or relative_error(out[:count], expected[:count]) < 4e-3


def test_add_norm_refuses_without_a_warning_or_falls_back(recwarn):
    case = *residuals(2049, 512, 1), 0
    with pytest.raises(NotImplementedError, match="2049 rows of 512; the kernel takes up to 2048"):
        kernels.add_norm(*case, eps=1e-5, implementation="hopper")
    with pytest.raises(NotImplementedError, match="rows of 576"):
        kernels.add_norm(*residuals(1, 576, 1), 0, eps=1e-5, implementation="hopper")
    assert same(
        kernels.add_norm(*case, eps=1e-5, backend=Backend("gpu", "9.0", ("hopper", "xla")))[1],
        kernels.add_norm(*case, eps=1e-5, implementation="xla")[1],
    )
    assert not recwarn


@pytest.mark.parametrize(("rows", "width", "parts"), [(8, 4096, 8), (64, 3072, 1)])
def test_add_norm_is_lowered_for_a_gpu(rows, width, parts):
    case = jax.eval_shape(functools.partial(residuals, rows, width, parts))
    on = {"backend": Backend("gpu", "9.0"), "implementation": "hopper", "eps": 1e-5}
    traced = jax.jit(functools.partial(kernels.add_norm, **on)).trace(*case, 1)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_write_kv(dtype):
    _, store, layer, *rows = scattered((150, 3, 70), 40, kv_heads=3, dtype=dtype)
    keys, values = jax.random.normal(jax.random.key(0), (2, 40, 3, 64))
    written = hopper(kernels.write_kv)(store, layer, keys, values, *rows)
    assert same(written, jitted(kernels.write_kv)(store, layer, keys, values, *rows, implementation="reference"))


@pytest.mark.parametrize(
    ("parts", "dim"), [(2, 64), pytest.param(1, 128, marks=pytest.mark.slow)], ids=["in parts", "one part"]
)
def test_rotate_and_write(parts, dim):
    """Two of six rows are padding, and write nothing. Where nothing is fused, roundings are those of XLA's version."""
    case = scattered((150, 3, 70), 6, live=4, kv_heads=4, group=2, dim=dim)
    product, inv_freq = products_to_write(parts, case)
    operands = product, *case[1:], inv_freq
    outs = hopper(functools.partial(kernels.rotate_and_write, dtype=jnp.bfloat16))(*operands)
    expected = kernels.rotate_and_write(*operands, dtype=jnp.bfloat16, implementation="xla")
    assert all(map(same, outs, expected))
    assert not same(outs[1], case[1])


def test_rotate_and_write_of_few_of_many_rows(monkeypatch):
    """One program, in which 3 take turns. Parts that are not used, and products of padding, hold NaN."""
    monkeypatch.setattr(hopper_rotation, "AT_ONCE", 3)
    monkeypatch.setattr(hopper_rotation, "FEW_ROWS", 2)
    case = scattered((150, 3, 70), 9, live=5, kv_heads=4, group=2)
    product, inv_freq = products_to_write(3, case)
    product = product._replace(parts=product.parts.at[:, 5:].set(jnp.nan))
    run = functools.partial(kernels.rotate_and_write, dtype=jnp.bfloat16)
    for used in (1, 3):
        operands = cut_to(used, product), *case[1:], inv_freq, jnp.int32(5)
        (q, store), (expected, expected_store) = hopper(run)(*operands), run(*operands, implementation="xla")
        assert same(q[:5], expected[:5])
        assert same(store, expected_store)


def test_rotate_and_write_refuses():
    run = functools.partial(kernels.rotate_and_write, dtype=jnp.bfloat16, implementation="hopper")
    case = scattered((70,), 6, kv_heads=3, group=4)
    product, inv_freq = products_to_write(1, case)
    with pytest.raises(NotImplementedError, match="6 rows of 12 and 3 heads of 64; the kernel takes up to 2048"):
        run(product, *case[1:], inv_freq)
    with pytest.raises(NotImplementedError, match="on a store of float8_e4m3fn"):
        run(product, case[1].astype("float8_e4m3fn"), *case[2:], inv_freq)


def test_where_rotation_and_write_are_one_kernel():
    """XLA would add parts that nobody wrote, so a caller asks before it leaves some."""
    gpu, llama = Backend("gpu", "9.0"), Heads(32, 8, 128)
    is_one = functools.partial(is_one_kernel, dtype=jnp.bfloat16, stored=jnp.bfloat16, backend=gpu)
    assert is_one(2048, llama)
    assert not is_one(2049, llama)
    assert not is_one(8, Heads(14, 2, 64))
    assert not is_one(8, llama, stored=jnp.float8_e4m3fn)
    assert not is_one(8, llama, backend=Backend("gpu", "8.0"))


@pytest.mark.parametrize(("rows", "parts"), [(8, 5), (64, 1)])
def test_rotate_and_write_is_lowered_for_a_gpu(rows, parts):
    case = jax.eval_shape(functools.partial(scattered, (150, 3, 70), rows, kv_heads=8, group=4, dim=128))
    product, inv_freq = jax.eval_shape(functools.partial(products_to_write, parts), case)
    on = {"backend": Backend("gpu", "9.0"), "implementation": "hopper", "dtype": jnp.bfloat16}
    traced = jax.jit(functools.partial(kernels.rotate_and_write, **on)).trace(product, *case[1:], inv_freq)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("kv_heads", "dim", "dtype"), [(4, 64, "bfloat16"), pytest.param(2, 128, "float32", marks=pytest.mark.slow)]
)
def test_align_and_copy(kv_heads, dim, dtype):
    store = jax.random.normal(jax.random.key(0), (4, 8, 2, kv_heads, 64, dim)).astype(dtype)
    runs = [(10, 259, 40, 77), (60, 380, 10, -500), (90, 400, 1, 3), (93, 470, 1, 900), (120, 480, 5, 1)]
    args = (*copies(runs), 10000.0 ** -jnp.linspace(0, 1, dim // 2), jnp.array([1, 3]))
    moved = hopper(kernels.align_and_copy)(store, *args)
    expected = jitted(kernels.align_and_copy)(store, *args, implementation="reference")
    np.testing.assert_allclose(
        *(np.asarray(x, np.float32) for x in (moved, expected)), atol=2e-2 if dim == 64 else 1e-4
    )
    assert same(moved[:, :, 1], expected[:, :, 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "dim", "layers"), [("bfloat16", 64, (0, 4)), ("bfloat16", 128, (1, 3)), ("float8_e4m3fn", 64, (1, 4))]
)
def test_copies_with_a_patch(dtype, dim, layers):
    store, moves, patch = restored(dtype, dim=dim)
    inv_freq = 10000.0 ** -jnp.linspace(0, 1, dim // 2)
    if layers[0]:
        inv_freq *= jnp.array([1.0, 1.0, 0.1, 1.0])[:, None]
    check_restored(hopper(kernels.align_and_copy), store, moves, inv_freq, layers, patch)
    check_packed(hopper(kernels.pack_rows), store, moves, patch)


def test_what_cannot_be_done_falls_back_or_raises():
    case = scattered((20,), 4, dim=32)
    with pytest.raises(NotImplementedError, match="head_dim 32"):
        kernels.paged_attention(*case, implementation="hopper")
    with prefer("hopper"), pytest.raises(NotImplementedError, match="hopper: head_dim 32"):
        kernels.paged_attention(*case)
    with prefer("hopper", "xla"):
        out = kernels.paged_attention(*case)
    assert same(out, kernels.paged_attention(*case, implementation="xla"))


@pytest.mark.parametrize("kind", ["squares", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "int8"))])
def test_linear_of_codes(kind):
    """Few rows: the kernel reads codes of 8 bits, with scales of outputs or of squares."""
    x, dense = stacks(5, 512, (256, 128))
    weights = [turned(quantise(weight, "int8" if kind == "int8" else "fp8")) for weight in dense]
    if kind == "squares":
        rng = np.random.default_rng(0)
        scales = (jnp.array(rng.uniform(0.01, 1, (3, 2, weight.shape[2] // 128)), jnp.float32) for weight in weights)
        weights = [dataclasses.replace(weight, scales=each) for weight, each in zip(weights, scales, strict=True)]
    args = LinearArgs(x, tuple(weights), jnp.int32(1), 5, CPU)
    assert linear_hopper._reads_codes(args)
    for out, weight in zip(linear_hopper.linear(args), weights, strict=True):
        assert relative_error(out, x.astype(jnp.float32) @ dequantise(weight, jnp.float32)[1]) < 8e-3


@pytest.mark.slow
@pytest.mark.parametrize("rows", [5, 80])
def test_what_is_added_to_products_with_codes(rows):
    """Few rows read codes, and add afterwards; of many, the sum goes on."""
    x, dense = stacks(rows, 512, (256, 128))
    weights = tuple(turned(quantise(512**-0.5 * weight, "fp8")) for weight in dense)
    added = with_added(rows, (256, 128), (0, 64))
    args = LinearArgs(x, weights, jnp.int32(1), rows, CPU, added=tuple(added))
    assert linear_hopper._reads_codes(args) == (rows == 5)
    plain = [dequantise(weight, jnp.float32) for weight in weights]
    for out, expected in zip(linear_hopper.linear(args), exact_sums(x, plain, added, 1), strict=True):
        assert relative_error(out, expected) < 8e-3


def test_what_cannot_be_added_is_refused_or_falls_back():
    x, weights = stacks(4, 64, (64,))
    added = with_added(4, (64,), (48,))
    with pytest.raises(
        NotImplementedError, match="48 inputs from column 0 on is added; the kernel takes multiples of 64"
    ):
        kernels.linear(x, weights, 0, added=added, implementation="hopper")
    with pytest.raises(NotImplementedError, match="float32 on float32 is added to a product of bfloat16"):
        kernels.linear(x, weights, 0, added=with_added(4, (64,), (64,), "float32"), implementation="hopper")
    with prefer("hopper", "xla"):
        (out,) = kernels.linear(x, weights, 2, added=added)
    assert relative_error(out, exact_sums(x, weights, added, 2)[0]) < 8e-3


def test_squares_are_turned_around():
    (dense,) = stacks(1, 256, (384,))[1]
    weight = quantise(dense, "int8")
    other = turned(weight)
    assert other.codes[2, 130, 300] == weight.codes[2, 128 + 44, 256 + 2]  # within square (1, 2): row 2, column 44
    assert same(dequantise(other, jnp.float32), dequantise(weight, jnp.float32))
    assert same(turned(other).codes, weight.codes)


@pytest.mark.parametrize("kind", ["squares", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8", "int8"))])
def test_linear_of_codes_is_lowered_for_a_gpu(kind):
    """For projections of Llama 3.1 8B, by the passes that run where there is no GPU."""
    shape, dtype = jax.ShapeDtypeStruct, jnp.int8 if kind == "int8" else jnp.float8_e4m3fn

    def codes(width):
        scales = shape((2, 32, width // 128) if kind == "squares" else (2, 1, width), jnp.float32)
        return Quantised(shape((2, 4096, width), dtype), scales, kind="int8" if kind == "int8" else "fp8", turned=True)

    on = {"backend": Backend("gpu", "9.0"), "implementation": "hopper"}
    weights = [codes(4096), codes(1024), codes(1024)]
    traced = jax.jit(functools.partial(kernels.linear, **on)).trace(shape((8, 4096), jnp.bfloat16), weights, 1)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "2x4096x1024xbf16" not in text  # no copy in floats


FLOAT8 = {"stored": "float8_e4m3fn"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "windows"),
    [
        pytest.param(scattered((200, 70), 40, kv_heads=1, **FLOAT8), (EVERYTHING,), id="tiles"),
        pytest.param(late_rows(scattered((600, 300), 30, dim=128, kv_heads=1, **FLOAT8)), (150,), id="heads of 128"),
        pytest.param(last_rows((260, 5, 64), kv_heads=1, **FLOAT8), (100, EVERYTHING), id="decode"),
    ],
)
def test_attention_over_float8(case, windows, few_programs):
    check_windows(case, windows, attend)


@pytest.mark.slow
def test_key_mass_over_float8():
    case = scattered((200, 70), 40, kv_heads=1, **FLOAT8)
    mass = hopper(kernels.key_mass)(*case)
    assert relative_error(mass, jitted(kernels.key_mass)(*in_float32(case), implementation="reference")) < 1e-3


@pytest.mark.slow
def test_float8_is_written_and_moved():
    _, store, layer, *rows = scattered((150, 3, 70), 40, layers=4, stored=jnp.float8_e4m3fn)
    keys, values = 300 * jax.random.normal(jax.random.key(0), (2, 40, 2, 64))  # some are larger than the largest
    written = hopper(kernels.write_kv)(store, layer, keys, values, *rows)
    assert same(written, jitted(kernels.write_kv)(store, layer, keys, values, *rows, implementation="reference"))
    moves = (*copies([(10, 259, 40, 77), (60, 380, 10, -500)]), 10000.0 ** -jnp.linspace(0, 1, 32))
    full = as_stored(300 * jax.random.normal(jax.random.key(1), store.shape), store.dtype)
    moved = hopper(kernels.align_and_copy)(full, *moves)
    check_moved(moved, jitted(kernels.align_and_copy)(full, *moves, implementation="reference"))
    with pytest.raises(NotImplementedError, match="3 KV heads of float8"):
        kernels.align_and_copy(jnp.repeat(full[:, :, :, :1], 3, axis=3), *moves, implementation="hopper")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "window"),
    [
        pytest.param(late_rows(scattered((400, 3, 150, 100), 60, kv_heads=1, group=2)), 100, id="tiles"),
        pytest.param(last_rows((260, 5, 64, 90), kv_heads=1, group=2), 70, id="decode"),
    ],
)
def test_low_rank_within_windows(case, window, few_programs):
    case, window = behind_windows(case, window), jnp.int32(window)
    low_rank = with_adapters(case, 16)
    args = dataclasses.replace(arguments(case, window), low_rank=low_rank)
    out = jax.jit(hopper_attention.paged_attention)(args)
    whole = over_whole_values(case, low_rank)
    assert (
        relative_error(out, jitted(kernels.paged_attention)(*whole, window=window, implementation="reference")) < 6e-3
    )


@pytest.mark.parametrize(
    ("dim", "rank", "rows", "requests"),
    [
        (128, 16, 2048, 4),
        pytest.param(128, 32, 512, 4, marks=pytest.mark.slow),
        pytest.param(64, 64, 512, 4, marks=pytest.mark.slow),
        pytest.param(128, 32, 64, 64, marks=pytest.mark.slow),
        pytest.param(64, 64, 64, 64, marks=pytest.mark.slow),
    ],
)
def test_low_rank_attention_is_lowered_for_a_gpu(dim, rank, rows, requests):
    """For 32 query and 8 KV heads: tiles that may be cut, others, and decode, within a GPU's shared memory."""
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    case = floats((rows, 32, dim)), floats((2, 64, 2, 8, 64, dim)), ints(()), ints((rows,)), ints((rows,))
    adapters = floats((2, 64, 64, 3 * rank)), floats((2, 3, 8, rank, dim)), ints((requests,)), ints((requests,))
    on = {"backend": Backend("gpu", "9.0"), "implementation": "hopper"}
    attend = jax.jit(functools.partial(kernels.paged_attention, return_lse=True, **on))
    traced = attend.trace(*case, ints((requests, 16)), low_rank=kernels.LowRank(*adapters), window=ints(()))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_adapters_that_the_kernels_cannot_do_are_refused():
    for options, rank, reason in [
        ({"dim": 128}, 64, "adapters of rank 64; kernels take 16, 32$"),
        ({}, 8, "adapters of rank 8"),
        ({"stored": "float8_e4m3fn"}, 16, "adapters of bfloat16 beside a store of float8"),
    ]:
        case = scattered((20,), 4, **options)
        with pytest.raises(NotImplementedError, match=reason):
            kernels.paged_attention(*case, low_rank=with_adapters(case, rank), implementation="hopper")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rank", "used"),
    [
        pytest.param(lambda: scattered((150, 3, 70, 130), 48, kv_heads=1, group=3), 16, 4, id="tiles"),
        pytest.param(
            lambda: scattered((600, 9, 300, 70), 30, live=12, kv_heads=1, group=8, dim=128),
            32,
            None,
            id="parts",
        ),
        pytest.param(
            lambda: last_rows((260, 5, 64, 90), kv_heads=2, group=3, dim=128),
            16,
            None,
            id="decode",
        ),
    ],
)
def test_attention_over_whole_values_by_low_rank(make, rank, used, few_programs):
    """Requests of one tile have adapters of their own or none; all other columns of Y hold NaN."""
    case = make()
    low_rank = with_adapters(case, rank, used=used)
    args = dataclasses.replace(arguments(case), low_rank=low_rank)
    out, lse = jax.jit(lambda args: hopper_attention.paged_attention(args, True, EIGHT))(args)
    whole = over_whole_values(case, low_rank)
    expected, expected_lse = jitted(kernels.paged_attention)(*whole, return_lse=True, implementation="reference")
    assert relative_error(out, expected) < 6e-3
    assert not np.asarray(out)[np.asarray(case[3]) < 0].any()
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4)
