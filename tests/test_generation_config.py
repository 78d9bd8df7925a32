"""What a model's files recommend for sampling is the default of requests that do not say otherwise."""

import json
import shutil
from pathlib import Path

import pytest

from sparsex_jax import Engine, SamplingParams
from sparsex_jax.checkpoints import convert, open_checkpoint
from sparsex_jax.config.generation import read_generation_config
from sparsex_jax.errors import InvalidRequestError, UnsupportedModelError
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.intake import Intake
from sparsex_jax.serving.schemas import CompletionRequest

GOLDEN = Path(__file__).parent / "golden"
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1, "eos_token_id": 5}
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen") / "model"
    shutil.copytree(GOLDEN / "qwen2", folder)
    (folder / "generation_config.json").write_text(json.dumps(QWEN))
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, dtype="float32", store_tokens=256, page_size=16)


def sampling_of(engine, **fields):
    request = CompletionRequest(prompt=[1, 2], **fields)
    return Intake(engine, Limits())._sampling(request, 4, True, None)


def test_python_callers_have_them_where_they_name_no_sampling(engine, monkeypatch):
    assert engine.sampling == SAMPLING
    assert engine.default_sampling(top_k=3) == SamplingParams(**SAMPLING | {"top_k": 3})
    asked = []
    monkeypatch.setattr(engine.loop.requests, "generation", lambda _, params, **__: asked.append(params) or 1 / 0)
    for sampling in (None, SamplingParams()):
        with pytest.raises(ZeroDivisionError):
            engine.generate([1, 2], sampling)
    assert asked == [SamplingParams(**SAMPLING), SamplingParams()]


def test_requests_have_what_they_do_not_name(engine):
    sampling = sampling_of(engine, top_p=0.5, top_k=-1)
    assert (sampling.temperature, sampling.repetition_penalty) == (0.7, 1.1)
    assert (sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0, 0)
    assert sampling_of(engine, temperature=0).temperature == 0
    assert sampling_of(engine).top_k == 20


def test_they_can_be_left_aside(folder):
    options = {"dtype": "float32", "store_tokens": 256, "page_size": 16}
    engine = Engine.from_pretrained(folder, generation_config="none", **options)
    assert engine.sampling == {}
    assert 5 in engine.model.eos_token_ids  # what ends an answer is no matter of taste
    assert sampling_of(engine).temperature == 1
    with pytest.raises(InvalidRequestError, match="generation_config='vllm' must be one of auto, none"):
        Engine.from_pretrained(folder, generation_config="vllm")


def test_a_converted_model_keeps_them(folder, tmp_path):
    convert(folder, tmp_path / "out", "float32", make_mesh())
    assert open_checkpoint(tmp_path / "out").sampling == SAMPLING


def test_values_are_checked_and_what_is_not_applied_is_said(tmp_path, caplog):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": None, "top_k": -1, "num_beams": 4, "typical_p": 1.0}))
    assert read_generation_config(tmp_path) == {"top_k": 0}
    assert "not applied: num_beams" in caplog.text
    path.write_text(json.dumps({"temperature": "hot"}))
    with pytest.raises(UnsupportedModelError, match=r"generation_config.json: temperature='hot' must be a number"):
        read_generation_config(tmp_path)
