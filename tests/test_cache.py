"""The page cache, case by case: what a prompt finds, which pages stay, and which are evicted first."""

import numpy as np
import pytest

from sparsex_jax.cache import Forgotten, Match, PageCache, Segment, children, segments, windows
from sparsex_jax.errors import StoreFullError, UnknownHandleError

PAGE = 16


class Store:
    """A cache, and the test's own record of what was written into every slot."""

    def __init__(self, num_pages: int = 32, page_size: int = PAGE, **kwargs: float) -> None:
        self.cache = PageCache(num_pages, page_size, **kwargs)
        self.tokens = np.full(num_pages * page_size, -1)
        self.positions = np.full(num_pages * page_size, -1)

    def put(self, text, namespace="a", exact=None, start=0, shared=(), keep=False):
        """Commit a sequence and release it; returns its pages."""
        text = np.array(text, np.int32)
        size = self.cache.page_size
        self.cache.share(shared)
        fresh = self.cache.allocate(-(-len(text) // size) - len(shared))
        pages = list(shared) + fresh
        for i in range(len(shared) * size, len(text)):
            self.tokens[pages[i // size] * size + i % size] = text[i]
            self.positions[pages[i // size] * size + i % size] = start + i
        self.cache.commit(pages, text, namespace, exact_tokens=len(text) if exact is None else exact, start=start)
        if not keep:
            self.cache.release(pages)
        self.cache.check()
        return pages

    def look(self, text, namespace="a", **kwargs) -> Match:
        """Look up, verify every slot against the record, let go."""
        text = np.array(text, np.int32)
        match = self.cache.lookup(text, namespace, **kwargs)
        self.verify(match, text)
        self.cache.check()
        self.cache.let_go(match)
        return match

    def verify(self, match: Match, text) -> None:
        size = self.cache.page_size
        end = len(match.prefix_pages) * size
        slots = [page * size + i for page in match.prefix_pages for i in range(size)]
        assert np.array_equal(self.tokens[slots], text[:end])
        assert np.array_equal(self.positions[slots], np.arange(end))
        if match.prefix_tail is not None:
            assert match.prefix_tail.start == end
            assert match.prefix_tail.shift == 0
            assert match.prefix_tail.exact
            end = match.prefix_tail.end
        assert match.num_prefix_tokens == end <= max(len(text) - 1, 0)
        for segment in match.segments:
            assert segment.start >= end
            end = segment.end
        for segment in [match.prefix_tail, *match.segments] if match.prefix_tail else match.segments:
            assert np.array_equal(self.tokens[segment.slots], text[segment.start : segment.end])
            assert np.array_equal(self.positions[segment.slots], segment.donor_start + np.arange(segment.length))
            assert {int(slot) // size for slot in segment.slots} <= set(match.pages)


def spans(match: Match) -> list[tuple[int, int, int]]:
    """(start, length, donor_start) of every segment."""
    return [(s.start, s.length, s.donor_start) for s in match.segments]


def words(start: int, count: int) -> list[int]:
    """Tokens that occur nowhere else."""
    return list(range(start, start + count))


DOC = words(1000, 100)  # six full pages of 16, and 4 tokens
OTHER = words(2000, 60)


@pytest.fixture
def store() -> Store:
    made = Store()
    made.put(DOC)
    return made


def test_content_without_room_does_not_keep_others_from_healing():
    store = Store(num_pages=24)
    store.put(words(3000, 160), exact=0)
    store.put(words(4000, 40), exact=0)
    for _ in range(3):
        store.cache.let_go(store.cache.lookup(np.array(words(3000, 160), np.int32), "a"))
    frozen = store.put(OTHER + words(5000, 68), keep=True)
    store.cache.register(frozen, 128, "a", frozen=True)
    store.cache.release(frozen)
    in_use = store.cache.lookup(np.array(words(3000, 160), np.int32), "a")  # so its pages cannot be had
    tokens, namespace = store.cache.to_heal(160)
    assert (tokens.tolist(), namespace) == (words(4000, 40), "a")
    store.cache.let_go(in_use)


# The exact prefix ---------------------------------------------------------------------------------------------


def test_prefix_is_whole_pages_then_a_tail(store):
    match = store.look(DOC[:40] + words(0, 10))
    assert len(match.prefix_pages) == 2
    assert match.num_prefix_tokens == 40
    assert match.prefix_tail.length == 8
    assert match.segments == []


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 32, 33, 96, 97, 100])
def test_last_prompt_token_is_always_computed(store, length):
    match = store.look(DOC[:length])
    assert match.num_prefix_tokens == length - 1
    assert len(match.prefix_pages) == (length - 1) // PAGE


def test_prefix_longer_than_what_is_stored(store):
    match = store.look(DOC + words(0, 30))
    assert match.num_prefix_tokens == 100
    assert match.prefix_tail.length == 4


def test_tail_takes_the_branch_that_agrees_longest(store):
    store.put(DOC[:32] + words(0, 16), shared=store.look(DOC[:33]).prefix_pages)
    assert store.look(DOC[:32] + words(0, 7) + OTHER).num_prefix_tokens == 39
    assert store.look(DOC[:43] + OTHER).num_prefix_tokens == 43


def test_shared_pages_become_the_parents(store):
    shared = store.look(DOC[:33]).prefix_pages
    longer = DOC[:32] + words(0, 32)
    store.put(longer, shared=shared)
    match = store.look([*longer, 5])
    assert match.num_prefix_tokens == 64
    assert match.prefix_pages[:2] == shared


def test_approximate_kv_is_never_a_prefix():
    store = Store()
    store.put(DOC, exact=40)
    match = store.look([*DOC, 1])
    assert match.num_prefix_tokens == 40
    assert match.prefix_tail.length == 8
    assert spans(match) == [(40, 60, 40)]
    assert not match.segments[0].exact


def test_what_follows_an_approximate_page_is_not_exact():
    store = Store()
    store.put(DOC[:64], shared=store.put(DOC[:32], exact=0), exact=64)
    match = store.look([*DOC[:64], 1])
    assert match.num_prefix_tokens == 0
    assert spans(match) == [(0, 64, 0)]
    assert not match.segments[0].exact


def test_text_computed_at_another_position_is_no_prefix():
    store = Store()
    store.put(DOC, start=50)
    match = store.look([*DOC, 1])
    assert match.num_prefix_tokens == 0
    assert spans(match) == [(0, 100, 50)]
    assert match.segments[0].shift == -50


def test_lookup_without_prefix_or_without_segments(store):
    assert spans(store.look(DOC, prefix=False)) == [(0, 100, 0)]
    match = store.look(DOC[:40] + words(0, 9) + DOC[50:], segments=False)
    assert (match.num_prefix_tokens, match.segments) == (40, [])


def test_twins_serve_when_the_first_is_gone():
    """Two sequences prefilled the same text at once. When one's pages are withdrawn, the other's still serve."""
    store = Store()
    first = store.put(DOC[:48], keep=True)
    second = store.put(DOC[:32] + words(0, 16), keep=True)
    store.cache.withdraw(first)
    store.cache.release(first)
    store.cache.check()
    match = store.look(DOC[:32] + words(0, 16) + [9])
    assert match.prefix_pages == second
    store.cache.release(second)


def test_sequence_committed_as_it_grows():
    store = Store()
    pages = store.cache.allocate(4)
    store.tokens[[p * PAGE + i for p in pages for i in range(PAGE)]] = DOC[:64]
    store.positions[[p * PAGE + i for p in pages for i in range(PAGE)]] = np.arange(64)
    for length in (5, 20, 20, 10, 33, 60):
        store.cache.commit(pages, np.array(DOC[:length], np.int32), "a", exact_tokens=length)
        store.cache.check()
    assert store.look([*DOC[:60], 1]).num_prefix_tokens == 60
    store.cache.release(pages)
    assert store.cache.stats().tokens == 60


# Segments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [1, 7, 8, 16, 21])
@pytest.mark.parametrize("offset", [1, 5, 8, 16, 37])
@pytest.mark.parametrize("length", [15, 16, 23, 48, 63])
def test_segment_anywhere(store, before, offset, length):
    prompt = words(0, before) + DOC[offset : offset + length] + words(500, 5)
    assert spans(store.look(prompt, min_segment=15)) == [(before, length, offset)]


def test_segment_at_the_start_that_is_no_prefix(store):
    assert spans(store.look(DOC[3:50] + words(0, 5))) == [(0, 47, 3)]


def test_segment_at_the_end_may_cover_the_last_token(store):
    assert spans(store.look(words(0, 5) + DOC[40:])) == [(5, 60, 40)]


def test_adjacent_segments(store):
    store.put(OTHER)
    assert spans(store.look([1, *DOC[60:90], *OTHER[3:40], *DOC[5:30]])) == [(1, 30, 60), (31, 37, 3), (68, 25, 5)]


def test_gap_of_one_token(store):
    prompt = [1, *DOC[10:40], 7, *DOC[41:80]]
    assert spans(store.look(prompt)) == [(1, 30, 10), (32, 39, 41)]


def test_same_segment_twice(store):
    match = store.look([1, *DOC[10:40], 2, *DOC[10:40]])
    assert spans(match) == [(1, 30, 10), (32, 30, 10)]
    assert np.array_equal(match.segments[0].slots, match.segments[1].slots)


def test_segment_cut_in_half_by_new_text(store):
    prompt = [1, *DOC[:50], *words(0, 20), *DOC[50:]]
    assert spans(store.look(prompt)) == [(1, 50, 0), (71, 50, 50)]


def test_segment_behind_a_prefix(store):
    match = store.look(DOC[:20] + words(0, 3) + DOC[50:90])
    assert match.num_prefix_tokens == 20
    assert spans(match) == [(23, 40, 50)]


def test_runs_shorter_than_min_segment_are_not_found(store):
    prompt = [1, *DOC[8:32], 2]
    assert spans(store.look(prompt, min_segment=24)) == [(1, 24, 8)]
    assert spans(store.look(prompt, min_segment=25)) == []


def test_partial_last_page_is_a_donor(store):
    store.put(OTHER[:27])
    assert spans(store.look([1, *OTHER[9:27], 2])) == [(1, 18, 9)]


def test_run_follows_the_right_branch(store):
    shared = store.look(DOC[:33]).prefix_pages
    store.put(DOC[:32] + OTHER, shared=shared)
    assert spans(store.look([1, *DOC[5:32], *OTHER[:40], 2])) == [(1, 67, 5)]
    assert spans(store.look([1, *DOC[5:70], 2])) == [(1, 65, 5)]


def test_run_follows_the_longest_branch(store):
    shared = store.look(DOC[:33]).prefix_pages
    store.put(DOC[:35] + OTHER, shared=shared)
    assert spans(store.look([1, *DOC[5:40], 2])) == [(1, 35, 5)]
    assert spans(store.look([1, *DOC[5:35], *OTHER[:3], 2])) == [(1, 33, 5)]


def test_exact_donor_before_a_longer_approximate_one(store):
    store.put(words(0, 3) + DOC[20:50] + OTHER, exact=0)
    match = store.look([1, *DOC[20:50], *OTHER[:20], 2])
    assert spans(match) == [(1, 30, 20), (31, 20, 33)]
    assert [s.exact for s in match.segments] == [True, False]


def test_longer_donor_before_a_shorter_one():
    store = Store()
    store.put(DOC[:40] + words(0, 30))
    store.put(words(100, 4) + DOC[:70])
    store.put(words(200, 8) + DOC[:40] + words(300, 9))
    assert spans(store.look([1, *DOC[:70], 2])) == [(1, 70, 4)]


def test_recent_donor_before_an_older_one():
    store = Store()
    store.put(words(0, 4) + DOC[:30] + words(50, 30))
    store.put(words(100, 8) + DOC[:30] + words(150, 30))
    assert spans(store.look([1, *DOC[:30], 2])) == [(1, 30, 8)]
    store.look(words(0, 4) + DOC[:30] + words(50, 30))
    assert spans(store.look([1, *DOC[:30], 2])) == [(1, 30, 4)]


def test_many_approximate_copies_do_not_hide_the_original():
    store = Store(num_pages=80)
    store.put(DOC)
    for i in range(windows.MAX_CANDIDATES + 4):
        store.put(words(9000 + i, 1 + i % 9) + DOC[:16], exact=0)
    assert spans(store.look([1, *DOC[:40], 2])) == [(1, 40, 0)]


def test_orphan_is_a_donor_but_no_prefix():
    store = Store(num_pages=8)
    pages = store.put(DOC[:64], keep=True)
    store.cache.release(pages[:1])  # the first page is the only one that may go
    store.cache.release(store.cache.allocate(5))
    store.cache.check()
    match = store.look([*DOC[:64], 1])
    assert match.num_prefix_tokens == 0
    assert spans(match) == [(16, 48, 16)]
    assert match.segments[0].exact


def test_namespaces_do_not_see_each_other(store):
    store.put(OTHER, namespace="b")
    for namespace, text in (("b", DOC), ("a", OTHER), ("c", DOC)):
        match = store.look([*text, 1], namespace)
        assert (match.num_prefix_tokens, match.segments) == (0, [])
        assert store.look([1, *text], namespace).segments == []


@pytest.mark.parametrize("mask", [0, 3, 3 << 62])
def test_colliding_hashes_change_nothing_but_speed(monkeypatch, mask):
    plain = windows.window_hashes
    monkeypatch.setattr(windows, "window_hashes", lambda tokens, salt: plain(tokens, salt) & np.uint64(mask))
    store = Store(num_pages=64)
    store.put(OTHER, namespace="b")
    store.put(DOC[:48])
    assert spans(store.look([1, *DOC[5:40], 2])) == ([(1, 35, 5)])
    assert store.look([1, *OTHER, 2]).segments == []
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 3, 50).tolist() for _ in range(8)]
    for i, text in enumerate(texts):
        store.put(text, namespace="ab"[i % 2], exact=25)
    for text in texts:
        store.look(text[7:] + text[:20])


@pytest.mark.parametrize("exact", [True, False])
def test_repetitive_text_is_found_in_bounded_time(exact):
    store = Store(num_pages=3000, page_size=64)
    text = [7] * 20000
    for i in range(6):
        store.put(text, exact=len(text) if exact else 40 * i)
    match = store.look([1, *text, 2])
    assert sum(s.length for s in match.segments) == len(text)


def test_hurried_search_still_finds_long_runs(store, monkeypatch):
    monkeypatch.setattr(segments, "COMPARISON_BUDGET", 0)
    prompt = [1, *DOC[3:], 2, *DOC[:95]]
    assert sum(s.length for s in store.look(prompt).segments) >= 97


def test_negative_tokens_are_refused(store):
    with pytest.raises(ValueError, match="negative"):
        store.cache.lookup(np.array([3, -1], np.int32), "a")


def test_empty_prompt(store):
    match = store.look([])
    assert (match.prefix_pages, match.segments, match.num_prefix_tokens) == ([], [], 0)


def test_segment_properties():
    segment = Segment(100, 50, 20, np.arange(50), True)
    assert (segment.end, segment.shift) == (150, 80)


# Holding ------------------------------------------------------------------------------------------------------


def test_uncommitted_pages_are_free_when_released():
    cache = PageCache(4, PAGE)
    pages = cache.allocate(3)
    cache.share(pages[:1])
    cache.release(pages)
    assert cache.stats().free == 3
    cache.release(pages[:1])
    assert cache.stats().free == 4
    cache.check()


@pytest.mark.parametrize("wrong", [[0, 0], [99], [-1], [3]])
def test_wrong_release_changes_nothing(wrong):
    cache = PageCache(8, PAGE)
    held = cache.allocate(2)
    assert 3 not in held
    with pytest.raises(ValueError, match="page"):
        cache.release(held + wrong)
    cache.check()
    cache.release(held)
    with pytest.raises(ValueError, match="not held"):
        cache.release(held)


def test_sharing_a_free_page_raises():
    with pytest.raises(ValueError, match="free"):
        PageCache(4, PAGE).share([2])


def test_unpin_twice_raises(store):
    match = store.look(DOC)
    with pytest.raises(ValueError, match="not held"):
        store.cache.let_go(match)


def test_full_store_raises_and_changes_nothing():
    store = Store(num_pages=8)
    store.put(DOC[:64])
    held = store.cache.allocate(3)
    before = store.cache.stats()
    with pytest.raises(StoreFullError, match="6 pages asked, but only 5 of 8"):
        store.cache.allocate(6)
    assert store.cache.stats() == before
    assert store.look([*DOC[:64], 1]).num_prefix_tokens == 64
    store.cache.release(held)


def test_donor_that_is_held_is_not_evicted():
    store = Store(num_pages=8)
    store.put(DOC[:64])
    match = store.cache.lookup(np.array([1, *DOC[20:40]], np.int32), "a")
    with pytest.raises(StoreFullError):
        store.cache.allocate(7)
    store.cache.allocate(6)
    store.verify(match, np.array([1, *DOC[20:40]]))
    store.cache.check()
    store.cache.let_go(match)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "empty"),
        ({"tokens": [-5]}, "negative"),
        ({"exact_tokens": 99}, "exact_tokens=99"),
        ({"tokens": words(0, 40)}, "do not fit"),
        ({"pages": [30, 31]}, "not held"),
        ({"tokens": words(7, 20)}, "other content"),
        ({"namespace": "b"}, "other content"),
        ({"start": 16}, "other content"),
    ],
)
def test_wrong_commit_changes_nothing(change, message):
    store = Store()
    pages = store.put(DOC[:20], keep=True)
    call = {"pages": pages, "tokens": DOC[:20], "namespace": "a", "exact_tokens": 0, "start": 0} | change
    with pytest.raises(ValueError, match=message):
        store.cache.commit(
            call["pages"],
            np.array(call["tokens"], np.int32),
            call["namespace"],
            exact_tokens=call["exact_tokens"],
            start=call["start"],
        )
    store.cache.check()
    assert store.look([*DOC[:20], 1]).num_prefix_tokens == 20


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (4, 12), (4, 0)])
def test_wrong_sizes_are_refused(num_pages, page_size):
    with pytest.raises(ValueError, match="page"):
        PageCache(num_pages, page_size)


