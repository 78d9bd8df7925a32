"""Mirrors against a store of numbers, in any order of calls that hypothesis finds: what was derived is as it was.

A rotation is modelled by a hash of the row and the shift. So two rotations are not one by their sum, as is so for
numbers that are rounded, and a row that came another way than the first time is another row.
"""

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.derived import Derived, pack
from sparsex_jax.cache.mirrors import Origins
from sparsex_jax.errors import PinLimitError, StoreFullError
from sparsex_jax.reuse import schedule

PAGE, LAYERS = 8, 4
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck))


def rotated(rows, shift):
    turned = (rows * 1_000_003 + shift * 7_919 + 7) % (1 << 40)
    return np.where(shift == 0, rows, turned)


@QUICK
@given(st.lists(st.lists(st.integers(0, 6), min_size=PAGE, max_size=PAGE), min_size=1, max_size=4))
def test_no_two_rows_are_packed_into_one_place(depths):
    depth = np.array(depths)
    column, layer, columns = pack(depth, 6)
    places, pages = set(), {}
    for page, place in zip(*np.nonzero(depth), strict=True):
        assert layer[page, place] + depth[page, place] <= 6
        assert pages.setdefault(int(column[page, place]), page) == page
        for row in range(depth[page, place]):
            where = int(column[page, place]), int(layer[page, place]) + row
            assert where not in places
            places.add(where)
    assert len(pages) == columns.sum() == max(pages, default=-1) + 1
    assert np.array_equal(np.bincount(list(pages.values()), minlength=len(depth)), columns)


def test_the_packing_of_the_docstring():
    column, layer, columns = pack(np.array([[2, 1, 4, 1, 1, 0]]), 4)
    assert column.tolist() == [[1, 2, 0, 2, 2, 0]]
    assert layer.tolist() == [[0, 0, 0, 1, 2, 0]]
    assert columns.tolist() == [3]


def test_the_rows_that_a_prefill_wrote():
    """As in the docstring of `written_depth`, and where a signal looks before layer 0."""
    every = np.ones(4, bool)
    phases = [schedule.Phase(0, every), schedule.Phase(2, every, "key_mass"), schedule.Phase(4, every)]
    computed = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    assert schedule.written_depth(phases, computed, 5).tolist() == [5, 4, 3, 0]
    phases = [schedule.Phase(0, every), schedule.Phase(0, every, "key_mass"), schedule.Phase(5, every)]
    assert schedule.written_depth(phases, computed, 5).tolist() == [5, 5, 0, 0]
    for signal, deep in (("kv_deviation", [5, 5, 1, 0]), ("probe_mass", [5, 5, 0, 0]), ("own", [5, 5, 1, 0])):
        phases[1] = schedule.Phase(0, every, signal)
        assert schedule.written_depth(phases, computed, 5).tolist() == deep


class Store:
    """Rows of all layers, and a cache that says what they are."""

    def __init__(self, num_pages, num_layers=LAYERS, **options):
        self.cache = PageCache(num_pages, PAGE, num_layers=num_layers, **options)
        self.rows = np.full((LAYERS, num_pages * PAGE), -1, np.int64)
        self.num_written = 0

    def gathered(self, segment):
        """What is copied for a segment."""
        rows = segment.rows or Derived.stored(segment.slots)
        layer = np.arange(LAYERS)[:, None]
        patched = layer < rows.depth
        from_source = rotated(self.rows[layer, rows.source], segment.shift + rows.shift)
        from_patch = rotated(self.rows[np.where(patched, layer + rows.layer, 0), rows.patch], np.int64(segment.shift))
        return np.where(patched, from_patch, from_source)

    def copy(self, segments, pages):
        found = [(segment, self.gathered(segment)) for segment in segments]
        for segment, rows in found:
            self.rows[:, self.slots(pages)[segment.start : segment.end]] = rows

    def write(self, slots, depth):
        for slot, deep in zip(slots.tolist(), depth.tolist(), strict=True):
            self.rows[:deep, slot] = self.num_written + np.arange(deep)
            self.num_written += deep

    def derive(self, pages, origins, depth, first=0):
        packing = self.cache.mirrors.derive(pages, origins, depth, first)
        if packing is not None:
            for source, target, layer, deep in zip(
                packing.source, packing.target, packing.layer, packing.depth, strict=True
            ):
                self.rows[layer : layer + deep, target] = self.rows[:deep, source]
        return packing

    @staticmethod
    def slots(pages):
        return (np.array(pages, np.int64)[:, None] * PAGE + np.arange(PAGE)).ravel()

    def content(self, page):
        """The rows of a page as its derived form, or the store, has them."""
        if not self.cache.mirrors.is_derived(page):
            return self.rows[:, self.slots([page])]
        rows = self.cache._pool.derived[page]
        layer = np.arange(LAYERS)[:, None]
        own = self.rows[np.where(layer < rows.depth, layer + rows.layer, 0), rows.patch]
        return np.where(layer < rows.depth, own, rotated(self.rows[layer, rows.source], rows.shift))


