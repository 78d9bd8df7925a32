"""The simulator of fleets: what it conserves, and where its figures are known without it."""

import dataclasses
import doctest
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import simulate_fleet
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import InvalidRequestError, ReuseConfig
from sparsex_jax.cache import segments as stored_segments
from sparsex_jax.cache.match import Match
from sparsex_jax.config import named_config
from sparsex_jax.eval.fleet import calibration
from sparsex_jax.eval.fleet.figures import figures
from sparsex_jax.eval.fleet.policies import SIMPLE, routed
from sparsex_jax.eval.fleet.replica import Replica, ReplicaConfig
from sparsex_jax.eval.fleet.simulation import FleetConfig, Simulation
from sparsex_jax.eval.fleet.store import Found, Store, TierConfig, chain_of
from sparsex_jax.eval.fleet.timing import METHODS, DecodeTimes, Method, Timing
from sparsex_jax.eval.fleet.traffic import KINDS, Agents, Arrivals, Chat, Prompt, Rag, Segment, Surge, Tenants, Traffic
from sparsex_jax.reuse.cost import ChunkTimes, Speeds, prefill_seconds
from sparsex_jax.reuse.methods import method_of
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap

MODEL = named_config("llama-3.1-8b")
PREFIX, SEGMENTS = METHODS["prefix"], METHODS["sparsex l*=0, 5 %"]
RESULTS = Path(__file__).parents[1] / "scripts" / "results"
FITTED = calibration.fit(RESULTS)
LAYERS = MODEL.num_layers


def timing(method: Method = SEGMENTS) -> Timing:
    """Of the devices that were measured."""
    return FITTED.timing(method)


def token_timing(seconds: float, *, method: Method = PREFIX) -> Timing:
    """A token of a prompt takes so many seconds, whatever else is done. Decode takes nothing."""
    chunk = ChunkTimes((1, 2048), (seconds / LAYERS, 2048 * seconds / LAYERS), (0.0, 0.0))
    speeds = Speeds(chunk, chunk, start=0.0, boundary=0.0, copy=0.0, copied_token=0.0)
    return Timing(MODEL, speeds, DecodeTimes(0.0, 0.0, 0.0), method, budget=8192, token_bytes=1)


def prompt(keys: str, *, tokens: int = 100, number: int = 0, due: float = 0.0, answer: int = 1) -> Prompt:
    """A prompt with a segment for each letter."""
    segments = tuple(Segment(ord(key), tokens) for key in keys)
    return Prompt(number, due, 0, 0, segments, Segment(10**6 + number, answer), tokens * len(keys))


def small_traffic(rate: float, **fields) -> Traffic:
    kinds = Chat(turns=3.0, think=6.0), Rag(documents=20, found=3), Agents(members=3, rounds=2, pause=3.0)
    return Traffic(tuple((kind, rate / 3) for kind in kinds), Tenants(3), **fields)


def run(
    config: FleetConfig, make, traffic: Traffic, *, seconds: float = 10.0, method: Method = SEGMENTS, seed: int = 0
):
    simulation = Simulation(config, timing(method), make)
    return simulation, simulation.run(traffic.prompts(seed, seconds))