# Evicting -----------------------------------------------------------------------------------------------------


def test_least_recently_used_page_is_evicted_first():
    store = Store(num_pages=6)
    store.put(DOC[:32])
    store.put(OTHER[:32])
    store.look([*DOC[:32], 1])
    store.cache.release(store.cache.allocate(4))
    assert store.look([*DOC[:32], 1]).num_prefix_tokens == 32
    assert store.look([*OTHER[:32], 1]).num_prefix_tokens == 0
    assert store.cache.stats().evictions == 2


def test_sequence_is_evicted_from_its_end():
    store = Store(num_pages=6)
    store.put(DOC[:96])
    for left in (5, 4, 3):
        store.cache.allocate(1)
        assert store.look([*DOC[:96], 1]).num_prefix_tokens == left * PAGE


def frozen(store: Store, text: list[int], namespace: str = "a") -> int:
    pages = store.put(text, namespace, keep=True)
    try:
        return store.cache.register(pages, len(text), namespace, True)
    finally:
        store.cache.release(pages)
        store.cache.check()


def handles(store: Store) -> list[int]:
    return [entry.handle for entry in store.cache.entries()]


def test_frozen_entries_are_never_evicted():
    store = Store(num_pages=10)
    kept = frozen(store, DOC[:64])
    store.put(OTHER)
    with pytest.raises(StoreFullError, match="7 pages asked, but only 6 of 10"):
        store.cache.allocate(7)
    assert store.look([*OTHER, 1]).num_prefix_tokens == 60
    store.cache.allocate(6)
    assert handles(store) == [kept]
    assert store.look([*DOC[:64], 1]).num_prefix_tokens == 64
    assert store.cache.num_beside_kept == 6


