"""Schedules that would give wrong logits without another sign are refused, each with the rule that it breaks."""

import dataclasses

import numpy as np
import pytest

from sparsex_jax import CacheBlend, Focus, InvalidRequestError, SparseX
from sparsex_jax.reuse.methods import METHODS, Phase, check_schedule
from sparsex_jax.reuse.prompt import PromptMap, TokenKind

LAYERS = 8
KIND = np.repeat([TokenKind.PREFIX, TokenKind.FRESH, TokenKind.REUSED, TokenKind.FRESH], [4, 2, 8, 2]).astype(np.uint8)
PROMPT = PromptMap(np.arange(16, dtype=np.int32), KIND)
COMPUTED, FRESH, REUSED = PROMPT.computed, PROMPT.fresh, PROMPT.reused
LAST = np.arange(16) == 15


def check(*phases):
    check_schedule("own", phases, PROMPT, LAYERS)


def refused(*phases):
    """What is said about phases that are refused."""
    with pytest.raises(InvalidRequestError, match=r"^method 'own': ") as caught:
        check(*phases)
    return str(caught.value)


def phase_with(**wrong):
    """A phase with values that the run-time type checker of these tests would not let its constructor have."""
    phase = Phase(3, FRESH, "key_mass")
    for name, value in wrong.items():
        object.__setattr__(phase, name, value)
    return phase


FIRST = Phase(0, COMPUTED)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", [KIND, np.full(16, TokenKind.FRESH, np.uint8)], ids=["found", "nothing found"])
def test_the_schedules_of_all_methods_are_sound(method, kind):
    prompt = PromptMap(PROMPT.tokens, kind)
    for num_layers in (1, 2, LAYERS):
        assert method().phases(prompt, num_layers)[0].start == 0


def test_sound_schedules_pass():
    check(FIRST)
    check(Phase(0, FRESH))
    check(FIRST, Phase(0, FRESH, "key_mass", 3))
    check(FIRST, Phase(2, FRESH | REUSED, "key_mass", 3), Phase(4, FRESH))
    check(FIRST, *[Phase(start, FRESH) for start in (2, LAYERS, LAYERS, LAYERS)])
    check(
        FIRST, Phase(0, LAST, "probe_mass", 2, probe_layers=LAYERS)
    )  # the signal's pass computes the other fresh ones
    check(FIRST, Phase(1, FRESH, "given", 2, scores=np.ones(16, np.float32)))


@pytest.mark.parametrize(
    "starts", [[], [1], [0, 3, 1], [0, 3, 3], [0, 0, 0], [0, -1], [0, 9], [0, 8, 9], [0, 2, 8, 3]], ids=str
)
def test_layers_must_rise(starts):
    complaint = refused(*[Phase(start, COMPUTED) for start in starts])
    assert f"the phases start at layers {starts}; " in complaint


def test_layers_are_whole_numbers():
    assert "start at layers [0, 1.5]" in refused(FIRST, phase_with(start=1.5))


def test_at_most_four_phases_follow_the_first():
    check(FIRST, *[Phase(start, FRESH) for start in range(1, 5)])
    assert "there are 6 phases; at most 4 may follow the first" in refused(
        FIRST, *[Phase(start, FRESH) for start in range(1, 6)]
    )


@pytest.mark.parametrize("forced", [FRESH.astype(np.int32), FRESH[:-1], np.append(FRESH, True), FRESH.tolist()])
def test_forced_is_a_mask_of_the_prompt(forced):
    assert "it must be a bool mask of the prompt's 16 tokens" in refused(FIRST, phase_with(forced=forced))


def test_the_last_token_is_in_every_phase():
    assert "phase 0 leaves out the prompt's last token" in refused(Phase(0, COMPUTED & ~LAST))
    assert "phase 2 leaves out the prompt's last token" in refused(FIRST, Phase(1, FRESH), Phase(2, FRESH & ~LAST))


def test_no_phase_has_a_token_of_the_prefix():
    everything = np.ones(16, bool)
    assert "phase 0 forces tokens of the prefix" in refused(Phase(0, everything), Phase(1, FRESH, "key_mass", 3))
    assert "phase 1 forces tokens of the prefix" in refused(FIRST, Phase(1, everything))


def test_a_later_phase_has_only_tokens_of_the_one_before():
    assert "phase 1 forces tokens that the phase before it does not force" in refused(
        Phase(0, FRESH), Phase(1, COMPUTED)
    )
    assert "phase 2 forces tokens that the phase before it does not force" in refused(
        FIRST, Phase(1, FRESH, "key_mass", 3), Phase(2, COMPUTED)
    )


def test_the_first_phase_chooses_nothing():
    assert "phase 0 has a signal" in refused(Phase(0, COMPUTED, "key_mass"))


def test_no_fresh_token_goes_without_kv():
    some = FRESH & (np.arange(16) != 4)
    assert "phase 0 leaves out fresh tokens" in refused(Phase(0, some))
    assert "phase 1 leaves out fresh tokens" in refused(FIRST, Phase(3, some, "key_mass", 2))
    assert "phase 1 leaves out fresh tokens" in refused(FIRST, Phase(3, some, "probe_mass", 2, probe_layers=4))
    check(FIRST, Phase(3, some, "probe_mass", 2, probe_layers=5))