# Traffic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_arrivals_are_in_order_as_many_as_asked_and_the_same_for_a_seed(name):
    traffic = Traffic(((KINDS[name], 20.0),), Tenants(4), Arrivals(1.0, burst=4.0, swing=0.5, day=60.0))
    first, again, other = (list(traffic.prompts(seed, 60.0)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert all(a.due <= b.due <= 60 for a, b in itertools.pairwise(first))
    assert [each.number for each in first] == list(range(len(first)))
    assert 0.4 * 20 * 60 < len(first) < 1.2 * 20 * 60  # some sessions have not ended
    assert all(each.tokens == sum(segment.tokens for segment in each.segments) for each in first)


def test_bursts_keep_the_mean_rate_and_raise_it_where_they_are():
    arrivals = Arrivals(100.0, burst=5.0, burst_seconds=10.0)
    times = np.array(list(itertools.takewhile(lambda time: time < 60, arrivals.times(np.random.default_rng(0)))))
    in_burst = times % 10 < 1
    assert len(times) == pytest.approx(6_000, rel=0.05)
    assert in_burst.mean() == pytest.approx(0.5, abs=0.04)


def test_keys_belong_to_one_tenant_and_have_one_length():
    prompts = list(small_traffic(60.0).prompts(0, 20.0))
    lengths, tenants = {}, {}
    for each in prompts:
        for segment in (*each.segments, each.answer):
            assert lengths.setdefault(segment.key, segment.tokens) == segment.tokens
            assert tenants.setdefault(segment.key, each.tenant) == each.tenant
    answers = Counter(each.answer.key for each in prompts)
    assert max(answers.values()) == 1


def test_a_chat_goes_on_with_what_was_said():
    turns = [each for each in Traffic(((Chat(), 5.0),), Tenants(2)).prompts(0, 60.0) if each.session == 0]
    for before, after in itertools.pairwise(turns):
        assert after.segments[: len(before.segments) + 1] == (*before.segments, before.answer)


def test_agents_read_what_all_said_in_orders_of_their_own():
    kind = Agents(members=4, rounds=2)
    prompts = [each for each in Traffic(((kind, 5.0),), Tenants(2)).prompts(0, 60.0) if each.session == 0]
    first, second = prompts[:4], prompts[4:8]
    said = {first[0].segments[2], *(each.answer for each in first)}
    assert all(set(each.segments[2:-1]) == said for each in second)
    assert len({each.segments[2:-1] for each in second}) > 1


def test_a_surge_is_one_tenants_and_ends():
    surge = Surge(Rag(documents=3, found=3), rate=50.0, start=5.0, end=8.0, tenant=1)
    prompts = list(small_traffic(3.0, surge=surge).prompts(0, 20.0))
    surging = [each for each in prompts if 5 <= each.due < 8 and each.tenant == 1]
    assert len(surging) > 100
    assert sum(each.due > 8 for each in prompts) < 100


# A store ------------------------------------------------------------------------------------------------------


def stored(store: Store, keys: str) -> None:
    """Prefill a prompt and let it end."""
    each = prompt(keys)
    chain = chain_of(each.segments)
    pinned = store.pin(chain)
    assert store.reserve(100 * (len(keys) - pinned))
    store.commit(each.segments, chain, pinned)
    store.unpin(chain)


def find(store: Store, keys: str) -> Found:
    each = prompt(keys)
    return store.find(each.segments, chain_of(each.segments))


def test_prefixes_by_hand():
    store = Store(10_000, segments=False)
    stored(store, "sabq")
    assert [find(store, keys).prefix for keys in ("sabx", "sax", "sbax", "xs", "sabq")] == [300, 200, 100, 0, 300]
    assert find(store, "sbax").fresh == 300
    assert store.held == 400


def test_segments_are_found_in_any_order_and_the_last_is_computed():
    store = Store(10_000)
    stored(store, "sabq")
    found = find(store, "sbxaq")
    assert (found.prefix, found.reused, found.fresh, found.borders) == (100, 200, 200, 3)
    assert found.reused_keys == 100 * 150 + 100 * 350
    assert found.fresh_keys == 100 * 250 + 100 * 450


def test_the_ends_of_the_least_recently_used_chain_go_first():
    store = Store(600, segments=False)
    stored(store, "abc")
    stored(store, "def")
    stored(store, "abx")
    assert [find(store, keys).prefix for keys in ("abxy", "abcy", "defy")] == [300, 200, 300]
    stored(store, "ghi")
    assert [find(store, keys).prefix for keys in ("abxy", "abcy", "defy")] == [300, 200, 0]


def test_what_is_pinned_stays_and_nothing_is_evicted_in_vain():
    store = Store(300, segments=False)
    chain = chain_of(prompt("ab").segments)
    stored(store, "ab")
    assert store.pin(chain) == 2
    assert not store.reserve(200)
    assert find(store, "abx").prefix == 200
    store.unpin(chain)
    assert store.reserve(200)


def test_what_is_evicted_is_found_in_a_tier_and_then_in_the_next():
    tiers = (TierConfig(200, 1.0), TierConfig(100, 1.0))
    store = Store(300, tiers, segments=False)
    for keys in ("abc", "def", "ghi"):
        stored(store, keys)
    loaded = [find(store, keys).loaded for keys in ("ghix", "defx", "abcx")]
    assert loaded == [(0, 0), (200, 100), (0, 0)]
    assert store.find(prompt("defx").segments, chain_of(prompt("defx").segments), below=False).prefix == 0


texts = st.text("abcdef", min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, max_size=30), st.booleans())
def test_tokens_held_are_those_of_nodes_and_digests_say_what_is_found(prompts, segments):
    store, told = Store(900, (TierConfig(500, 1.0), TierConfig(300, 1.0)), segments=segments), set()
    for index, keys in enumerate(prompts):
        stored(store, keys)
        assert store.held == store.tokens_of_nodes <= store.capacity
        assert store.pinned == 0
        for tier in store.tiers:
            assert tier.held == sum(segment.tokens for segment in tier.nodes.values()) <= tier.config.tokens
        if index % 3 == 0:
            for key, (_, is_found) in store.take_changes().items():
                assert (key in told) != is_found  # only changes are told
                (told.add if is_found else told.remove)(key)
            assert told == store.keys


# Timing -------------------------------------------------------------------------------------------------------


def planned(tokens: int, share: float, segments: int, reuse: ReuseConfig) -> RequestPlan:
    """The engine's plan of a prompt with reused segments between fresh texts."""
    each = int(tokens * share) // segments
    gap = (tokens - each * segments) // (segments + 1)
    starts = [gap + index * (each + gap) for index in range(segments)]
    copies = [stored_segments.Segment(start, each, 0, np.arange(each), True) for start in starts]
    match = dataclasses.replace(Match.nothing(), segments=copies)
    mapped = PromptMap.of(np.zeros(tokens, np.int32), match)
    return RequestPlan(mapped, tuple(method_of(reuse).schedule(mapped, LAYERS)), (), tuple(copies))


@pytest.mark.parametrize("tokens", [4096, 16384])
@pytest.mark.parametrize(("name", "options"), [("sparsex l*=0, 5 %", (0, 0.05)), ("sparsex l*=3, 15 %", (3, 0.15))])
def test_the_closed_form_is_the_engines_cost_model(tokens, name, options):
    plan = planned(tokens, 0.95, 16, ReuseConfig(boundary_layer=options[0], recompute_ratio=options[1]))
    expected = prefill_seconds(MODEL, plan, FITTED.speeds)
    reused = int(plan.prompt.reused.sum())
    half, fresh = tokens / 2, tokens - reused
    found = Found(0, reused, 32, fresh, (), fresh * half, reused * half)
    each = timing(METHODS[name])
    assert each.plan_seconds([each.forced(found)]) == pytest.approx(expected, rel=0.03)


def test_a_plan_that_is_shared_takes_less_than_two():
    each = timing(PREFIX)
    works = each.stages(Found(4000, 0, 0, 50, (), 50 * 4025, 0.0))
    assert each.plan_seconds(works * 2) < 1.5 * each.plan_seconds(works)


def test_a_long_prompt_has_as_many_stages_as_the_budget_asks_for():
    each = timing(PREFIX)
    found = Found(0, 0, 0, 20_000, (), 20_000 * 10_000, 0.0)
    stages = each.stages(found)
    assert len(stages) == 3
    assert sum(stage.behind for stage in stages) == pytest.approx(20_000)


def test_segments_that_do_not_pay_are_computed():
    found = Found(0, 64, 1, 32, (), 32 * 80, 64 * 32)
    assert not timing().work(found).sparse


def test_decode_steps_add_up():
    each = timing()
    together = each.decode_seconds(5, 3, 1000)
    assert together == pytest.approx(sum(each.decode_seconds(1, 3, 1000 + 3 * step) for step in range(5)))


# A replica ----------------------------------------------------------------------------------------------------


def played(prompts: list[Prompt], config: ReplicaConfig, method: Method = SEGMENTS, each: Timing | None = None):
    done = []
    replica = Replica(0, config, each or timing(method), done.append)
    calibration.play(replica, prompts)
    return replica, done


def test_a_single_server_waits_as_pollaczek_and_khinchine_say():
    """M/D/1: with a service time of s and a load of rho, a prompt waits rho s / (2 (1 - rho)) on average. A plan is one
    prompt, since it fills the token budget."""
    rng, rho = np.random.default_rng(1), 0.7
    dues = rng.exponential(1 / rho, 5_000).cumsum()  # the service time is 1 s
    prompts = [prompt(chr(300 + i), tokens=8192, number=i, due=due) for i, due in enumerate(dues.tolist())]
    _, done = played(prompts, ReplicaConfig(store_tokens=10**8), each=token_timing(1 / 8192))
    waits = [outcome.first - outcome.due - 1 for outcome in done]
    assert np.mean(waits) == pytest.approx(rho / (2 * (1 - rho)), rel=0.12)


def test_a_prompt_waits_for_one_that_computes_the_same():
    """Both arrive at once. The second computes its last segment only, whatever else it has in common."""
    prompts = [prompt("sabcx", tokens=2000), prompt("scbay", tokens=2000, number=1)]
    _, done = played(prompts, ReplicaConfig())
    assert [outcome.prefix + outcome.reused for outcome in done] == [0, 8000]
    assert done[0].first < done[1].first


def test_prompts_decode_between_the_stages_of_a_long_one():
    short = prompt("a", tokens=500, answer=40)
    long = prompt("b", tokens=30_000, number=1, due=0.01)
    _, done = played([short, long], ReplicaConfig())
    ends = {outcome.number: outcome.end for outcome in done}
    assert ends[0] < ends[1] + 0.4
    assert timing(PREFIX).decode_seconds(39, 1, 500) < ends[0]


def test_a_prompt_that_can_never_fit_fails_and_others_do_not():
    _, done = played([prompt("ab"), prompt("a", number=1)], ReplicaConfig(store_tokens=150))
    assert [(outcome.number, outcome.failed) for outcome in done] == [(0, True), (1, False)]


def test_prompts_wait_for_room():
    prompts = [prompt(chr(300 + i), tokens=1000, number=i, answer=50) for i in range(6)]
    _, done = played(prompts, ReplicaConfig(store_tokens=2200))
    firsts = sorted(outcome.first for outcome in done)
    ends = sorted(outcome.end for outcome in done)
    assert not any(outcome.failed for outcome in done)
    assert all(first >= end for first, end in zip(firsts[2:], ends, strict=False))  # two at a time


def test_what_comes_from_host_memory_is_loaded_only_where_that_is_faster():
    config = ReplicaConfig(9000, (TierConfig(50_000, 50e9),))
    prompts = [prompt(keys, tokens=2000, number=i, due=10.0 * i) for i, keys in enumerate(("abcd", "efgh", "abcx"))]
    replica, fast = played(prompts, config, PREFIX)
    assert fast[-1].loaded == 6000
    assert replica.loaded_bytes == [6000 * FITTED.token_bytes]
    slow = dataclasses.replace(config, tiers=(TierConfig(50_000, 1e9),))
    assert played(prompts, slow, PREFIX)[1][-1].loaded == 0
    assert fast[-1].first - 20 < played(prompts, slow, PREFIX)[1][-1].first - 20


class Checked(Replica):
    """Looks at its store when it has been woken."""

    def wake(self, now: float) -> None:
        super().wake(now)
        assert self.store.held == self.store.tokens_of_nodes + self.reserved <= self.store.capacity
        assert self.open - len(self._waiting) <= self.config.max_running
        assert self.next_time > now


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(texts, st.floats(0, 0.5), st.integers(1, 60)), max_size=15), st.booleans())
def test_every_request_ends_once_and_nothing_is_left_over(asked, segments):
    dues = np.cumsum([wait for _, wait, _ in asked]).tolist()
    prompts = [
        prompt(keys, tokens=300, number=i, due=due, answer=answer)
        for i, ((keys, _, answer), due) in enumerate(zip(asked, dues, strict=True))
    ]
    done, config = [], ReplicaConfig(2500, (TierConfig(1500, 1e9),), max_running=3)
    replica = Checked(0, config, timing(SEGMENTS if segments else PREFIX), done.append)
    calibration.play(replica, prompts)
    assert sorted(outcome.number for outcome in done) == list(range(len(prompts)))
    assert all(outcome.due <= outcome.first <= outcome.end and not outcome.failed for outcome in done)
    assert all(outcome.prefix + outcome.reused < outcome.tokens for outcome in done)
    store = replica.store
    assert (replica.open, store.pinned, replica.running) == (0, 0, 0)
    assert store.held == store.tokens_of_nodes <= store.capacity


