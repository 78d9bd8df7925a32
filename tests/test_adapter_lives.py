"""Random lives of an engine whose adapters come and go, and what adapters do in the rarer ways of a request.

At layer 0 K and V depend on the token, its position and the adapter's version alone, and keys name all three. So each
slot of the store can be checked, whoever computed it. Exact prefixes are checked at all layers, and exact answers.
"""

import dataclasses
from typing import ClassVar

import jax
import numpy as np
import pytest
from adapting import DEVICE, Adapted, adapting_engine, dense_of, greedy, make_adapter, merged
from conftest import TINY, found_in_segments, idle, losing_the_store, tiny_params
from dense import Dense, stored_kv
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparsex_jax import (
    ContextLengthError,
    Engine,
    EngineConfig,
    InvalidRequestError,
    ReuseConfig,
    Round,
    SamplingParams,
    StoreFullError,
)
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.model.matrices import quantise_params
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.reuse.adapters import last_place
from sparsex_jax.scheduler import warmup

PAGE, BITS = 16, 7
FEW_PAGES = {"store_tokens": 20 * PAGE, "decode_steps": 4}
CALLED = (90, 91)
WEIGHTS = [
    make_adapter(1),
    make_adapter(2, rank=8, targets=("wq", "wv")),
    make_adapter(3, invocation=CALLED),
    make_adapter(4, rank=2, targets=("wk", "w_up")),
]
TEXT = np.random.default_rng(11).integers(1, 89, 900).astype(np.int32)
DOCUMENTS = [*(TEXT[at : at + length] for at, length in ((0, 20), (50, 33), (100, 48))), np.int32([*CALLED, 5])]
METHODS = ["full", "prefix", "naive", "sparsex", "excerpt"]

names = st.sampled_from("xyz")
places = st.integers(0, 5)  # among the base model, twice, and what is loaded
pieces = st.lists(st.sampled_from(range(len(DOCUMENTS))), min_size=1, max_size=4)


def build(numbers):
    return np.concatenate([np.int32([1]), *(DOCUMENTS[number] for number in numbers)])


