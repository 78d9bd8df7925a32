"""What restoring takes, as predicted and as measured since."""

import numpy as np
import pytest

from sparsex_jax.reuse.cost import ChunkTimes, Speeds
from sparsex_jax.reuse.pace import Factor, Pace

CHUNK = ChunkTimes(rows=(1, 512), layer=(1.0, 512.0), key=(0.0, 1.0))
SPEEDS = Speeds(small=CHUNK, large=CHUNK, start=7.0, boundary=0.0, copy=0.0, copied_token=0.0)


def test_cells_by_measured_speeds():
    cells = Pace(SPEEDS, 1.0).predicted_cells([(0, 512), (512, 1024)], [[None] * 2, [None] * 3])
    first, second = 512 + (128 + 256 + 384 + 512) / 4, 512 + (640 + 768 + 896 + 1024) / 4
    np.testing.assert_allclose(cells, [[2 * first + 7, 2 * second + 7], [3 * first, 3 * second]])


def test_without_measured_speeds_late_and_long_chunks_still_take_longer():
    [cells] = Pace(None, 1.0).predicted_cells([(0, 10), (10, 20), (20, 40)], [[None]])
    assert list(cells) == sorted(set(cells))


def test_a_factor_follows_what_is_measured():
    factor = Factor()
    for _ in range(40):
        factor.correct(2.0 * factor.value, 6.0)
    assert factor.value == pytest.approx(3.0, rel=0.01)


def test_one_outlier_counts_little():
    factor = Factor()
    factor.correct(1.0, 1e6)
    assert 1 < factor.value < 1.4
    factor.correct(0.0, 1.0)
    factor.correct(1.0, 0.0)
    assert 1 < factor.value < 1.4


def test_a_guess_is_replaced_by_the_fastest_of_the_first_measurements():
    factor = Factor(known=False)
    for took in (50.0, 0.2, 0.3):  # the first one compiled
        factor.correct(factor.value, took)
    assert factor.value == pytest.approx(0.2)
    factor.correct(factor.value, 0.3)
    assert 0.2 < factor.value < 0.25


def test_what_was_slow_once_is_forgotten():
    factor = Factor(2.0)
    for _ in range(10):
        factor.correct(1.0, 4.0)
    slow = factor.value
    for _ in range(60):
        factor.forget()
    assert slow > 20
    assert factor.value == pytest.approx(2.0, rel=0.01)


def test_bytes_take_what_the_link_says():
    pace = Pace(None, 1e9)
    pace.link.correct(pace.load_seconds(5e8), 0.5)
    assert pace.load_seconds(10**9) == pytest.approx(1.0)
