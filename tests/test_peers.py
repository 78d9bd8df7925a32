"""Replicas that get blocks from each other: over HTTP, between two engines of one process, through wires that fail."""

import asyncio
import contextlib
import dataclasses
import functools
import json

import httpx
import numpy as np
import pytest
from conftest import tiny_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsex_jax import InvalidRequestError, ReuseConfig, SamplingParams
from sparsex_jax.reuse.cost import ChunkTimes, Speeds
from sparsex_jax.routing import Position, Sketch
from sparsex_jax.scheduler.peering import Lookup, Peering
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.fleet import peer_messages as messages
from sparsex_jax.serving.fleet.peers import PeerConfig
from sparsex_jax.serving.fleet.preview import Prompt
from sparsex_jax.serving.fleet.replica import Forwarded, Replica
from sparsex_jax.serving.fleet.seal import Seal
from sparsex_jax.serving.worker import Worker
from sparsex_jax.tiers import block_file
from sparsex_jax.tiers.blocks import BLOCK_PAGES

PAGE, SKETCH = 16, Sketch(b"a fleet's secret")
LONG = 20 * PAGE - 3  # a block and a part of one
SMALL = {"store_tokens": 64 * PAGE, "host_store_bytes": 1 << 26}
NAIVE = {"method": "naive", "only_if_faster": False}
SLOW = Speeds(*(ChunkTimes((32,), (10.0,), (0.0,)),) * 2, 0.0, 0.0, 0.0, 0.0)  # of a device that takes 10 s a chunk


LOOKUP = Lookup("docs", np.zeros(1, np.int32), ReuseConfig(**NAIVE), 3, ((0, 1),))


def texts(number, length=LONG, seed=0):
    return list(np.random.default_rng(seed).integers(1, 97, (number, length)).astype(np.int32))


def fill(engine, prompt, namespace="default"):
    done = engine.generate(prompt, SamplingParams(max_new_tokens=2), reuse=ReuseConfig("prefix"), namespace=namespace)
    engine.loop.settle()
    return done


def peering(engine) -> Peering:
    return Peering(engine.admission, engine.model)


def pieces_of(there: Peering, key: bytes) -> list[np.ndarray]:
    """Those of a block, out of its file."""
    file = np.frombuffer(b"".join(there.tiers.file_of(key)().parts), np.uint8)
    return block_file.decode(file, key, there.tiers.model)[1]


def check(engine):
    engine.admission.check_books()
    engine.admission.tiers.check()


# Messages ---------------------------------------------------------------------------------------------------


def test_a_seal_is_of_one_fleet_and_one_message():
    ours, theirs = Seal(b"a fleet's secret"), Seal(b"a fleet's secreT")
    assert ours.is_of(ours.of(b"ab", b"c"), b"ab", b"c")
    for seal in (ours.of(b"a", b"bc"), theirs.of(b"ab", b"c"), "", "é", None):
        assert not ours.is_of(seal, b"ab", b"c")


@settings(max_examples=30)
@given(st.data())
def test_messages_say_what_was_said(data):
    tokens = np.array(data.draw(st.lists(st.integers(0, 96), min_size=1, max_size=40)), np.int32)
    lookup = dataclasses.replace(LOOKUP, tokens=tokens, namespace=data.draw(st.text()), ranges=((0, len(tokens)),))
    fields = json.loads(messages.lookup_to_bytes(lookup, "m"))
    again = messages.lookup_of(fields)
    assert (fields["model"], again.namespace, again.reuse) == ("m", lookup.namespace, lookup.reuse)
    assert (again.num_prefix, again.ranges, again.tokens.tolist()) == (3, lookup.ranges, tokens.tolist())


# Two stores -------------------------------------------------------------------------------------------------


def move(asking, giving, prompt, namespace, reuse, bytes_per_s=1e9, most_bytes=1 << 30):
    """What one engine gets from another without a network; None where it asks for nothing."""
    here, there = peering(asking), peering(giving)
    lookup = here.lacking(prompt, namespace, reuse)
    if lookup is None:
        return None
    told = messages.told_of(messages.told_to_bytes(there.find(lookup)))
    chosen = here.choose(lookup, told, bytes_per_s, most_bytes)
    for block in chosen.fetched:
        assert here.tiers.arrived(block.key, here.tiers.host_block(pieces_of(there, block.key)))
    return chosen