class AdapterMachine(RuleBasedStateMachine):
    changes: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.engine, self.versions = adapting_engine(**FEW_PAGES, **self.changes), {}

    def named(self, place):
        """One of the adapters that are there, or None."""
        loaded = [None, None, *self.engine.adapters]
        return loaded[place % len(loaded)]

    def weights_of(self, name):
        return None if name is None else self.versions[self.engine.adapters[name].number]

    @rule(name=names, which=st.sampled_from(range(len(WEIGHTS))))
    def load(self, name, which):
        if name in self.engine.adapters:
            self.engine.unload_adapter(name)
        self.versions[self.engine.load_adapter(name, WEIGHTS[which]).number] = WEIGHTS[which]

    @precondition(lambda self: self.engine.adapters)
    @rule(name=names)
    def unload(self, name):
        if name in self.engine.adapters:
            self.engine.unload_adapter(name)

    @rule(numbers=pieces, place=places)
    def ask_exactly(self, numbers, place):
        prompt, name = build(numbers), self.named(place)
        try:
            out = self.engine.prefill(prompt, adapter=name, reuse=ReuseConfig("prefix"))
        except (ContextLengthError, StoreFullError):
            return
        expected = reference(self.weights_of(name), prompt).full(prompt)[0][-1]
        np.testing.assert_allclose(out.logits, expected, atol=1e-3)

    @rule(
        asked=st.lists(st.tuples(pieces, places), min_size=1, max_size=4),
        method=st.sampled_from(METHODS),
        new=st.integers(1, 20),
    )
    def generate(self, asked, method, new):
        reuse = ReuseConfig.fitting(
            method, boundary_layer=1, recompute_ratio=0.1, overflow_tokens=2, coverage=0.5, piece_tokens=16
        )
        adapters = [self.named(place) for _, place in asked]
        sampling = SamplingParams(max_new_tokens=new, temperature=1.0, seed=new)
        try:
            self.engine.generate_batch([build(each) for each, _ in asked], sampling, adapter=adapters, reuse=reuse)
        except (ContextLengthError, StoreFullError):
            return

    @rule(number=st.sampled_from(range(3)), place=places, before=st.booleans())
    def remember(self, number, place, before):
        try:
            preamble = DOCUMENTS[-1] if before else None
            self.engine.remember(DOCUMENTS[number], adapter=self.named(place), preamble=preamble)
        except StoreFullError:
            return

    @precondition(lambda self: self.engine.entries())
    @rule(which=st.integers(0, 20))
    def forget(self, which):
        entries = self.engine.entries()
        handle = entries[which % len(entries)].handle
        text = self.engine.admission.adapters.tokens(self.engine.cache.text(handle))
        self.engine.forget(handle)
        own = [self.engine.cache.text(entry.handle) & 127 for entry in self.engine.entries()]
        if not any(np.array_equal(each, text) for each in own):
            for name in (None, *self.engine.adapters):
                try:
                    report = self.engine.prefill(text, adapter=name, keep=False).report
                except StoreFullError:
                    continue
                assert report.fresh_tokens + report.prefix_tokens == len(text)

    @rule()
    def heal(self):
        self.engine.heal(0.2)

    @rule()
    def lose_the_store(self):
        with losing_the_store(self.engine):
            self.engine.prefill([1, 2, 3])

    @invariant()
    def no_page_is_lost(self):
        self.engine.cache.check()
        self.engine.admission.check_books()
        assert self.engine.stats()["active"] == 0

    @invariant()
    def stored_kv_is_what_its_keys_say(self):
        there = {adapter.number for adapter in self.engine.adapters.values()}
        for node in self.engine.cache.tree.live_nodes():
            keys = np.frombuffer(node.key, np.int32)
            for number in set((keys >> BITS).tolist()):
                assert number == 0 or number in there
                own = np.flatnonzero(keys >> BITS == number)
                dense = dense_of(self.versions.get(number))
                hidden = dense.embed[keys[own] & 127]
                _, *expected = dense.qkv(0, hidden, node.start + own)
                for page in node.pages[: len(node.pages) - (node.derived is not None)]:
                    stored = stored_kv(self.engine, page * PAGE + own)
                    for ours, right in zip(stored, expected, strict=True):
                        np.testing.assert_allclose(ours[0], right, atol=1e-4)

    def teardown(self):
        for root in self.engine.cache.tree.roots.values():
            self.check_chain(root, np.empty(0, np.int32))

    def check_chain(self, node, past):
        for child in node.children:
            keys = np.append(past, np.frombuffer(child.key, np.int32)[: child.exact])
            if child.start != len(past) or child.exact == 0 or not child.pages or child.pages[0] == child.derived:
                continue
            acting = np.flatnonzero(keys >> BITS)
            weights = self.versions[int(keys[-1]) >> BITS] if len(acting) else None
            dense = Adapted(weights, acting[0]) if len(acting) else dense_of(None)
            expected = dense.full(keys & 127)[1]
            stored = stored_kv(self.engine, child.pages[0] * PAGE + np.arange(child.exact))
            np.testing.assert_allclose(stored[0], np.array([k[len(past) :] for k, _ in expected]), atol=1e-4)
            np.testing.assert_allclose(stored[1], np.array([v[len(past) :] for _, v in expected]), atol=1e-4)
            if child.sharable:
                self.check_chain(child, keys)


def reference(weights, prompt):
    if weights is None:
        return dense_of(None)
    start = last_place(prompt, weights.invocation) if weights.invocation else 0
    return Adapted(weights, start)


class AdapterMachineWithCompany(AdapterMachine):
    changes: ClassVar = {"company_tokens": 64}


class AdapterMachineOfMirrors(AdapterMachine):
    changes: ClassVar = {"mirrors": True}


class AdapterMachineAboveATier(AdapterMachine):
    """What host memory has is loaded again after the store has lost it; none of that is an adapter's."""

    changes: ClassVar = {"host_store_bytes": 1_000_000}

    @invariant()
    def nothing_of_an_adapter_goes_down(self):
        self.engine.loop.settle()
        for block in self.engine.admission.tiers.index.blocks.values():
            assert (np.frombuffer(block.tokens, np.int32) < TINY.vocab_size).all()


LIVES = settings(max_examples=30, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck))
for each in (AdapterMachine, AdapterMachineWithCompany, AdapterMachineOfMirrors, AdapterMachineAboveATier):
    each.TestCase.settings = LIVES
test_lives = pytest.mark.slow(AdapterMachine.TestCase)
test_lives_with_company = pytest.mark.slow(AdapterMachineWithCompany.TestCase)
test_lives_of_mirrors = pytest.mark.slow(AdapterMachineOfMirrors.TestCase)
test_lives_above_a_tier = pytest.mark.slow(AdapterMachineAboveATier.TestCase)


# The rarer ways of a request --------------------------------------------------------------------------------

