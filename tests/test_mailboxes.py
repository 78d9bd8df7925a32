"""Mailboxes: where they are, and their protocol under every order in which GPUs may get on.

The kernel runs on GPUs only (`test_gpu.py`). What it relies on is played here, step by step: programs of a kernel get
on in any order, and a GPU begins a kernel when the one before it has ended.
"""

import contextlib
import random

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax.model.sharding import make_mesh
from sparsex_kernels.mailboxes import HEADER, abstract_mailboxes, mailbox_bytes, make_mailboxes, reach_one_another

PROGRAMS = 3  # of a sum of many rows; a sum of fewer rows has one for each


class Device:
    """A GPU's mailbox, the counts of its programs, and those that run."""

    def __init__(self, rank):
        self.rank, self.mailbox, self.counts = rank, {}, [0] * PROGRAMS
        self.kernel, self.running = 0, []


def program(device, devices, number, kernel, count, counts_always):
    """One program's part of a sum of `count` rows. Before each step it says what it waits for, if it does."""
    rows, flag = range(number, count, PROGRAMS), device.counts[number] + 1
    for row in rows:
        for other in devices:
            yield None
            other.mailbox[flag % 2, device.rank, row] = flag, (kernel, device.rank, row)
        for sender in devices:
            place = flag % 2, sender.rank, row
            yield place, flag
            assert device.mailbox[place][1] == (kernel, sender.rank, row)
    if rows or counts_always:
        device.counts[number] = flag


def gets_on(device, waits_for):
    return waits_for is None or device.mailbox.get(waits_for[0], (0,))[0] == waits_for[1]


def play(number, counts, choose, *, counts_always=False):
    """Play sums of these numbers of rows on `number` GPUs. `choose` picks the next one of the steps that can be made.

    Raises:
      AssertionError: a step read another part than its own, or all wait for one another.
    """
    devices = [Device(rank) for rank in range(number)]
    while any(one.running or one.kernel < len(counts) for one in devices):
        for one in devices:
            if not one.running and one.kernel < len(counts):
                about = one.kernel, counts[one.kernel], counts_always
                begun = [program(one, devices, k, *about) for k in range(PROGRAMS)]
                one.running = [(each, None) for each in begun]
                one.kernel += 1
        steps = [(one, step) for one in devices for step in one.running if gets_on(one, step[1])]
        assert steps, "all wait"
        device, (each, waited_for) = choose(steps)
        device.running.remove((each, waited_for))
        with contextlib.suppress(StopIteration):
            device.running.append((each, next(each)))


@settings(max_examples=25)
@given(st.integers(2, 3), st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_every_order_gives_each_sum_its_own_parts(number, counts, seed):
    play(number, counts, random.Random(seed).choice)


def first(steps):
    """The first GPU gets on as far as it can."""
    return steps[0]


def test_programs_without_rows_must_not_count():
    """Else one that had none writes over what another GPU has still to read."""
    play(2, [2, 0, 2], first)
    with pytest.raises(AssertionError, match="all wait"):
        play(2, [2, 0, 2], first, counts_always=True)


@pytest.mark.parametrize("devices", [2, 4])
def test_a_table_has_the_address_of_every_mailbox(devices):
    mesh = make_mesh(devices)
    mailboxes = make_mailboxes(mesh, rows=8, width=64)
    table = np.asarray(mailboxes.table)
    assert table[:, 0].tolist() == list(range(devices))
    addresses = table[0, 2:].view(np.uint64)
    assert len(set(addresses.tolist())) == devices
    assert all(np.array_equal(line[1:], table[0, 1:]) for line in table)
    assert {shard.data.shape for shard in mailboxes.table.addressable_shards} == {(1, 2 * devices + 2)}
    described = abstract_mailboxes(mesh, rows=8, width=64)
    assert jax.tree.structure(described) == jax.tree.structure(mailboxes)
    assert [x.shape for x in jax.tree.leaves(described)] == [x.shape for x in jax.tree.leaves(mailboxes)]


def test_a_mailbox_holds_two_sums_of_every_device():
    assert mailbox_bytes(4, 8, 64) == HEADER + 2 * 4 * 8 * 64 * 4


def test_only_gpus_reach_one_another():
    assert not reach_one_another(jax.devices())