LOOKUP_TEXTS = texts(3, length=300) + texts(1, length=40, seed=9)
step = st.tuples(
    st.booleans(),  # at which engine
    st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True),
    st.sampled_from(["a", "b"]),
    st.sampled_from(["prefix", "naive"]),
    st.sampled_from([0, 5]),
)


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(step, min_size=2, max_size=3))
def test_two_stores_have_what_either_had(asked):
    exchange(asked)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(step, max_size=6))
def test_two_stores_have_what_either_had_at_length(asked):
    exchange(asked)


def exchange(asked):
    """Whatever is asked where: after a transfer nothing lacks that the other has; what came is byte for byte the
    other's; no namespace has what was never asked in it; and answers are those of an engine alone, where all is exact.
    """
    engines = [tiny_engine(**SMALL, choose="always") for _ in range(2)]
    known = {"a": set(), "b": set()}
    for at, numbers, namespace, method, cut in asked:
        here, there = engines[at], engines[not at]
        prompt = np.concatenate([LOOKUP_TEXTS[i][cut:] for i in numbers])
        reuse = ReuseConfig("prefix") if method == "prefix" else ReuseConfig(**NAIVE)
        chosen = move(here, there, prompt, namespace, reuse)
        if chosen is not None:
            lookup = peering(here).lacking(prompt, namespace, reuse)
            assert lookup is None or not move(here, there, prompt, namespace, reuse).fetched
            for block in chosen.fetched:
                mine, theirs = (b"".join(each.admission.tiers.file_of(block.key)().parts) for each in (here, there))
                assert mine == theirs
        known[namespace].add(prompt.tobytes())
        done = here.generate(prompt, SamplingParams(max_new_tokens=1), reuse=reuse, namespace=namespace)
        here.loop.settle()
        if method == "prefix":
            assert done.token_ids == alone(prompt.tobytes())
        for engine in engines:
            check(engine)
            for block in engine.admission.tiers.index.blocks.values():
                assert any(block.tokens[:32] in each for each in known[block.namespace])


@functools.cache
def alone(prompt: bytes):
    """The answer of an engine that stores nothing."""
    options = {"reuse": ReuseConfig("full"), "keep": False}
    return _lonely().generate(np.frombuffer(prompt, np.int32), SamplingParams(max_new_tokens=1), **options).token_ids


@functools.cache
def _lonely():
    return tiny_engine(**SMALL)


def test_only_what_pays_is_fetched_and_no_more_than_may_be():
    giving, asking = tiny_engine(**SMALL), tiny_engine(**SMALL)
    [prompt] = texts(1)
    fill(giving, prompt)
    size = asking.admission.tiers.nbytes_of(next(iter(giving.admission.tiers.index.blocks.values())))
    asking.admission.choice.speeds = SLOW
    reuse = ReuseConfig("sparsex", boundary_layer=1)
    assert reuse.only_if_faster
    assert move(asking, giving, prompt, "default", reuse, bytes_per_s=1.0).fetched == []
    assert move(asking, giving, prompt, "default", reuse, most_bytes=1).fetched == []
    chosen = move(asking, giving, prompt, "default", reuse, most_bytes=size)
    assert [block.num_tokens for block in chosen.fetched] == [BLOCK_PAGES * PAGE]
    assert chosen.seconds > 0
    check(asking)


def test_what_is_on_disk_only_is_sent_as_it_is_there(tmp_path):
    disk = {"disk_store": str(tmp_path), "disk_store_bytes": 1 << 26}
    giving = tiny_engine(**SMALL, **disk)
    [prompt] = texts(1)
    fill(giving, prompt)
    tiers = giving.admission.tiers
    files = {key: b"".join(tiers.file_of(key)().parts) for key in tiers.index.blocks}
    giving.close()
    again, asking = tiny_engine(**SMALL, **disk), tiny_engine(**SMALL)
    there = again.admission.tiers
    assert not there.has_host_blocks
    assert {key: b"".join(there.file_of(key)().parts) for key in there.index.blocks} == files
    assert len(move(asking, again, prompt, "default", ReuseConfig("prefix")).fetched) == len(files) == 2
    make = there.file_of(next(iter(files)))
    there.forget(prompt[:40], "default")
    assert make() is None
    again.close()
    check(asking)


