"""A prefix that is restored from host memory is as if it had never been evicted. A tiny model on the CPU."""

import itertools

import jax
import numpy as np
import pytest
from conftest import CONFIG, TINY, sharded_tiny, tiny_engine

from sparsex_jax.device import restorer as restorer_module
from sparsex_jax.device.link import Link
from sparsex_jax.device.restoration import Cell, Chunk
from sparsex_jax.device.restorer import Restorer
from sparsex_jax.errors import LinkError
from sparsex_jax.reuse.pace import Pace
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.schedule import Phase

PAGE = CONFIG.page_size
NUM_PAGES = 24
LENGTH = NUM_PAGES * PAGE - 5  # of the prefix: its last page is not full
PROMPT = np.random.default_rng(0).integers(1, 97, LENGTH + 30).astype(np.int32)
OLD, NEW = list(range(26)), list(range(100, 74, -1))  # pages of the whole prompt, before and after


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


def prefill(runner, pages, num_prefix):
    """Logits behind the prompt, of which so many tokens are in these pages already."""
    kind = np.full(len(PROMPT), TokenKind.FRESH, np.uint8)
    kind[:num_prefix] = TokenKind.PREFIX
    prompt = PromptMap(PROMPT, kind)
    logits, _ = runner.prefill([RequestPlan(prompt, (Phase(0, prompt.computed),), pages)])
    return np.asarray(logits[0])


class Fates(Link):
    """Each load comes after some looks, or never, or fails."""

    def __init__(self, engine, rng, fates):
        super().__init__(TINY, engine.config, engine.mesh)
        self.rng, self.fates = rng, fates

    def fetch(self, block, groups):
        fate = self.rng.choice(self.fates)
        if fate == "fails":
            raise LinkError("no")
        arriving = super().fetch(block, groups)
        looks, ready = itertools.count(), arriving.ready
        if fate == "fails later":
            arriving.wait = arriving.ready = lambda: failing(next(looks) > 3)
        else:
            most = np.inf if fate == "never" else int(self.rng.integers(0, 12))
            arriving.ready = lambda: next(looks) >= most and ready()
        return arriving


def failing(now):
    if now:
        raise LinkError("no")
    return False