# A fleet ------------------------------------------------------------------------------------------------------


ALL = {**SIMPLE, "router": routed(16), "router of prefixes": routed(16, segments=False)}


@pytest.mark.parametrize("name", ALL)
def test_all_are_answered_once_by_every_policy_and_the_same_for_a_seed(name):
    config = FleetConfig(4, ReplicaConfig(60_000), routers=2, digest_s=0.5, every=16)
    method = PREFIX if "prefix" in name else SEGMENTS
    (simulation, first), (_, again) = (run(config, ALL[name], small_traffic(12.0), method=method) for _ in range(2))
    assert first.outcomes == again.outcomes
    numbers = sorted(outcome.number for outcome in first.outcomes)
    assert numbers == list(range(len(list(small_traffic(12.0).prompts(0, 10.0)))))
    assert not any(outcome.failed for outcome in first.outcomes)
    assert {outcome.replica for outcome in first.outcomes} == set(range(4))
    assert sum(first.busy) <= 4 * first.seconds
    for replica in simulation.replicas:
        assert replica.open == 0
        assert replica.store.held == replica.store.tokens_of_nodes <= 60_000


def test_a_replica_that_dies_fails_what_it_has_and_no_other_and_comes_back():
    config = FleetConfig(3, deaths=((4.0, 1),), detect_s=0.5, restart_s=3.0, digest_s=0.5, every=16)
    simulation, done = run(config, routed(16), small_traffic(30.0))
    failed = [outcome for outcome in done.outcomes if outcome.failed]
    assert failed
    assert all(outcome.replica == 1 and 4.0 <= outcome.end <= 4.5 for outcome in failed)
    assert len(done.outcomes) == len({outcome.number for outcome in done.outcomes})
    assert not any(outcome.replica == 1 for outcome in done.outcomes if 4.6 < outcome.due < 7.0)
    assert any(outcome.replica == 1 and not outcome.failed for outcome in done.outcomes if outcome.due > 7.0)
    assert all(replica is not None for replica in simulation.replicas)


