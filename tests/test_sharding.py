"""Tensor parallelism on virtual devices: the results of one device, and the share of the store on each."""

import dataclasses
import functools
import math
import os
import re
import socket
import subprocess
import sys
from inspect import unwrap

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIG, TALKING, TINY, sharded_tiny
from dense import Dense
from live import wait_for

from sparsex_jax import Engine, InvalidRequestError, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.checkpoints import open_checkpoint, save_checkpoint
from sparsex_jax.config import METHODS as REGISTERED
from sparsex_jax.config import find_method
from sparsex_jax.device.decode import DecodeState, decode, forward
from sparsex_jax.device.prefill import embed_rows, prefill
from sparsex_jax.device.probe import ProbeState, probe
from sparsex_jax.device.signals import BUILT_IN
from sparsex_jax.device.state import BatchSlot, decode_state
from sparsex_jax.model import layers, ops
from sparsex_jax.model.decoder import Decoder
from sparsex_jax.model.forward_pass import ForwardPass
from sparsex_jax.model.layers import run_layer, run_layers
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh, spec
from sparsex_jax.model.weights import random_params
from sparsex_jax.reuse.plan import PADDING_REQUEST, Rows
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.schedule import Phase

MODEL = ModelConfig(
    vocab_size=120,  # divides by 2 and 8; the table's fallback to replication is tested below
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_q_heads=16,
    num_kv_heads=8,
    head_dim=8,
    max_position=512,
)
FEW_HEADS = dataclasses.replace(MODEL, num_kv_heads=2, qk_norm=True)
METHODS = {
    "full": ReuseConfig(method="full"),
    "prefix": ReuseConfig(method="prefix"),
    "naive": ReuseConfig(method="naive"),
    "sparsex": ReuseConfig(boundary_layer=1, recompute_ratio=0.2, overflow_tokens=2),
    "sparsex, l*=0": ReuseConfig(boundary_layer=0, recompute_ratio=0.2, overflow_tokens=2),
}


def few_heads(tensor_parallel: int, **options) -> Engine:
    """With fewer KV heads than devices."""
    return engine(tensor_parallel, FEW_HEADS, **options)


def many_norms(tensor_parallel: int, **options) -> Engine:
    """With norms behind attention and MLP too, which need the sums over the mesh."""
    return engine(tensor_parallel, dataclasses.replace(MODEL, post_norms=True), **options)


def experts(tensor_parallel: int, **options) -> Engine:
    model = dataclasses.replace(MODEL, num_experts=4, experts_per_token=2)
    return engine(tensor_parallel, model, **options)


def engine(tensor_parallel: int, model: ModelConfig = MODEL, **options) -> Engine:
    sizes = {"store_tokens": 1024, "page_size": 16, "max_num_seqs": 2, "chunk_rows": 32} | options
    return Engine.from_config(model, mesh=make_mesh(tensor_parallel), **sizes)


# Those of `METHODS` that stand for all in the default suite: the others are data of the same programs.
FEW = {name: METHODS[name] for name in ("full", "sparsex")}
ALL = METHODS | {name: find_method(name)(only_if_faster=False) for name in sorted(set(REGISTERED) - METHODS.keys())}


def run_all(one: Engine, methods: dict[str, ReuseConfig]) -> dict[str, tuple[np.ndarray, list[int], float]]:
    rng = np.random.default_rng(5)
    documents = [rng.integers(0, 97, 50).tolist() for _ in range(2)]
    prompt = [*rng.integers(0, 97, 11).tolist(), *documents[1], 3, *documents[0], *rng.integers(0, 97, 9).tolist()]
    for document in documents:
        one.remember(document, frozen=True)
    out = {}
    for name, reuse in methods.items():
        generation = one.generate(prompt, SamplingParams(max_new_tokens=8), reuse=reuse, keep=False)
        logits = one.prefill(prompt, reuse=reuse, keep=False).logits
        out[name] = logits, generation.token_ids, generation.report.computed_fraction
    return out


# A head of keys for each device, or for each two; and where there are 8, a vocabulary that divides.
MESHES = pytest.mark.parametrize(
    ("make", "tensor_parallel"),
    [
        (sharded_tiny, 4),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((sharded_tiny, 2), (engine, 8))),
    ],
)


