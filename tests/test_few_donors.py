"""Which donors a store with mirrors takes, so that those who read the same texts have them from the same pages."""

import numpy as np
import pytest

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.mirrors import ENOUGH

PAGE = 16
FIRST, SECOND, THIRD = (np.arange(1000 * i, 1000 * i + 300, dtype=np.int32) for i in (1, 2, 3))


def words(number, count):
    return np.arange(10_000 + 100 * number, 10_000 + 100 * number + count, dtype=np.int32)


class Store:
    def __init__(self, num_layers):
        self.cache = PageCache(400, PAGE, num_layers=num_layers)

    def put(self, *parts, exact=None):
        """Commit a prompt of these parts; returns its pages."""
        text = np.concatenate(parts)
        pages = self.cache.allocate(-(-len(text) // PAGE))
        self.cache.commit(pages, text, "a", exact_tokens=len(text) if exact is None else exact)
        self.cache.release(pages)
        return pages

    def donors(self, *parts, last_used=None):
        """Of each segment of a prompt: where it begins, its length, and the pages that it is in."""
        match = self.cache.lookup(np.concatenate(parts), "a", last_used=last_used)
        self.cache.let_go(match)
        return [(one.start, one.length, one.pages(PAGE)) for one in match.segments]


@pytest.fixture
def mirrored():
    return Store(num_layers=4)


def test_a_donor_that_has_enough_is_as_good_as_a_longer_one(mirrored):
    """The newest has the two texts in another order. Whoever asks for them in any order takes them from there."""
    for store, runs in ((mirrored, 2), (Store(num_layers=0), 1)):
        store.put(words(0, 5), FIRST, SECOND)
        newest = store.put(words(1, 9), SECOND, words(2, 3), FIRST)
        found = store.donors(words(3, 7), FIRST, SECOND, words(4, 2))
        assert sum(length for _, length, _ in found) == 600
        assert len(found) == runs
        assert all(set(pages) <= set(newest) for _, _, pages in found) == (runs == 2)


def test_what_is_too_short_counts_by_its_length(mirrored):
    older = mirrored.put(words(0, 5), FIRST[: ENOUGH - 10])
    mirrored.put(words(1, 9), FIRST[:100])
    [(start, length, pages)] = mirrored.donors(words(2, 7), FIRST)
    assert (start, length) == (7, ENOUGH - 10)
    assert set(pages) <= set(older)


def test_pages_at_the_ends_of_a_run_do_not_say_when_it_was_used(mirrored):
    """A text is taken from the donor whose text was used, not from one of which what stands behind it was."""
    other = mirrored.put(words(0, 5), FIRST, words(1, 20))
    used = mirrored.put(words(2, 9), FIRST, words(3, 20))
    mirrored.donors(words(4, 3), words(1, 20), words(5, 3))
    [(_, _, pages)] = mirrored.donors(words(6, 7), FIRST, words(7, 2))
    assert set(pages) <= set(used)
    assert not set(pages) & set(other)


def test_an_approximate_run_ends_where_an_exact_one_begins(mirrored):
    exact = mirrored.put(words(0, 5), FIRST)
    rough = mirrored.put(words(1, 5), words(2, 32), FIRST, SECOND, exact=0)
    found = mirrored.donors(words(3, 7), words(2, 32), FIRST, SECOND, words(4, 2))
    assert [(start, length) for start, length, _ in found] == [(7, 32), (39, 300), (339, 300)]
    assert [set(pages) <= set(donor) for (_, _, pages), donor in zip(found, (rough, exact, rough), strict=True)]
    assert set(found[1][2]) <= set(exact)


def test_too_few_tokens_before_an_exact_run_are_no_segment(mirrored):
    """What is short and exact interrupts no run, and a beginning of five tokens is left out."""
    mirrored.put(words(0, 5), FIRST)
    mirrored.put(words(5, 5), THIRD[100:140])
    mirrored.put(words(1, 5), words(2, 12), FIRST, THIRD, exact=0)
    found = mirrored.donors(words(3, 7), words(2, 12), FIRST, THIRD, words(4, 2))
    assert [(start, length) for start, length, _ in found] == [(19, 300), (319, 300)]