def test_freezing_more_than_the_limit_is_refused():
    store = Store(num_pages=10, frozen_limit=0.5)
    first = frozen(store, DOC[:32])
    with pytest.raises(StoreFullError, match=r"needs 4 pages of 16 tokens; frozen texts have 2 of the 5 pages"):
        frozen(store, words(0, 64))
    shared = store.look([*DOC[:32], 1]).prefix_pages  # frozen already
    pages = store.put(DOC[:32] + words(0, 48), shared=shared)
    second = store.cache.register(pages, 80, "a", True)
    assert handles(store) == [first, second]
    store.cache.forget(second)
    assert store.cache.num_beside_kept == 8


def test_an_entry_is_frozen_later():
    store = Store(num_pages=10)
    pages = store.put(DOC[:32])
    handle = store.cache.register(pages, 32, "a", False, b"doc")
    assert store.cache.entry_of("a", b"doc").handle == handle
    assert store.cache.entry_of("b", b"doc") is None
    for _ in range(2):
        store.cache.freeze(handle)
        assert store.cache.stats().frozen == 2
    store.cache.check()
    store.cache.forget(handle)
    assert store.cache.entry_of("a", b"doc") is None
    assert store.cache.stats().free == 10


# Remembering --------------------------------------------------------------------------------------------------