@pytest.mark.parametrize("tensor_parallel", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_mesh_gives_the_logits_and_tokens_of_one_device(tensor_parallel):
    check_against_one_device(sharded_tiny, tensor_parallel, METHODS if tensor_parallel == 2 else FEW)


@pytest.fixture
def turns(monkeypatch):
    """A mesh takes chunks through layers as one of GPUs does: in turns or in halves, and sums run beside other work.
    Programs do not tell such meshes apart, so tests that use it have chunks of sizes of their own."""
    monkeypatch.setattr(ops, "WHOLE_ROWS", 16)
    monkeypatch.setattr(Ops, "host_steers", property(lambda ops: ops.mesh.size > 1))
    monkeypatch.setattr(Ops, "hides_sums", property(lambda ops: ops.mesh.size > 1))


@pytest.mark.parametrize(
    ("make", "tensor_parallel"),
    [
        (sharded_tiny, 4),
        *(pytest.param(make, 4, marks=pytest.mark.slow) for make in (few_heads, many_norms, experts)),
    ],
)
def test_parts_that_are_exchanged_give_what_all_reduces_do(make, tensor_parallel, monkeypatch):
    """As on GPUs that reach one another, but for the kernel: what stands in for it sums over the mesh too."""
    prompt, sampling = list(range(2, 40)), SamplingParams(max_new_tokens=5, temperature=0.0)

    def answer():
        one = make(tensor_parallel)
        return one, one.prefill(prompt, keep=False).logits, one.generate(prompt, sampling).token_ids

    taken, exchange = [], Ops._parts_to_exchange
    monkeypatch.setattr(Ops, "_parts_to_exchange", lambda *about: taken.append(about) or exchange(*about))
    plain, logits, tokens = answer()
    assert plain.runner.params.mailboxes is None
    assert not taken
    monkeypatch.setattr(Ops, "exchanges", lambda *_: True)
    other, found, others = answer()
    assert taken or make is many_norms  # which are taken of whole sums
    assert other.runner.params.mailboxes.table.shape == (tensor_parallel, 2 * tensor_parallel + 2)
    np.testing.assert_allclose(found, logits, atol=2e-5)
    assert others == tokens
    mailboxes = other.runner.params.mailboxes
    other.runner.store.delete()
    assert other.runner.recover()
    assert other.runner.params.mailboxes is not mailboxes  # devices may have counted differently


def some_rows(model: ModelConfig, number: int, valid: int) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Rows of two requests and padding, their page tables, and hidden states."""
    rng, index = np.random.default_rng(0), np.arange(number)
    line = (index >= valid // 2).astype(np.int32)
    position = np.where(index < valid, index - line * (valid // 2), -1).astype(np.int32)
    request = np.where(index < valid, line, PADDING_REQUEST).astype(np.int32)
    rows = Rows(np.zeros(number, np.int32), position, request, index.astype(np.int32))
    tables = np.arange(2, 10, dtype=np.int32).reshape(2, 4)
    return rows, tables, rng.normal(size=(number, model.hidden_size)).astype("f")


def layers_of(runner, rows: Rows, tables: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The store and the rows' hidden states behind layers 1 and 2, compiled now."""

    def run(params, store, rows, hidden):
        return run_layers(
            ForwardPass(params, jnp.asarray(tables), runner.decoder, 32),
            jnp.int32(1),
            jnp.int32(3),
            store,
            rows,
            hidden,
        )

    store, hidden = jax.jit(run)(runner.params, runner.store, rows, hidden)
    return np.asarray(store), np.asarray(hidden)


@pytest.mark.parametrize("valid", [128, 90, 40])
def test_turns_of_chunks_give_what_layers_one_by_one_do(valid, turns, monkeypatch):
    """Of four chunks, some of which are padding: three stages with hidden sums, or whole layers of fewer than three."""
    runner = sharded_tiny(4).runner
    about = some_rows(TINY, 128, valid)
    found = layers_of(runner, *about)
    monkeypatch.setattr(Ops, "hides_sums", False)
    whole = layers_of(runner, *about)
    monkeypatch.setattr(Ops, "host_steers", False)
    expected = layers_of(runner, *about)
    for store, hidden in (found, whole):
        np.testing.assert_allclose(store, expected[0], atol=1e-5)
        np.testing.assert_allclose(hidden[:valid], expected[1][:valid], atol=1e-5)


@pytest.mark.parametrize("valid", [60, 24])
@pytest.mark.parametrize(
    ("make", "tensor_parallel"),
    [(sharded_tiny, 4), *(pytest.param(make, 4, marks=pytest.mark.slow) for make in (few_heads, many_norms, experts))],
)
def test_halves_of_a_chunk_give_what_the_whole_does(valid, make, tensor_parallel, turns, monkeypatch):
    """Of two requests, or with a later half that is padding."""
    runner = make(tensor_parallel).runner
    rows, tables, hidden = some_rows(runner.model, 64, valid)

    def through_layers():
        forward = ForwardPass(runner.params, jnp.asarray(tables), runner.decoder, 64)
        store, out = jax.jit(lambda *about: layers.all_layers(forward, *about))(runner.store, rows, hidden)
        return np.asarray(store), np.asarray(out)[:valid]

    taken, layer_of_halves = [], layers.layer_of_halves
    monkeypatch.setattr(layers, "layer_of_halves", lambda *about: taken.append(about) or layer_of_halves(*about))
    found = through_layers()
    assert taken
    taken.clear()
    monkeypatch.setattr(Ops, "hides_sums", False)
    for one, other in zip(found, through_layers(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert not taken


@pytest.mark.slow
@pytest.mark.parametrize(("make", "tensor_parallel"), [(engine, 8), (few_heads, 4), (many_norms, 2), (experts, 4)])
def test_every_method_is_the_same_with_hidden_sums(make, tensor_parallel, turns):
    check_against_one_device(functools.partial(make, chunk_rows=24), tensor_parallel, ALL)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "tensor_parallel"), [(engine, 2), (engine, 8), (few_heads, 4), (few_heads, 8)])
def test_every_method_gives_the_logits_and_tokens_of_one_device(make, tensor_parallel):
    check_against_one_device(make, tensor_parallel, ALL)


def check_against_one_device(make, tensor_parallel, methods):
    single = run_all(make(1), methods)
    for name, (logits, tokens, fraction) in run_all(make(tensor_parallel), methods).items():
        np.testing.assert_allclose(logits, single[name][0], atol=2e-5, err_msg=name)
        assert (tokens, fraction) == (single[name][1], single[name][2]), name


@MESHES
def test_each_device_holds_its_share_of_the_store_only(make, tensor_parallel):
    one = make(tensor_parallel)
    one.generate(list(range(40)), SamplingParams(max_new_tokens=4))  # the steps must keep it so
    shards = one.runner.store.addressable_shards
    assert {shard.device for shard in shards} == set(jax.devices()[:tensor_parallel])
    assert all(shard.data.nbytes * tensor_parallel == one.runner.store.nbytes for shard in shards)
    weights = one.runner.params.layers
    for weight in (weights.w_gate, weights.w_down, weights.wq, weights.wk, weights.wv, weights.wo):
        assert all(shard.data.nbytes * tensor_parallel == weight.nbytes for shard in weight.addressable_shards)


def collectives(step, *args, **static) -> list[tuple[str, int]]:
    """The kind of each collective in a compiled step, and how many numbers it gives; once for all turns of a loop."""
    leaves, tree = jax.tree.flatten(args)  # checked dataclasses take nothing but arrays
    compiled = jax.jit(lambda *leaves: step(*jax.tree.unflatten(tree, leaves), **static)).lower(*leaves).compile()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", compiled.as_text())
    return [(kind, max(map(_size, re.findall(r"\[([\d,]*)\]", made)))) for made, kind in found]


def _size(shape: str) -> int:
    return math.prod(map(int, filter(None, shape.split(","))))


def decoding(one: Engine) -> DecodeState:
    slot = BatchSlot(range(30), [1], SamplingParams(), pages=range(2))
    return decode_state([slot], one.runner.shapes.max_pages, one.model.vocab_size)


@pytest.mark.parametrize("tensor_parallel", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_layer_has_two_all_reduces_of_its_rows_and_no_other_collective(tensor_parallel):
    """In decode and in prefill, whose loops over the layers have one body. Each device has all of the vocabulary that
    makes logits."""
    one = sharded_tiny(tensor_parallel)
    runner, state = one.runner, decoding(one)
    step = functools.partial(unwrap(forward), decoder=runner.decoder)
    found = sorted(collectives(step, runner.params, runner.store, state))
    assert found == [("all-gather", TINY.hidden_size), *[("all-reduce", TINY.hidden_size)] * 2]  # gathered: embeddings

    def layer(params, tables, *rest):
        return run_layer(ForwardPass(params, tables, runner.decoder, 32), *rest)

    rows, hidden = Rows(*[np.zeros(128, np.int32)] * 4), np.zeros((128, TINY.hidden_size), np.float32)
    found = collectives(layer, runner.params, state.page_tables, np.int32(1), runner.store, rows, hidden)
    assert found == [("all-reduce", 32 * TINY.hidden_size)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("make", "tensor_parallel"), [(engine, 8), (few_heads, 8), (sharded_tiny, 4)])
def test_nothing_gathers_the_store(make, tensor_parallel):
    """Nor a layer of it: what goes over the mesh in whole prefills, probes and decodes is of rows, keys or logits."""
    one = make(tensor_parallel)
    runner, model, config = one.runner, one.model, one.config
    prompt = PromptMap(np.zeros(100, np.int32), np.full(100, TokenKind.FRESH, np.uint8))
    run = runner.begin([RequestPlan(prompt, (Phase(0, prompt.computed),), range(7))])
    decoder, plan, state = runner.decoder, run.plan, run.state
    about, keys = (runner.params, runner.store), config.max_prefill_seqs * runner.shapes.max_pages * config.page_size
    focus = np.zeros((config.max_prefill_seqs, keys // config.max_prefill_seqs), np.float32)
    probed = ProbeState(state.layer, state.hidden, jnp.asarray(focus))
    prefilled = functools.partial(unwrap(prefill), decoder=decoder, signals=tuple(BUILT_IN.values()), chunk=32)
    looked = functools.partial(unwrap(probe), decoder=decoder, layers=3, watched=2, chunk=32)
    steps = {
        "prefill": collectives(prefilled, *about, plan, state, np.int32(model.num_layers), np.bool(False)),
        "probe": collectives(looked, *about, plan.page_tables, state.rows, np.zeros(128, bool), probed),
        "decode": collectives(functools.partial(unwrap(decode), decoder=decoder, steps=16), *about, decoding(one)),
    }
    most = max(128 * model.hidden_size, keys, config.max_prefill_seqs * model.vocab_size)
    assert most < runner.store.size / model.num_layers / 2
    for name, found in steps.items():
        assert len(found) >= 2, name
        assert max(size for _, size in found) <= most, name


@pytest.mark.parametrize(("tied", "kind"), [(False, "all-gather"), (True, "all-reduce")])
def test_embeddings_that_are_only_looked_up_are_gathered_and_not_summed(tied, kind):
    model, mesh = dataclasses.replace(MODEL, tied_embeddings=tied), make_mesh(2)
    params, decoder = random_params(model, "float32", mesh), Decoder(model, Ops.on(mesh))
    rows = Rows(*np.zeros((4, 32), np.int32))
    step = functools.partial(unwrap(embed_rows), decoder=decoder, requests=1)
    assert collectives(step, params, rows) == [(kind, 32 * model.hidden_size)]
    assert {shard.data.nbytes * 2 for shard in params.embed.addressable_shards} == {params.embed.nbytes}


@pytest.mark.slow
def test_a_vocabulary_that_does_not_divide_is_replicated():
    model = ModelConfig(**{**MODEL.__dict__, "vocab_size": 121})
    one = engine(2, model)
    assert one.runner.params.lm_head.sharding.is_fully_replicated
    logits = one.prefill(list(range(100))).logits
    np.testing.assert_allclose(logits, engine(1, model).prefill(list(range(100))).logits, atol=2e-5)


def test_an_axis_that_the_rules_do_not_list_is_an_error():
    with pytest.raises(ValueError, match="columns, which the sharding rules do not list"):
        spec(("layers", "columns", "embed"))


def test_heads_that_do_not_divide_are_refused():
    model = ModelConfig(**{**MODEL.__dict__, "num_kv_heads": 3, "num_q_heads": 24})
    said = "num_kv_heads=3 does not divide over the mesh's tensor=8, nor that over them. tensor_parallel=1 or 3 or "
    with pytest.raises(InvalidRequestError, match=said):
        engine(8, model)


def test_a_mesh_without_a_tensor_axis_is_refused():
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.raises(InvalidRequestError, match="it needs one named 'tensor'"):
        Engine.from_config(MODEL, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tensor_parallel"), [(MODEL, 2), (FEW_HEADS, 4), (MODEL, 8)])
def test_the_loop_gives_the_answers_of_one_device(model, tensor_parallel):
    """Of sequences that wait for one another, share texts, are preempted, drawn, biased, or cancelled on their way."""
    sizes = {"store_tokens": 800, "max_num_seqs": 4, "decode_steps": 4}
    expected, answers = (serve_many(engine(size, model, **sizes)) for size in (1, tensor_parallel))
    assert answers == expected


def serve_many(one: Engine) -> list[list[int]]:
    rng = np.random.default_rng(7)
    texts = [rng.integers(1, 97, 64).tolist() for _ in range(3)]
    for text in texts:
        one.remember(text, frozen=True)
    wishes = [{}, {"temperature": 0.8, "seed": 3}, {"presence_penalty": 0.5}, {"logit_bias": {5: 2.0}}, {"logprobs": 2}]
    answers: dict[int, list[int]] = {number: [] for number in range(9)}
    for number in answers:
        own = rng.integers(1, 97, 5 + 9 * number).tolist()
        prompt = [*own, *texts[number % 3], *own[:3], *texts[(number + 1) % 3], *own[-4:]]
        reuse = METHODS["sparsex" if number % 2 else "naive"].updated(only_if_faster=False)
        ticket = one.loop.submit(
            prompt,
            SamplingParams(max_new_tokens=40, **wishes[number % len(wishes)]),
            reuse=reuse,
            keep=False,
            listener=lambda event, number=number: answers[number].extend(event.token_ids),
        )
    for _ in range(3):
        one.loop.step()
    ticket.cancel()
    while one.loop.step():
        pass
    one.cache.check(held=[])
    assert one.loop.stats.preempted > 0
    *others, cancelled = answers.values()
    assert all(len(answer) == 40 for answer in others)
    assert len(cancelled) < 40
    return others


@pytest.mark.slow
def test_a_server_on_a_mesh_gives_the_answers_of_one_device(tmp_path):
    """The model has one KV head, so each of two devices has a copy of it."""
    model = dataclasses.replace(TALKING, num_layers=2)
    tokenizer = open_checkpoint("smollm2-135m-instruct").tokenizer
    save_checkpoint(tmp_path / "tiny", model, random_params(model, "float32", make_mesh()), tokenizer)
    sizes, prompt = {"store_tokens": 1024, "company_tokens": 0}, list(range(300, 380))
    alone = Engine.from_pretrained(tmp_path / "tiny", dtype="float32", **sizes)
    expected = alone.generate(prompt, SamplingParams(max_new_tokens=12)).text
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from sparsex_jax.cli import app; app()", "serve", str(tmp_path / "tiny")]
    command += ["--port", str(port)]
    command += ["--tensor-parallel", "2", "--store-tokens", "1024", "--no-warm-up", "--healing", "0"]
    said = {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen(command, env=os.environ | said)
    try:
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", port)), 300)
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
        answers = [httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=300) for _ in range(2)]
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
    finally:
        process.terminate()
        process.wait(60)
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [expected] * 2
    assert 'device="2 x cpu"' in metrics


@pytest.mark.slow
def test_other_axes_of_a_mesh_hold_copies():
    """The vocabulary is divided too."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))  # with explicit axis types, as jax makes it by default
    one = Engine.from_config(MODEL, mesh=mesh, store_tokens=1024, page_size=16, max_num_seqs=2, chunk_rows=32)
    logits, _ = Dense(MODEL, jax.device_get(one.runner.params)).full(np.arange(60))
    np.testing.assert_allclose(one.prefill(list(range(60))).logits, logits[-1], atol=2e-5)
    assert not one.runner.params.embed.sharding.is_fully_replicated
    assert {shard.data.nbytes * 2 for shard in one.runner.store.addressable_shards} == {one.runner.store.nbytes}


@pytest.mark.slow
def test_tiers_bring_back_what_each_device_had(monkeypatch):
    """A prefix, and segments that come while the first layers run."""
    monkeypatch.setattr("sparsex_jax.device.restorer._WORTH", 1e9)  # a busy machine would rather compute than load
    documents = list(np.random.default_rng(0).integers(1, 97, (6, 317)).astype(np.int32))
    asked = np.concatenate([[5, 6, 7], documents[1][:160], documents[0][:160], [8, 9]]).astype(np.int32)
    late, prefix = ReuseConfig(boundary_layer=2, recompute_ratio=0.3, only_if_faster=False), ReuseConfig("prefix")
    options = vars(CONFIG) | {"store_tokens": 66 * 16, "host_store_bytes": 1 << 26}
    tiered = Engine.from_config(TINY, mesh=make_mesh(2), **options)
    for document in documents:
        tiered.generate(document, SamplingParams(max_new_tokens=2), reuse=prefix)
    tiered.loop.settle()
    found = [tiered.prefill(asked, reuse=late, keep=False), tiered.prefill(documents[2], reuse=prefix)]
    alone = Engine.from_config(TINY, **vars(CONFIG))
    for document in documents[:3]:
        alone.generate(document, SamplingParams(max_new_tokens=2), reuse=prefix)
    expected = [alone.prefill(asked, reuse=late, keep=False), alone.prefill(documents[2], reuse=prefix)]
    for one, other in zip(found, expected, strict=True):
        assert one.report.restored_tokens > 0
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-4)
