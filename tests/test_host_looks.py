"""What steps do on GPUs, done on a CPU: decode asks the host nothing on its way, and launches are few."""

import dataclasses
import re
from inspect import unwrap

import jax
import numpy as np
import pytest
from conftest import CONFIG, TINY, tiny_engine

from sparsex_jax import ReuseConfig, SamplingParams
from sparsex_jax.device import runner
from sparsex_jax.device.decode import decode
from sparsex_jax.device.runner import Runner
from sparsex_jax.device.state import BatchSlot, decode_state
from sparsex_jax.model.ops import Ops
from sparsex_kernels.backend import prefer

KINDS = {
    "plain": SamplingParams(temperature=1.0),
    "ranked": SamplingParams(temperature=1.0, top_k=3),
    "adjusted": SamplingParams(presence_penalty=0.5, logprobs=2),
}
STEPS = 4  # of a program


def steered_engine(**changes):
    """An engine whose host answers, on a device that would not need it."""
    engine = tiny_engine(**changes)
    engine.runner.host_steers = True
    return engine


@pytest.mark.parametrize(("kind", "sorts"), [("adjusted", True), pytest.param("plain", False, marks=pytest.mark.slow)])
def test_no_step_of_a_compiled_decode_asks_the_host(kind, sorts):
    """Attention aside: what stands in for its kernel here goes through the pages that there are."""
    runner = steered_engine().runner
    state = decode_state([BatchSlot([0], [0], KINDS[kind], (1,), [0])], runner.shapes.max_pages, TINY.vocab_size)
    leaves, structure = jax.tree.flatten(runner.place(state))
    about = {"decoder": runner.decoder, "steps": STEPS, "stops_early": False}

    @jax.jit
    def step(store, leaves, limit):  # checked records cannot hold what `lower` says of arguments
        return unwrap(decode)(runner.params, store, jax.tree.unflatten(structure, leaves), limit, **about)

    compiled = step.lower(runner.store, leaves, 1).compile().as_text()
    lines = [line for line in compiled.splitlines() if "/attention/" not in line]
    loops = [line for line in lines if re.search(r" while\(", line)]
    assert any(f'"known_trip_count":{{"n":"{STEPS}"}}' in line for line in loops), "the steps"
    assert any(f'"known_trip_count":{{"n":"{TINY.num_layers}"}}' in line for line in loops), "the layers"
    assert [line for line in loops if "known_trip_count" not in line] == []
    assert [line for line in lines if re.search(r" conditional\(", line)] == []
    assert any(re.search(r" sort\(", line) for line in lines) == sorts


def decoded(runner):
    """What two requests get in two dispatches, of which one ends within the first, and the state behind both."""
    slots = [
        BatchSlot([0], [5], dataclasses.replace(KINDS["ranked"], max_new_tokens=40, seed=1), (-1,), [0, 1, 2]),
        BatchSlot([0], [5], dataclasses.replace(KINDS["adjusted"], max_new_tokens=4), (-1,), [3]),
    ]
    state, first = runner.start_decode(decode_state(slots, runner.shapes.max_pages, TINY.vocab_size), 16)
    state, second = runner.start_decode(state, 3)
    counts = state.sampling.adjustment.counts
    return jax.device_get((first, second, [state.token, state.position, state.remaining, counts]))


def test_the_same_tokens_come_when_nothing_is_asked():
    expected, got = decoded(tiny_engine().runner), decoded(steered_engine().runner)
    *sampled, state = zip(got, expected, strict=True)
    for steered, usual in sampled:
        taken = usual.token >= 0
        width = steered.token.shape[1]
        assert taken.sum() in (16 + 3, 3)
        assert not taken[:, width:].any()
        assert np.array_equal(steered.token, usual.token[:, :width])
        for one, other in zip(jax.tree.leaves(steered.logprobs), jax.tree.leaves(usual.logprobs), strict=True):
            assert np.array_equal(one[taken[:, :width]], other[taken])
    for one, other in zip(*state, strict=True):
        assert np.array_equal(one, other)