def test_entries_are_listed_by_namespace():
    store = Store()
    first, second = frozen(store, DOC), frozen(store, OTHER, "b")
    entry = store.cache.entries("b")[0]
    assert (entry.handle, entry.namespace, entry.num_tokens, entry.frozen, entry.uses) == (second, "b", 60, True, 0)
    assert handles(store) == [first, second]
    store.look(OTHER, "b")
    assert [e.uses for e in store.cache.entries()] == [0, 1]


def test_forgotten_entry_is_no_longer_found():
    store = Store()
    handle = frozen(store, DOC)
    store.cache.forget(handle)
    store.cache.check()
    assert store.look([*DOC, 1]).pages == ()
    assert store.cache.stats().free == 32
    with pytest.raises(UnknownHandleError, match="handle"):
        store.cache.forget(handle)


def test_forgetting_an_entry_in_use_hides_it_at_once_and_frees_its_pages_when_let_go():
    store = Store()
    handle = frozen(store, DOC[:32])
    match = store.cache.lookup(np.array([1, *DOC[:32]], np.int32), "a")
    store.cache.forget(handle)
    store.cache.check()
    assert store.look([*DOC[:32], 1]).pages == ()
    store.verify(match, np.array([1, *DOC[:32]]))
    assert store.cache.stats().active == 2
    store.cache.let_go(match)
    assert store.cache.stats().free == 32


