"""The tiers below the store: what was evicted comes back as it was, and nothing that should not."""

import dataclasses

import numpy as np
import pytest
from conftest import tiny_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant
from test_engine_properties import EngineMachine
from typer.testing import CliRunner

from sparsex_jax import InvalidRequestError, ReuseConfig, SamplingParams
from sparsex_jax.cli.commands import app
from sparsex_jax.device.link import Arriving, HostBlock, Link
from sparsex_jax.device.restorer import Restorer
from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import DiskStoreError, LinkError
from sparsex_jax.scheduler.sequence import ignore
from sparsex_jax.scheduler.timeline import Timeline
from sparsex_jax.tiers.blocks import BLOCK_PAGES, Block
from sparsex_jax.tiers.disk import DiskStore
from sparsex_jax.tiers.host import HostStore
from sparsex_jax.tiers.index import BlockIndex

PAGE = 16
SMALL = {"store_tokens": 24 * PAGE, "host_store_bytes": 1 << 26}
LONG = 20 * PAGE - 3  # a block and a part of one


def texts(number, length=LONG, seed=0):
    return list(np.random.default_rng(seed).integers(1, 97, (number, length)).astype(np.int32))


def exact(tokens):
    return tiny_engine(store_tokens=24 * PAGE).prefill(tokens, reuse=ReuseConfig("full"), keep=False).logits


def fill(engine, prompts, **options):
    for prompt in prompts:
        engine.generate(prompt, SamplingParams(max_new_tokens=2), reuse=ReuseConfig("prefix"), **options)
    engine.loop.settle()


def check(engine):
    engine.admission.check_books()
    engine.admission.tiers.check()


def check_restored(engine, prompts, tier):
    """Each prompt of `LONG` tokens finds itself in a tier, and is answered as if it had never been evicted."""
    for prompt in prompts:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparsex_jax.device.restorer._WORTH", 1e9)  # nothing is computed that could be loaded
            back = engine.loop.requests.prefill(
                prompt,
                reuse=ReuseConfig("prefix"),
                namespace="default",
                keep=True,
                wants_logits=True,
                timeline=Timeline(),
            )
            engine.loop.complete([back])
        loads = [interval.tokens for interval in back.timeline.intervals if interval.name == "load"]
        assert sum(loads) == back.report.restored_tokens
        assert back.report.prefix_tokens == LONG - 1
        assert back.report.restored_tokens > 0
        assert back.report.prefix_tier == tier
        np.testing.assert_allclose(back.logits, exact(prompt), atol=1e-3)
    check(engine)


# The engine --------------------------------------------------------------------------------------------------------


def test_what_was_evicted_comes_back_exactly():
    engine, prompts = tiny_engine(**SMALL), texts(4)
    fill(engine, prompts)
    check_restored(engine, prompts, "host")
    assert engine.prefill(prompts[-1], reuse=ReuseConfig("prefix")).report.prefix_tier == "device"
    assert engine.admission.tiers.counts.host_tokens > 3 * PAGE


def test_loaded_bytes_are_those_that_were_stored():
    engine, (prompt, *others) = tiny_engine(**SMALL), texts(4)

    def stored():
        match = engine.cache.lookup(prompt, "default")
        engine.cache.let_go(match)
        return np.asarray(engine.runner.store)[:, match.prefix_pages].copy()

    fill(engine, [prompt])
    before = stored()
    fill(engine, others)
    assert len(stored()[0]) < len(before[0])
    engine.prefill(prompt, reuse=ReuseConfig("prefix"))
    np.testing.assert_array_equal(stored(), before)


