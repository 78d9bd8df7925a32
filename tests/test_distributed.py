"""Groups of processes: how they find each other, that a follower does what its leader does, and how groups end.

The groups here are of one process: each member has a runner and a thread of its own, and talks over real sockets. So
nothing is compiled for them, and what the store of each holds can be compared. `test_processes.py` has real ones.
"""

import contextlib
import dataclasses
import random
import socket
import threading
import time
import types

import httpx
import numpy as np
import pytest
from conftest import CONFIG, idle, run, tiny_engine, tiny_params
from hypothesis import given, settings
from hypothesis import strategies as st
from live import ScriptedLoop, live_server, make_engine, wait_for

from sparsex_jax import Engine, GroupError, InvalidRequestError, ReuseConfig, SamplingParams, Structure
from sparsex_jax.cache import Segment
from sparsex_jax.config.membership import Membership, Patience, first_node, secret_of
from sparsex_jax.device.runner import Runner, relayed_methods
from sparsex_jax.distributed import join, joining, kinds
from sparsex_jax.distributed.channel import open_channel
from sparsex_jax.distributed.codec import Reference, pack, unpack
from sparsex_jax.distributed.follower import Follower
from sparsex_jax.distributed.leader import Leader
from sparsex_jax.engine import _check_processes
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase
from sparsex_jax.scheduler import policy

SECRET = b"only for this test"
# A busy machine may leave a process without a turn for seconds, so that only tests of silence take it for an end soon.
SOON = Patience(join=30, silence=30, stall=60, farewell=0.5)
HASTY = dataclasses.replace(SOON, silence=1)
GREEDY = SamplingParams(max_new_tokens=6)
SPARSE = ReuseConfig(boundary_layer=1, recompute_ratio=0.2, only_if_faster=False)


def free_port():
    """A free port of this machine whose next one is free too."""
    while True:
        port = random.randrange(20000, 60000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port + 1)):
            return port


def member(process_id, port, size=2, patience=SOON):
    return Membership(f"127.0.0.1:{port}", size, process_id, patience)


class Group:
    """A leader and a follower. Each notes why the group ended."""

    def __init__(self, follower_engine):
        port, self.ends, self.engine = free_port(), [], follower_engine
        self.thread = threading.Thread(target=self._follow, args=(port,), daemon=True)
        self.thread.start()
        peers = joining.gather(member(0, port), SECRET, {})
        self.leader = Leader(peers, SOON, lambda error: self.ends.append(("leader", str(error))))

    def _follow(self, port):
        peer = joining.come(member(1, port), SECRET, {})
        self.follower = Follower(peer, self._follower_ends)
        with contextlib.suppress(GroupError):
            self.follower.follow(self.engine.runner)
        self.follower.close()

    def _follower_ends(self, error):
        self.ends.append(("follower", str(error)))
        self.follower._inbox.put((kinds.BYE, ""))  # a process would end here

    def lose_follower(self):
        self.follower._leader._channel.close()


@contextlib.contextmanager
def group_of(leading: Engine, following: Engine):
    group = Group(following)
    try:
        group.leader.lead(leading.runner)
        yield group
    finally:
        group.leader.close()
        group.thread.join(10)


@pytest.fixture
def pair():
    """Two engines of the same shapes; the second one's runner does what the first one's does."""
    leading, following = tiny_engine(), tiny_engine()
    with group_of(leading, following) as group:
        yield leading, following, group


# What travels -----------------------------------------------------------------------------------------------

numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)
arrays = st.lists(numbers.filter(lambda n: isinstance(n, float)) | st.integers(-99, 99), max_size=5).map(np.array)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=5) | st.binary(max_size=5) | arrays
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip


def equal(one, other):
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@given(values)
def test_values_arrive_as_they_were_sent(value):
    assert equal(unpack(pack(value)), value)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_message_are_an_error_and_nothing_else(data):
    with contextlib.suppress(ValueError, KeyError, TypeError):  # which a channel expects
        unpack(data)


def test_plans_arrive_whole():
    segment = Segment(1, 2, 5, np.arange(2), exact=True)
    prompt = PromptMap(np.arange(4, dtype=np.int32), np.array([0, 1, 1, 2], np.uint8), (segment,))
    plan = RequestPlan(prompt, (Phase(0, prompt.fresh), Phase(2, prompt.fresh, "key_mass", 3)), [4, 7])
    came = unpack(pack(plan))
    assert equal(came.prompt.tokens, prompt.tokens)
    assert (came.kind, list(came.pages), came.prompt.segments[0].shift) == (plan.kind, [4, 7], segment.shift)