def test_what_another_replica_holds_is_fetched_from_it_while_it_lives():
    config = FleetConfig(2, ReplicaConfig(network=50e9), digest_s=None, detect_s=0.0, deaths=((25.0, 0),))
    prompts = [prompt(keys, tokens=2000, number=i, due=10.0 * i) for i, keys in enumerate(("abcx", "bcay", "dez"))]
    prompts += [prompt("dew", tokens=2000, number=3, due=30.0)]
    simulation = Simulation(config, timing(), SIMPLE["round robin"])
    done = sorted(simulation.run(iter(prompts)).outcomes)
    assert [outcome.replica for outcome in done] == [1, 0, 1, 1]
    assert [outcome.loaded for outcome in done] == [0, 6000, 0, 0]
    assert done[1].first - done[1].due < (done[0].first - done[0].due) / 2


def test_nothing_of_a_dead_replica_is_fetched():
    config = FleetConfig(2, ReplicaConfig(network=50e9), digest_s=None, detect_s=0.0, deaths=((5.0, 1),))
    prompts = [prompt(keys, tokens=2000, number=i, due=10.0 * i) for i, keys in enumerate(("abcx", "bcay"))]
    done = Simulation(config, timing(), SIMPLE["round robin"]).run(iter(prompts)).outcomes
    assert [(outcome.replica, outcome.loaded, outcome.failed) for outcome in done] == [(1, 0, False), (0, 0, False)]