def test_segments_come_back_at_other_places():
    engine, (document, *others) = tiny_engine(**SMALL), texts(4)
    fill(engine, [document, *others])
    asked = np.concatenate([[5, 6, 7], document[: 10 * PAGE], [8, 9]]).astype(np.int32)
    reuse = ReuseConfig("naive", only_if_faster=False)
    found = engine.prefill(asked, reuse=reuse, keep=False).report
    alone = tiny_engine(store_tokens=24 * PAGE)
    fill(alone, [document])
    assert found.reused_tokens == alone.prefill(asked, reuse=reuse, keep=False).report.reused_tokens >= 10 * PAGE
    assert [(segment.tier, found.prefix_tier) for segment in found.segments] == [("host", None)]
    assert found.tiers_in_words() == "1 segments from host"
    again = engine.prefill(asked, reuse=reuse, keep=False).report
    assert {segment.tier for segment in again.segments} == {"device"}
    check(engine)


LATE = ReuseConfig(boundary_layer=2, recompute_ratio=0.3, only_if_faster=False)


def with_segments(**options):
    """An engine whose host memory has two documents that its store lacks, and a prompt of them in another order."""
    engine = tiny_engine(**{"store_tokens": 66 * PAGE, "host_store_bytes": 1 << 26} | options)
    documents = texts(6)
    fill(engine, documents)
    return engine, np.concatenate([[5, 6, 7], *(text[: 10 * PAGE] for text in documents[1::-1]), [8, 9]]).astype(
        np.int32
    )


def never_evicted(prompt, reuse):
    engine = tiny_engine()
    fill(engine, texts(6)[:2])
    return engine.prefill(prompt, reuse=reuse, keep=False)


def slow_link(monkeypatch):
    """Nothing comes before somebody waits for it. Returns what happens: layers that run, and groups that come."""
    steps = []
    monkeypatch.setattr(Arriving, "ready", lambda self: False)
    place, advance = Link.place_together, Runner._advance

    def note_place(self, store, arriving, targets):
        steps.append(("place", arriving.groups[0]))
        return place(self, store, arriving, targets)

    def note_advance(self, run, until):
        steps.append(("layers", until))
        advance(self, run, until)

    monkeypatch.setattr(Link, "place_together", note_place)
    monkeypatch.setattr(Runner, "_advance", note_advance)
    return steps


def test_first_layers_run_before_segments_come(monkeypatch):
    """And each group of layers, of which the tiny model has one each, comes before the layer that reads it."""
    engine, prompt = with_segments(prefill_tokens=512)
    steps = slow_link(monkeypatch)
    found = engine.prefill(prompt, reuse=LATE, keep=False)
    come = [("place", 0), ("place", 1), ("place", 2)]  # of two documents each
    assert steps == [("layers", 2), *come, ("layers", 3), ("place", 3), ("layers", 4)]
    expected = never_evicted(prompt, LATE)
    assert found.report.restored_tokens == 2 * 16 * PAGE
    assert found.report.recomputed_tokens == expected.report.recomputed_tokens > 0
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    check(engine)


@pytest.mark.parametrize("method", ["naive", "cacheblend", "prophetkv"])
def test_segments_that_come_late_change_no_method(method, monkeypatch):
    engine, prompt = with_segments()
    slow_link(monkeypatch)
    reuse = ReuseConfig(method, only_if_faster=False)
    found, expected = engine.prefill(prompt, reuse=reuse, keep=False), never_evicted(prompt, reuse)
    assert found.report.restored_tokens == 2 * 16 * PAGE
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    check(engine)


def test_segments_come_beside_chunks_and_others(monkeypatch):
    """What stands before the segments is computed in chunks, and others want the same segments meanwhile."""
    engine, prompt = with_segments(prefill_tokens=64)
    slow_link(monkeypatch)
    prompts = [np.concatenate([text[:lead], prompt]) for text, lead in zip(texts(3, seed=8), (200, 3, 70), strict=True)]
    sequences = [submit(engine, each, 2, reuse=LATE, keep=False) for each in prompts]
    engine.loop.complete(sequences)
    for each, sequence in zip(prompts, sequences, strict=True):
        assert sequence.report.reused_tokens > 0
        assert sequence.output.token_ids[0] == never_evicted(each, LATE).logits.argmax()
    check(engine)


