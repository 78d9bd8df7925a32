"""How a stored prefix is restored, in simulated time: what computing and loading take is given, and both are exact."""

from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from sparsex_jax.device.link import Arriving, HostBlock, Link
from sparsex_jax.device.restoration import Cell, Chunk
from sparsex_jax.device.restorer import Restorer
from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import LinkError
from sparsex_jax.reuse.pace import Factor, Pace

PAGE, PAGES, LAYERS = 16, 4, 8
TOKENS = PAGE * PAGES  # of a chunk
BYTES = 1000  # of a chunk
ROW = 1e-6  # seconds of a row in a layer, as `Pace` predicts it where nothing was measured


class Block(HostBlock):
    nbytes = BYTES

    def __init__(self, *, fails=""):
        self.fails = fails


class OnTheWay(Arriving):
    nbytes = 0

    def __init__(self, world, nbytes, due, fails):
        self.world, self.nbytes, self.due, self.fails = world, nbytes, due, fails

    def ready(self):
        if self.fails == "arriving":
            raise LinkError("no")
        return self.world.now >= self.due


class SlowLink(Link):
    """Takes one transfer after the other; stops for good at some time."""

    def __init__(self, world, seconds, stops=np.inf):
        self.world, self.seconds, self.stops, self.free = world, seconds, stops, 0.0
        self.layers = tuple(range(at, at + 2) for at in range(0, LAYERS, 2))
        self.placed = []

    def block_bytes(self, pages):
        return BYTES

    def fetch(self, block, groups):
        if block.fails == "fetch":
            raise LinkError("no")
        nbytes = BYTES * len(groups) // len(self.layers)
        self.free = max(self.free, self.world.now) + self.seconds * nbytes / BYTES
        return OnTheWay(self.world, nbytes, self.free if self.free <= self.stops else np.inf, block.fails)

    def place(self, store, arriving, rows, pages):
        if arriving.fails == "place":
            raise LinkError("no")
        assert self.world.now >= arriving.due
        self.placed.append((self.world.now, tuple(pages)))
        return store