def test_what_nobody_is_to_make_does_not_travel():
    with pytest.raises(TypeError, match="Thread does not travel"):
        pack([threading.current_thread()])
    with pytest.raises(ValueError, match="extension of code 4, which is unknown here"):
        unpack(pack([...], lambda _: Reference(3, 0)))


# Who belongs to a group -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("here", 2, 0), "coordinator='here' must be HOST:PORT"),
        (("here:65535", 2, 0), "with a port from 1 to 65534"),
        (("here:80", 0, 0), "num_processes=0 must be at least 1"),
        (("here:80", 2, 2), "process_id=2 must be from 0 to 1"),
        (("here:80", None, 0), "num_processes must be given with coordinator='here:80'"),
        ((None, 2, None), "num_processes: coordinator must be given too"),
        (("slurm", None, None), "coordinator='slurm' needs SLURM_JOB_ID, .*, which srun sets"),
    ],
)
def test_memberships_that_are_none(fields, says):
    with pytest.raises(InvalidRequestError, match=says):
        Membership.of(*fields)


def test_memberships():
    assert Membership.of(None, None, None) is None
    assert Membership("[::1]:99", 2, 1).control == ("::1", 100)
    task = {"SLURM_JOB_ID": "8003", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_NTASKS": "3", "SLURM_PROCID": "2"}
    assert Membership.of_slurm(task) == Membership("gpu07:49158", 3, 2)
    assert Membership.of_slurm(task | {"JAX_COORDINATOR_PORT": "7"}).coordinator == "gpu07:7"
    assert [first_node(nodes) for nodes in ("a", "a,b", "a1,b[2-3]", "a[001,4]", "a[5-6],b")] == [
        "a", "a", "a1", "a001", "a5",
    ]  # fmt: skip


def test_a_secret_is_long():
    with pytest.raises(InvalidRequestError, match=r"SPARSEX_GROUP_SECRET must be set to the same 16 or more .* has 5"):
        secret_of({"SPARSEX_GROUP_SECRET": "short"})
    with pytest.raises(InvalidRequestError, match="silence=0 must be a number of seconds above 0"):
        Patience(silence=0)


def gathering(port, about=None, size=2, patience=SOON):
    """A leader that waits for followers on a thread, and what comes of it."""
    results = []

    def gather():
        try:
            results.append(joining.gather(member(0, port, size, patience), SECRET, about or {}))
        except GroupError as error:
            results.append(error)

    thread = threading.Thread(target=gather, daemon=True)
    thread.start()
    return thread, results


def test_a_follower_may_come_first_and_waits():
    port, came = free_port(), []
    early = threading.Thread(target=lambda: came.append(joining.come(member(1, port), SECRET, {})), daemon=True)
    early.start()
    time.sleep(0.1)
    thread, [*_] = gathering(port)
    early.join(10)
    thread.join(10)
    assert came[0].number == 0


def test_another_secret_is_refused_and_the_group_waits_on():
    port = free_port()
    thread, results = gathering(port)
    with pytest.raises(GroupError, match="its group secret is another one"):
        joining.come(member(1, port), b"another secret of a group", {})
    joining.come(member(1, port), SECRET, {})
    thread.join(10)
    assert [peer.number for peer in results[0]] == [1]


def test_a_leader_with_another_secret_is_no_leader():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    server.sendall(bytes(64))  # a nonce, and what is no proof
    with pytest.raises(GroupError, match="the leader does not know the group secret"):
        open_channel(client, SECRET, leads=False)
    server.close()


def test_what_differs_is_named_in_all_processes():
    port = free_port()
    thread, results = gathering(port, {"jax": "1.0", "dtype": "float32"})
    says = r"dtype is auto in process 1 \(.*\) and float32 in process 0; it must be the same in all"
    with pytest.raises(GroupError, match=says):
        joining.come(member(1, port), SECRET, {"jax": "1.0", "dtype": "auto"})
    thread.join(10)
    assert "dtype is auto in process 1" in str(results[0])


def test_two_of_one_number_are_refused():
    port = free_port()
    thread, results = gathering(port, size=3)
    channel = open_channel(joining._connected(member(1, port, 3)), SECRET, leads=False)
    channel.send(1, "there", {})
    with pytest.raises(GroupError, match="process_id=1 is that of two processes"):
        joining.come(member(1, port, 3), SECRET, {})
    assert "process_id=1 is that of two processes" in channel.receive(5)[0]
    thread.join(10)
    assert "on there and on" in str(results[0])


def test_who_ends_while_others_are_waited_for_may_come_again(caplog):
    port = free_port()
    thread, results = gathering(port, size=3)
    silent = open_channel(joining._connected(member(1, port, 3)), SECRET, leads=False)
    silent.close()  # before it said its number
    first = open_channel(joining._connected(member(1, port, 3)), SECRET, leads=False)
    first.send(1, "there", {})
    first.close()
    again = open_channel(joining._connected(member(1, port, 3)), SECRET, leads=False)
    again.send(1, "here", {})
    joining.come(member(2, port, 3), SECRET, {})
    thread.join(10)
    assert str(results[0][0]) == "process 1 (here)"
    assert "before it said which one it is" in caplog.text


def test_groups_of_different_sizes_are_refused(monkeypatch):
    monkeypatch.setattr("sparsex_jax.distributed.tell_jax", lambda _: pytest.fail("JAX was told"))
    port, ends = free_port(), []

    def lead():
        with pytest.raises(GroupError) as refused:
            join(member(0, port), SECRET, {})
        ends.append(str(refused.value))

    leading = threading.Thread(target=lead, daemon=True)
    leading.start()
    with pytest.raises(GroupError, match=r"num_processes is 3 in process 1 \(.*\) and 2 in process 0"):
        join(member(1, port, 3), SECRET, {})
    leading.join(10)
    assert "num_processes is 3 in process 1" in ends[0]


def test_who_does_not_come_is_named():
    hasty = dataclasses.replace(SOON, join=0.3)
    with pytest.raises(GroupError, match="process 1, 2 did not come in time"):
        joining.gather(member(0, free_port(), 3, hasty), SECRET, {})
    with pytest.raises(GroupError, match=r"process 0 was not reached at 127.0.0.1, port \d+, within join=0.3 s"):
        joining.come(member(1, free_port(), 3, hasty), SECRET, {})


def test_a_port_in_use_is_named():
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port + 1)),
        pytest.raises(
            GroupError, match=f"coordinator='127.0.0.1:{port}': the group's channel, port {port + 1}, cannot"
        ),
    ):
        joining.gather(member(0, port), SECRET, {})