def test_nothing_is_computed_behind_segments_that_are_still_coming(monkeypatch):
    """A segment from the beginning of a document is a prefix of that document, which another prompt asks for."""
    engine, document = tiny_engine(store_tokens=88 * PAGE, host_store_bytes=1 << 26, prefill_tokens=64), texts(1)[0]
    fill(engine, [document, *texts(6, seed=2)])
    slow_link(monkeypatch)
    monkeypatch.setattr("sparsex_jax.device.restorer._WORTH", 0)  # what can be computed is not waited for
    first = submit(engine, np.concatenate([texts(1, 400, seed=8)[0], document[: 12 * PAGE], [8]]), reuse=LATE)
    engine.loop._put_in_line([first])
    engine.loop.step()
    assert first.late is not None
    assert engine.admission.loading.active
    asks = submit(engine, np.append(document, [7, 7]).astype(np.int32), keep=False)
    asks.wants_logits = True
    engine.loop.complete([asks])
    np.testing.assert_allclose(asks.logits, exact(asks.prompt), atol=1e-3)
    check(engine)


@pytest.mark.parametrize("group", [0, 3])
def test_segments_that_fail_to_come_are_computed(group, monkeypatch):
    engine, prompt = with_segments()
    slow_link(monkeypatch)
    place = Link.place_together

    def fail(self, store, arriving, targets):
        if arriving.groups[0] == group:
            raise LinkError("a test's")
        return place(self, store, arriving, targets)

    monkeypatch.setattr(Link, "place_together", fail)
    back = engine.prefill(prompt, reuse=LATE, keep=False)
    assert back.report.restored_tokens == back.report.reused_tokens == 0
    np.testing.assert_allclose(back.logits, exact(prompt), atol=1e-3)
    engine.loop.settle()
    check(engine)
    assert engine.cache.stats().active == 0
    monkeypatch.undo()
    assert engine.prefill(prompt, reuse=LATE, keep=False).report.reused_tokens > 0


@pytest.mark.parametrize("how", ["cancelled", "lost", "forgotten"])
def test_segments_outlive_those_they_were_for(how, monkeypatch):
    engine, prompt = with_segments(prefill_tokens=64)
    handle = engine.remember(texts(1)[0]) if how == "forgotten" else None
    fill(engine, texts(4, seed=3))
    slow_link(monkeypatch)
    waits = submit(engine, np.concatenate([texts(1, 200, seed=8)[0], prompt]), 2, reuse=LATE)
    engine.loop._put_in_line([waits])
    engine.loop.step()
    assert waits.late is not None
    assert engine.admission.loading.active
    if how == "cancelled":
        waits.cancelled = True
    elif how == "lost":
        engine.runner.store.delete()
    else:
        engine.forget(handle)
    monkeypatch.undo()
    while engine.loop.step():
        pass
    assert (waits.error is None) is (how != "lost")  # it is the only one that can be at fault
    check(engine)
    assert engine.cache.stats().active == 0


@pytest.mark.parametrize("step", ["place_together", "spill"])
def test_a_store_that_is_lost_while_blocks_move_ends_no_request(step, monkeypatch):
    engine, prompt = with_segments(prefill_tokens=64)
    slow_link(monkeypatch)
    waits = submit(engine, np.concatenate([texts(1, 200, seed=8)[0], prompt]), 2, reuse=LATE)
    engine.loop._put_in_line([waits])
    engine.loop.step()
    assert engine.admission.loading.active
    short, losses = submit(engine, texts(1, 20, seed=3)[0], 2), engine.runner.losses
    engine.loop._put_in_line([short])

    def lose(self, store, *rest):
        store.delete()
        raise RuntimeError("a test's")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, step, lose)
        patch.setattr(Arriving, "ready", lambda self: True)
        for _ in range(40):
            if engine.runner.losses == losses:
                engine.loop.step()
    assert engine.runner.losses > losses
    while engine.loop.step():
        pass
    assert [(each.error, len(each.output.token_ids)) for each in (waits, short)] == [(None, 2)] * 2
    check(engine)