def test_what_is_forgotten_while_it_comes_does_not_come():
    giving, asking = tiny_engine(**SMALL), tiny_engine(**SMALL)
    [prompt] = texts(1)
    fill(giving, prompt)
    here, there = peering(asking), peering(giving)
    lookup = here.lacking(prompt, "default", ReuseConfig("prefix"))
    [first, second] = here.choose(lookup, there.find(lookup), 1e9, 1 << 30).fetched
    assert here.choose(lookup, there.find(lookup), 1e9, 1 << 30).awaited == [first.key, second.key]
    here.tiers.forget(prompt[:40], "default")
    assert not here.tiers.arrived(first.key, here.tiers.host_block(pieces_of(there, first.key)))
    here.tiers.not_coming(second.key)
    assert not here.tiers.has_blocks
    check(asking)


def test_blocks_of_another_namespace_or_no_blocks_at_all_are_not_taken():
    giving, asking = tiny_engine(**SMALL), tiny_engine(**SMALL)
    [prompt] = texts(1)
    fill(giving, prompt)
    here = peering(asking)
    lookup = here.lacking(prompt, "default", ReuseConfig("prefix"))
    [run, *_] = peering(giving).find(lookup)
    for wrong in (
        run._replace(block=dataclasses.replace(run.block, namespace="other")),
        run._replace(block=dataclasses.replace(run.block, exact=run.block.num_tokens + 1)),
        run._replace(block=dataclasses.replace(run.block, tokens=run.block.tokens * 2)),
        run._replace(end=LONG + 1),
    ):
        assert here.choose(lookup, [wrong], 1e9, 1 << 30).fetched == []
    assert here.choose(lookup, [run], 1e9, 1 << 30).fetched == [run.block]


# Two replicas -----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def replica(engine, sketch=SKETCH, **config):
    worker = Worker(engine)
    app = create_app(worker, model="tiny")
    peers = PeerConfig(**{"rest_s": 0.0, "most_s": 20.0} | config)
    async with Replica(app, worker, sketch, limits=Limits(client_timeout=5), peers=peers) as made:
        yield made


def with_two(scenario, sketches=(SKETCH, SKETCH), options=({}, {}), **config):
    async def run():
        engines = [tiny_engine(**SMALL, choose="always", **each) for each in options]
        async with replica(engines[0], sketches[0]) as giving, replica(engines[1], sketches[1], **config) as asking:
            await scenario(giving, asking, engines)
        for engine in engines:
            check(engine)
            assert not engine.admission.tiers._fetching

    asyncio.run(asyncio.wait_for(run(), 120))


async def ask(of: Replica, tokens, held_at=None, salt="ours", **fields):
    """The answer's object."""
    body = {"prompt": tokens.tolist(), "max_tokens": 4, "temperature": 0, "cache_salt": salt, "ignore_eos": True}
    body |= {"return_token_ids": True} | fields
    namespace = Access.open(Limits()).tenant(None).store_namespace(salt)
    prompt = Prompt(namespace, tokens, fields.get("reuse", {}), None)
    headers = [(b"content-type", b"application/json")]
    about = {"prompt": prompt, "held_at": held_at} if held_at else {}
    request = Forwarded("POST", "/v1/completions", b"", headers, json.dumps(body).encode(), **about)
    sent = [message async for message in of.answer(request)]
    assert sent[0]["status"] == 200, sent
    return json.loads(b"".join(message.get("body", b"") for message in sent))


async def settled(engine, of: Replica):
    await of._worker.call(engine.loop.settle)