def test_engines_that_differ_are_refused_by_the_field():
    leading, following = tiny_engine(), tiny_engine(max_num_seqs=2)
    group = Group(following)
    with pytest.raises(GroupError, match=r"max_num_seqs is 2 in process 1 .* and 4 in process 0"):
        group.leader.lead(leading.runner)
    group.leader.close()


def test_weights_that_differ_are_refused():
    params = tiny_params()
    other = params.replace(final_norm=2 * params.final_norm)
    group = Group(tiny_engine(other))
    with pytest.raises(GroupError, match=r"weights is [0-9a-f]{16} in process 1"):
        group.leader.lead(tiny_engine().runner)
    group.leader.close()


# What a follower does ---------------------------------------------------------------------------------------


def same_calls(group):
    """Wait until the follower has made all calls."""
    last = next(group.leader._numbers) - 1
    wait_for(lambda: group.follower._outcomes[0] == last)


def same_stores(leading, following, group):
    """Wait until the follower has made all calls, and compare what they left."""
    same_calls(group)
    np.testing.assert_array_equal(leading.runner.store, following.runner.store)
    assert np.any(np.asarray(leading.runner.store))


def test_a_follower_has_the_leaders_store_bit_for_bit(pair):
    leading, following, group = pair
    documents = np.random.default_rng(0).integers(1, 97, (2, 50)).tolist()
    prompt = [1, 2, *documents[1], 3, *documents[0], 5]

    def answers(engine):
        for document in documents:
            engine.remember(document)
        for temperature in (0.0, 0.8):
            sampling = dataclasses.replace(GREEDY, temperature=temperature, seed=3)
            yield engine.generate(prompt, sampling, reuse=SPARSE, keep=False).token_ids
        yield engine.prefill(prompt, reuse=SPARSE, keep=False).logits.tolist()

    alone = list(answers(tiny_engine()))  # first, so that the others need not compile at the same time
    assert list(answers(leading)) == alone
    same_stores(leading, following, group)
    assert idle(leading)
    assert len(group.follower._kept) == len(group.leader._kept) + len(group.leader._dropped) <= 4