def test_other_namespaces_find_nothing():
    engine, prompts = tiny_engine(**SMALL), texts(3)
    fill(engine, prompts, namespace="mine")
    for method in ("prefix", "naive"):
        report = engine.prefill(prompts[0], reuse=ReuseConfig(method), namespace="yours", keep=False).report
        assert report.computed_fraction == 1
    assert engine.admission.tiers.counts.loaded_bytes == 0


def test_forget_reaches_the_tiers():
    engine, (text, *others) = tiny_engine(**SMALL), texts(4, 8 * PAGE)
    handle = engine.remember(text)
    fill(engine, [np.append(text, [1, 2, 3]).astype(np.int32), *others])
    tiers = engine.admission.tiers
    assert tiers.index.copies(text, "default")
    assert not engine.cache.has_entry(handle)  # it was evicted
    assert [entry.handle for entry in engine.entries()] == [handle]
    engine.forget(handle)
    assert engine.entries() == []
    assert not tiers.index.copies(text, "default")
    fill(engine, texts(3, seed=1))
    assert engine.prefill(text, reuse=ReuseConfig("naive"), keep=False).report.computed_fraction == 1
    check(engine)


def test_a_text_that_was_evicted_keeps_its_handle():
    engine, (text, *others) = tiny_engine(**SMALL), texts(4, 8 * PAGE)
    handle = engine.remember(text)
    fill(engine, others + texts(3, seed=1))
    asked = np.concatenate([[1, 2], text, [3]]).astype(np.int32)
    reuse = ReuseConfig("excerpt", only_if_faster=False, coverage=0.1, keep_ratio=0.1, piece_tokens=2 * PAGE)
    assert engine.prefill(asked, reuse=reuse, keep=False).report.omitted_tokens > 0  # it is known to be a document
    assert engine.remember(text) == handle
    assert engine.cache.has_entry(handle)
    check(engine)


def test_a_lost_store_is_filled_again_from_host_memory():
    engine, (prompt,) = tiny_engine(**SMALL), texts(1)
    fill(engine, [prompt])
    engine.runner.store.delete()
    assert engine.loop.recover()
    back = engine.prefill(prompt, reuse=ReuseConfig("prefix"))
    assert back.report.prefix_tokens == LONG - 1
    np.testing.assert_allclose(back.logits, exact(prompt), atol=1e-3)


def test_approximate_kv_comes_back_as_approximate():
    engine, (document, *others) = tiny_engine(**SMALL), texts(4, 6 * PAGE)
    reuse = ReuseConfig("sparsex", boundary_layer=1, only_if_faster=False)
    engine.remember(document)
    chat = np.concatenate([[3, 4, 5], document, [6, 7]]).astype(np.int32)
    engine.generate(chat, SamplingParams(max_new_tokens=2), reuse=reuse)
    fill(engine, [*others, *texts(3, seed=2)])
    tokens = np.append(chat, [1, 2]).astype(np.int32)
    assert engine.prefill(tokens, reuse=ReuseConfig("prefix"), keep=False).report.prefix_tokens < PAGE
    report = engine.prefill(tokens, reuse=reuse, keep=False).report
    assert report.prefix_tokens < PAGE
    assert report.prefix_tokens + report.approximate_prefix_tokens == len(chat)
    check(engine)


def test_healing_need_not_wait_for_the_tiers():
    engine, (document, other) = tiny_engine(**SMALL), texts(2, 6 * PAGE)
    reuse = ReuseConfig("naive", only_if_faster=False)
    engine.generate(document, SamplingParams(max_new_tokens=2))
    engine.generate(np.concatenate([other[:5], document, [6, 7]]).astype(np.int32), reuse=reuse)
    assert engine.admission.tiers.busy
    assert engine.heal() > 0
    engine.loop.settle()
    check(engine)


