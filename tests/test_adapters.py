"""LoRA adapters: each answer is that of merged weights, and nothing that one computed is found by another."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from adapting import DEVICE, Adapted, adapting_engine, dense_of, greedy, make_adapter
from conftest import TINY, idle, tiny_params
from hypothesis import given
from hypothesis import strategies as st

from sparsex_jax import (
    AdapterInUseError,
    Engine,
    EngineConfig,
    InvalidRequestError,
    ReuseConfig,
    SamplingParams,
    UnknownAdapterError,
)
from sparsex_jax.device.adapters import all_ranks, check_pairs
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.model.adapters import Pair
from sparsex_jax.model.low_rank import Adapting, narrow_products
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.reuse.adapters import NEVER, Acting, last_place
from sparsex_jax.scheduler.adapters import Adapters
from sparsex_kernels.backend import Backend

ALL, SOME = make_adapter(1), make_adapter(2, rank=8, targets=("wq", "wv"))
CALLED = (90, 91)  # what invokes the activated adapter
ACTIVATED = make_adapter(3, invocation=CALLED)
TEXT = np.random.default_rng(7).integers(1, 89, 200).astype(np.int32)
PREFIX = ReuseConfig("prefix")
FEW = SamplingParams(max_new_tokens=4, ignore_eos=True)


@pytest.fixture
def engine():
    engine = adapting_engine()
    for name, weights in (("all", ALL), ("some", SOME), ("activated", ACTIVATED)):
        engine.load_adapter(name, weights)
    return engine


def test_a_mixed_batch_has_the_answers_of_merged_weights(engine):
    prompts = [TEXT[:12], TEXT[:12], TEXT[:12], TEXT[20:37]]
    names = ["all", "some", None, "all"]
    outs = engine.generate_batch(prompts, FEW, adapter=names, return_logits=True, reuse=PREFIX)
    of_name = {"all": dense_of(ALL), "some": dense_of(SOME), None: dense_of(None)}
    for prompt, name, out in zip(prompts, names, outs, strict=True):
        logits, tokens = greedy(of_name[name], prompt, 4)
        np.testing.assert_allclose(out.logits, logits, atol=1e-3)
        assert list(out.token_ids) == tokens
        assert (out.report.adapter and out.report.adapter.name) == name
        assert out.report.prefix_tokens == 0
    assert outs[0].report.to_dict()["adapter"] == {"name": "all", "tokens": 12}
    assert "adapter" not in outs[2].report.to_dict()
    assert len({tuple(out.token_ids) for out in outs[:3]}) == 3
    assert idle(engine)


def test_a_base_row_is_the_same_bit_for_bit_whatever_is_loaded(engine):
    without = adapting_engine()
    alone = without.generate_batch([TEXT[:12]] * 4, FEW, return_logits=True, keep=False)
    names = ["all", None, "some", "activated"]
    mixed = engine.generate_batch([TEXT[:12]] * 4, FEW, adapter=names, return_logits=True, keep=False)
    np.testing.assert_array_equal(alone[1].logits, mixed[1].logits)
    assert alone[1].token_ids == mixed[1].token_ids


def test_each_finds_its_own_kv_and_no_other_does(engine):
    for name in ("all", None, "some", "all", "some", None):
        report = engine.prefill(TEXT[:40], adapter=name, reuse=PREFIX).report
        assert report.prefix_tokens == 0 or name in seen(engine)
        seen(engine).add(name)
        assert engine.prefill(TEXT[:40], adapter=name, reuse=PREFIX).report.prefix_tokens == 39
    engine.unload_adapter("all")
    engine.load_adapter("all", ALL)  # the very same weights are another version
    assert engine.prefill(TEXT[:40], adapter="all", reuse=PREFIX).report.prefix_tokens == 0
    assert engine.prefill(TEXT[:40], adapter="some", reuse=PREFIX).report.prefix_tokens == 39


def seen(engine):
    return vars(engine).setdefault("seen_by_test", set())


# Activated --------------------------------------------------------------------------------------------------


def test_what_stands_before_the_invocation_is_found_by_all(engine):
    prompt = np.concatenate([TEXT[:34], CALLED, TEXT[40:44]]).astype(np.int32)  # all three fit a plan of 64 rows
    engine.prefill(prompt[:34], reuse=PREFIX)  # the base model's
    out, *others = engine.generate_batch([prompt] * 3, FEW, adapter=["activated", "all", None], reuse=PREFIX)
    logits, tokens = greedy(Adapted(ACTIVATED, 34), prompt, 4)
    assert out.token_ids == tokens
    assert [each.token_ids for each in others] == [greedy(dense_of(one), prompt, 4)[1] for one in (ALL, None)]
    assert [each.report.prefix_tokens for each in (out, *others)] == [34, 0, 34]
    assert out.report.adapter.tokens == 6
    again = engine.prefill(prompt, adapter="activated", reuse=PREFIX)
    assert again.report.prefix_tokens == len(prompt) - 1
    np.testing.assert_allclose(again.logits, logits, atol=1e-3)
    of_base = engine.prefill(prompt, reuse=PREFIX)
    assert of_base.report.prefix_tokens == len(prompt) - 1  # its own: what it does not share begins at token 34
    np.testing.assert_allclose(of_base.logits, dense_of(None).full(prompt)[0][-1], atol=1e-3)


def test_an_adapter_that_is_not_invoked_does_not_act(engine):
    report = engine.prefill(TEXT[:20], adapter="activated", reuse=PREFIX).report
    assert (report.adapter.name, report.adapter.tokens) == ("activated", 0)
    plain = engine.prefill(TEXT[:20], reuse=PREFIX)
    assert plain.report.prefix_tokens == 19
    np.testing.assert_allclose(plain.logits, dense_of(None).full(TEXT[:20])[0][-1], atol=1e-3)


def test_the_last_invocation_counts():
    assert last_place(np.int32([1, 90, 91, 2, 90, 91, 90]), CALLED) == 4
    assert last_place(np.int32([90]), CALLED) == NEVER
    assert last_place(np.int32([1, 2, 3]), CALLED) == NEVER


# Texts ------------------------------------------------------------------------------------------------------


def test_a_text_is_remembered_under_its_adapter(engine):
    handle = engine.remember(TEXT[:32], adapter="all")
    assert [entry.origin.adapter for entry in engine.entries()] == ["all"]
    assert engine.remember(TEXT[:32], adapter="all") == handle
    assert engine.remember(TEXT[:32]) != handle
    assert engine.prefill(TEXT[:40], adapter="all", keep=False, reuse=PREFIX).report.prefix_tokens == 32
    assert engine.prefill(TEXT[:40], adapter="some", keep=False, reuse=PREFIX).report.prefix_tokens == 0
    engine.unload_adapter("all")
    assert len(engine.entries()) == 1
    assert idle(engine)


def test_a_text_that_does_not_invoke_an_adapter_is_the_base_models(engine):
    handle = engine.remember(TEXT[:32], adapter="activated")
    invoking = engine.remember(np.concatenate([TEXT[40:60], CALLED, TEXT[60:70]]).astype(np.int32), adapter="activated")
    assert [(each.handle, each.origin.adapter) for each in engine.entries()] == [
        (handle, None),
        (invoking, "activated"),
    ]
    assert engine.remember(TEXT[:32]) == handle
    engine.unload_adapter("activated")
    assert [each.handle for each in engine.entries()] == [handle]


def test_a_forgotten_text_is_forgotten_under_all_adapters(engine):
    handle = engine.remember(TEXT[:32])
    for name in ("all", "some"):
        engine.prefill(TEXT[:40], adapter=name)
    engine.forget(handle)
    for name in ("all", "some", None):
        assert engine.prefill(TEXT[:40], adapter=name, keep=False).report.fresh_tokens == 40


def test_the_company_of_a_text_is_what_the_base_model_computed():
    engine = adapting_engine(company_tokens=48)
    engine.load_adapter("all", ALL)
    engine.load_adapter("activated", ACTIVATED)
    for name, begin in (("all", 0), ("all", 0), ("activated", 0), ("activated", 0)):
        engine.prefill(np.concatenate([TEXT[begin : begin + 8], CALLED, TEXT[:30]]).astype(np.int32), adapter=name)
    engine.remember(TEXT[60:80], adapter="all")
    handle = engine.remember(TEXT[80:100])
    (entry,) = (one for one in engine.entries() if one.handle == handle)
    np.testing.assert_array_equal(entry.origin.company.tokens, TEXT[:8])  # as far as nothing was invoked


def test_segments_are_found_and_shifted_under_the_same_adapter_only(engine):
    engine.remember(TEXT[:48], adapter="all")
    sparse = ReuseConfig("sparsex", boundary_layer=1, recompute_ratio=0.1, overflow_tokens=2)
    prompt = np.concatenate([TEXT[100:106], TEXT[:48], TEXT[110:116]])
    out = engine.prefill(prompt, adapter="all", reuse=sparse, keep=False)
    parts = [(TEXT[100:106], None), (TEXT[:48], (TEXT[:48], 0)), (TEXT[110:116], None)]
    logits, active = dense_of(ALL).sparsex(parts, 1, 0.1, 2, 0)
    assert out.report.active_tokens == active.sum() < len(prompt)
    np.testing.assert_allclose(out.logits, logits, atol=1e-3)
    assert engine.prefill(prompt, adapter="some", reuse=sparse, keep=False).report.fresh_tokens == len(prompt)
    assert engine.prefill(prompt, reuse=sparse, keep=False).report.fresh_tokens == len(prompt)


# Loading ----------------------------------------------------------------------------------------------------


def test_loading_compiles_nothing_and_wrong_adapters_are_refused(engine):
    engine.generate_batch([TEXT[:12]] * 3, FEW, adapter="all")
    engine.unload_adapter("all")
    compiled = num_compilations()
    engine.load_adapter("all", SOME)
    out, *_ = engine.generate_batch([TEXT[:12]] * 3, FEW, adapter="all")
    assert num_compilations() == compiled
    assert out.token_ids == greedy(dense_of(SOME), TEXT[:12], 4)[1]
    with pytest.raises(InvalidRequestError, match="max_adapters=3 are loaded"):
        engine.load_adapter("more", SOME)
    with pytest.raises(InvalidRequestError, match="'some' is loaded already"):
        engine.load_adapter("some", SOME)
    engine.unload_adapter("some")
    a, b = SOME.pairs["wq"]
    wrong = {
        "rank 16, and max_adapter_rank=8": dataclasses.replace(SOME, rank=16),
        r"'wq' of shapes .* must be \(4, 32, 8\) and \(4, 8, 32\)": dataclasses.replace(
            SOME, pairs={"wq": Pair(a, b[:, :, :7])}
        ),
        "tokens are from 0 to 96": dataclasses.replace(SOME, invocation=(1, 97)),
        "NaN or infinities": dataclasses.replace(SOME, pairs={"wq": Pair(a * np.nan, b)}),
        "takes pairs for wq, wk, wv, wo, w_gate": dataclasses.replace(SOME, pairs={"lm_head": Pair(a, b)}),
    }
    for message, weights in wrong.items():
        with pytest.raises(InvalidRequestError, match=message):
            engine.load_adapter("some", weights)
    for name in ("", "two\nlines", " ", 3, "x" * 257):
        with pytest.raises(InvalidRequestError, match="adapter name"):
            engine.load_adapter(name, SOME)
    assert list(engine.adapters) == ["activated", "all"]
    assert num_compilations() == compiled


def test_numbers_that_the_dtype_of_an_engine_does_not_hold_are_refused():
    a, b = SOME.pairs["wq"]
    large = dataclasses.replace(SOME, pairs={"wq": Pair(a, b * np.float32(1e6))})
    about = large, TINY, make_mesh()
    check_pairs("large", *about, "bfloat16")
    with pytest.raises(InvalidRequestError, match="'large' has a pair for 'wq' that has NaN or infinities in float16"):
        check_pairs("large", *about, "float16")


def test_an_unknown_adapter_is_refused_by_the_names_of_those_that_are_there(engine):
    for name in ("other", "", 3):
        with pytest.raises(InvalidRequestError, match=r"'all', 'some', 'activated'|must be"):
            engine.generate(TEXT[:12], FEW, adapter=name)
    with pytest.raises(UnknownAdapterError, match="'other'"):
        engine.unload_adapter("other")
    with pytest.raises(InvalidRequestError, match="2 entries for 1 prompts"):
        engine.generate_batch([TEXT[:12]], FEW, adapter=["all", None])
    with pytest.raises(InvalidRequestError, match="an adapter exclude each other"):
        engine.remember(TEXT[:20], adapter="all", company=True)
    assert idle(engine)


def test_an_adapter_in_use_is_not_unloaded(engine):
    with engine.prefilled(TEXT[:20], adapter="all"):
        assert engine.adapters["all"].uses == 1
        with pytest.raises(AdapterInUseError, match="1 sequence with it did not end within timeout_s=30"):
            engine.unload_adapter("all")  # at once: no step ends what is held
        assert engine.adapters["all"].uses == 1
    assert engine.unload_adapter("all").name == "all"
    made = engine.loop.requests.generation(TEXT[:12], FEW, reuse=None, namespace="default", keep=True, adapter="some")
    engine.unload_adapter("some")
    engine.load_adapter("some", ALL)
    with pytest.raises(UnknownAdapterError, match="'some' was unloaded meanwhile"):
        engine.loop.complete([made])
    assert idle(engine)


def test_an_adapter_leaves_behind_its_last_request(engine):
    """Who came before is answered, and who comes meanwhile hears why it is not."""
    heard = []

    def listen(event):
        if not heard:
            for ask in (lambda: engine.loop.submit(TEXT[:12], FEW, adapter="all", listener=listen), engine_checks):
                with pytest.raises(UnknownAdapterError, match="'all' is being unloaded, and takes no new requests"):
                    ask()
        heard.append(event)

    def engine_checks():
        engine.admission.adapters.named("all")

    engine.loop.submit(TEXT[:12], FEW, adapter="all", listener=listen)
    engine.loop.submit(TEXT[:12], FEW, adapter="some", listener=lambda event: None)
    with pytest.raises(AdapterInUseError, match=r"1 sequence with it did not end within timeout_s=0\. It takes"):
        engine.unload_adapter("all", timeout_s=0)
    assert engine.adapters["all"].uses == 1
    assert engine.unload_adapter("all").name == "all"
    assert heard[-1].finish_reason == "length"
    assert "all" not in engine.adapters
    for wrong in (-1, "soon", True):
        with pytest.raises(InvalidRequestError, match="timeout_s="):
            engine.unload_adapter("some", timeout_s=wrong)
    engine.loop.step()
    assert idle(engine)


def test_what_is_no_adapter_is_refused(engine):
    for wrong in (123, None, b"path"):
        with pytest.raises(InvalidRequestError, match="of an adapter must be a directory"):
            engine.load_adapter("x", wrong)
    for wrong in (["x"], "x"):
        with pytest.raises(InvalidRequestError, match=r"adapters=.* must be a mapping"):
            Engine(TINY, tiny_params(), adapters=wrong)
    with pytest.raises(InvalidRequestError, match="rank=0 must be an integer >= 1"):  # types are jaxtyping's here
        dataclasses.replace(ALL, rank=0)
    with pytest.raises(InvalidRequestError, match="prompts=None must be a list"):
        engine.generate_batch(None)
    with pytest.raises(InvalidRequestError, match="allow_control_tokens='x' must be a bool"):
        engine.remember(TEXT[:12], allow_control_tokens="x")


def test_slots_that_no_device_holds_are_refused_by_what_they_take():
    about = r"max_adapters=16000000 slots of max_adapter_rank=128.* take 15204\.4 GB on each device, which has"
    for share in (False, True):
        config = EngineConfig(store_tokens=64, max_adapters=16_000_000, max_adapter_rank=128, share_adapters=share)
        with pytest.raises(
            InvalidRequestError, match=about if not share else "with store_tokens=64 and share_adapters"
        ):
            Engine(TINY, tiny_params(), config=config)


def test_limits_of_the_configuration():
    for fields in ({"max_adapters": -1}, {"max_adapters": 1.5}, {"max_adapter_rank": 12}, {"max_adapter_rank": 136}):
        with pytest.raises(InvalidRequestError, match=next(iter(fields))):
            EngineConfig(**fields)
    with pytest.raises(InvalidRequestError, match="max_adapters=3 must be less than 1 for a vocabulary"):
        Adapters(dataclasses.replace(TINY, vocab_size=1 << 30), DEVICE)
    with pytest.raises(InvalidRequestError, match="needs an engine with max_adapters above 0"):
        Engine(TINY, tiny_params(), config=EngineConfig(store_tokens=64)).load_adapter("all", ALL)


def test_a_row_keeps_its_own_adapters_columns_of_a_narrow_product():
    """Whatever is in the others', NaN too. Y has the columns of all."""
    x, a = np.ones((3, 4), np.float32), np.ones((1, 4, 8), np.float32)
    a[..., 2:4], a[..., 6:] = 3, np.nan  # slots 1 and 3, of rank 2
    given = Adapting((jnp.array(a), None), (jnp.ones((1, 8, 5)), None), jnp.array([1, 2, -1]), jnp.array(a[..., :4]))
    added, y = narrow_products(jnp.array(x), given, 0, jnp.int32(3), rank=2, backend=Backend("cpu"))
    np.testing.assert_array_equal(added[0].own, [[0, 0, 12, 12, 0, 0, 0, 0], [0, 0, 0, 0, 4, 4, 0, 0], [0] * 8])
    assert added[1] is None
    np.testing.assert_array_equal(y, [[4, 4, 12, 12]] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [False, True])