def serve_anything(seed):
    """Requests of all lengths on few pages, so that sequences are preempted; some are cancelled."""
    rng = np.random.default_rng(seed)
    few = {"store_tokens": 16 * 16}
    leading, following = tiny_engine(**few), tiny_engine(**few)
    with group_of(leading, following) as group:
        tickets, seen = [], []
        for _ in range(int(rng.integers(3, 7))):
            prompt = rng.integers(1, 97, rng.integers(1, 90)).tolist()
            sampling = SamplingParams(max_new_tokens=int(rng.integers(1, 60)), temperature=float(rng.choice([0, 1])))
            tickets.append(leading.loop.submit(prompt, sampling, reuse=SPARSE, listener=seen.append))
            for _ in range(int(rng.integers(0, 4))):
                leading.loop.step()
            if rng.random() < 0.3:
                tickets[int(rng.integers(len(tickets)))].cancel()
        run(leading.loop)
        same_stores(leading, following, group)
        assert sum(event.finish_reason is not None for event in seen) == len(tickets)
        assert not group.ends
    assert idle(leading)


def test_requests_that_come_and_go_leave_the_same_stores():
    serve_anything(seed=4)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_any_requests_leave_the_same_stores(seed):
    serve_anything(seed)


def test_what_is_sent_before_tokens_are_seen_is_sent_to_all(pair, monkeypatch):
    """Dispatches ahead, prefills behind them, and dispatches behind prefills."""
    for name in ("ROUND_SECONDS", "LONG_SECONDS"):
        monkeypatch.setattr(policy, name, 0.0)
    leading, following, group = pair
    prompts = np.random.default_rng(1).integers(1, 97, (3, 40)).tolist()

    def answers(engine):
        heard = []
        for prompt in prompts:  # each comes while those before it decode
            heard.append([])
            engine.loop.submit(prompt, GREEDY, listener=heard[-1].append)
            engine.loop.step()
        run(engine.loop)
        return [[token for event in one for token in event.token_ids] for one in heard]

    alone = answers(tiny_engine())
    assert answers(leading) == alone
    same_stores(leading, following, group)
    assert idle(leading)


def test_structured_answers_are_decoded_by_all():
    leading, following = make_engine(), make_engine()
    sampling = SamplingParams(max_new_tokens=8, structure=Structure("choice", ("yes", "maybe so")))
    alone = leading.generate("Is it?", sampling, keep=False).text
    with group_of(leading, following) as group:
        assert leading.generate("Is it?", sampling, keep=False).text == alone
        same_calls(group)
        assert not group.ends


def test_calls_that_dispatch_are_relayed():
    """Who adds one to the runner has to think of it."""
    assert relayed_methods() == {
        "begin", "advance", "begin_probe", "advance_probe", "prefill", "copy", "pack", "first_tokens", "score",
        "logits_of", "are_finite", "finite_slots", "start_decode", "start_forward", "choose", "place_adapter",
        "recover", "set_shapes", "with_pages", "place",
    }  # fmt: skip


def test_tiers_need_all_devices_in_one_process():
    spread = types.SimpleNamespace(is_multi_process=True)
    with pytest.raises(InvalidRequestError, match="host_store_bytes=1048576 must be 0 where several processes"):
        _check_processes(dataclasses.replace(CONFIG, host_store_bytes=1 << 20), spread)


# How groups end ---------------------------------------------------------------------------------------------


def test_a_group_ends_in_peace(pair):
    _, _, group = pair
    group.leader.close()
    group.thread.join(10)
    assert not group.thread.is_alive()
    assert not group.ends


def test_a_follower_that_ends_is_named(pair):
    leading, _, group = pair
    leading.generate([1, 2, 3], GREEDY)
    group.lose_follower()
    wait_for(lambda: group.leader.failure is not None)
    with pytest.raises(GroupError, match=r"process 1 \(.*\) has ended; without it the others cannot go on"):
        leading.generate([1, 2, 3], GREEDY)
    wait_for(lambda: "leader" in {who for who, _ in group.ends})


