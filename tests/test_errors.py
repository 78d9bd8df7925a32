"""Bad input raises one error that names the field and its limit, and the engine goes on."""

import numpy as np
import pytest
from conftest import found_in_segments, losing_the_store, tiny_engine

from sparsex_jax import (
    ContextLengthError,
    Engine,
    EngineConfig,
    InvalidRequestError,
    NoRoomError,
    ReuseConfig,
    SamplingParams,
    SparsexError,
    StoreFullError,
    UnknownHandleError,
    UnknownModelError,
)

BAD_PROMPTS = {
    "empty text": ([], "prompt is empty"),
    "text without a tokenizer": ("hello", "no tokenizer"),
    "a number": (5, "prompt has type int"),
    "bytes": (b"hello", "prompt has type bytes"),
    "none": (None, "prompt has type NoneType"),
    "floats": ([1.5, 2.5], "flat list of integer token ids"),
    "nested": ([[1, 2], [3, 4]], "flat list of integer token ids"),
    "ragged": ([[1, 2], [3]], "flat list of integer token ids"),
    "mixed": ([1, "two"], r"flat list of integer token ids .*; prompt\[1\] is 'two'"),
    "nothing at the end": ([1] * 600 + [None], r"prompt\[600\] is None"),
    "true": ([1, True], r"prompt\[1\] is True"),
    "a table": (np.ones((2, 2), int), "flat list of integer token ids"),
    "an integer beyond 64 bits": ([1, 2**70], "token id 1180591620717411303424"),
    "negative id": ([1, -1], "token id -1; ids must be from 0 to 96"),
    "id too large": ([1, 97], "token id 97; ids must be from 0 to 96"),
    "too long": ([1] * 1025, "prompt has 1025 tokens .* the model's limit is 1024"),
}


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
@pytest.mark.parametrize("call", ["prefill", "remember", "generate"])
def test_bad_prompts(tiny, call, prompt, message):
    pages = tiny.stats()["free"]
    with pytest.raises(InvalidRequestError, match=message):
        getattr(tiny, call)(prompt)
    assert tiny.stats()["free"] == pages
    assert tiny.generate([1, 2, 3], SamplingParams(max_new_tokens=2)).finish_reason == "length"


BAD_SETTINGS = {
    "unknown method": (lambda: {"reuse": ReuseConfig(method="magic")}, "method='magic' is unknown; there are: full"),
    "boundary": (lambda: {"reuse": ReuseConfig(boundary_layer=5)}, "boundary_layer=5 must be at most 4"),
    "second boundary": (
        lambda: {"reuse": ReuseConfig(boundary_layer=3, second_boundary=1)},
        "second_boundary=1 must be larger than boundary_layer=3",
    ),
    "negative boundary": (lambda: {"reuse": ReuseConfig(boundary_layer=-1)}, "boundary_layer=-1 must be"),
    "ratio": (lambda: {"reuse": ReuseConfig(recompute_ratio=1.5)}, "recompute_ratio=1.5 must be a number from 0 to 1"),
    "ratio not a number": (lambda: {"reuse": ReuseConfig(recompute_ratio=float("nan"))}, "recompute_ratio=nan"),
    "segment": (lambda: {"reuse": ReuseConfig(min_segment_tokens=4)}, "min_segment_tokens=4 must be an integer >= 16"),
    "reuse": (lambda: {"reuse": "sparsex"}, "reuse='sparsex' must be a ReuseConfig"),
    "sampling": (lambda: {"sampling": 5}, "sampling=5 must be SamplingParams"),
    "namespace": (lambda: {"namespace": ""}, "namespace='' must be a non-empty string"),
    "namespace type": (lambda: {"namespace": 3}, "namespace=3 must be str, or a list of them"),
    "no tokens": (lambda: {"sampling": SamplingParams(max_new_tokens=-1)}, "max_new_tokens=-1 must be an integer >= 0"),
    "temperature": (lambda: {"sampling": SamplingParams(temperature=-1)}, "temperature=-1 must be"),
    "top_p": (lambda: {"sampling": SamplingParams(top_p=1.1)}, "top_p=1.1 must be a number from 0 to 1"),
    "top_k": (lambda: {"sampling": SamplingParams(top_k=-2)}, "top_k=-2 must be an integer >= 0"),
    "seed": (lambda: {"sampling": SamplingParams(seed=2**32)}, "seed=4294967296 must be"),
    "stop": (lambda: {"sampling": SamplingParams(stop=("",))}, "must be non-empty strings"),
    "stop without tokenizer": (lambda: {"sampling": SamplingParams(stop=("x",))}, "stop=.* no tokenizer"),
    "answer too long": (
        lambda: {"sampling": SamplingParams(max_new_tokens=2000)},
        "max_new_tokens=2000: together 2003",
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(tiny, settings, message):
    with pytest.raises(InvalidRequestError, match=message):
        tiny.generate([1, 2, 3], **settings())
    assert tiny.stats()["active"] == 0
    assert tiny.generate([1, 2, 3], SamplingParams(max_new_tokens=2)).finish_reason == "length"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store_tokens", 0),
        ("page_size", 12),
        ("dtype", "int4"),
        ("max_num_seqs", 0),
        ("max_prefill_seqs", 0),
        ("max_waiting", 0),
        ("prefill_tokens", 1.5),
        ("frozen_limit", 2),
        ("chunk_rows", 1),
    ],
)
def test_errors_name_bad_engine_options(field, value):
    with pytest.raises(InvalidRequestError, match=f"{field}="):
        EngineConfig(**{field: value})