def cut(rng, first_page, blocks):
    """Chunks from this page on, each of one block of 4 pages, of which some are not stored."""
    edges = sorted({first_page, NUM_PAGES, *range(first_page + 4 - first_page % 4, NUM_PAGES, 4)})
    if rng.random() < 0.3:  # smaller ones, so that several are of the same block
        edges = sorted({*edges, *range(first_page, NUM_PAGES, 2)})
    return [
        Chunk(begin * PAGE, min(end * PAGE, LENGTH), None if rng.random() < 0.1 else blocks[begin // 4], begin % 4)
        for begin, end in itertools.pairwise(edges)
    ]


def poison(runner, pages):
    runner.store = runner.store.at[:, np.array(pages)].set(np.nan)


def check_restored(engine, restoration, wanted, before):
    """Loaded cells are the stored bytes, no other page has changed, and the prompt's other tokens see what they did."""
    size, store = PAGE, np.asarray(engine.runner.store)
    assert restoration.done
    assert not restoration.runs
    for group, layers in enumerate(restoration_layers(engine)):
        for number, chunk in enumerate(restoration.chunks):
            pages = slice(chunk.start // size, -(-chunk.end // size))
            new, old = (array[layers.start : layers.stop][:, pp[pages]] for array, pp in ((store, NEW), (before, OLD)))
            if restoration.cells[group, number] == Cell.LOADED:
                assert new.tobytes() == old.tobytes()
            else:
                np.testing.assert_allclose(
                    rows(new)[: chunk.end - chunk.start], rows(old)[: chunk.end - chunk.start], atol=1e-4
                )
    others = np.setdiff1d(np.arange(CONFIG.num_pages), restoration.pages)
    assert store[:, others].tobytes() == before[:, others].tobytes()
    np.testing.assert_allclose(prefill(engine.runner, restoration.pages + NEW[NUM_PAGES:], LENGTH), wanted, atol=1e-3)


def rows(pages):
    """`[layers, pages, 2, heads, slots, dim]` as a line for each token."""
    layers, number, two, heads, slots, dim = pages.shape
    return pages.transpose(1, 4, 0, 2, 3, 5).reshape(number * slots, layers * two * heads * dim)


def restoration_layers(engine):
    return Link(TINY, engine.config, engine.mesh).layers


def restore(engine, seed, fates, monkeypatch, *, first_page=0, random_heights=True):
    rng = np.random.default_rng(seed)
    runner, link = engine.runner, Fates(engine, rng, fates)
    wanted = prefill(runner, OLD, 0)
    blocks = [link.spill(runner.store, OLD[at : at + 4]) for at in range(0, NUM_PAGES, 4)]
    poison(runner, NEW)
    before = np.asarray(runner.store)
    if random_heights:
        monkeypatch.setattr(restorer_module, "plan_heights", lambda costs, **_: (random_stairs(rng, costs), 0.0))
    chunks, pages = cut(rng, first_page, blocks), OLD[:first_page] + NEW[first_page:NUM_PAGES]
    restorer = Restorer(runner, link, Pace(None, 1e9, known=False), turn_seconds=float(rng.choice([1e-9, 1.0])))
    restoration = restorer.begin(PROMPT[:LENGTH], pages, chunks)
    for _ in range(3000):
        if not restorer.pump(wait=0.001):
            break
    assert restoration.error is None
    check_restored(engine, restoration, wanted, before)
    return restoration


def random_stairs(rng, costs):
    """Heights that never rise, but for what has to be computed."""
    groups, chunks = costs.load.shape
    forced = np.where(np.isinf(costs.load), np.arange(1, groups + 1)[:, None], 0).max(axis=0)
    return np.maximum(np.sort(rng.integers(0, groups + 1, chunks))[::-1], forced)


def seeds(few):
    """The first few of twelve; the others are slow tests."""
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(few, 12))]


@pytest.mark.parametrize("seed", seeds(4))
def test_random_staircases(engine, seed, monkeypatch):
    restore(engine, seed, ["comes"], monkeypatch, first_page=int(seed % 3) * 3)


@pytest.mark.parametrize("seed", seeds(3))
def test_links_that_stop_or_fail(engine, seed, monkeypatch):
    fates = [["comes", "never"], ["comes", "fails", "fails later"], ["comes", "fails", "never", "fails later"]][
        seed % 3
    ]
    restore(engine, 100 + seed, fates, monkeypatch, first_page=int(seed % 2) * 5)


@pytest.mark.parametrize("fate", ["fails", "fails later", "never"])
def test_a_link_that_brings_nothing(engine, fate, monkeypatch):
    restoration = restore(engine, 1, [fate], monkeypatch)
    assert (restoration.cells == Cell.COMPUTED).all()


def test_as_planned(engine, monkeypatch):
    restore(engine, 5, ["comes"], monkeypatch, random_heights=False)


@pytest.mark.slow
def test_heads_on_two_devices(monkeypatch):
    engine = sharded_tiny(2)
    for seed in range(3):
        restore(engine, 200 + seed, ["comes", "fails", "fails later"], monkeypatch)


def test_all_is_loaded(engine, monkeypatch):
    """Whatever the bytes are: here no model made them."""
    runner, link = engine.runner, Link(TINY, engine.config, engine.mesh)
    content = np.random.default_rng(0).integers(0, 256, runner.store.nbytes, np.uint8).view(np.float32)
    runner.store = jax.device_put(content.reshape(runner.store.shape), runner.store.sharding)
    blocks = [link.spill(runner.store, OLD[at : at + 4]) for at in range(0, NUM_PAGES, 4)]
    chunks = [Chunk(4 * PAGE * i, min(4 * PAGE * (i + 1), LENGTH), block) for i, block in enumerate(blocks)]
    monkeypatch.setattr(restorer_module, "plan_heights", lambda costs, **_: (np.zeros(len(chunks), int), 1.0))
    monkeypatch.setattr(Restorer, "_late_step", lambda *_: None)
    restorer = Restorer(runner, link, Pace(None, 1e9))
    restoration = restorer.begin(PROMPT[:LENGTH], NEW[:NUM_PAGES], chunks)
    while restorer.pump(wait=0.01):
        pass
    assert (restoration.cells == Cell.LOADED).all()
    wanted = content.reshape(runner.store.shape)[:, OLD[:NUM_PAGES]]
    assert np.asarray(runner.store)[:, NEW[:NUM_PAGES]].tobytes() == wanted.tobytes()
    runner.store = np.zeros_like(runner.store)