def test_a_text_that_has_seen_what_is_forgotten_leaves_the_tiers():
    engine, (first, second) = tiny_engine(**SMALL, company_tokens=8 * PAGE), texts(2, 6 * PAGE)
    handles = [engine.remember(text, company=True) for text in (first, second)]
    engine.loop.settle()
    tiers = engine.admission.tiers
    assert engine.forget(handles[0]).num_stale == 1
    assert not tiers.index.copies(second, "default")
    check(engine)


def test_a_tier_that_is_too_small_loses_ends_first():
    block = tiny_engine(**SMALL)
    fill(block, texts(1))
    one = block.admission.tiers.stats().host_bytes
    engine, prompts = tiny_engine(store_tokens=24 * PAGE, host_store_bytes=one + one // 2), texts(3)
    fill(engine, prompts)
    assert engine.admission.tiers.stats().host_bytes <= one + one // 2
    for prompt in prompts:
        back = engine.prefill(prompt, reuse=ReuseConfig("prefix"), keep=False)
        np.testing.assert_allclose(back.logits, exact(prompt), atol=1e-3)
    check(engine)


def room_for(engine, number):
    """Bytes of host memory for so many prompts of `LONG` tokens."""
    return number * engine.admission.tiers._link.block_bytes(BLOCK_PAGES) * 5 // 4  # a block and four pages


@pytest.mark.parametrize("blocks", [1, 2])
def test_host_memory_has_room_for_blocks(blocks, tmp_path):
    size = tiny_engine(**SMALL).admission.tiers._link.block_bytes(BLOCK_PAGES)
    disk = {"disk_store": str(tmp_path), "disk_store_bytes": 1 << 26} if blocks == 2 else {}
    with pytest.raises(InvalidRequestError, match=f"host_store_bytes={blocks * size - 1} must be at least"):
        tiny_engine(store_tokens=24 * PAGE, host_store_bytes=blocks * size - 1, **disk)
    tiny_engine(store_tokens=24 * PAGE, host_store_bytes=blocks * size, **disk).close()


@pytest.mark.slow
def test_a_tier_for_a_part_of_what_returns_has_that_part():
    room, prompts = room_for(tiny_engine(**SMALL), 3), texts(9)
    engine = tiny_engine(store_tokens=24 * PAGE, host_store_bytes=room)
    tiers = engine.admission.tiers
    fill(engine, prompts * 2)
    before = dataclasses.replace(tiers.counts)
    fill(engine, prompts * 2)
    assert tiers.counts.host_tokens - before.host_tokens >= 2 * 2 * BLOCK_PAGES * PAGE
    assert tiers.counts.spilled_bytes - before.spilled_bytes < room  # and it does not only write
    assert tiers.counts.refused > before.refused
    check(engine)
    fill(engine, texts(3, seed=3) * 5)  # others are followed
    assert all(tiers.index.prefix(prompt, "default", lambda block: False) for prompt in texts(3, seed=3))
    check(engine)


@pytest.mark.slow
def test_what_host_memory_refuses_goes_to_the_disk_and_comes_from_there(tmp_path):
    room, prompts = room_for(tiny_engine(**SMALL), 8), texts(12)
    disk = {"disk_store": str(tmp_path), "disk_store_bytes": 1 << 26}
    engine = tiny_engine(store_tokens=24 * PAGE, host_store_bytes=room, **disk)
    tiers = engine.admission.tiers
    fill(engine, prompts * 3)
    assert tiers.counts.refused > 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2 * len(prompts)
    before = dataclasses.replace(tiers.counts)
    fill(engine, prompts)
    host, every = tiers.counts.host_tokens - before.host_tokens, len(prompts) * LONG
    assert host >= every / 3
    assert tiers.counts.disk_tokens > before.disk_tokens
    check(engine)
    engine.close()


def test_a_block_that_is_used_in_host_memory_does_not_look_unused_on_disk(tmp_path):
    disk = {"disk_store": str(tmp_path), "disk_store_bytes": 1 << 26}
    engine, (prompt, *others) = tiny_engine(**SMALL, **disk), texts(3)
    fill(engine, [prompt, *others, prompt])
    engine.close()
    assert list(engine.admission.tiers._disk.blocks())[-1].tokens == prompt[: BLOCK_PAGES * PAGE].tobytes()


def test_a_restart_finds_what_the_disk_has(tmp_path):
    disk = {"disk_store": str(tmp_path), "disk_store_bytes": 1 << 26}
    engine, prompts = tiny_engine(**SMALL, **disk), texts(3)
    fill(engine, prompts)
    engine.close()
    again = tiny_engine(**SMALL, **disk)
    check_restored(again, prompts, "disk")
    counts = again.admission.tiers.counts
    assert counts.disk_tokens > PAGE
    assert counts.host_tokens == 0
    again.close()


def test_forget_has_deleted_the_files_when_it_returns(tmp_path, monkeypatch):
    engine, (text,) = tiny_engine(**SMALL, disk_store=str(tmp_path), disk_store_bytes=1 << 26), texts(1)
    handle = engine.remember(text)
    engine.loop.settle()
    tiers = engine.admission.tiers
    assert len(tiers._disk) > 0
    with monkeypatch.context() as patch:
        patch.setattr(tiers._threads, "submit", lambda *arguments: None)  # as if the thread were busy for ever
        engine.forget(handle)
    assert not list(tmp_path.rglob("*.safetensors"))
    check(engine)
    engine.close()


def test_what_the_disk_evicted_or_refused_is_stored_again(tmp_path, monkeypatch):
    engine = tiny_engine(
        store_tokens=24 * PAGE, host_store_bytes=400_000, disk_store=str(tmp_path), disk_store_bytes=600_000
    )
    tiers, prompts = engine.admission.tiers, texts(6)
    fill(engine, prompts)
    assert tiers._disk.counts.evicted > 0
    check(engine)

    def fail(*arguments, **options):
        raise DiskStoreError("a test's")

    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "put", fail)
        fill(engine, texts(6, seed=1))
        check(engine)
    fill(engine, prompts[:1] * 2)  # the first time, what is there returns sooner
    assert tiers.index.prefix(prompts[0], "default", lambda block: False)
    check(engine)
    engine.close()