@dataclasses.dataclass(eq=False)
class Running:
    pages: list[int]
    tokens: np.ndarray
    namespace: str
    exact: int
    first: int
    origins: Origins
    depth: np.ndarray


def serve(store, tokens, namespace, rng, deepest=LAYERS):
    """Look up, restore, copy, compute some layers of what was found, commit. Raises StoreFullError."""
    cache, tokens = store.cache, np.array(tokens, np.int32)
    match = cache.lookup(tokens, namespace, accepts=lambda made_by: True)
    try:
        derived = [page for page in match.prefix_pages if cache.mirrors.is_derived(page)]
        dense = [page for page in match.prefix_pages if not cache.mirrors.is_derived(page)]
        new = cache.allocate(-(-len(tokens) // PAGE) - len(dense))
        cache.share(dense)
        for place, copy in enumerate(cache.mirrors.restore(derived, new[: len(derived)])):
            store.copy([copy], new[: len(derived)])
            derived[place] = (derived[place], new[place])
        fresh, restored = new[len(derived) :], dict(derived)
        pages = [restored.get(page, page) for page in match.prefix_pages] + fresh
        segments = [cache.mirrors.located(each) for each in match.copies]
        origins = cache.mirrors.origins(segments, len(tokens))
        store.copy(segments, pages)
    finally:
        cache.let_go(match)
    copied = np.zeros(len(tokens), bool)
    for segment in match.copies:
        copied[segment.start : segment.end] = True
    depth = np.where(copied, rng.integers(0, deepest + 1, len(tokens)) * (rng.random(len(tokens)) < 0.3), LAYERS)
    depth[: len(match.prefix_pages) * PAGE] = 0
    tail = match.prefix_tail
    if tail is not None:
        depth[tail.start : tail.end] = 0
    store.write(store.slots(pages)[: len(tokens)], depth)
    exact = match.segments[0].start if match.segments else len(tokens)
    exact = match.num_exact_tokens if match.num_exact_tokens < match.num_prefix_tokens else exact
    cache.commit(pages, tokens, namespace, exact_tokens=exact, made_by="sparse")
    return Running(pages, tokens, namespace, exact, len(match.prefix_pages), origins, depth)


DOCUMENTS = [np.random.default_rng(seed).integers(0, 1000, 64).tolist() for seed in range(3)]
cuts = st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 3, 8, 20]), st.sampled_from([64, 64, 40, 20]))
prompts = st.tuples(st.sampled_from([1000, 1010, 1020]), st.lists(cuts, min_size=1, max_size=3)).map(
    lambda parts: [
        token
        for i, (which, at, length) in enumerate(parts[1])
        for token in [parts[0] + i, *DOCUMENTS[which][at : at + length]]
    ]
)
namespaces = st.sampled_from(["a", "a", "a", "b"])