class SlowRunner(Runner):
    """Takes `seconds` for all layers of a chunk, and `rise` more for each chunk before it."""

    def __init__(self, world, seconds, rise=0.0):
        self.world, self.seconds, self.rise, self.store = world, seconds, rise, np.zeros(1)
        self.engine, self.model = (
            SimpleNamespace(page_size=PAGE),
            SimpleNamespace(num_layers=LAYERS, windows=(None,) * LAYERS),
        )
        self.ran, self.losses, self.error = [], 0, None

    def begin(self, requests):
        prompt = requests[0].prompt
        return SimpleNamespace(chunk=int(prompt.computed.argmax()) // TOKENS, rows=int(prompt.computed.sum()))

    def advance(self, run, layers):
        if self.error:
            raise self.error
        self.ran.append(run.chunk)
        self.world.now += (self.seconds + self.rise * run.chunk) * layers / LAYERS


class World:
    """A device and a link that share a clock. `told`: how many times slower than the link is, it is said to be."""

    def __init__(self, *, compute, load, rise=0.0, stops=np.inf, told=1.0, **options):
        self.now = 0.0
        self.runner, self.link = SlowRunner(self, compute, rise), SlowLink(self, load, stops)
        pace = Pace(None, BYTES / load / told)
        pace.compute = Factor(compute / (LAYERS * TOKENS * ROW))
        self.restorer = Restorer(self.runner, self.link, pace, clock=lambda: self.now, sleep=self.sleep, **options)

    def sleep(self, seconds):
        self.now += seconds

    def begin(self, chunks=16, at=0, **fails):
        """A prefix of so many chunks; those named fail to load."""
        blocks = [Block(fails=fails.get(f"chunk_{i}", "")) for i in range(chunks)]
        return self.begin_with(blocks, at)

    def begin_with(self, blocks, at=0):
        own = [Chunk(TOKENS * i, TOKENS * (i + 1), block) for i, block in enumerate(blocks)]
        pages = list(range(at, at + PAGES * len(blocks)))
        return self.restorer.begin(np.zeros(TOKENS * len(blocks), np.int32), pages, own)

    def run(self, *restorations, turns=20000):
        """Until all is done; the seconds."""
        began = self.now
        for _ in range(turns):
            if not self.restorer.pump(wait=0.01):
                assert all(one.done for one in restorations)
                return self.now - began
        raise AssertionError("it does not end")


@pytest.mark.parametrize("rise", [0.0, 0.02])
def test_both_sides_take_half_where_they_are_equally_fast(rise):
    world = World(compute=0.1, load=0.1 + 7.5 * rise, rise=rise)
    restoration = world.begin()
    seconds = world.run(restoration)
    assert seconds <= 0.6 * 16 * world.link.seconds
    assert restoration.counts.loaded + restoration.counts.computed == 4 * 16
    assert restoration.counts.overtaken + restoration.counts.failed <= 3


@pytest.mark.parametrize(("compute", "load"), [(0.1, 0.001), (0.001, 0.1), (0.03, 0.1), (0.1, 0.03)])
def test_never_slower_than_the_better_side_alone(compute, load):
    world = World(compute=compute, load=load)
    assert world.run(world.begin()) <= 16 * min(compute, load) + 0.001
    assert world.run(world.begin()) <= 16 * min(compute, load) + 0.001


@pytest.mark.parametrize("told", [0.25, 0.5, 2.0, 4.0])
def test_a_link_that_is_not_as_fast_as_said(told):
    world = World(compute=0.1, load=0.1, told=told)
    assert world.run(world.begin()) <= 0.6 * 1.6
    world.now += 10  # until what was overtaken has left the link
    restoration = world.begin()
    assert world.run(restoration) == pytest.approx(restoration.expected_seconds, rel=0.1)  # it has learnt


@pytest.mark.parametrize("stops", [0.0, 0.05, 0.3, 0.7])
def test_a_link_that_stops_is_overtaken(stops):
    world = World(compute=0.1, load=0.1, stops=stops)
    restoration = world.begin()
    assert world.run(restoration) <= 1.6 - 0.8 * stops + 0.2
    assert restoration.counts.overtaken > 0


@pytest.mark.parametrize("how", ["fetch", "arriving", "place"])
def test_what_fails_to_load_is_computed_alone(how):
    world = World(compute=0.1, load=0.01)
    restoration = world.begin(chunk_15=how, chunk_9=how)
    world.run(restoration)
    assert restoration.counts.failed >= 8 - 4  # a whole chunk at least; what is overtaken does not fail
    assert (restoration.cells[:, [9, 15]] == Cell.COMPUTED).all()
    assert (restoration.cells == Cell.LOADED).sum() >= 4 * 10


def test_nothing_is_stored():
    world = World(compute=0.1, load=0.1)
    assert world.run(world.begin_with([None] * 8)) == pytest.approx(0.8)
    assert world.link.placed == []


def test_a_hole_does_not_have_all_before_it_computed():
    world = World(compute=0.1, load=0.01)
    restoration = world.begin_with([Block()] * 15 + [None])
    assert world.run(restoration) <= 0.25
    assert restoration.counts.computed <= 12


def test_two_share_device_and_link():
    world = World(compute=0.1, load=0.1)
    long, short = world.begin(12), world.begin(4, at=100)
    assert world.run(long, short) <= 0.65 * 1.6
    assert 4 <= long.counts.computed <= 40
    assert {pages[0] >= 100 for _, pages in world.link.placed} == {False, True}


def test_blocks_that_still_come_into_memory():
    world = World(compute=0.1, load=0.001)
    blocks = [Future() for _ in range(8)]
    restoration = world.begin_with(blocks)
    blocks[7].set_result(Block())
    world.restorer.pump()
    assert restoration.cells[:, 7].all()
    blocks[6].set_result(None)
    blocks[5].set_exception(OSError("disk"))
    blocks[4].cancel()
    world.run(restoration)  # the others never come
    assert (restoration.cells[:, :7] == Cell.COMPUTED).all()
    assert (restoration.cells[:, 7] == Cell.LOADED).all()


def test_after_it_is_cancelled_nothing_is_written():
    world = World(compute=0.1, load=0.1)
    restoration = world.begin()
    for _ in range(6):
        world.restorer.pump()
    placed, ran = len(world.link.placed), len(world.runner.ran)
    world.restorer.cancel(restoration)
    world.restorer.cancel(restoration)
    assert not world.restorer.pump()
    world.now += 10
    assert not world.restorer.pump()
    assert (len(world.link.placed), len(world.runner.ran)) == (placed, ran)
    assert restoration.ended
    assert not restoration.done
    assert not restoration.runs


def test_a_device_that_fails_ends_it_with_the_error():
    world = World(compute=0.1, load=0.1)
    restoration, world.runner.error = world.begin(), RuntimeError("device")
    world.restorer.pump()
    assert restoration.error is world.runner.error
    assert restoration.ended
    assert not world.restorer.active


def test_a_lost_store_stops_all():
    world = World(compute=0.1, load=0.1)
    both = world.begin(), world.begin(at=100)
    world.runner.losses += 1
    world.now += 10
    assert not world.restorer.pump()
    assert all(one.ended and not one.done for one in both)
    assert world.link.placed == []
    world.run(world.begin())


def test_what_is_on_the_link_is_bounded():
    world = World(compute=0.1, load=0.01, in_flight_bytes=2 * BYTES)
    world.begin()
    assert 2 * BYTES <= world.restorer.traffic.nbytes < 3 * BYTES


def test_a_turn_is_bounded_and_others_can_work_between():
    world = World(compute=0.4, load=10.0, turn_seconds=0.25)
    restoration = world.begin(4)
    while world.restorer.pump():
        assert world.now <= 0.25 * len(world.runner.ran)
    assert restoration.done


@pytest.mark.parametrize("spans", [[], [(0, 64), (80, 128)], [(0, 64), (64, 100)], [(8, 128)], [(0, 0), (0, 128)]])
def test_chunks_that_do_not_cover_the_prefix_are_refused(spans):
    world = World(compute=0.1, load=0.1)
    with pytest.raises(ValueError, match="chunks start"):
        world.restorer.begin(np.zeros(128, np.int32), list(range(8)), [Chunk(*span, Block()) for span in spans])


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_it_ends_and_writes_only_where_it_may(seed):
    """Prefixes come and are cancelled, blocks are not stored, come late, or fail, and the link may stop."""
    rng = np.random.default_rng(seed)
    compute, load, stops = (float(rng.choice(values)) for values in ([0.02, 0.1], [0.01, 0.1, 1.0], [np.inf, 1.0]))
    world = World(compute=compute, load=load, stops=stops, rise=0.01)
    restorations, late = [], []
    for number in range(60):
        if rng.random() < 0.15:
            blocks = [random_block(rng, late) for _ in range(rng.integers(1, 10))]
            restorations.append(world.begin_with(blocks, at=100 * len(restorations)))
        if restorations and rng.random() < 0.05:
            world.restorer.cancel(restorations[rng.integers(len(restorations))])
        if late and rng.random() < 0.5:
            late.pop().set_result(rng.choice([Block(), None]))
        before = len(world.link.placed)
        world.restorer.pump(wait=float(rng.choice([0.0, 0.02])))
        now_active = {number for number, one in enumerate(restorations) if not one.ended or one.done}
        assert {pages[0] // 100 for _, pages in world.link.placed[before:]} <= now_active
    world.run()
    assert all(one.ended and one.error is None for one in restorations)
    for one in (one for one in restorations if one.done):
        assert one.counts.loaded == (one.cells == Cell.LOADED).sum() + recomputed(one)
        assert not one.runs


def recomputed(restoration):
    """Cells that had been loaded and were computed as well, on the way to one behind them that could not be."""
    return restoration.counts.loaded + restoration.counts.computed - restoration.cells.size


def random_block(rng, late):
    kind = rng.random()
    if kind < 0.1:
        return None
    if kind < 0.3:
        late.append(Future())
        return late[-1]
    return Block(fails=str(rng.choice(["", "", "", "", "fetch", "arriving", "place"])))