def test_without_replicas_requests_fail_at_once():
    config = FleetConfig(1, deaths=((2.0, 0),), detect_s=0.0, restart_s=60.0, digest_s=None)
    _, done = run(config, SIMPLE["least loaded"], small_traffic(5.0))
    late = [outcome for outcome in done.outcomes if outcome.due > 2.0]
    assert late
    assert all(outcome.failed and outcome.replica == -1 for outcome in late)


def test_the_router_finds_more_than_chance_and_less_when_it_is_told_late():
    traffic = Traffic(((Rag(documents=30, found=4), 8.0),), Tenants(8))
    rates = {}
    for name, digest_s in (("router", 0.5), ("router, late", 20.0), ("round robin", None)):
        make = SIMPLE[name] if name in SIMPLE else routed(64, assume_s=0.0, stale_after_s=100.0)
        config = FleetConfig(8, ReplicaConfig(40_000), digest_s=digest_s, every=64)
        _, done = run(config, make, traffic, seconds=30.0)
        rates[name] = figures(done, config, 10.0, 30.0)["hit rate"]
    assert rates["router"] > rates["router, late"] + 0.1
    assert rates["router"] > rates["round robin"] + 0.1


def test_digests_have_the_bytes_of_the_samples_that_changed():
    config = FleetConfig(2, digest_s=1.0, every=64)
    coarse = dataclasses.replace(config, every=256)
    fine, few = (run(each, routed(each.every), small_traffic(10.0))[1] for each in (config, coarse))
    assert 2 < fine.digest_bytes / few.digest_bytes < 5


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: FleetConfig(0), "replicas=0"),
        (lambda: FleetConfig(2, routers=0), "routers=0"),
        (lambda: FleetConfig(2, digest_s=0.0), "digest_s=0.0"),
        (lambda: FleetConfig(2, deaths=((1.0, 2),)), "replica 2"),
        (lambda: Arrivals(0.0), "rate=0.0"),
        (lambda: Arrivals(1.0, burst=11.0), "burst=11.0"),
        (lambda: Tenants(0), "number=0"),
        (lambda: Rag(documents=3, found=4), "found=4"),
        (lambda: Surge(Rag(), 1.0, 5.0, 5.0), "end=5.0"),
        (lambda: TierConfig(1, 0.0), "bytes_per_s=0.0"),
        (lambda: Store(0), "capacity=0"),
        (lambda: ReplicaConfig(max_running=0), "max_running=0"),
        (lambda: ReplicaConfig(network=0.0), "network=0.0"),
        (lambda: Method("m", ratio=1.5), "ratio=1.5"),
        (lambda: timing(Method("m", boundary=32)), "boundary=32"),
    ],
)
def test_bad_settings_are_named(make, field):
    with pytest.raises(InvalidRequestError, match=field):
        make()