def test_a_hot_document_moves_and_is_hit():
    """As a prefix, exactly; and as a segment behind other words. Who asks under another salt gets nothing."""
    document, words = texts(2)

    async def scenario(giving, asking, engines):
        address = (await giving.tell(Position())).address
        first = await ask(giving, document, reuse={"method": "prefix"})
        await settled(engines[0], giving)
        other = await ask(asking, document, address, salt="others", reuse={"method": "prefix"})
        assert other["sparsex"]["prefix_tokens"] == 0
        again = await ask(asking, document, address, reuse={"method": "prefix"})
        assert again["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
        assert again["sparsex"]["prefix_tokens"] == LONG - 1
        assert again["sparsex"]["prefix_tier"] == "peer"
        assert asking.moved.fetched.blocks == 2
        assert asking.moved.fetched.failed == 0
        await ask(asking, document, address, reuse={"method": "prefix"})
        assert asking.moved.fetched.asked == 2, "nothing lacks any more"

        second = texts(1, seed=5)[0]
        await ask(giving, second)
        await settled(engines[0], giving)
        mixed = await ask(asking, np.concatenate([words[:20], second]), address, reuse=NAIVE)
        assert mixed["sparsex"]["reused_tokens"] > 0.8 * LONG
        assert {segment["tier"] for segment in mixed["sparsex"]["segments"]} == {"peer"}
        await check_counts(giving, asking, engines)

    with_two(scenario)


async def check_counts(giving, asking, engines):
    """What one fetched, the other one served; both tell routers and Prometheus of it. Sums are made once a block."""
    fetched, served = asking.moved.fetched, giving.moved.served
    assert (fetched.blocks, fetched.failed) == (served.blocks, served.refused) == (4, 0)
    assert fetched.nbytes == served.nbytes
    assert fetched.asked == served.lookups == 3
    assert (await asking.tell(Position())).moved == asking.moved
    assert asking.moved is not asking._moved
    of_asking, of_giving = [await series(each) for each in (asking, giving)]
    for name, count in (("blocks", 4), ("bytes", fetched.nbytes), ("lookups", 3), ("failures", 0)):
        for text, side, other in ((of_asking, "asking", "giving"), (of_giving, "giving", "asking")):
            assert text[f'sparsex_peer_{name}_total{{side="{side}"}}'] == count
            assert text[f'sparsex_peer_{name}_total{{side="{other}"}}'] == 0
    tiers = engines[1].loop.tiers.counts
    assert of_asking['sparsex_tier_moved_bytes_total{way="fetched"}'] == tiers.fetched_bytes > 0
    assert of_asking['sparsex_tier_hit_tokens_total{tier="peer"}'] == tiers.peer_tokens > LONG
    stores = [engine.admission.tiers for engine in engines]
    summed = [store._kept(key).sums is not None for store in stores for key in store.index.blocks]
    assert sum(summed) == 4


async def series(of: Replica) -> dict[str, float]:
    """The replica's metrics."""
    sent = [message async for message in of.answer(Forwarded("GET", "/metrics", b"", [], b""))]
    lines = b"".join(message.get("body", b"") for message in sent).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


class Wire:
    """A listener that passes bytes to a replica and back, and harms what comes back.

    `harm` gives what is passed on of some bytes, and whether the connection goes on behind them. None: it hangs.
    """

    def __init__(self, address: str, harm) -> None:
        self._host, self._port = address.removeprefix("http://").split(":")
        self._harm = harm

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _pass(self, reader, writer):
        there, back = await asyncio.open_connection(self._host, self._port)
        up, goes_on = asyncio.ensure_future(self._pump(reader, back)), True
        with contextlib.suppress(ConnectionError):
            while goes_on and (data := await there.read(1 << 16)):
                data, goes_on = self._harm(data)
                writer.write(data)
                await writer.drain()
                if goes_on is None:
                    await asyncio.sleep(3)
        up.cancel()
        for each in (writer, back):
            each.close()

    async def _pump(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)


def of_blocks(harm):
    """Only of responses that are blocks, whose bytes are many."""
    return lambda data: harm(data) if len(data) > 20_000 else (data, True)


def flipped(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


HARMS = {  # with what is said of them
    "it ends in the middle of a block": (of_blocks(lambda data: (data[: len(data) // 2], False)), "it stopped where"),
    "it ends with the lookup": (lambda data: (b"", False), "RemoteDisconnected"),
    "a byte of a block is another": (of_blocks(lambda data: (flipped(data), True)), "a checksum differs"),
    "a byte of a lookup is another": (lambda data: (data.replace(b"[[0", b"[[1"), True), "no seal"),
    "a seal is another": (lambda data: (data.replace(b"x-sparsex-seal: ", b"x-sparsex-seal: 0"), True), "no seal"),
    "it hangs in the middle of a block": (of_blocks(lambda data: (data[:2000], None)), "timed out"),
    "it is no server": (lambda data: (b"hello\r\n\r\n", False), "BadStatusLine"),
    "it promises too much": (
        lambda data: (data.replace(b"content-length: ", b"content-length: 99999"), True),
        "at most",
    ),
}


@pytest.fixture(scope="module")
def two_at_once():
    """Runs scenarios on two replicas that live as long as this module's tests do."""
    with asyncio.Runner() as runner:
        engines = [tiny_engine(**SMALL, choose="always") for _ in range(2)]
        stack = contextlib.AsyncExitStack()

        async def enter():
            return [await stack.enter_async_context(replica(each, most_s=0.6)) for each in engines]

        giving, asking = runner.run(enter())
        yield lambda scenario: runner.run(scenario(giving, asking, engines))
        runner.run(stack.aclose())


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_wire_costs_no_answer(two_at_once, harm, caplog):
    """What comes through it is not served; the prompt is computed, and answered as ever."""
    [document], (harms, said) = texts(1, seed=list(HARMS).index(harm) + 20), HARMS[harm]

    async def scenario(giving, asking, engines):
        before = asking.moved.fetched.failed
        first = await ask(giving, document, reuse={"method": "prefix"})
        await settled(engines[0], giving)
        address = (await giving.tell(Position())).address
        async with Wire(address, harms) as wire:
            again = await ask(asking, document, wire.address, reuse={"method": "prefix"})
        assert again["choices"][0]["token_ids"] == first["choices"][0]["token_ids"]
        assert again["sparsex"]["prefix_tokens"] == 0
        assert asking.moved.fetched.failed > before
        assert said in caplog.text
        await settled(engines[1], asking)
        check(engines[1])
        assert not engines[1].admission.tiers._fetching

    two_at_once(scenario)


def test_a_peer_that_is_gone_is_left_alone_for_a_while(two_at_once):
    [document] = texts(1, seed=60)

    async def scenario(giving, asking, engines):
        before = asking.moved.fetched.failed
        asking._peers._config = dataclasses.replace(asking._peers._config, rest_s=60.0)
        for _ in range(3):
            await ask(asking, document, "http://127.0.0.1:9", salt=f"salt {_}")
        assert asking.moved.fetched.failed == before + 1

    two_at_once(scenario)


def test_strangers_get_nothing(two_at_once):
    """Without the fleet's secret, and with it from a fleet of another model."""

    async def scenario(giving, asking, engines):
        address, before = (await giving.tell(Position())).address, giving.moved.served.refused
        body = messages.key_to_bytes(bytes(16), giving._peers._model)
        async with httpx.AsyncClient(base_url=address) as client:
            assert (await client.post("/block", content=body)).status_code == 403
            seal = {"x-sparsex-seal": Seal(SKETCH.key).of(b"/block", body)}
            assert (await client.post("/block", content=body, headers=seal)).status_code == 404
            assert (await client.post("/lookup", content=body, headers=seal)).status_code == 403
            other = messages.key_to_bytes(bytes(16), "another")
            seal = {"x-sparsex-seal": Seal(SKETCH.key).of(b"/block", other)}
            assert (await client.post("/block", content=other, headers=seal)).status_code == 409
            large = b"x" * (2 << 20)
            assert (await client.post("/block", content=large, headers=seal)).status_code == 413
            for path, wrong in (("/lookup", b"{}"), ("/block", b"no"), ("/lookup", b'{"model": "%s"}')):
                wrong = wrong.replace(b"%s", giving._peers._model.encode())
                seal = {"x-sparsex-seal": Seal(SKETCH.key).of(path.encode(), wrong)}
                assert (await client.post(path, content=wrong, headers=seal)).status_code == 400
        assert giving.moved.served.refused == before + 8

    two_at_once(scenario)


def test_peers_need_host_memory_to_have_blocks_in():
    engine = tiny_engine(store_tokens=40 * PAGE)
    with pytest.raises(InvalidRequestError, match="peers needs host_store_bytes above 0"):
        Replica(create_app(Worker(engine), model="tiny"), Worker(engine), SKETCH, limits=Limits(), peers=PeerConfig())
    for options, message in (
        ({"port": 70000}, "port=70000"),
        ({"threads": 0}, "threads=0"),
        ({"most_s": -1}, "most_s"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            PeerConfig(**options)
