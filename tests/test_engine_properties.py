"""Random lives of an engine with a tiny store: no page is ever lost, and what is stored is what is claimed.

At layer 0 K and V depend on the token and its position alone, so every slot that the cache says holds a token
can be checked, whatever method computed it. Exact pages are checked at all layers, against the dense reference.
"""

import numpy as np
import pytest
from conftest import TINY, losing_the_store, tiny_engine, tiny_params
from dense import Dense, stored_kv
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from sparsex_jax import ContextLengthError, ReuseConfig, SamplingParams, StoreFullError, UnknownHandleError
from sparsex_jax.cache.company import having_seen

FEW_PAGES = {"store_tokens": 20 * 16, "decode_steps": 4}
PAGE_SIZE = 16
DENSE = Dense(TINY, tiny_params())
DOCUMENTS = [np.random.default_rng(seed).integers(1, 97, length) for seed, length in enumerate((20, 33, 48, 70))]

namespaces = st.sampled_from(["a", "b"])
methods = st.sampled_from(["full", "prefix", "naive", "sparsex", "excerpt"])
cuts = st.tuples(st.sampled_from(range(4)), st.integers(0, 30), st.integers(31, 70))
prompts = st.lists(st.one_of(cuts, st.lists(st.integers(0, 96), min_size=1, max_size=5)), min_size=1, max_size=4)


def build(pieces):
    parts = [np.array(p) if isinstance(p, list) else DOCUMENTS[p[0]][p[1] : p[2]] for p in pieces]
    return np.concatenate([np.array([1]), *parts]).astype(np.int32)


class EngineMachine(RuleBasedStateMachine):
    handles = Bundle("handles")
    company_tokens, mirrors = 0, False

    def __init__(self):
        super().__init__()
        self.engine = self.make()

    def make(self):
        return tiny_engine(**FEW_PAGES, company_tokens=self.company_tokens, mirrors=self.mirrors)

    @rule(target=handles, pieces=prompts, namespace=namespaces, frozen=st.booleans())
    def remember(self, pieces, namespace, frozen):
        try:
            return self.engine.remember(build(pieces), namespace=namespace, frozen=frozen)
        except (ContextLengthError, StoreFullError):
            return multiple()

    @rule(seconds=st.sampled_from([0.01, None]))
    def heal(self, seconds):
        self.engine.heal(seconds)

    @rule(handle=consumes(handles))
    def forget(self, handle):
        try:
            has_seen = having_seen(self.engine.cache.text(handle))
            namespace = self.engine.cache.entry(handle).namespace
            self.engine.forget(handle)
            companies = [(entry, entry.origin.company) for entry in self.engine.entries(namespace)]
            assert all(entry.stale for entry, company in companies if company is not None and has_seen(company))
        except UnknownHandleError:
            assert handle not in [entry.handle for entry in self.engine.entries()]

    @rule(
        pieces=st.lists(prompts, min_size=1, max_size=3), namespace=namespaces, method=methods, new=st.integers(1, 20)
    )
    def generate(self, pieces, namespace, method, new):
        try:
            outs = self.engine.generate_batch(
                [build(p) for p in pieces],
                SamplingParams(max_new_tokens=new, temperature=1.0, seed=new),
                reuse=ReuseConfig.fitting(
                    method, boundary_layer=1, recompute_ratio=0.1, overflow_tokens=2, coverage=0.5, piece_tokens=16
                ),
                namespace=namespace,
            )
        except (ContextLengthError, StoreFullError):
            return
        assert [len(out.token_ids) for out in outs] == [new] * len(pieces)

    @rule(
        pieces=prompts,
        namespace=namespaces,
        step=st.sampled_from(["begin", "advance", "start_decode", "first_tokens"]),
    )
    def fail(self, pieces, namespace, step):
        def broken(*args, **kwargs):
            raise RuntimeError("broken")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.engine.runner, step, broken)
            with pytest.raises((RuntimeError, ContextLengthError, StoreFullError)):
                self.engine.generate(build(pieces), SamplingParams(max_new_tokens=5), namespace=namespace)

    @rule()
    def lose_the_store(self):
        with losing_the_store(self.engine):
            self.engine.prefill([1, 2, 3])

    @invariant()
    def no_page_is_lost(self):
        self.engine.cache.check()
        stats = self.engine.stats()
        assert stats["active"] == 0
        assert sum(stats[state] for state in ("free", "spare", "cached", "frozen", "base")) == stats["pages"]

    @invariant()
    def stored_kv_is_that_of_the_tokens_claimed(self):
        for node in self.engine.cache.tree.live_nodes():
            tokens = np.frombuffer(node.key, np.int32)
            positions = node.start + np.arange(len(tokens))
            _, keys, values = DENSE.qkv(0, DENSE.embed[tokens], positions)
            for page in node.pages[: len(node.pages) - (node.derived is not None)]:
                stored = stored_kv(self.engine, page * PAGE_SIZE + np.arange(len(tokens)))
                np.testing.assert_allclose(stored[0][0], keys, atol=1e-4)
                np.testing.assert_allclose(stored[1][0], values, atol=1e-4)

    def teardown(self):
        """Exact pages, all layers: a root's chain of sharable pages is a prefix that was prefilled in full."""
        for root in self.engine.cache.tree.roots.values():
            self.check_chain(root, np.empty(0, np.int32))

    def check_chain(self, node, past):
        for child in node.children:
            tokens = np.append(past, np.frombuffer(child.key, np.int32)[: child.exact])
            if child.start != len(past) or child.exact == 0:
                continue
            expected = DENSE.full(tokens)[1]
            stored = stored_kv(self.engine, child.pages[0] * PAGE_SIZE + np.arange(child.exact))
            np.testing.assert_allclose(stored[0], np.array([k[len(past) :] for k, _ in expected]), atol=1e-4)
            if child.sharable:
                self.check_chain(child, tokens)


