"""Which part of a stored prefix is computed while the rest is loaded."""

import itertools

import numpy as np
import pytest

from sparsex_jax.reuse.staircase import Costs, Staircase, plan_heights, plan_staircases


def random_costs(rng, groups, chunks, *, missing=0.0, whole=False) -> Costs:
    """Compute rises along the chunks; loads are about alike. `whole`: small integers, so that many plans tie."""
    draw = (
        (lambda low, high: rng.integers(low, high + 1, (groups, chunks)).astype(float))
        if whole
        else (lambda low, high: rng.uniform(low, high, (groups, chunks)))
    )
    load = np.where(rng.random((groups, chunks)) < missing, np.inf, draw(0, 4) * rng.choice([0.1, 1.0, 5.0]))
    return Costs(draw(0, 3) + np.arange(chunks) * rng.choice([0.0, 0.5]), load)


def all_staircases(costs: Costs) -> list[Staircase]:
    falling = itertools.combinations_with_replacement(range(costs.num_chunks, -1, -1), len(costs.compute))
    return [stair for computed in falling if np.isfinite((stair := Staircase.of(computed, costs)).load_seconds)]


def brute_force(requests, compute_busy=0.0, load_busy=0.0) -> float:
    plans = itertools.product(*map(all_staircases, requests))
    return min(later(plan, compute_busy, load_busy) for plan in plans)


def later(plan, compute_busy=0.0, load_busy=0.0) -> float:
    compute, load = sum(one.compute_seconds for one in plan), sum(one.load_seconds for one in plan)
    return max(compute_busy + compute, load_busy + load)


@pytest.mark.parametrize("seed", range(60))
def test_one_prefix_as_brute_force(seed):
    rng = np.random.default_rng(seed)
    costs = random_costs(rng, rng.integers(1, 5), rng.integers(1, 7), missing=(seed % 3) * 0.1, whole=seed % 2 == 0)
    busy = rng.uniform(0, 10, 2) * (seed % 5 == 0)
    [found] = plan_staircases([costs], compute_busy=busy[0], load_busy=busy[1])
    assert later([found], *busy) == pytest.approx(brute_force([costs], *busy), rel=1e-9)
    assert list(found.computed) == sorted(found.computed, reverse=True)
    assert found == Staircase.of(found.computed, costs)


@pytest.mark.parametrize("seed", range(12))
def test_prefixes_that_share_device_and_link_as_brute_force(seed):
    rng = np.random.default_rng(100 + seed)
    requests = [random_costs(rng, 3, rng.integers(1, 5), missing=(seed % 2) * 0.1) for _ in range(2 + seed % 2)]
    found = plan_staircases(requests)
    assert [len(one.computed) for one in found] == [3] * len(requests)
    assert later(found) == pytest.approx(brute_force(requests), rel=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_a_long_prefix_within_a_share_of_the_best(seed):
    """32 chunks in 4 groups, of which there are 58905 staircases."""
    rng = np.random.default_rng(200 + seed)
    compute = np.tile((1 + np.arange(32) / 16) * rng.uniform(0.5, 2), (4, 1))
    costs = Costs(compute, np.full((4, 32), rng.choice([0.2, 1.0, 4.0])) * rng.uniform(0.9, 1.1, (4, 32)))
    [near], [best] = plan_staircases([costs], within=0.01), plan_staircases([costs])
    assert later([best]) <= later([near]) <= 1.01 * later([best])
    assert later([best]) < min(costs.compute.sum(), costs.load.sum())


def test_a_chunk_that_is_not_stored_is_computed_with_all_before_it():
    load = np.full((3, 5), 0.01)
    load[1, 2] = np.inf
    [found] = plan_staircases([Costs(np.ones((3, 5)), load)])
    assert found.computed == (3, 3, 0)
    assert found.heights(5).tolist() == [2, 2, 2, 0, 0]


def test_nothing_stored_computes_everything_and_a_free_link_nothing():
    ones = np.ones((2, 3))
    assert plan_staircases([Costs(ones, np.full((2, 3), np.inf))])[0].computed == (3, 3)
    assert plan_staircases([Costs(ones, np.zeros((2, 3)))])[0] == Staircase((0, 0), 0.0, 0.0)
    assert plan_staircases([]) == []


def test_who_is_busy_gets_less():
    costs = Costs(np.ones((1, 8)), np.ones((1, 8)))
    assert plan_staircases([costs])[0].computed == (4,)
    assert plan_staircases([costs], compute_busy=4.0)[0].computed == (2,)
    assert plan_staircases([costs], load_busy=4.0)[0].computed == (6,)


@pytest.mark.parametrize(("compute", "load"), [(np.inf, 1.0), (-1.0, 1.0), (np.nan, 1.0), (1.0, -1.0), (1.0, np.nan)])
def test_costs_that_mean_nothing_are_refused(compute, load):
    with pytest.raises(ValueError, match="compute"):
        Costs(np.full((1, 1), compute), np.full((1, 1), load))


def test_holes_are_computed_alone_where_that_is_sooner():
    """The third chunk's second group is not stored: the stairs compute all before it, in both groups."""
    load = np.full((3, 4), 0.01)
    load[1, 2] = np.inf
    heights, seconds = plan_heights(Costs(np.ones((3, 4)), load))
    assert heights.tolist() == [0, 0, 2, 0]
    assert 2 < seconds < 2.2
    heights, seconds = plan_heights(Costs(np.ones((3, 4)), 100 * load))
    assert heights.tolist() == [2, 2, 2, 0]
    assert seconds == 6


def test_heights_without_holes_are_those_of_the_best_stairs():
    costs = Costs(np.ones((2, 8)), np.ones((2, 8)))
    heights, seconds = plan_heights(costs, load_busy=2.0)
    assert (heights.sum(), seconds) == (9, 9.0)