LONG = SamplingParams(max_new_tokens=40, ignore_eos=True)


@pytest.fixture
def engine():
    return loaded(adapting_engine())


def loaded(engine):
    for name, weights in zip("xyz", WEIGHTS, strict=False):
        engine.load_adapter(name, weights)
    return engine


@pytest.mark.slow
def test_what_is_preempted_goes_on_under_its_adapter():
    prompts = [TEXT[:90], TEXT[200:280], np.append(TEXT[300:390], CALLED).astype(np.int32), TEXT[400:480]]
    names = ["x", "y", "z", None]
    alone = [
        loaded(adapting_engine()).generate(prompt, LONG, adapter=name)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    engine = loaded(adapting_engine(store_tokens=24 * PAGE, decode_steps=4))
    together = engine.generate_batch(prompts, LONG, adapter=names)
    assert engine.loop.stats.preempted > 0
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert [out.token_ids[:6] for out in together] == [
        greedy(reference(weights, prompt), prompt, 6)[1]
        for prompt, weights in zip(prompts, [*WEIGHTS[:3], None], strict=True)
    ]
    assert idle(engine)


@pytest.mark.slow
def test_members_of_a_round_have_adapters_of_their_own(engine):
    shared = TEXT[:64]
    prompts = [np.concatenate([TEXT[100 + 20 * n :][:10], shared, TEXT[600 + 20 * n :][:6]]) for n in range(4)]
    names = ["x", "y", "x", None]
    engine.remember(shared, adapter="x")
    engine.remember(shared)
    sparse = ReuseConfig("sparsex", boundary_layer=1, recompute_ratio=0.1, overflow_tokens=2)
    options = {"adapter": names, "reuse": sparse, "return_logits": True, "keep": False}
    alone = [
        engine.generate_batch([prompt], LONG, **(options | {"adapter": name}))[0]
        for prompt, name in zip(prompts, names, strict=True)
    ]
    outs = engine.generate_batch(prompts, LONG, round=Round("r", 4), **options)
    for out, expected in zip(outs, alone, strict=True):
        np.testing.assert_allclose(out.logits, expected.logits, atol=1e-3)
        assert out.token_ids == expected.token_ids
    assert [found_in_segments(out.report) for out in outs] == [64, 0, 64, 64]


@pytest.mark.slow
def test_an_excerpt_is_answered_under_the_adapter(engine):
    texts = [TEXT[at : at + 48] for at in (0, 100, 200, 300)]
    for text in texts:
        engine.remember(text, adapter="x")
    prompt = np.concatenate([TEXT[800:806], *texts, TEXT[500:510]])
    reuse = ReuseConfig("excerpt", only_if_faster=False, coverage=0.3, piece_tokens=16)
    with engine.prefilled(prompt, adapter="x", reuse=reuse) as held:
        kept = held.prompt
        assert held.report.omitted_tokens > 0
    out = engine.generate(prompt, SamplingParams(max_new_tokens=4, ignore_eos=True), adapter="x", reuse=reuse)
    assert out.token_ids == greedy(dense_of(WEIGHTS[0]), kept, 4)[1]
    assert out.report.adapter.tokens == len(kept)


@pytest.mark.slow
def test_prompt_logprobs_are_those_of_the_adapter(engine):
    sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=1)
    out = engine.generate(TEXT[:30], sampling, adapter="x")
    logits = dense_of(WEIGHTS[0]).full(TEXT[:30])[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[place - 1, TEXT[place]] for place in range(1, 30)]
    np.testing.assert_allclose([entry.logprob for entry in out.prompt_logprobs[1:]], expected, atol=1e-3)


@pytest.mark.slow
def test_healing_makes_what_an_adapter_pasted_exact(engine):
    engine.remember(TEXT[:64], adapter="x")
    prompt = np.concatenate([TEXT[100:106], TEXT[:64], TEXT[110:116]])
    sparse = ReuseConfig("naive", only_if_faster=False)
    engine.prefill(prompt, adapter="x", reuse=sparse)
    assert engine.heal() > 0
    healed = engine.prefill(prompt, adapter="x", reuse=ReuseConfig("prefix"))
    assert healed.report.prefix_tokens == len(prompt) - 1
    np.testing.assert_allclose(healed.logits, dense_of(WEIGHTS[0]).full(prompt)[0][-1], atol=1e-3)