class CompanyMachine(EngineMachine):
    """The same where texts are remembered in company."""

    company_tokens = 64

    @invariant()
    def texts_have_the_kv_that_their_company_gives(self):
        for entry in self.engine.entries():
            before, text = entry.origin.company.tokens, self.engine.cache.text(entry.handle)
            assert len(before) == entry.origin.company_tokens <= self.company_tokens
            if len(before):
                assert not any(self.engine.cache.tree[page].in_place for page in entry.pages)
            expected = DENSE.full(np.concatenate([before, text]))[1]
            slots = np.concatenate([page * PAGE_SIZE + np.arange(PAGE_SIZE) for page in entry.pages])[: len(text)]
            for ours, right in zip(stored_kv(self.engine, slots), zip(*expected, strict=True), strict=True):
                np.testing.assert_allclose(ours, np.array(right)[:, len(before) :], atol=1e-4)

    @rule()
    def heal_all(self):
        self.engine.heal()
        assert self.engine.heal() == 0


class ManyLivesOfMirrors(EngineMachine):
    """The same where what shares segments is stored as mirrors, whose pages come and go."""

    mirrors = True

    @rule()
    def drop_what_can_be_restored(self):
        self.engine.cache._evict(np.flatnonzero(self.engine.cache._pool.spare).tolist())


class ManyLives(EngineMachine):
    """The same, for longer."""


class ManyLivesInCompany(CompanyMachine):
    """The same, for longer."""


QUICK = settings(max_examples=4, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck))
EngineMachine.TestCase.settings = QUICK
CompanyMachine.TestCase.settings = QUICK
ManyLivesOfMirrors.TestCase.settings = settings(QUICK, max_examples=60)
ManyLives.TestCase.settings = ManyLivesInCompany.TestCase.settings = settings(QUICK, max_examples=60)
test_engine_machine = EngineMachine.TestCase
test_company_machine = CompanyMachine.TestCase
test_many_lives = pytest.mark.slow(ManyLives.TestCase)
test_many_lives_of_mirrors = pytest.mark.slow(ManyLivesOfMirrors.TestCase)
test_many_lives_in_company = pytest.mark.slow(ManyLivesInCompany.TestCase)