def test_forgetting_keeps_the_pages_that_another_entry_has():
    store = Store()
    first = frozen(store, DOC[:32])
    shared = store.look([*DOC[:32], 1]).prefix_pages
    pages = store.put(DOC[:32] + OTHER, shared=shared)
    second = store.cache.register(pages, 92, "a", True)
    assert store.cache.forget(first) == Forgotten(32, frozenset(), 32)
    store.cache.check()
    assert store.look(DOC[:32] + OTHER).num_prefix_tokens == 91
    assert store.cache.forget(second) == Forgotten(92, frozenset(pages), 0)
    assert store.cache.stats().free == 32


def test_forgetting_takes_the_copies_of_the_text_along():
    store = Store(num_pages=64)
    handle = frozen(store, DOC)
    in_place = store.put(DOC + words(0, 40))
    pasted = store.put(words(3000, 21) + DOC + words(4000, 30), exact=21)
    end = store.put(words(5000, 7) + DOC[85:] + words(6000, 30))
    other_name = store.put(DOC, "b")
    apart = store.put(words(7000, 50) + DOC[:14] + words(8000, 20))
    entry_pages = store.cache.entries()[0].pages
    gone = store.cache.forget(handle).pages
    store.cache.check()
    assert gone == {*entry_pages, *in_place[:6], *pasted[1:8], *end[:2]}
    assert store.look(words(0, 3) + DOC).pages == ()
    assert store.look([*DOC, 1]).pages == ()
    assert store.look([*DOC, 1], "b").prefix_pages == other_name[:6]
    assert store.look(words(9000, 5) + words(4000, 30)).segments
    assert store.look([*words(7000, 50), *DOC[:14], 1]).prefix_pages == apart[:4]


