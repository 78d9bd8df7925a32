"""What a replica tells of its store, and the front, on replicas that only act as such. None of it runs a model."""

import asyncio
import contextlib
import dataclasses
import functools
import json

import msgpack
import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from live import HELLO_EVENTS, ScriptedLoop, make_engine, wait_for

from sparsex_jax import EngineConfig, SamplingParams
from sparsex_jax.cache import PageCache
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.routing import Ask, Load, Position, RoundRobin, Router, SegmentPolicy, Sketch, Update
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.faults import ReplicaLostError
from sparsex_jax.serving.fleet.feed import DigestFeed
from sparsex_jax.serving.fleet.front import Front
from sparsex_jax.serving.fleet.kv_events import END, Blocks, KvEvents, KvEventsConfig
from sparsex_jax.serving.fleet.observers import Observers
from sparsex_jax.serving.fleet.pages import Journal
from sparsex_jax.serving.fleet.peer_counts import PeerCounts, PeerStats, ServedCounts
from sparsex_jax.serving.fleet.preview import Preview
from sparsex_jax.serving.fleet.replica import Forwarded, Replica, Told
from sparsex_jax.serving.worker import Worker
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.index import BlockIndex

SKETCH, VOCABULARY, PAGE = Sketch(b"a fleet's secret", every=2), 1000, 16