def test_a_leader_that_ends_is_told_from_one_that_says_so(pair):
    _, _, group = pair
    group.leader._peers[0]._channel.close()
    wait_for(lambda: any(who == "follower" for who, _ in group.ends))
    assert (
        "follower",
        "process 0 (127.0.0.1) has ended; it leads the group, which cannot go on without it",
    ) in group.ends


def test_who_gives_no_sign_of_life_is_named():
    port, hasty = free_port(), dataclasses.replace(SOON, silence=0.3)
    thread, results = gathering(port, patience=hasty)
    mute = joining.come(member(1, port), SECRET, {})  # it is never started
    thread.join(10)
    leader = Leader(results[0], hasty, lambda _: None)
    wait_for(lambda: leader.failure is not None)
    assert "has given no sign of life for 0.3 s" in str(leader.failure)
    mute.close()


def test_who_hangs_in_a_call_is_named(pair):
    leading, following, group = pair
    leading.generate([1, 2, 3], GREEDY)  # nothing is compiled from now on, which takes longer than the patience lasts
    group.leader._patience = dataclasses.replace(SOON, stall=0.2)

    def hang(*_):
        for _ in range(100):  # until it is noticed
            if group.leader.failure is None:
                time.sleep(0.3)
                group.follower._leader._wake.set()  # the next sign of life comes now

    following.runner.start_decode = hang
    leading.generate([1, 2, 3], GREEDY)
    wait_for(lambda: group.leader.failure is not None)
    assert "hangs: call" in str(group.leader.failure)


def broken(*_, **__):
    raise RuntimeError("no memory")


def test_a_follower_that_fails_alone_ends_the_group(pair):
    leading, following, group = pair
    group.leader._patience = HASTY
    following.runner.start_decode = broken
    leading.generate([1, 2, 3], GREEDY)  # nothing here waits for the other devices
    wait_for(lambda: group.leader.failure is not None)
    assert "failed alone, in call" in str(group.leader.failure)
    assert "RuntimeError: no memory" in str(group.leader.failure)


def test_a_leader_that_fails_alone_ends_the_group(pair, monkeypatch):
    leading, _, group = pair
    group.leader._patience = HASTY
    own, advance = leading.runner, Runner._advance
    monkeypatch.setattr(
        "sparsex_jax.device.runner.Runner._advance",
        lambda self, *args: broken() if self is own else advance(self, *args),
    )
    with pytest.raises(GroupError, match=r"process 0 has RuntimeError: no memory, and process 1 \(.*\) has not failed"):
        leading.generate([1, 2, 3], GREEDY)
    wait_for(lambda: {who for who, _ in group.ends} == {"leader", "follower"})


def test_where_all_fail_alike_the_request_fails_and_the_group_goes_on(pair):
    leading, following, group = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsex_jax.device.runner.prefill", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            leading.generate([1, 2, 3], GREEDY)
    expected = tiny_engine().generate([1, 2, 3], GREEDY).token_ids
    assert leading.generate([1, 2, 3], GREEDY).token_ids == expected
    same_stores(leading, following, group)
    assert not group.ends


def test_a_follower_that_is_told_to_end_asks_the_leader(pair):
    _, _, group = pair
    asked = threading.Event()
    group.leader.on_leaving = asked.set
    group.follower.ask_to_leave()
    assert asked.wait(5)


def test_clients_hear_which_process_is_lost(tiny):
    """Who waits for an answer already, and who comes until the process ends."""
    lost, answers = GroupError("process 1 (there) has ended"), []
    with live_server(tiny, loop=ScriptedLoop(lambda _: [None])) as live:

        def ask():
            answers.append(httpx.post(f"{live.url}/v1/completions", json={"prompt": [1], "max_tokens": 2}, timeout=30))

        waiting = threading.Thread(target=ask, daemon=True)
        waiting.start()
        wait_for(lambda: live.worker.loop.tickets)
        live.worker.broke(lost)
        waiting.join(10)
        ask()
        assert [each.status_code for each in answers] == [503, 503]
        for each in answers:
            error = each.json()["error"]
            assert (error["code"], error["message"]) == ("process_lost", str(lost))
        assert httpx.get(f"{live.url}/health").json() == {"status": "failed"}