def test_entry_that_is_not_frozen_ends_with_its_first_evicted_page():
    store = Store(num_pages=8)
    pages = store.put(DOC[:64])
    handle = store.cache.register(pages, 64, "a", False)
    store.cache.allocate(4)
    assert handles(store) == [handle]
    store.cache.allocate(1)
    assert handles(store) == []
    with pytest.raises(UnknownHandleError):
        store.cache.forget(handle)
    store.cache.check()


def test_registering_needs_committed_pages_of_the_namespace(store):
    pages = store.look(DOC).prefix_pages
    for arguments in ((pages, 97, "a"), (pages, 0, "a"), (pages, 10, "b"), ([30], 1, "a"), (pages * 2, 10, "a")):
        with pytest.raises(ValueError, match=r"num_tokens|namespace|committed|twice"):
            store.cache.register(*arguments, True)
    store.cache.check()


def test_clear_drops_everything_that_is_not_active():
    store = Store()
    frozen(store, DOC[:32])
    kept = store.put(OTHER, keep=True)
    store.put(words(0, 50))
    store.cache.clear()
    store.cache.check()
    assert handles(store) == []
    assert store.cache.stats().free == 32 - len(kept)
    assert store.look([*OTHER, 1]).num_prefix_tokens == 60
    store.cache.release(kept)
    store.cache.clear()
    assert store.cache.stats().free == 32
    assert store.cache.stats().windows == 0