def store(cache: PageCache, tokens, namespace="docs", exact=None) -> None:
    pages = cache.allocate(-(-len(tokens) // PAGE))
    exact = len(tokens) if exact is None else min(exact, len(tokens))
    cache.commit(pages, np.array(tokens, np.int32), namespace, exact_tokens=exact)
    cache.release(pages)


def words(seed: int, length: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)


def feed_of(cache: PageCache, num_pages: int = 16) -> DigestFeed:
    feed = DigestFeed(SKETCH, VOCABULARY, num_pages)
    cache.watch(feed)
    return feed


def held(updates: list[bytes], before=None) -> dict[bytes, set[int]]:
    """What a follower holds after these updates."""
    state = {tag: set(each) for tag, each in (before or {}).items()}
    for update in map(Update.from_bytes, updates):
        state = {} if update.whole else state
        for tag, samples in update.added.items():
            state.setdefault(tag, set()).update(samples.tolist())
        for tag, samples in update.removed.items():
            state[tag].difference_update(samples.tolist())
    return {tag: each for tag, each in state.items() if each}


# Digests of a store -----------------------------------------------------------------------------------------

sequences = st.lists(
    st.tuples(st.sampled_from(["docs", "other"]), st.integers(0, 5), st.integers(1, 70), st.booleans(), st.booleans()),
    max_size=12,
)


@settings(max_examples=60)
@given(sequences, st.integers(0, 11), st.booleans())
def test_a_feed_follows_its_store(texts, cleared_at, loses):
    """Whatever is committed and evicted, approximate or exact: the deltas give what a new feed of the store says.

    Windows across the border to a page that went before its children are told of until those go too.
    """
    cache = PageCache(12, PAGE)
    feed = feed_of(cache)
    if loses:
        feed._most = 3
    state, position = {}, Position()
    for number, (namespace, seed, length, exact, asks) in enumerate(texts):
        store(cache, words(seed, length), namespace, None if exact else 0)
        if number == cleared_at:
            cache.clear()
        if feed.is_lost:
            feed.cleared()
            feed._most = 100
            cache.watch(feed)
        if asks:
            updates = feed.since(position)
            state = held(updates, state)
            position = _behind(updates, position)
    state = held(feed.since(position), state) if not feed.is_lost else state
    if not feed.is_lost:
        told = held(feed_of(cache).since(Position()))
        assert all(
            told.get(tag, set()) <= each <= told.get(tag, set()) | across_borders(tag) for tag, each in state.items()
        )
        assert told.keys() <= state.keys()
        assert feed.num_samples == sum(map(len, state.values()))


@functools.cache
def across_borders(tag: bytes) -> set[int]:
    """The samples of all windows of the texts above that reach over the border of two pages."""
    [namespace] = [each for each in ("docs", "other") if SKETCH.tag(each) == tag]
    rows = [words(seed, 80)[border - 7 : border + 7] for seed in range(6) for border in range(PAGE, 80, PAGE)]
    return {int(sample) for each in SKETCH.samples_of_each(np.array(rows), namespace) for sample in each}


def _behind(updates, position):
    last = Update.from_bytes(updates[-1]) if updates else None
    return position if last is None else Position(last.epoch, last.seq)


def test_a_stored_text_is_found_wherever_it_stands_in_a_prompt():
    """Also across the borders of pages, and behind other words."""
    cache = PageCache(16, PAGE)
    feed, text = feed_of(cache), words(0, 150)
    store(cache, text)
    router = Router(SegmentPolicy())
    router.join("a")
    router.apply("a", Update.from_bytes(feed.since(Position())[0]))
    prompt = np.concatenate([words(1, 13), text[20:120]])
    assert 90 <= router.route(Ask.of(SKETCH, prompt, "docs")).hit_tokens <= 105


def test_an_old_position_gets_a_snapshot_and_a_late_one_the_deltas():
    cache, feed = PageCache(64, PAGE), DigestFeed(SKETCH, VOCABULARY, 64, most_deltas=4)
    cache.watch(feed)
    [whole] = feed.since(Position())
    start = _behind([whole], Position())
    for seed in range(3):
        store(cache, words(seed))
        feed.since(start)
    assert [Update.from_bytes(each).seq for each in feed.since(start)] == [start.seq + 1 + i for i in range(3)]
    assert feed.since(Position(start.epoch, start.seq + 3)) == []
    for seed in range(3, 5):
        store(cache, words(seed))
        feed.since(start)
    assert [Update.from_bytes(each).whole for each in feed.since(start)] == [True]
    other = DigestFeed(SKETCH, VOCABULARY, 16)
    assert Update.from_bytes(other.since(start)[0]).whole


def test_what_an_adapter_computed_is_not_told():
    """Its keys have another mark in each process."""
    cache = PageCache(16, PAGE)
    feed = feed_of(cache)
    store(cache, words(0) + VOCABULARY)
    assert feed.num_samples == 0
    store(cache, words(0))
    assert feed.num_samples == len(set(SKETCH.samples(words(0), "docs").tolist()))
    cache.clear()
    assert feed.num_samples == 0


def test_what_only_lower_tiers_have_is_told_too():
    index, feed = BlockIndex(PAGE), DigestFeed(SKETCH, VOCABULARY, 16)
    blocks = [Block("docs", 0, words(seed, 100).tobytes(), 100, "", b"") for seed in range(2)]
    index.add(blocks[0])
    index.watch(feed)
    cache = PageCache(16, PAGE)
    cache.watch(feed)
    store(cache, words(0, 100))
    index.add(blocks[1])
    index.add(blocks[1])
    both = [set(SKETCH.samples(words(seed, 100), "docs").tolist()) for seed in range(2)]
    state = held(feed.since(Position()))
    assert state == {SKETCH.tag("docs"): both[0] | both[1]}
    cache.clear()
    assert held(feed.since(Position())) == state
    for block in blocks:
        index.remove(block.key)
    assert feed.num_samples == 0


def test_a_journal_that_nobody_reads_is_bounded():
    cache, journal = PageCache(64, PAGE), Journal(most=5)
    cache.watch(journal)
    store(cache, words(0))
    assert (journal.is_lost, len(journal.read()[1])) == (False, 4)
    for seed in range(1, 4):
        store(cache, words(seed))
    assert journal.is_lost
    assert journal.read() == (False, [])
    journal.cleared()
    assert not journal.is_lost
    cache.watch(None)
    store(cache, words(9))
    assert journal.read() == (True, [])


def test_a_store_that_was_lost_is_told_of_as_empty():
    """Also of the cache that replaces it."""
    admission = Admission(TINY, EngineConfig(store_tokens=256, page_size=PAGE))
    feed = DigestFeed(SKETCH, VOCABULARY, 16)
    admission.watch(feed)
    store(admission.cache, words(0))
    first = Update.from_bytes(feed.since(Position())[0])
    admission.start_over()
    store(admission.cache, words(1))
    [update] = map(Update.from_bytes, feed.since(Position(first.epoch, first.seq)))
    assert (update.whole, update.epoch != first.epoch) == (True, True)
    assert held([update.to_bytes()]) == {SKETCH.tag("docs"): set(SKETCH.samples(words(1), "docs").tolist())}


def test_a_loop_says_how_many_tokens_wait():
    loop = engine().loop
    ticket = loop.submit([1, 2, 3], SamplingParams(max_new_tokens=1), listener=lambda event: None)
    assert loop.queued_tokens == 3
    ticket.cancel()
    assert loop.queued_tokens == 0
    loop.step()


# KV events --------------------------------------------------------------------------------------------------


def blocks_after(events) -> dict[int, dict]:
    """A subscriber's index, which refuses what does not fit."""
    known = {}
    for event in events:
        if event["type"] == "AllBlocksCleared":
            known = {}
        elif event["type"] == "BlockRemoved":
            for value in event["block_hashes"]:
                del known[value]
        else:
            [value] = event["block_hashes"]
            assert value not in known
            assert len(event["token_ids"]) == event["block_size"] == PAGE
            known[value] = event
    return known


@settings(max_examples=60)
@given(sequences)
def test_events_tell_the_whole_pages_of_prefixes(texts):
    cache, journal, blocks = PageCache(12, PAGE), Journal(1000), Blocks(PAGE, VOCABULARY)
    cache.watch(journal)
    events = []
    for namespace, seed, length, exact, reads in texts:
        store(cache, words(seed, length), namespace, None if exact else 0)
        if reads:
            events += blocks.events(journal.read()[1])
    events += blocks.events(journal.read()[1])
    rooted = {
        (node.namespace, chain)
        for node in cache.tree.live_nodes()
        if node.in_place and node.length == PAGE and (chain := _chain(node)) is not None
    }
    known = blocks_after(events)
    told = {(event["extra_keys"][0][0], _told_chain(event, known)) for event in known.values()}
    assert {chain for _, chain in told if chain is not None} >= {chain for _, chain in rooted}
    assert len({name for name, _ in told}) <= 2


def _chain(node):
    tokens = node.key
    while node.parent is not None and node.parent.pages:
        node = node.parent
        tokens = node.key + tokens
    return tokens if node.start == 0 else None


def _told_chain(event, known):
    tokens = np.array(event["token_ids"], np.int32).tobytes()
    while event["parent_block_hash"] is not None:
        if event["parent_block_hash"] not in known:
            return None
        event = known[event["parent_block_hash"]]
        tokens = np.array(event["token_ids"], np.int32).tobytes() + tokens
    return tokens


def test_equal_prompts_of_two_namespaces_have_other_blocks():
    cache, journal, blocks = PageCache(12, PAGE), Journal(1000), Blocks(PAGE, VOCABULARY)
    cache.watch(journal)
    store(cache, words(0), "docs")
    store(cache, words(0), "other")
    events = list(blocks.events(journal.read()[1]))
    assert len({event["block_hashes"][0] for event in events}) == len(events) == 8
    assert blocks.clear() == {"type": "AllBlocksCleared"}


@contextlib.contextmanager
def publishing(cache, **config):
    events = KvEvents(
        KvEventsConfig("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", **config),
        page_size=PAGE,
        vocab_size=VOCABULARY,
        num_pages=16,
        rank=3,
    )
    cache.watch(events)
    try:
        yield events
    finally:
        events.stop()


def test_subscribers_get_numbered_batches_and_replays():
    zmq = pytest.importorskip("zmq", reason="KV events need pyzmq, of the extra ray")
    cache = PageCache(16, PAGE)
    with publishing(cache, buffer_steps=2) as events, zmq.Context() as context:
        stream, replay = context.socket(zmq.SUB), context.socket(zmq.REQ)
        stream.setsockopt(zmq.SUBSCRIBE, b"kv-events")
        stream.setsockopt(zmq.RCVTIMEO, 10_000)
        stream.connect(events.endpoint)
        monitor = stream.get_monitor_socket()
        monitor.setsockopt(zmq.RCVTIMEO, 10_000)
        events.start()
        while monitor.poll(10_000) and b"" != None:
            frames = monitor.recv_multipart()
            if int.from_bytes(frames[0][:2], "little") == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                break
        stream.disable_monitor()
        numbers, told = [], []
        for seed in range(3):
            seen = events.num_published
            store(cache, words(seed, 32))
            wait_for(lambda seen=seen: events.num_published > seen, 10)
        while len(told) < 6:
            topic, number, batch = stream.recv_multipart()
            stamp, some, rank = msgpack.unpackb(batch)
            assert (topic, rank, stamp > 1e9) == (b"kv-events", 3, True)
            numbers.append(int.from_bytes(number, "big"))
            told += [event for event in some if event["type"] == "BlockStored"]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert [event["parent_block_hash"] is None for event in told] == [True, False] * 3
        assert told[1]["token_ids"] == words(0, 32)[16:].tolist()
        replay.connect(events.replay_endpoint)
        replay.send((0).to_bytes(8, "big"))
        frames = replay.recv_multipart()
        assert int.from_bytes(frames[0], "big") == numbers[-1] - 1  # two are kept
        stream.close(linger=0)
        replay.close(linger=0)
    assert END == b"\xff" * 8


def test_endpoints_that_cannot_be_had_are_refused():
    pytest.importorskip("zmq", reason="KV events need pyzmq, of the extra ray")
    about = {"page_size": PAGE, "vocab_size": VOCABULARY, "num_pages": 16}
    with pytest.raises(InvalidRequestError, match="endpoint='tcp://nowhere:1' cannot be bound"):
        KvEvents(KvEventsConfig("tcp://nowhere:1"), **about)
    with pytest.raises(InvalidRequestError, match="endpoint='nowhere' must be an endpoint of ZMQ"):
        KvEventsConfig("nowhere")
    with pytest.raises(InvalidRequestError, match="hwm=0"):
        KvEventsConfig(hwm=0)


def test_each_rank_has_ports_of_its_own():
    config = KvEventsConfig("tcp://*:5557", "tcp://*:6000").of_rank(2)
    assert (config.endpoint, config.replay_endpoint) == ("tcp://*:5559", "tcp://*:6002")
    assert KvEventsConfig("tcp://*:0").of_rank(2).endpoint == "tcp://*:0"


# A replica --------------------------------------------------------------------------------------------------


@functools.cache
def engine():
    return make_engine()


def completion(prompt="hello", path="/v1/completions", headers=(), method="POST", **fields) -> Forwarded:
    body = json.dumps({"prompt": prompt, "max_tokens": 4} | fields).encode() if method == "POST" else b""
    headers = [(b"content-type", b"application/json"), *headers]
    return Forwarded(method, path, b"", list(headers), body)


def with_replica(scenario, script):
    loop = ScriptedLoop(script)
    worker = Worker(engine(), loop)
    app = create_app(worker, model="tiny")

    async def run():
        async with Replica(app, worker, SKETCH, limits=Limits(client_timeout=5)) as replica:
            await scenario(replica, loop)

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_replica_answers_in_this_process():
    async def scenario(replica, loop):
        messages = [message async for message in replica.answer(completion())]
        assert messages[0]["status"] == 200
        answer = json.loads(b"".join(message["body"] for message in messages[1:]))
        assert answer["choices"][0]["text"] == "Hello"
        wrong = [message async for message in replica.answer(completion(max_tokens="many"))]
        assert wrong[0]["status"] == 400
        assert replica.is_live()

    with_replica(scenario, lambda prompt: HELLO_EVENTS)


def test_a_request_that_nobody_reads_any_more_is_cancelled():
    async def scenario(replica, loop):
        messages = replica.answer(completion(stream=True))
        assert (await anext(messages))["status"] == 200
        await anext(messages)
        await messages.aclose()
        assert loop.tickets[0].cancelled

    with_replica(scenario, lambda prompt: [Event("...", (1,)), None])


def test_a_replica_tells_of_its_store_again_where_its_feed_lost_something():
    async def scenario(replica, loop):
        cache = engine().cache
        told = await replica.tell(Position())
        assert told.load == Load(0.0, 0)
        before = held(told.updates)
        replica.feed._most = 0
        page = cache.allocate(1)
        cache.commit(page, words(5, 64), "docs", exact_tokens=64)
        assert replica.feed.is_lost
        replica.feed._most = 1000
        after = held((await replica.tell(Position())).updates)
        assert set(SKETCH.samples(words(5, 64), "docs").tolist()) == after[SKETCH.tag("docs")]
        cache.withdraw(page)
        cache.release(page)
        assert held((await replica.tell(Position())).updates) == before

    with_replica(scenario, lambda prompt: HELLO_EVENTS)


# The front --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Actors:
    """A backend whose replicas act: each answers with its name, in several parts."""

    names: list[str] = dataclasses.field(default_factory=lambda: ["a", "b"])
    dies_after: dict[str, int] = dataclasses.field(default_factory=dict)  # parts
    told: dict[str, Told] = dataclasses.field(default_factory=dict)
    media_type: bytes = b"text/event-stream"
    sent: list[tuple[str, Forwarded]] = dataclasses.field(default_factory=list)
    closed: int = 0
    hangs: bool = False

    async def start(self):
        pass

    def replicas(self):
        return list(self.names)

    async def send(self, replica, request):
        self.sent.append((replica, request))
        actual = replica if replica in self.names else self.names[0]
        parts = [
            actual,
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", self.media_type)]},
            *({"type": "http.response.body", "body": b"data: part\n\n", "more_body": True} for _ in range(3)),
            {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False},
        ]
        try:
            for number, part in enumerate(parts):
                if number >= self.dies_after.get(actual, 99):
                    raise ReplicaLostError(f"replica {actual} was lost")
                yield part
                if self.hangs and number == 2:
                    await asyncio.Event().wait()
        finally:
            self.closed += 1

    async def tell(self, replica, position):
        return self.told[replica]


@functools.cache
def preview() -> Preview:
    return Preview(open_checkpoint("smollm2-135m-instruct").tokenizer, engine().model, SKETCH, "auto")


def front(backend, *, policy=None, access=None, **options) -> Front:
    made = Front(Router(policy or RoundRobin()), preview(), backend, access=access, **options)
    for name in backend.replicas():
        made.router.join(name)
    return made


async def call(app, request: Forwarded, leaves=None):
    """Status, headers and body of a response."""
    received, started = [{"type": "http.request", "body": request.body, "more_body": False}], asyncio.Event()
    sent = []

    async def receive():
        if received:
            return received.pop()
        await (started if leaves else asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        if message.get("body"):
            started.set()

    await asyncio.wait_for(app(request.scope(), receive, send), 20)
    status = sent[0]["status"] if sent else None
    return status, dict(sent[0]["headers"]) if sent else {}, b"".join(each.get("body", b"") for each in sent)


def test_responses_pass_through_and_name_their_replica():
    backend = Actors()
    app = front(backend, dropped=[b"x-other"])
    for name in "ab":
        status, headers, body = asyncio.run(call(app, completion(headers=[(b"x-mine", b"1"), (b"host", b"h")])))
        assert (status, headers[b"x-sparsex-replica"]) == (200, name.encode())
        assert body == b"data: part\n\n" * 3 + b"data: [DONE]\n\n"
    sent = dict(backend.sent[0][1].headers)
    assert (sent[b"x-mine"], b"host" in sent, backend.closed) == (b"1", False, 2)
    assert sent[b"content-length"] == str(len(backend.sent[0][1].body)).encode()
    assert all(state["open"] == 0 for state in app.router.states().values())


def test_prompts_go_to_the_replica_that_holds_them_in_their_namespace():
    text = "The keeper writes the code of the dome on a slate behind the stove every evening at nine. " * 3
    document = engine().tokenizer(text)["input_ids"]
    backend = Actors(names=["a", "b", "c"])
    app = front(backend, policy=SegmentPolicy())
    namespace = Access.open(Limits()).tenant(None).store_namespace("ours")
    tag, samples = SKETCH.tag(namespace), SKETCH.samples(np.array(document, np.int32), namespace)
    app.router.apply("c", Update(1, 0, True, {tag: np.unique(samples)}, {}))
    chat = [{"role": "user", "content": f"Behind other words: {text} And a question?"}]
    asks = {
        "/v1/completions": {"prompt": f"Well. {text}"},
        "/v1/chat/completions": {"messages": chat},
        "/v1/messages": {"messages": chat, "max_tokens": 4},
        "/v1/responses": {"input": chat, "max_output_tokens": 4},
    }
    for path, fields in asks.items():
        body = json.dumps(fields | {"cache_salt": "ours"}).encode()
        ask = app._preview.read(path, body, Access.open(Limits()).tenant(None)).ask
        ticket = app.router.route(ask)
        assert (ticket.replica, ticket.hit_tokens > 0.7 * len(document)) == ("c", True), path
        app.router.done(ticket, failed=True)
    other = app._preview.read(
        "/v1/completions", json.dumps({"prompt": text}).encode(), Access.open(Limits()).tenant(None)
    )
    assert app.router.route(other.ask).hit_tokens == 0


def test_a_replica_without_the_texts_is_told_who_has_them():
    """Where load sends a prompt elsewhere, and the holder gives blocks to others."""
    text = "The keeper writes the code of the dome on a slate behind the stove every evening at nine. " * 20
    document = np.array(engine().tokenizer(text)["input_ids"], np.int32)
    tenant = Access.open(Limits()).tenant(None)
    namespace = tenant.store_namespace("ours")
    moved = PeerStats(PeerCounts(blocks=3, nbytes=7), ServedCounts(refused=1))
    backend = Actors(told={name: Told([], Load(), f"http://{name}", moved) for name in "ab"})
    app = front(backend)  # round robin
    samples = np.unique(SKETCH.samples(document, namespace))
    app.router.apply("b", Update(1, 0, True, {SKETCH.tag(namespace): samples}, {}))

    async def scenario():
        app.follower.look()
        await app.follower.settled()
        for salt in ("ours", "ours", "others"):
            reuse = {"method": "naive"}
            await call(app, completion(text, cache_salt=salt, reuse=reuse))
        backend.names = ["a"]
        app.follower.look()
        assert app.follower.addresses == {"a": "http://a"}
        [state] = json.loads((await call(app, completion(path="/v1/replicas", method="GET")))[2])["data"]
        assert (state["id"], state["fetched"]) == ("a", {"asked": 0, "blocks": 3, "nbytes": 7, "failed": 0})
        assert state["served"] == {"lookups": 0, "blocks": 0, "nbytes": 0, "refused": 1}
        await app.follower.settled()

    asyncio.run(scenario())
    [to_a, to_b, of_others] = [request for _, request in backend.sent]
    assert to_a.held_at == "http://b"
    assert to_a.prompt.tokens.tolist() == document.tolist()
    assert (to_a.prompt.namespace, to_a.prompt.reuse) == (namespace, {"method": "naive"})
    assert to_b.held_at is to_b.prompt is of_others.held_at is of_others.prompt is None


def test_members_of_a_round_and_moves_of_a_pin_stay_together():
    tenant = Access.open(Limits()).tenant(None)
    fields = {"prompt": "hello"}
    for more, group in (
        ({"round": {"id": "r", "size": 2}}, b"round:r"),
        ({"prompt_cache_key": "k", "prompt_cache_options": {"ttl": "5m"}}, b"pin:k"),
        ({"prompt_cache_key": "k"}, None),
    ):
        assert preview().read("/v1/completions", json.dumps(fields | more).encode(), tenant).ask.group == group


def test_a_wrong_request_gets_its_error_from_a_replica():
    backend = Actors()
    status, _, _ = asyncio.run(call(front(backend), Forwarded("POST", "/v1/completions", b"", [], b"{not json")))
    assert (status, len(backend.sent)) == (200, 1)  # these replicas take anything


@pytest.mark.parametrize(("dies_after", "media_type"), [(0, b"text/event-stream"), (1, b"application/json")])
def test_a_replica_that_dies_before_its_response_gives_an_error(dies_after, media_type):
    backend = Actors(dies_after={"a": dies_after}, media_type=media_type)
    app = front(backend)
    status, headers, body = asyncio.run(call(app, completion()))
    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert json.loads(body)["error"]["code"] == "replica_lost"
    assert asyncio.run(call(app, completion()))[0] == 200  # by the other
    assert all(state["open"] == 0 for state in app.router.states().values())


def test_a_replica_that_dies_in_a_stream_gives_an_event():
    app = front(Actors(dies_after={"a": 4}))
    status, _, body = asyncio.run(call(app, completion(stream=True)))
    *parts, last = body.decode().strip().split("\n\n")
    assert (status, parts) == (200, ["data: part"] * 2)
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
    message = completion(path="/v1/messages", messages=[{"role": "user", "content": "hello"}])
    app = front(Actors(dies_after={"a": 4}))
    assert b'event: error\ndata: {"type": "error"' in asyncio.run(call(app, message))[2]


def test_a_replica_that_dies_in_a_whole_response_ends_the_connection():
    with pytest.raises(ConnectionError, match="was lost"):
        asyncio.run(call(front(Actors(dies_after={"a": 4}, media_type=b"application/json")), completion()))


def test_a_client_that_leaves_is_not_answered_any_more():
    backend = Actors(hangs=True)
    app = front(backend)
    status, _, body = asyncio.run(call(app, completion(), leaves=True))
    assert (status, body, backend.closed) == (200, b"data: part\n\n", 1)
    assert all(state["open"] == 0 for state in app.router.states().values())


def test_a_request_counts_where_it_was_answered():
    backend = Actors(names=["a", "b"])
    app = front(backend)
    backend.names.remove("a")
    status, headers, _ = asyncio.run(call(app, completion()))
    assert (status, headers[b"x-sparsex-replica"], backend.sent[0][0]) == (200, b"b", "a")


def test_without_replicas_clients_are_told_to_come_later():
    app = front(Actors(names=[]))
    assert asyncio.run(call(app, completion()))[0] == 503
    assert asyncio.run(call(app, completion(path="/health", method="GET")))[0] == 503
    assert asyncio.run(call(front(Actors()), completion(path="/health", method="GET")))[0] == 200


@pytest.mark.parametrize("path", ["/v1/knowledge", "/v1/pins/key", "/v1/load_lora_adapter", "/v1/store", "/metrics"])
def test_what_one_replica_keeps_is_refused(path):
    backend = Actors()
    status, _, body = asyncio.run(call(front(backend), completion(path=path)))
    assert (status, json.loads(body)["error"]["code"], backend.sent) == (501, "fleet", [])


def test_keys_are_checked_before_anything_else(tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text('[alice]\nkey = "sk-a"\n[root]\nkey = "sk-r"\nmetrics = true\n')
    backend = Actors()
    app = front(backend, access=Access.load(keys, Limits()))
    named = functools.partial(completion, path="/v1/replicas", method="GET")
    for key, path_status, replicas_status in ((b"sk-a", 200, 403), (b"sk-r", 200, 200), (b"sk-x", 401, 401)):
        headers = [(b"authorization", b"Bearer " + key)]
        assert asyncio.run(call(app, completion(headers=headers)))[0] == path_status
        assert asyncio.run(call(app, named(headers=headers)))[0] == replicas_status
    assert len(backend.sent) == 2
    assert asyncio.run(call(app, completion(path="/version", method="GET")))[0] == 200


def test_a_body_that_is_too_large_is_refused_here():
    app = front(Actors(), limits=Limits(max_body_bytes=100))
    assert asyncio.run(call(app, completion("x" * 200)))[0] == 413


def test_the_follower_brings_news_and_takes_away_who_left():
    async def scenario():
        holdings = Update(9, 0, True, {SKETCH.tag("docs"): np.array([1, 2], np.uint32)}, {})
        backend = Actors(told={"a": Told([holdings.to_bytes()], Load(70.0, 2))})  # b gives an error
        app = front(backend)
        app.follower.look()
        await app.follower.settled()
        states = app.router.states()
        assert {name: states["a"][name] for name in ("samples", "queued_tokens", "running")} == {
            "samples": 2,
            "queued_tokens": 70.0,
            "running": 2,
        }
        assert states["b"]["samples"] == 0
        assert app.router.position("a") == Position(9, 0)
        backend.names = ["b", "c"]
        app.follower.look()
        await app.follower.settled()
        assert app.router.replicas == ["b", "c"]

    asyncio.run(scenario())


def test_the_front_lives_as_long_as_its_server():
    async def scenario():
        backend, messages = Actors(), [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
        app, sent = Front(Router(RoundRobin()), preview(), backend, period_s=0.01), []

        async def receive():
            while len(messages) == 1 and not app.router.replicas:
                await asyncio.sleep(0.01)
            return messages.pop(0)

        async def send(message):
            sent.append(message["type"])

        await app({"type": "lifespan"}, receive, send)
        assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert app.router.replicas == ["a", "b"]

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_observers_hear_the_same():
    cache, journals = PageCache(16, PAGE), [Journal(100), Journal(100)]
    cache.watch(Observers(*journals))
    store(cache, words(0))
    cache.clear()
    assert len(journals[0].read()[1]) == len(journals[1].read()[1]) == 8