def test_kv_moves_to_another_machine(tmp_path):
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "kv.tar"
    engine, prompts = tiny_engine(**SMALL, disk_store=str(here), disk_store_bytes=1 << 26), texts(2)
    fill(engine, prompts[:1], namespace="a")
    fill(engine, prompts[1:], namespace="b")
    engine.close()
    run = CliRunner().invoke
    assert run(app, ["tier", "export", str(here), str(file), "--namespace", "a"]).exit_code == 0
    assert run(app, ["tier", "import", str(file), f"{there}:64MiB"]).exit_code == 0
    other = tiny_engine(**SMALL, disk_store=str(there), disk_store_bytes=1 << 26)
    assert {block.namespace for block in other.admission.tiers.index.blocks.values()} == {"a"}
    assert other.prefill(prompts[0], reuse=ReuseConfig("prefix"), namespace="a").report.prefix_tokens == LONG - 1
    other.close()
    refused = run(app, ["tier", "export", str(tmp_path / "nothing"), str(file)])
    assert refused.exit_code != 0
    assert "weights" in refused.output


def test_a_broken_file_is_computed_again(tmp_path):
    disk = {"disk_store": str(tmp_path), "disk_store_bytes": 1 << 26}
    engine, prompts = tiny_engine(**SMALL, **disk), texts(2)
    fill(engine, prompts)
    engine.close()
    for path in tmp_path.rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    again = tiny_engine(**SMALL, **disk)
    back = again.prefill(prompts[0], reuse=ReuseConfig("prefix"))
    assert back.report.computed_fraction > 0.75  # all but the part of a block, which may be whole
    np.testing.assert_allclose(back.logits, exact(prompts[0]), atol=1e-3)
    assert again.admission.tiers.counts.lost > 0
    check(again)
    again.close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"host_store_bytes": -1}, "host_store_bytes"),
        ({"disk_store": "x", "host_store_bytes": 1}, "disk_store_bytes"),
        ({"disk_store": "x", "disk_store_bytes": 1}, "host_store_bytes"),
    ],
)
def test_impossible_options_are_refused(options, named):
    with pytest.raises(InvalidRequestError, match=named):
        tiny_engine(**options)