def test_stats_add_up(store):
    store.look([*DOC[:20], 1, *DOC[40:80]])
    stats = store.cache.stats()
    assert (stats.lookups, stats.prefix_tokens, stats.segment_tokens) == (1, 20, 40)
    assert (stats.tokens, stats.windows, stats.cached) == (100, 12, 7)
    assert stats.free + stats.active + stats.frozen + stats.pinned + stats.cached == stats.pages == 32


def test_what_is_looked_at_does_not_grow_with_the_store(monkeypatch):
    """Many prompts that begin alike and differ within their first page, some of them frozen."""
    compared, common_prefix = [], children.common_prefix
    monkeypatch.setattr(children, "common_prefix", lambda *ab: compared.append(ab) or common_prefix(*ab))
    store = Store(num_pages=1000)
    for i in range(400):
        pages = store.cache.allocate(2)
        store.cache.commit(pages, np.array(DOC[:9] + words(10_000 + 30 * i, 15), np.int32), "a", exact_tokens=24)
        store.cache.register(pages, 24, "a", i % 2 == 0)
        store.cache.release(pages)
    del compared[:]
    match = store.cache.lookup(np.array(DOC[:9] + words(10_000 + 30 * 77, 9) + DOC, np.int32), "a")
    assert (match.num_prefix_tokens, len(match.segments)) == (18, 0)
    store.cache.let_go(match)
    assert 0 < len(compared) < 50
    shared_by_all = store.cache.lookup(np.array(DOC[:12], np.int32), "a")
    assert shared_by_all.num_prefix_tokens == 9
    assert len(compared) < 100
    store.cache.check()