class MirrorMachine(RuleBasedStateMachine):
    """Sequences, mirrors, pins, entries and failures in any order, on a store that is nearly always too small."""

    sequences = Bundle("sequences")

    @initialize(num_pages=st.integers(6, 40))
    def start(self, num_pages):
        self.now = 0.0
        self.store = Store(num_pages, clock=lambda: self.now)
        self.cache = self.store.cache
        self.running, self.ended = [], []
        self.expected = {}  # by node
        self.owner = np.full(num_pages * PAGE, None)

    @staticmethod
    def key(node, page):
        """Exact content that was computed twice is on two pages, of other numbers here."""
        return node, page if node.sharable else None

    def note(self, running):
        """What its nodes have from now on."""
        for page in running.pages:
            node = self.cache.tree.node_of[page]
            if node is not None and self.key(node, page) not in self.expected:
                rows = self.store.rows[:, self.store.slots([page])][:, : node.length]
                self.expected[self.key(node, page)] = rows.copy()
        self.owner[self.store.slots(running.pages)] = running.namespace

    def serve(self, tokens, namespace, seed):
        try:
            running = serve(self.store, tokens, namespace, np.random.default_rng(seed))
        except StoreFullError:
            return multiple()  # nothing to hold
        self.running.append(running)
        self.note(running)
        return running

    @rule(several=st.lists(prompts, min_size=2, max_size=5), namespace=namespaces, seed=st.integers(0, 99))
    def round(self, several, namespace, seed):
        """Agents that come and go one after the other, and are stored as mirrors."""
        for number, tokens in enumerate(several):
            running = self.serve(tokens, namespace, seed + number)
            if isinstance(running, Running):
                self.end(running, True)

    @rule(more=prompts, number=st.integers(0, 1000), seed=st.integers(0, 99))
    def go_on(self, more, number, seed):
        """A conversation that was answered goes on."""
        if self.ended:
            tokens, namespace = self.ended[number % len(self.ended)]
            running = self.serve([*tokens, *more[:20]], namespace, seed)
            if isinstance(running, Running):
                self.end(running, True)

    @rule(target=sequences, tokens=prompts, namespace=namespaces, seed=st.integers(0, 99))
    def begin(self, tokens, namespace, seed):
        return self.serve(tokens, namespace, seed)

    @rule(running=sequences, more=st.lists(st.integers(2000, 2010), min_size=1, max_size=12))
    def answer(self, running, more):
        """It grows, and is committed again."""
        tokens = np.append(running.tokens, np.array(more, np.int32))
        lacking = -(-len(tokens) // PAGE) - len(running.pages)
        try:
            running.pages += self.cache.allocate(max(lacking, 0))
        except StoreFullError:
            return
        self.store.write(self.store.slots(running.pages)[len(running.tokens) : len(tokens)], np.full(len(more), LAYERS))
        try:
            self.cache.commit(running.pages, tokens, running.namespace, exact_tokens=running.exact, made_by="sparse")
        except ValueError:  # a page of it was forgotten, and another's content
            return
        running.tokens = tokens
        self.note(running)

    @rule(running=consumes(sequences), mirrored=st.booleans())
    def end_one(self, running, mirrored):
        self.end(running, mirrored)

    def end(self, running, mirrored):
        self.running.remove(running)
        self.ended.append((running.tokens.tolist(), running.namespace))
        if mirrored:
            packing = self.store.derive(running.pages, running.origins, running.depth, running.first)
            if packing is not None:
                rows = sum(self.cache._pool.derived[page].num_rows for page in packing.pages)
                assert rows == packing.depth.sum()
                self.owner[packing.target] = running.namespace
                for page in packing.pages:
                    derived = self.cache._pool.derived[page]
                    slots = [*derived.source[derived.depth < LAYERS], *derived.patch[derived.depth > 0]]
                    assert set(self.owner[slots]) == {running.namespace}
        self.cache.release(running.pages)

    @rule(running=consumes(sequences))
    def fail(self, running):
        self.running.remove(running)
        self.cache.withdraw(running.pages[running.first :])
        self.cache.release(running.pages)

    @rule(running=sequences, key=st.sampled_from(["x", "y"]))
    def pin(self, running, key):
        with contextlib.suppress(PinLimitError):
            self.cache.pin(running.tokens, running.namespace, key, 2.0)

    @rule()
    def time_goes_on(self):
        self.now += 1
        self.cache.pins.expire()

    @rule(tokens=prompts, namespace=namespaces)
    def find(self, tokens, namespace):
        """What is found is of this namespace, and has these tokens."""
        match = self.cache.lookup(np.array(tokens, np.int32), namespace, accepts=lambda made_by: True)
        assert all(self.cache.tree[page].namespace == namespace for page in match.pages)
        self.cache.let_go(match)

    @rule(which=st.integers(0, 2), at=st.integers(0, 20), namespace=namespaces)
    def forget(self, which, at, namespace):
        """A text that is remembered and forgotten is not found in mirrors either."""
        text = np.array(DOCUMENTS[which][at : at + 40], np.int32)
        try:
            pages = self.cache.allocate(5)
        except StoreFullError:
            return
        self.store.write(self.store.slots(pages), np.full(40, LAYERS))
        self.cache.commit(pages, text, namespace, exact_tokens=40)
        self.owner[self.store.slots(pages)] = namespace
        try:
            handle = self.cache.register(pages, 40, namespace, frozen=False)
        except ValueError:
            handle = None
        self.cache.release(pages)
        if handle is None:
            return
        self.cache.forget(handle)
        match = self.cache.lookup(np.append(text, 0).astype(np.int32), namespace, accepts=lambda made_by: True)
        assert match.num_prefix_tokens + sum(segment.length for segment in match.segments) < 15
        self.cache.let_go(match)

    @rule(most=st.integers(1, 40))
    def heal(self, most):
        asked = self.cache.to_heal(most)
        if asked is None:
            return
        tokens, namespace = asked
        match = self.cache.lookup(tokens, namespace, segments=False)
        assert not any(map(self.cache.mirrors.is_derived, match.prefix_pages))
        new = self.cache.allocate(-(-len(tokens) // PAGE) - len(match.prefix_pages))
        self.cache.share(match.prefix_pages)
        pages = match.prefix_pages + new
        self.store.copy([self.cache.mirrors.located(each) for each in match.copies], pages)
        self.cache.let_go(match)
        slots = self.store.slots(pages)[: len(tokens)]
        self.store.write(slots[match.num_prefix_tokens :], np.full(len(tokens) - match.num_prefix_tokens, LAYERS))
        self.cache.commit(pages, tokens, namespace, exact_tokens=len(tokens))
        self.note(Running(pages, tokens, namespace, len(tokens), len(match.prefix_pages), None, None))
        self.cache.release(pages)

    @rule()
    def clear(self):
        self.cache.clear()
        assert self.cache.stats().cached == 0

    @invariant()
    def nothing_leaks_and_nothing_changes(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check([page for running in self.running for page in running.pages])
        for node in self.cache.tree.live_nodes():
            for page in node.pages:
                expected = self.expected.get(self.key(node, page))
                there = self.store.content(page)[:, : node.length]
                assert expected is None or np.array_equal(there, expected), (page, node.pages)

    def forget_the_past(self):
        """What is expected of nodes that are gone, and prompts that were answered long ago."""
        live = set(self.cache.tree.live_nodes())
        self.expected = {key: rows for key, rows in self.expected.items() if key[0] in live}
        self.ended = self.ended[-20:]

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        for running in self.running:
            self.cache.release(running.pages)
        self.running = []
        self.cache.clear()
        self.cache.check([])
        stats = self.cache.stats()
        assert stats.free == stats.pages
        assert stats.derived == stats.patch_rows == 0


TestMirrorMachine = MirrorMachine.TestCase
TestMirrorMachine.settings = settings(QUICK, max_examples=15, stateful_step_count=20)


@pytest.mark.slow
class TestMirrorMachineForLong(MirrorMachine.TestCase):
    settings = settings(QUICK, max_examples=200, stateful_step_count=50, phases=[Phase.generate])


def some_prompt(rng):
    """As `prompts`, of which hypothesis makes too few in a minute."""
    several = range(int(rng.integers(1, 4)))
    cut = [(int(rng.choice([0, 0, 3, 8, 20])), int(rng.choice([64, 64, 40, 20]))) for _ in several]
    parts = [(int(rng.integers(3)), at, length) for at, length in cut]
    first = 1000 + 10 * int(rng.integers(3))
    return [token for i, (which, at, n) in enumerate(parts) for token in [first + i, *DOCUMENTS[which][at : at + n]]]


def random_step(machine, rng):
    """One call of a rule with what a generator chooses. Rules about a running sequence do nothing where none is."""
    running = machine.running[int(rng.integers(len(machine.running)))] if machine.running else None
    namespace, seed = ("a", "a", "a", "b")[int(rng.integers(4))], int(rng.integers(100))
    several = [some_prompt(rng) for _ in range(int(rng.integers(2, 5)))]
    steps = [
        lambda: machine.round(several, namespace, seed),
        lambda: machine.go_on(several[0], int(rng.integers(1000)), seed),
        lambda: machine.begin(several[0], namespace, seed),
        lambda: running and machine.answer(running, rng.integers(2000, 2011, int(rng.integers(1, 13))).tolist()),
        lambda: running and machine.end_one(running, bool(rng.integers(2))),
        lambda: running and machine.fail(running),
        lambda: running and machine.pin(running, "xy"[int(rng.integers(2))]),
        machine.time_goes_on,
        lambda: machine.find(several[0], namespace),
        lambda: machine.forget(int(rng.integers(3)), int(rng.integers(21)), namespace),
        lambda: machine.heal(int(rng.integers(1, 41))),
        machine.clear,
    ]
    often = np.array([20, 15, 10, 10, 15, 3, 4, 4, 5, 3, 5, 0.3])
    steps[int(rng.choice(len(steps), p=often / often.sum()))]()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_5000_steps_at_random(seed):
    """100,000 in all, on stores of 6 to 100 pages. Sources are evicted all the time."""
    rng, machine = np.random.default_rng(seed), MirrorMachine()
    machine.start(num_pages=int(rng.integers(6, 101)))
    for number in range(5000):
        random_step(machine, rng)
        if number % 10 == 0:
            machine.nothing_leaks_and_nothing_changes()
            machine.forget_the_past()
    assert machine.cache.stats().lookups > 4000
    machine.teardown()