@pytest.mark.parametrize("where", ["spill", "ready", "fetch", "place"])
def test_a_link_that_fails_costs_time_only(where, monkeypatch):
    engine, prompts = tiny_engine(**SMALL), texts(3)

    def fail(*arguments, **options):
        raise LinkError("a test's")

    if where in ("fetch", "place"):
        fill(engine, prompts)
    monkeypatch.setattr(HostBlock if where == "ready" else Link, where, fail)
    if where in ("fetch", "place"):
        monkeypatch.setattr(Link, f"{where}_together", fail)
    fill(engine, prompts)
    asked = np.concatenate([[5, 6, 7], prompts[0]]).astype(np.int32)
    for prompt, method in ((prompts[0], "prefix"), (asked, "naive")):
        back = engine.prefill(prompt, reuse=ReuseConfig(method), keep=False)
        assert back.report.restored_tokens == 0
    np.testing.assert_allclose(
        engine.prefill(prompts[1], reuse=ReuseConfig("prefix")).logits, exact(prompts[1]), atol=1e-3
    )
    check(engine)


def submit(engine, prompt, number=1, **given):
    sampling = SamplingParams(max_new_tokens=number, ignore_eos=True)
    options = {"reuse": ReuseConfig("prefix"), "namespace": "default", "keep": True} | given
    return engine.loop.requests.generation(prompt, sampling, listener=ignore, **options)


def while_restoring(engine, prompt, then):
    """Complete other sequences while a prefix is under way that does not get on."""
    waits = submit(engine, prompt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Restorer, "pump", lambda *arguments: True)
        engine.loop._put_in_line([waits])
        engine.loop.step()
        assert engine.admission.restoring.active
        engine.loop.complete(then)
    while engine.loop.step():
        pass
    assert waits.error is None
    check(engine)


def test_prefixes_under_way_cut_no_answers():
    engine, prompts = tiny_engine(**SMALL), texts(3)
    fill(engine, prompts)
    decoding = submit(engine, prompts[0][:5], 100)
    while_restoring(engine, prompts[0], [decoding])
    assert len(decoding.output.token_ids) == 100


def test_prefixes_under_way_make_room_for_prompts():
    engine, prompts = tiny_engine(**SMALL), texts(3)
    fill(engine, prompts)
    while_restoring(engine, prompts[0], [submit(engine, texts(1, seed=9)[0])])


def test_what_is_forgotten_does_not_come_back_with_a_prefix():
    engine, (text, *others) = tiny_engine(**SMALL), texts(4)
    handle = engine.remember(text)
    fill(engine, others)
    waits = submit(engine, np.append(text, [1, 2]).astype(np.int32))
    engine.loop._put_in_line([waits])
    engine.loop.step()
    restoring = engine.admission.restoring
    assert restoring.active
    while not all(prefix.restoration.ended for prefix in restoring._prefixes.values()):
        restoring.pump(0.01)
    engine.forget(handle)
    assert not engine.admission.restoring.active
    match = engine.cache.lookup(text, "default")
    engine.cache.let_go(match)
    assert match.num_prefix_tokens == 0
    while engine.loop.step():
        pass
    assert waits.error is None
    check(engine)


class TieredMachine(EngineMachine):
    """The random lives of an engine, above a tier that has room for a few blocks."""

    def make(self):
        return tiny_engine(store_tokens=20 * 16, decode_steps=4, host_store_bytes=400_000)

    @invariant()
    def no_page_is_lost(self):
        self.engine.loop.settle()  # what a probe sent for may come behind the end of its request
        super().no_page_is_lost()

    @invariant()
    def tiers_agree(self):
        self.engine.admission.tiers.check()