def test_a_nucleus_is_decided_for_the_whole_batch():
    about = (2, TINY.vocab_size)
    states = {
        kinds: decode_state([BatchSlot([0], [0], KINDS[kind], (1,), [0]) for kind in kinds], *about)
        for kinds in (("plain", "plain"), ("plain", "ranked"), ("plain", "adjusted"))
    }
    decided = {kinds: state.sampling.decided().ranks for kinds, state in states.items()}
    assert decided == {("plain", "plain"): False, ("plain", "ranked"): True, ("plain", "adjusted"): True}
    assert all(state.sampling.ranks is None for state in states.values())


def test_where_launches_cost_time_the_answers_are_the_same(monkeypatch):
    """Decode without a loop of layers, and prefills of one chunk that make once what their rows alone decide."""
    text = np.random.default_rng(5).integers(0, TINY.vocab_size, 60).astype(np.int32)
    prompt = np.concatenate([text[:9], text[40:]])  # its last part is remembered
    reuse = ReuseConfig("naive", min_segment_tokens=16, only_if_faster=False)

    def answers():
        engine = tiny_engine()
        engine.remember(text[40:])
        found = engine.generate(prompt, SamplingParams(max_new_tokens=5), reuse=reuse, keep=False)
        assert found.report.reused_tokens > 16
        return found.token_ids, engine.prefill(prompt, reuse=reuse).logits

    tokens, logits = answers()
    monkeypatch.setattr(Ops, "pays_for_launches", property(lambda ops: True))
    with prefer("xla"):  # a backend of its own, so that programs are compiled anew
        changed, found = answers()
    assert changed == tokens
    np.testing.assert_allclose(found, logits, atol=1e-5)


METHODS = {
    "full": ReuseConfig("full"),
    "prefix": ReuseConfig("prefix"),
    "naive": ReuseConfig("naive"),
    "from layer 0": ReuseConfig("sparsex", boundary_layer=0, recompute_ratio=0.1),
    "from layer 2": ReuseConfig("sparsex", boundary_layer=2, recompute_ratio=0.3, tail_tokens=0, overflow_tokens=0),
    "pooled": ReuseConfig("sparsex", boundary_layer=1, recompute_ratio=0.2, pool_tokens=8),
    "covering": ReuseConfig("sparsex", boundary_layer=1, coverage=0.9),
}


def test_a_prefill_at_once_gives_what_one_by_layers_does(monkeypatch):
    """In full, behind a prefix and with chosen rows, of one chunk and of several, the last of them a short one.

    A program that does nothing else chooses the rows."""
    stored = [np.arange(2, 34), np.arange(34, 90)]
    long, short = [7, *stored[1], *range(30, 60), *stored[0], 3], [3, *stored[1], 9]
    prompts = [1, *stored[0][:9]], [*stored[0], 5, 6], short, long
    taken, goes = [], Runner._goes_at_once
    monkeypatch.setattr(
        Runner, "_goes_at_once", lambda *about: taken.append((*about[1:], goes(*about))) or taken[-1][2]
    )

    def outcomes(engine):
        for text in stored:
            engine.remember(text, frozen=True)
        found = [engine.prefill(one, reuse=how, keep=False) for how in METHODS.values() for one in prompts]
        return [each.logits for each in found], [each.report.active.tolist() for each in found]

    crossed, cross = [], runner.cross
    monkeypatch.setattr(
        runner, "cross", lambda *args, **static: crossed.append(int(args[3].layer)) or cross(*args, **static)
    )

    expected, active = outcomes(tiny_engine())
    assert not any(at_once for _, _, at_once in taken)
    assert not crossed
    found, others = outcomes(steered_engine())
    assert crossed == [first for first, _, at_once in taken if at_once and first is not None]
    chunk = CONFIG.chunk_rows
    kinds = {(first is not None, bool(first), rows > chunk) for first, rows, at_once in taken if at_once}
    assert kinds == {
        (False, False, False),
        (False, False, True),
        (True, False, False),
        (True, False, True),
        (True, True, False),
    }
    assert any(not at_once and first and rows > chunk for first, rows, at_once in taken[len(taken) // 2 :])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert others == active