@pytest.mark.slow
def test_two_devices_compute_what_one_does():
    sharded = Engine(TINY, sharded_params(2), mesh=make_mesh(2), config=DEVICE)
    for name, weights in zip("xyz", WEIGHTS, strict=False):
        sharded.load_adapter(name, weights)
    compiled = num_compilations()
    sharded.unload_adapter("y")
    sharded.load_adapter("y", WEIGHTS[1])
    assert num_compilations() == compiled
    few = SamplingParams(max_new_tokens=4, ignore_eos=True)
    names = ["x", "y", None]
    outs = sharded.generate_batch([TEXT[:12]] * 3, few, adapter=names, return_logits=True)
    for out, weights in zip(outs, [WEIGHTS[0], WEIGHTS[1], None], strict=True):
        logits, tokens = greedy(dense_of(weights), TEXT[:12], 4)
        np.testing.assert_allclose(out.logits, logits, atol=1e-3)
        assert out.token_ids == tokens


def sharded_params(devices):
    made = random_params(TINY, "float32", make_mesh(devices))
    return jax.tree.map(lambda ours, theirs: jax.device_put(ours, theirs.sharding), tiny_params(), made)


@pytest.mark.slow
def test_adapters_on_quantised_weights():
    params = quantise_params(TINY, tiny_params(), "int8", make_mesh())
    engine = Engine(TINY, params, config=DEVICE, adapters={"x": WEIGHTS[0]})
    plain = Engine(TINY, params, config=EngineConfig(**vars(DEVICE) | {"max_adapters": 0}))
    ours, theirs = engine.prefill(TEXT[:12]), plain.prefill(TEXT[:12])
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
    with_it = engine.prefill(TEXT[:12], adapter="x")
    np.testing.assert_allclose(with_it.logits, dense_of(WEIGHTS[0]).full(TEXT[:12])[0][-1], atol=0.3)
    assert np.abs(with_it.logits - ours.logits).max() > 1


@pytest.mark.slow
def test_experts_take_adapters_of_attention_only():
    model = dataclasses.replace(TINY, num_experts=4, experts_per_token=2, intermediate_size=16)
    params = random_params(model, "float32", make_mesh())
    slots_as_needed = EngineConfig(**vars(DEVICE) | {"max_adapters": 0})
    engine = Engine(model, params, config=slots_as_needed, adapters={"y": WEIGHTS[1]})
    assert engine.config.max_adapters == 1
    engine.unload_adapter("y")
    with pytest.raises(InvalidRequestError, match="'w_gate'; this model takes pairs for wq, wk, wv, wo"):
        engine.load_adapter("x", WEIGHTS[0])
    engine.load_adapter("y", WEIGHTS[1])
    dense = Dense(model, merged(WEIGHTS[1], params))
    np.testing.assert_allclose(engine.prefill(TEXT[:12], adapter="y").logits, dense.full(TEXT[:12])[0][-1], atol=1e-3)


@pytest.mark.slow
def test_a_disk_tier_has_the_base_part_alone_after_a_restart(tmp_path):
    disk = {"host_store_bytes": 1_000_000, "disk_store": str(tmp_path), "disk_store_bytes": 1_000_000}
    prompt = np.concatenate([TEXT[:64], CALLED, TEXT[80:120]]).astype(np.int32)
    first = loaded(adapting_engine(**disk))
    for name in ("x", "z"):
        first.generate(prompt, LONG, adapter=name)
    first.close()
    second = adapting_engine(**disk)
    second.load_adapter("z", WEIGHTS[2])  # its version's number was x's in the process before
    out = second.generate(prompt, SamplingParams(max_new_tokens=4, ignore_eos=True), adapter="z")
    assert out.report.restored_tokens == out.report.prefix_tokens == 64
    assert out.token_ids == greedy(Adapted(WEIGHTS[2], 64), prompt, 4)[1]
    second.close()


@pytest.mark.slow
def test_a_crowd_with_adapters_compiles_nothing_after_the_warm_up():
    model = dataclasses.replace(TINY, vocab_size=201)
    engine = Engine.from_config(model, **vars(DEVICE) | {"chunk_rows": 256, "max_num_seqs": 2})
    for step in warmup.steps(engine.loop):
        step()
    warm = num_compilations()
    loaded(engine)
    prompts = [TEXT[:300], TEXT[100:130], TEXT[:290]]
    engine.generate_batch(prompts, LONG, adapter=["x", None, "y"])
    engine.remember(TEXT[:64], adapter="x")
    engine.generate_batch([np.append(TEXT[500:520], TEXT[:64])] * 2, LONG, adapter=["x", "z"])
    assert num_compilations() == warm