def test_zeros_behind_the_slots_change_nothing(monkeypatch, sharing):
    """As GPUs have them: ranks are a multiple of 64 there."""

    def answers():
        engine = Engine(TINY, tiny_params(), config=dataclasses.replace(DEVICE, share_adapters=sharing))
        engine.load_adapter("some", SOME)
        outs = engine.generate_batch([TEXT[:30], TEXT[:30]], FEW, adapter=["some", None], return_logits=True)
        return engine.runner.params.adapters["wq"].a.shape[2], [out.logits for out in outs]

    ranks, expected = answers()
    monkeypatch.setattr("sparsex_jax.device.adapters.all_ranks", lambda engine, _: all_ranks(engine, "gpu"))
    more, logits = answers()
    assert (ranks, more) == (24, 64)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


# Keys -------------------------------------------------------------------------------------------------------

tokens_of = st.lists(st.integers(0, 96), min_size=1, max_size=20).map(lambda each: np.array(each, np.int32))


@given(tokens_of, st.integers(0, 25), st.integers(1, 2**24 - 1))
def test_keys_tell_versions_apart_and_give_the_tokens_back(tokens, start, number):
    adapters = Adapters(TINY, DEVICE)
    keys = Acting("name", 0, number, number << 7, start).keys(tokens)
    assert keys.dtype == np.int32
    assert (keys >= 0).all()
    np.testing.assert_array_equal(adapters.tokens(keys), tokens)
    np.testing.assert_array_equal(keys >= 128, np.arange(len(keys)) >= start)
    assert adapters.num_base(keys) == min(start, len(tokens))
    assert adapters.is_base(keys) == (start >= len(tokens))


@given(st.lists(st.sampled_from(["load", "unload"]), max_size=40))
def test_no_two_loaded_adapters_share_a_slot_or_a_number(steps):
    """With numbers that go round after 7 of them."""
    adapters, held = Adapters(dataclasses.replace(TINY, vocab_size=1 << 28), DEVICE), []
    for place, step in enumerate(steps):
        if step == "load" and len(held) < 3:
            held.append(adapters.new(f"{place}", SOME))
            adapters.add(held[-1])
        elif step == "unload" and held:
            adapters.remove(held.pop(place % len(held)).name)
        assert sorted(each.name for each in adapters) == sorted(each.name for each in held)
        assert len({each.slot for each in held}) == len({each.number for each in held}) == len(held)
        assert all(0 <= each.slot < 3 and 1 <= each.number <= 7 for each in held)
