"""Sampling on the device: which tokens can be drawn, and how often."""

import jax.numpy as jnp
import numpy as np
import pytest

from sparsex_jax.config import SamplingParams
from sparsex_jax.generation import sampling_arrays
from sparsex_jax.sampling import sample

PROBS = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
DRAWS = 2000


def draws(**options):
    """Tokens drawn at many positions of one request."""
    sampling = sampling_arrays([SamplingParams(**options)] * DRAWS, DRAWS)
    logits = jnp.broadcast_to(jnp.log(PROBS), (DRAWS, len(PROBS)))
    return np.asarray(sample(logits, sampling, jnp.arange(DRAWS)))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_p": 0.01}, {1}),  # the most probable always
        ({"top_p": 0.6}, {1, 3}),
        ({"top_p": 0.8}, {1, 3, 4}),
        ({"top_p": 0.8, "top_k": 2}, {1, 3}),
    ],
)
def test_what_is_kept_is_drawn_in_its_shares(options, kept):
    found = np.bincount(draws(temperature=1.0, **options), minlength=len(PROBS)) / DRAWS
    expected = np.where([i in kept for i in range(len(PROBS))], PROBS, 0)
    assert set(np.flatnonzero(found)) == kept
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.05)


def test_temperature_zero_takes_the_most_probable():
    assert set(draws(temperature=0.0).tolist()) == {1}


def test_a_low_temperature_sharpens():
    found = np.bincount(draws(temperature=0.5), minlength=len(PROBS)) / DRAWS
    np.testing.assert_allclose(found, PROBS**2 / (PROBS**2).sum(), atol=0.05)


def test_the_draw_depends_on_seed_and_position_alone():
    logits = jnp.broadcast_to(jnp.log(PROBS), (4, len(PROBS)))
    alone = [
        int(sample(logits[:1], sampling_arrays([SamplingParams(temperature=1.0, seed=s)], 1), jnp.array([9]))[0])
        for s in range(4)
    ]
    together = sampling_arrays([SamplingParams(temperature=1.0, seed=s) for s in range(4)], 4)
    assert sample(logits, together, jnp.full(4, 9)).tolist() == alone
