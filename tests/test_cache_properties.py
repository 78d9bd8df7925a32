"""The page cache against a model that records what each slot holds, in any order of calls that hypothesis finds."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from sparsex_jax.cache import Match, PageCache
from sparsex_jax.errors import PinLimitError, StoreFullError, UnknownHandleError, UnknownPinError

PAGE = 8
QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck))


def filled(texts: list[list[int]], page_size: int) -> PageCache:
    """A cache with room for all of these sequences, each committed as exact and released."""
    cache = PageCache(sum(-(-len(text) // page_size) for text in texts) + 1, page_size)
    for text in texts:
        pages = cache.allocate(-(-len(text) // page_size))
        cache.commit(pages, np.array(text, np.int32), "a", exact_tokens=len(text))
        cache.release(pages)
    return cache


def longest_from(prompt: list[int], at: int, texts: list[list[int]]) -> int:
    """By brute force, the length of the longest run of `prompt` from `at` on that is anywhere in one of the texts."""
    best = 0
    for text in texts:
        for offset in range(len(text)):
            length = 0
            while at + length < len(prompt) and offset + length < len(text):
                if prompt[at + length] != text[offset + length]:
                    break
                length += 1
            best = max(best, length)
    return best


@QUICK
@given(
    texts=st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=70, unique=True), min_size=1, max_size=3),
    cuts=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 60), st.integers(1, 40)), max_size=5),
    page_size=st.sampled_from([8, 16, 32]),
)
def test_everything_long_enough_is_covered(texts, cuts, page_size):
    """Pieces of texts without a common token: their runs do not overlap, so the lookup finds all of them."""
    texts = [[3000 * i + token for token in text] for i, text in enumerate(texts)]
    prompt: list[int] = []
    for i, (which, offset, length) in enumerate(cuts):
        prompt += [100_000 + i, *texts[which % len(texts)][offset : offset + length]]
    match = filled(texts, page_size).lookup(np.array(prompt, np.int32), "a", prefix=False, min_segment=15)
    covered = {i for segment in match.segments for i in range(segment.start, segment.end)}
    for at in range(len(prompt)):
        length = longest_from(prompt, at, texts)
        if length >= 15:
            assert covered >= set(range(at, at + length))


@QUICK
@given(
    texts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=2),
    prompt=st.lists(st.integers(0, 1), max_size=60),
)
def test_no_gap_has_room_for_a_run(texts, prompt):
    """With only two different tokens, runs overlap. No run of 15 tokens is left between the segments all the same."""
    match = filled(texts, 16).lookup(np.array(prompt, np.int32), "a", prefix=False, min_segment=15)
    ends = [0, *(segment.end for segment in match.segments)]
    starts = [*(segment.start for segment in match.segments), len(prompt)]
    for begin, end in zip(ends, starts, strict=True):
        for at in range(begin, end):
            assert longest_from(prompt[:end], at, texts) < 15


@dataclasses.dataclass
class Held:
    """A sequence that holds pages: what it wrote there, and how many leading tokens of it are exact."""

    pages: list[int]
    tokens: list[int]
    namespace: str
    exact: int
    care: int


texts = st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=1, max_size=6).map(
    lambda parts: [token for part in parts for token in part]
) | st.lists(st.sampled_from([[0] * 8, [1] * 8, [0, 1] * 4, list(range(8))]), min_size=1, max_size=7).map(
    lambda parts: [token for part in parts for token in part]
)
namespaces = st.sampled_from(["a", "b"])
EXACT = 3  # requests that are less careful may take approximate KV that was made as carefully


class CacheMachine(RuleBasedStateMachine):
    """Sequences, matches, pins, entries and failures in any order, on a store that is nearly always too small."""

    sequences = Bundle("sequences")
    matches = Bundle("matches")

    @initialize(num_pages=st.integers(3, 24), limit=st.sampled_from([0.5, 0.9, 1.0]), share=st.sampled_from([0.5, 0.9]))
    def start(self, num_pages: int, limit: float, share: float) -> None:
        self.now = 0.0
        self.cache = PageCache(num_pages, PAGE, limit, max_pinned=share, clock=lambda: self.now)
        self.limit = int(num_pages * limit)
        self.most_kept = self.limit + int(share * (num_pages - self.limit))
        size = num_pages * PAGE
        self.tokens, self.positions = np.full(size, -1), np.full(size, -1)
        self.history: list[tuple[int, ...]] = [()] * size  # all tokens before and in the slot
        self.care = [0] * size  # how carefully its KV was computed
        self.owner = [""] * size
        self.given: set[int] = set()
        self.forgotten: set[int] = set()
        self.held: list[Held] = []
        self.matched: list[Match] = []
        self.pinned: dict[tuple[str, str], tuple[list[int], int, float]] = {}  # tokens, how many stay, until when

    def write(self, held: Held, begin: int) -> None:
        for i in range(begin, len(held.tokens)):
            slot = held.pages[i // PAGE] * PAGE + i % PAGE
            self.tokens[slot], self.positions[slot], self.owner[slot] = held.tokens[i], i, held.namespace
            self.history[slot] = tuple(held.tokens[: i + 1])
            self.care[slot] = EXACT if i < held.exact else held.care

    def verify(self, match: Match, prompt: np.ndarray, namespace: str, care: int) -> None:
        slots = [page * PAGE + i for page in match.prefix_pages for i in range(PAGE)]
        slots += match.prefix_tail.slots.tolist() if match.prefix_tail else []
        assert len(slots) == match.num_prefix_tokens < max(len(prompt), 1)
        for i, slot in enumerate(slots):
            assert self.history[slot] == tuple(prompt[: i + 1])  # behind exactly this past
            assert self.care[slot] == EXACT if i < match.num_exact_tokens else care <= self.care[slot] < EXACT
            assert self.owner[slot] == namespace
        end = len(slots)
        for segment in match.segments:
            assert segment.start >= end
            end = segment.end
            assert np.array_equal(self.tokens[segment.slots], prompt[segment.start : end])
            assert np.array_equal(self.positions[segment.slots], segment.donor_start + np.arange(segment.length))
            assert {self.owner[slot] for slot in segment.slots} == {namespace}
            assert segment.exact == all(self.care[slot] == EXACT for slot in segment.slots)
        assert end <= len(prompt)

    def find(self, tokens: list[int], namespace: str, care: int, *, segments: bool = True) -> Match:
        """Look up for a request that is this careful."""
        prompt = np.array(tokens, np.int32)
        match = self.cache.lookup(prompt, namespace, segments=segments, accepts=lambda made_by: made_by >= care)
        self.verify(match, prompt, namespace, care)
        return match

    @rule(target=sequences, text=texts, extra=texts, namespace=namespaces, care=st.integers(1, EXACT))
    def serve(self, text: list[int], extra: list[int], namespace: str, care: int):
        """Lookup, allocate, compute, commit; the request goes on holding its pages."""
        tokens = (text + extra)[:-3]
        match = self.find(tokens, namespace, care)
        try:
            fresh = self.cache.allocate(-(-len(tokens) // PAGE) - len(match.prefix_pages))
        except StoreFullError:
            self.cache.let_go(match)
            return multiple()  # nothing to hold
        self.forgotten.difference_update(fresh)
        self.cache.share(match.prefix_pages)
        self.cache.let_go(match)
        exact = match.segments[0].start if match.segments and care < EXACT else len(tokens)
        if match.num_exact_tokens < match.num_prefix_tokens:
            exact = match.num_exact_tokens
        held = Held(match.prefix_pages + fresh, tokens, namespace, exact, care)
        self.write(held, len(match.prefix_pages) * PAGE)
        self.cache.commit(held.pages, np.array(tokens, np.int32), namespace, exact_tokens=exact, made_by=care)
        self.held.append(held)
        return held

    @rule(held=sequences)
    def commit_again(self, held: Held) -> None:
        """As a sequence does at its end; some of its pages may have been replaced by exact ones meanwhile."""
        tokens = np.array(held.tokens, np.int32)
        if not self.forgotten.intersection(held.pages):
            self.cache.commit(held.pages, tokens, held.namespace, exact_tokens=held.exact, made_by=held.care)

    @rule(most=st.integers(1, 40))
    def heal(self, most: int) -> None:
        self.heal_chunk(most)

    def heal_chunk(self, most: int) -> bool:
        """A chunk of approximate content is computed exactly. False if there was none, or no room."""
        asked = self.cache.to_heal(most)
        if asked is None:
            return False
        tokens, namespace = asked
        match = self.find(tokens.tolist(), namespace, EXACT, segments=False)
        assert 1 <= len(tokens) - match.num_prefix_tokens <= max(most, PAGE) + 1
        entries = [entry for entry in self.cache.entries() if entry.frozen]
        pages = match.prefix_pages + self.cache.allocate(-(-len(tokens) // PAGE) - len(match.prefix_pages))
        assert [entry for entry in self.cache.entries() if entry.frozen] == entries
        self.cache.share(match.prefix_pages)
        self.cache.let_go(match)
        self.write(Held(pages, tokens.tolist(), namespace, len(tokens), EXACT), len(match.prefix_pages) * PAGE)
        self.cache.commit(pages, tokens, namespace, exact_tokens=len(tokens))
        self.cache.release(pages)
        return True

    @rule(count=st.integers(0, 6), tokens=texts, namespace=namespaces)
    def fail_midway(self, count: int, tokens: list[int], namespace: str) -> None:
        """A request that found something and got pages, and then was cancelled."""
        match = self.find(tokens, namespace, EXACT)
        before = self.cache.stats()
        try:
            pages = self.cache.allocate(count)
        except StoreFullError:
            assert self.cache.stats() == before
        else:
            self.cache.release(pages)
        self.cache.let_go(match)
        with pytest.raises(ValueError, match="not held"):
            self.cache.let_go(match)

    @rule(held=consumes(sequences))
    def release(self, held: Held) -> None:
        self.cache.release(held.pages)
        self.held.remove(held)

    @rule(held=sequences, more=texts, cut=st.integers(0, 30), namespace=namespaces)
    def ask_again(self, held: Held, more: list[int], cut: int, namespace: str) -> None:
        """What some sequence holds, whole or in part, at its place or behind other tokens, under either name."""
        for tokens in (held.tokens[:cut] or held.tokens, held.tokens, more[:-3] + held.tokens[cut:]):
            for care in range(1, EXACT + 1):
                self.cache.let_go(self.find(tokens, namespace, care))

    @rule(target=matches, tokens=texts, namespace=namespaces, care=st.integers(1, EXACT))
    def find_and_hold(self, tokens: list[int], namespace: str, care: int):
        match = self.find(tokens, namespace, care)
        self.matched.append(match)
        return match, np.array(tokens, np.int32), namespace, care

    @rule(found=consumes(matches))
    def let_go(self, found) -> None:
        """What was found is still what it was, whatever happened since."""
        self.verify(*found)
        self.cache.let_go(found[0])
        self.matched.remove(found[0])

    @rule(held=sequences, key=st.sampled_from(["x", "y", "z"]), seconds=st.integers(1, 5))
    def pin(self, held: Held, key: str, seconds: int) -> None:
        before = self.cache.pin_states(), self.cache.stats()
        try:
            state = self.cache.pin(np.array(held.tokens, np.int32), held.namespace, key, float(seconds))
        except PinLimitError:
            assert (self.cache.pin_states(), self.cache.stats()) == before
            return
        self.cache.let_go(found := self.find([*held.tokens, 0], held.namespace, 1, segments=False))
        assert state.num_tokens >= found.num_prefix_tokens
        self.pinned[held.namespace, key] = (held.tokens, found.num_prefix_tokens, self.now + seconds)

    @rule(seconds=st.integers(1, 3))
    def time_goes_on(self, seconds: int) -> None:
        self.now += seconds
        over = [name for name, (_, _, until) in self.pinned.items() if until <= self.now]
        assert self.cache.pins.expire() >= bool(over)
        self.pinned = {name: pin for name, pin in self.pinned.items() if name not in over}

    @rule(name=st.tuples(namespaces, st.sampled_from(["x", "y", "z"])))
    def unpin(self, name: tuple[str, str]) -> None:
        there = any((state.namespace, state.key) == name for state in self.cache.pin_states())
        assert there or name not in self.pinned
        self.pinned.pop(name, None)
        if there:
            self.cache.unpin(*name)
        with pytest.raises(UnknownPinError):
            self.cache.unpin(*name)

    @invariant()
    def what_is_pinned_is_found(self) -> None:
        if not hasattr(self, "cache"):
            return
        for (namespace, _), (tokens, length, _) in self.pinned.items():
            self.cache.let_go(found := self.find([*tokens, 0], namespace, 1, segments=False))
            assert found.num_prefix_tokens >= length

    @rule(held=consumes(sequences), frozen=st.booleans())
    def remember(self, held: Held, frozen: bool) -> None:
        try:
            handle = self.cache.register(held.pages, len(held.tokens), held.namespace, frozen)
        except ValueError:  # a page of it was forgotten
            pass
        except StoreFullError:
            assert frozen
            assert self.num_frozen() + len(held.pages) > self.limit or self.cache.stats().pins
        else:
            assert handle not in self.given
            self.given.add(handle)
        self.release(held)

    @rule(data=st.data())
    def forget(self, data) -> None:
        handles = [entry.handle for entry in self.cache.entries()]
        assert set(handles) <= self.given
        handle = data.draw(st.sampled_from([0, *handles]))
        if handle:
            [entry] = [entry for entry in self.cache.entries() if entry.handle == handle]
            slots = [page * PAGE + i for page in entry.pages for i in range(PAGE)][: entry.num_tokens]
            text = self.tokens[slots].tolist()
            forgotten = self.cache.forget(handle)
            self.pinned.clear()  # some of them may have lost pages
            self.forgotten.update(forgotten.pages)
            self.cache.let_go(left := self.find([*text, 0], entry.namespace, 1))
            found = left.num_prefix_tokens + sum(segment.length for segment in left.segments)
            assert forgotten.num_tokens == len(text)
            assert found < 15 or forgotten.num_remaining >= 15
            assert forgotten.num_remaining == 0 or self.cache.entries(entry.namespace)
        with pytest.raises(UnknownHandleError):
            self.cache.forget(handle)

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.pinned.clear()
        assert self.cache.pin_states() == []
        assert self.cache.stats().cached == self.cache.stats().frozen == 0
        assert self.cache.entries() == []

    def num_frozen(self) -> int:
        return len({page for entry in self.cache.entries() if entry.frozen for page in entry.pages})

    @invariant()
    def frozen_texts_stay_within_their_limit(self) -> None:
        if hasattr(self, "cache"):
            assert self.num_frozen() <= self.limit
            pages = self.cache.stats().pages
            assert pages - self.most_kept <= self.cache.num_beside_kept <= pages - self.num_frozen()

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        active = {page for held in self.held for page in held.pages} | {p for m in self.matched for p in m.pages}
        assert self.cache.stats().active == len(active)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for match in self.matched:
            self.cache.let_go(match)
        for held in self.held:
            self.cache.release(held.pages)
        for _ in range(1000):
            if not self.heal_chunk(16):
                break
        else:
            raise AssertionError("healing does not end")
        self.cache.check()
        self.cache.clear()
        self.cache.check()
        assert self.cache.stats().free == self.cache.stats().pages


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(QUICK, max_examples=40, stateful_step_count=25)


@pytest.mark.slow
class TestCacheMachineFor100000Steps(CacheMachine.TestCase):
    settings = settings(QUICK, max_examples=2000, stateful_step_count=50, phases=[Phase.generate])