def test_a_pass_over_the_fresh_tokens_is_one_that_its_signal_makes():
    complaint = refused(FIRST, Phase(0, LAST, "key_mass", 2, probe_layers=LAYERS))
    assert complaint.endswith("has probe_layers=8, but its signal 'key_mass' runs no layers")
    # A phase that leaves nothing out asks no signal, so nothing was run through the layers behind it.
    complaint = refused(FIRST, Phase(0, COMPUTED, "probe_mass", 0, probe_layers=LAYERS), Phase(2, LAST))
    assert "phase 2 leaves out fresh tokens" in complaint


@pytest.mark.parametrize(("name", "value"), [("probe_layers", -1), ("budget", -1), ("budget", 1.5), ("pool_tokens", 0)])
def test_budgets_are_numbers_of_tokens(name, value):
    assert f"phase 1 has {name}={value}; it must be an integer >= " in refused(FIRST, phase_with(**{name: value}))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"coverage": 1.5}, "has coverage=1.5; it must be a number from 0 to 1"),
        ({"coverage": np.nan}, "has coverage=nan; it must be a number from 0 to 1"),
        ({"coverage": "0.5"}, "has coverage='0.5'; it must be a number from 0 to 1"),
        ({"budget": 3, "max_budget": 2}, "has max_budget=2; it must be None or an integer >= its budget, 3"),
        ({"max_budget": 2.5}, "has max_budget=2.5; it must be None or an integer >= its budget, 0"),
        ({"signal": None, "coverage": 0.5}, "has coverage=0.5 and no signal to choose by"),
    ],
)
def test_a_coverage_is_a_share_and_has_limits(wrong, complaint):
    assert f"phase 1 {complaint}" in refused(FIRST, phase_with(**wrong))


def test_a_coverage_may_choose_everything_or_the_least():
    phase = Phase(1, FRESH, "key_mass", 2, coverage=0.5)
    assert (phase.least, phase.size) == (FRESH.sum() + 2, len(FRESH))
    assert phase.can_leave_out(int(FRESH.sum()) + 3)
    assert dataclasses.replace(phase, max_budget=5).size == FRESH.sum() + 5
    assert dataclasses.replace(phase, coverage=0.0, max_budget=5).size == FRESH.sum() + 2
    check(FIRST, phase, Phase(2, FRESH, "key_mass", 2, coverage=0.5, max_budget=4))


def test_a_budget_needs_a_signal():
    assert "phase 1 has budget=3 and no signal to choose by" in refused(FIRST, Phase(1, FRESH, budget=3))


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        (None, "has the signal 'given' and no scores"),
        (np.ones(15, np.float32), r"has scores of shape (15,) for a prompt of 16 tokens"),
        (np.full(16, -1, np.float32), "has scores that are negative or not finite"),
        (np.full(16, np.nan, np.float32), "has scores that are negative or not finite"),
    ],
)
def test_given_scores_are_one_for_each_token(scores, complaint):
    assert f"phase 1 {complaint}" in refused(FIRST, phase_with(signal="given", scores=scores))


def test_all_boundaries_share_blocks_and_scores():
    ones, twos = np.ones(16, np.float32), np.full(16, 2, np.float32)
    assert "phases with a signal have different pool_tokens" in refused(
        FIRST, Phase(1, FRESH, "key_mass", 4, pool_tokens=4), Phase(2, FRESH, "key_mass", 2)
    )
    assert "phases have different scores" in refused(
        FIRST, Phase(1, FRESH, "given", 4, scores=ones), Phase(2, FRESH, "given", 2, scores=twos)
    )
    check(FIRST, Phase(1, FRESH, "given", 4, scores=ones), Phase(2, FRESH, "given", 2, scores=ones.copy()))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (SparseX(boundary_layer=9), "boundary_layer=9 must be at most 8, the model's layers"),
        (SparseX(second_boundary=9), "second_boundary=9 must be at most 8, the model's layers"),
        (SparseX(boundary_layer=3, second_boundary=3), "second_boundary=3 must be larger than boundary_layer=3"),
        (SparseX(second_boundary=1), "second_boundary=1 must be larger than boundary_layer=1"),  # by default: 8 / 6
        (SparseX(boundary_layer=8, second_boundary=2), "second_boundary=2 must be larger than boundary_layer=8"),
        (CacheBlend(boundary_layer=9), "boundary_layer=9 must be at most 8, the model's layers"),
        (Focus(second_boundary=9), "second_boundary=9 must be at most 8, the model's layers"),
    ],
)
def test_boundaries_that_no_model_or_order_allows_are_refused_by_name(method, message):
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        method.phases(PROMPT, LAYERS)


def test_boundaries_behind_the_last_layer_are_never_reached():
    starts = [phase.start for phase in SparseX(boundary_layer=8, second_boundary=8).phases(PROMPT, LAYERS)]
    assert starts == [0, 8, 8]