# Against what was measured ------------------------------------------------------------------------------------


def test_predictions_are_near_what_was_measured():
    rows = calibration.predictions(FITTED, RESULTS)
    fitted, others = ([abs(row.error) for row in rows if row.fitted == which] for which in (True, False))
    assert max(fitted) < 0.12
    assert np.median(others) < 0.15
    assert max(others) < 0.4


SMALL = ["--replicas", "1", "2", "--few", "2", "--some", "2", "--large", "2", "--seconds", "3", "--scale-seconds", "3"]
SMALL += ["--large-seconds", "3"]


def test_the_script_writes_rows_of_each_part_and_keeps_those_of_others(tmp_path):
    simulate_fleet.main([*SMALL, "--no-plots", "--only", "calibration", "scale"], tmp_path)
    simulate_fleet.main([*SMALL, "--no-plots", "--only", "memory", "large"], tmp_path)
    rows = json.loads((tmp_path / "fleet-llama-3.1-8b-cpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"calibration", "scale", "memory", "large"}
    assert all(np.isfinite(row["figure"]) for row in rows)
    names = [(row["part"], row["work"], row["implementation"], row.get("source")) for row in rows]
    assert Counter(names).most_common(1)[0][1] <= 4  # the same full prefill was measured in several cases


def test_the_script_does_what_its_docstrings_say():
    assert doctest.testmod(simulate_fleet).failed == 0


@pytest.mark.slow
def test_the_script_runs_all_parts_and_plots_them(tmp_path):
    simulate_fleet.main(SMALL, tmp_path)
    rows = json.loads((tmp_path / "fleet-llama-3.1-8b-cpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == set(simulate_fleet.PARTS)
    assert len(list(tmp_path.glob("*.png"))) == 4