class ManyTieredLives(TieredMachine):
    """The same, for longer."""


QUICK = settings(max_examples=4, stateful_step_count=12, suppress_health_check=list(HealthCheck))
TieredMachine.TestCase.settings = QUICK
ManyTieredLives.TestCase.settings = settings(QUICK, max_examples=60, stateful_step_count=25)
test_tiered_machine = TieredMachine.TestCase
test_many_tiered_lives = pytest.mark.slow(ManyTieredLives.TestCase)


# The index ---------------------------------------------------------------------------------------------------------


def chain(tokens, namespace="a", exact=None, start=0, page=4):
    """The blocks of a sequence."""
    size, before, blocks = BLOCK_PAGES * page, b"", []
    for at in range(0, len(tokens), size):
        own = np.array(tokens[at : at + size], np.int32)
        sound = len(own) if exact is None else int(np.clip(exact - at, 0, len(own)))
        blocks.append(Block(namespace, start + at, own.tobytes(), sound, "" if sound == len(own) else "{}", before))
        before = blocks[-1].key
    return blocks


sequences = st.lists(st.lists(st.integers(0, 1), max_size=40), min_size=1, max_size=6)


@given(sequences, st.lists(st.integers(0, 1), max_size=40), st.integers(1, 3))
def test_prefixes_are_found_page_by_page(stored, asked, scale):
    """As the longest common beginning of any stored sequence says, in whole pages."""
    index, repeat = BlockIndex(4), lambda bits: [bit for bit in bits for _ in range(4 * scale)]
    for each in stored:
        for block in chain(repeat(each)):
            if index.holder(block) is None:
                for key in index.outgrown(block):
                    index.remove(key)
                index.add(block)
    tokens = np.array(repeat(asked), np.int32)
    found = sum(each.num_tokens for each in index.prefix(tokens, "a", lambda made_by: False))

    def common(each):
        same = np.cumprod([a == b for a, b in zip(repeat(each), tokens, strict=False)])
        return int(same.sum()) // 4 * 4

    assert found == max(map(common, stored))
    assert index.prefix(tokens, "b", lambda made_by: True) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=40))
def test_the_index_forgets_what_is_removed(steps):
    index, here = BlockIndex(4), {}
    every = [chain(np.random.default_rng(seed).integers(0, 9, 50), exact=seed * 9)[0] for seed in range(6)]
    for number, add in steps:
        block = every[number]
        if add:
            index.add(block)
            here[block.key] = block
        else:
            assert index.remove(block.key) == here.pop(block.key, None)
    assert index.blocks == here
    for block in every:
        tokens = np.frombuffer(block.tokens, np.int32)
        assert (block.key in index.copies(tokens, "a")) == (block.key in here)


def test_a_short_text_is_found_where_a_block_has_it_alone():
    index, block = BlockIndex(4), chain([5, 6, 7])[0]
    index.add(block)
    assert index.copies(np.array([5, 6, 7], np.int32), "a") == [block.key]
    assert index.copies(np.array([5, 6], np.int32), "a") == index.copies(np.array([5, 6, 7], np.int32), "b") == []


def test_blocks_that_are_too_short_for_a_window_can_be_removed():
    index, blocks = BlockIndex(4), [chain([number] * 3)[0] for number in (1, 2)]
    for block in blocks:
        index.add(block)
    assert [index.remove(block.key) for block in blocks] == blocks


@dataclasses.dataclass
class Kept:
    nbytes: int


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), max_size=30))
def test_host_memory_stays_within_its_limit(steps):
    host, blocks = HostStore(12), [block for seed in range(5) for block in chain([seed] * 9)]
    for number, nbytes in steps:
        gone = host.put(blocks[number], Kept(nbytes))
        assert all(key not in host for key, _ in gone)
        host.check()