def test_errors_name_unknown_models():
    with pytest.raises(UnknownModelError, match="'gpt-9' is no embedded model"):
        Engine.from_pretrained("gpt-9")
    with pytest.raises(UnknownModelError, match=r"no configuration is named 'gpt-9'; there are: .*llama-3\.1-8b"):
        Engine.from_config("gpt-9")


@pytest.mark.parametrize("store_tokens", [500, 2000])
def test_the_longest_prompt_that_fits_is_answered(store_tokens):
    engine = tiny_engine(store_tokens=store_tokens)
    longest = {500: 512, 2000: 1024}[store_tokens]  # whole pages of 16, and the model's positions
    assert engine.max_context == longest
    assert len(engine.generate([5] * (longest - 1), SamplingParams(1)).token_ids) == 1
    assert engine.generate([6] * longest, SamplingParams(0)).finish_reason == "length"
    with pytest.raises(ContextLengthError):
        engine.generate([7] * longest, SamplingParams(2))


def test_a_store_that_is_too_small_raises():
    engine = tiny_engine(store_tokens=64)
    with pytest.raises(ContextLengthError, match="KV for 100 tokens, 7 pages of 16; store_tokens=64 gives 4"):
        engine.prefill(list(range(90)) + [1] * 10)
    with pytest.raises(ContextLengthError, match="KV for 79 tokens"):
        engine.generate(list(range(60)), SamplingParams(max_new_tokens=20))
    assert engine.generate(list(range(60)), SamplingParams(max_new_tokens=5)).finish_reason == "length"
    assert engine.stats()["active"] == 0


def test_frozen_texts_stay_and_what_does_not_fit_beside_them_is_refused():
    engine = tiny_engine(store_tokens=160)  # 10 pages
    handle = engine.remember(np.arange(40), frozen=True)
    with pytest.raises(StoreFullError, match=r"needs 3 pages of 16 tokens; frozen texts have 3 of the 5 pages"):
        engine.remember(np.arange(40, 80), frozen=True)
    assert engine.max_context == 7 * 16
    with pytest.raises(NoRoomError, match=r"needs 9 pages of 16 tokens of its own, and frozen texts leave 7 of 10"):
        engine.generate(list(range(80, 90)) * 12, SamplingParams(max_new_tokens=20))
    assert engine.generate(list(range(80, 90)) * 9, SamplingParams(max_new_tokens=20)).finish_reason == "length"
    beginning = list(range(40)) + list(range(80, 90)) * 8  # its first two pages are the text's
    assert engine.generate(beginning, SamplingParams(max_new_tokens=20)).report.prefix_tokens == 40
    assert [entry.handle for entry in engine.entries()] == [handle]
    assert engine.remember(np.arange(40)) == engine.remember(np.arange(40), frozen=True) == handle
    engine.forget(handle)
    engine.remember(np.arange(40, 96), frozen=True)
    engine.admission.check_books()


def test_errors_name_unknown_handles(tiny):
    handle = tiny.remember([1, 2, 3])
    tiny.forget(handle)
    for gone in (handle, 999):
        with pytest.raises(UnknownHandleError, match=str(gone)):
            tiny.forget(gone)


def test_a_failing_step_loses_no_page(tiny, monkeypatch):
    tiny.remember(list(range(50)), frozen=True)
    before = tiny.stats()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    for step in ("begin", "advance", "start_decode"):
        with monkeypatch.context() as patch:
            patch.setattr(tiny.runner, step, fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                tiny.generate([3, *range(50), 4], SamplingParams(max_new_tokens=5))
        after = tiny.stats()
        assert [after[k] for k in ("free", "active", "frozen")] == [before[k] for k in ("free", "active", "frozen")]
    assert found_in_segments(tiny.prefill([3, *range(50), 4], keep=False).report) == 50


def test_a_batch_that_fails_while_it_is_admitted_loses_no_page(tiny, monkeypatch):
    admit, calls = tiny.admission.admit, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no plan")
        return admit(*args)

    monkeypatch.setattr(tiny.admission, "admit", fail_at_the_second)
    with pytest.raises(RuntimeError, match="no plan"):
        tiny.generate_batch([[1, 2, 3], [4, 5, 6]])
    assert (tiny.stats()["active"], tiny.stats()["free"]) == (0, tiny.stats()["pages"])


def test_an_engine_that_lost_its_store_makes_an_empty_one(tiny):
    """A step that fails on the device deletes the store that was donated to it."""
    handle = tiny.remember(list(range(50)))
    prompt = [3, *range(50), 4]
    expected = tiny.prefill(prompt, reuse=ReuseConfig(method="full"), keep=False).logits

    with losing_the_store(tiny):
        tiny.prefill(prompt)
    assert tiny.stats()["free"] == tiny.stats()["pages"]
    out = tiny.prefill(prompt)
    assert out.report.fresh_tokens == len(prompt)  # what was stored is gone, and nothing of it is served
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)
    assert tiny.remember([1, 2, 3]) > handle  # whoever still has the old handle has no other's


def test_every_error_is_a_sparsex_error():
    for error in (InvalidRequestError, ContextLengthError, StoreFullError, UnknownHandleError, UnknownModelError):
        assert issubclass(error, SparsexError)
