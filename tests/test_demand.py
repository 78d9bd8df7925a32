"""Which blocks a full tier takes, against simulations: of sessions that return in turn, in other sets, by chance."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.demand import New
from sparsex_jax.tiers.host import HostStore
from sparsex_jax.tiers.order import REMEMBERED


@dataclasses.dataclass
class Kept:
    nbytes: int


class Tier:
    """A tier for sessions of `length` blocks, of 10 bytes each."""

    def __init__(self, sessions, length=1):
        self.host, self.length, self.refused = HostStore(10 * sessions * length), length, 0

    def visit(self, name, *, remembered=False):
        """The share of a session's blocks that are found; then it is computed."""
        blocks = list(self.blocks(name))
        here = [block for block in blocks if block.key in self.host]
        for block in here:
            self.host.use(block.key)
        new = [block for block in blocks if block not in here]
        asked = [New(10, [block.key], remembered) for block in new]
        number = self.host.demand.visit(asked, 10 * self.length)
        for block in new[:number]:
            for key, used in self.host.put(block, Kept(10), remembered=remembered):
                self.host.demand.left(key, used)
        self.refused += len(new) - number
        return len(here) / self.length

    def blocks(self, name):
        before = b""
        for start in range(self.length):
            block = Block(str(name), start, b"", 0, "", before)
            before = block.key
            yield block

    def visit_all(self, names, **options):
        hits = np.array([self.visit(name, **options) for name in names])
        self.host.check()
        return hits


def least_recently_used(names, room):
    order, hits = {}, []
    for name in names:
        hits.append(name in order)
        order.pop(name, None)
        order[name] = True
        if len(order) > room:
            del order[next(iter(order))]
    return np.array(hits)


@settings(max_examples=30)
@given(room=st.integers(1, 12), more=st.integers(1, 30), length=st.integers(1, 5))
def test_sessions_in_turn_are_found_as_far_as_there_is_room(room, more, length):
    number = room + more
    tier = Tier(room, length)
    hits = tier.visit_all(list(range(number)) * 6).reshape(6, number)
    assert hits[2:].mean() == pytest.approx(room / number)
    for name in range(number):  # whole sequences, but for one: a beginning is of use without its end
        assert sum(block.key in tier.host for block in tier.blocks(name)) in (0, length)


@pytest.mark.parametrize(("number", "room", "least"), [(16, 4, 0.1), (20, 15, 0.5), (40, 30, 0.5)])
def test_rounds_in_any_order_find_more_than_by_recency_alone(number, room, least):
    names = np.random.default_rng(0).permuted(np.tile(np.arange(number), (40, 1)), axis=1).ravel().tolist()
    hits = Tier(room).visit_all(names).mean()
    assert hits > max(least, least_recently_used(names, room).mean())


@given(st.lists(st.integers(0, 7), max_size=100), st.integers(8, 12))
def test_what_fits_is_never_refused(names, room):
    tier = Tier(room)
    hits = tier.visit_all(names)
    assert tier.refused == 0
    assert hits.sum() == len(names) - len(set(names))


@settings(max_examples=30)
@given(first=st.integers(1, 24), second=st.integers(1, 24), rounds=st.integers(2, 6))
def test_other_sessions_are_followed_within_a_few_rounds(first, second, rounds):
    tier = Tier(8)
    tier.visit_all([("yesterday", i) for i in range(first)] * rounds)
    hits = tier.visit_all([("today", i) for i in range(second)] * 10).reshape(10, second)
    settled = hits[2 + -(-first // second) * 2 :]
    assert len(settled) == 0 or settled.mean() == pytest.approx(min(8 / second, 1))
    tier.visit_all([("today", i) for i in range(second)] * 30)
    assert not any(tier.visit(("yesterday", i)) for i in range(first)) or second < 8


@pytest.mark.parametrize(("number", "room"), [(1000, 50), (200, 20)])
@pytest.mark.parametrize("skew", [0.6, 1.2])
def test_sessions_by_chance_are_found_as_often_as_by_recency(skew, number, room):
    weights = 1 / np.arange(1, number + 1) ** skew
    names = np.random.default_rng(1).choice(number, 5000, p=weights / weights.sum()).tolist()
    assert Tier(room).visit_all(names).mean() > least_recently_used(names, room).mean() - 0.02


@pytest.mark.parametrize("room", [10, 40])
@pytest.mark.parametrize("resumed", [0, 0.5])
def test_chats_of_a_few_turns_are_hardly_found_less_often_than_by_recency(room, resumed):
    """Twenty at a time have five turns each; then another begins, or an old one goes on."""
    rng, names, new = np.random.default_rng(2), [], itertools.count(20)
    chats = [[name, 5] for name in range(20)]
    for _ in range(4000):
        chat = chats[rng.integers(20)]
        names.append(chat[0])
        chat[1] -= 1
        if not chat[1]:
            chat[:] = [int(rng.choice(names)) if rng.random() < resumed else next(new), 5]
    assert Tier(room).visit_all(names).mean() > least_recently_used(names, room).mean() - 0.05


def test_what_comes_once_does_not_drive_out_what_returns():
    tier, names = Tier(8), []
    for once in range(400):
        names += [("returns", once % 16), ("once", once)]
    hits = tier.visit_all(names)[200::2]
    assert hits.mean() > 0.2
    assert least_recently_used(names, 8).sum() == 0


def test_remembered_texts_stay_longer_than_chats():
    tier = Tier(4)
    tier.visit("text", remembered=True)
    tier.visit_all(range(3 * REMEMBERED))
    assert tier.visit("text", remembered=True) == 1
    tier.visit_all(range(100, 400))
    assert tier.visit("text", remembered=True) == 0


def test_a_refused_block_that_has_grown_is_known_again():
    demand = HostStore(10).demand
    demand.visit([New(10, [b"a"], False)], 10)
    demand.left(b"a", demand.order.clock)
    for i in range(5):
        demand.visit([New(10, [bytes([i])], False)], 10)
    assert not demand.keeps
    demand.visit([New(10, [b"a", b"longer"], False)], 10)
    assert demand.keeps
