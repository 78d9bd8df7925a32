"""`dtype="auto"`: what the device can do fast, and what the checkpoint has."""

from pathlib import Path

import jax
import pytest
from conftest import TINY

from sparsex_jax import Engine
from sparsex_jax.checkpoints import convert, open_checkpoint
from sparsex_jax.config import EngineConfig
from sparsex_jax.engine import _with_dtype_of
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("platform", "stored", "dtype"),
    [
        ("cpu", "bfloat16", "float32"),
        ("cpu", None, "float32"),
        ("gpu", "bfloat16", "bfloat16"),
        ("gpu", "float16", "float16"),
        ("gpu", "float32", "bfloat16"),  # kernels take no float32
        ("tpu", None, "bfloat16"),  # quantised weights, or random ones
    ],
)
def test_auto_is_resolved_by_device_and_checkpoint(platform, stored, dtype):
    assert EngineConfig().dtype == "auto"
    assert EngineConfig().resolved(platform, stored).dtype == dtype
    assert EngineConfig(dtype="float32").resolved(platform, stored).dtype == "float32"


def test_an_engine_has_a_concrete_dtype():
    made = Engine.from_config(TINY, store_tokens=256, page_size=16)
    assert made.config.dtype == "float32"
    assert made.runner.store.dtype == "float32"
    given = Engine(TINY, made.runner.params, config=EngineConfig(store_tokens=256, page_size=16))
    assert given.config.dtype == "float32"
    assert Engine.from_config(TINY, store_tokens=256, page_size=16, dtype="bfloat16").config.dtype == "bfloat16"
    assert Engine.from_pretrained(GOLDEN / "qwen3", store_tokens=256).config.dtype == "float32"


def test_given_parameters_decide_on_an_accelerator(monkeypatch):
    monkeypatch.setattr("sparsex_jax.engine._platform", lambda mesh: "gpu")
    params = random_params(TINY, "float16", make_mesh())
    assert _with_dtype_of(params, EngineConfig(), make_mesh()).dtype == "float16"
    assert _with_dtype_of(params, EngineConfig(dtype="float32"), make_mesh()).dtype == "float32"
    loaded = Engine.from_pretrained(GOLDEN / "qwen3", store_tokens=256)
    assert loaded.config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.runner.params)} == {"bfloat16"}


def test_checkpoints_know_their_dtype(tmp_path):
    assert open_checkpoint(GOLDEN / "qwen3").dtype == "bfloat16"
    assert open_checkpoint(GOLDEN / "llama").dtype == "float32"
    assert open_checkpoint("smollm2-135m-instruct").dtype is None  # quantised
    convert(GOLDEN / "qwen3", tmp_path / "converted", "float16", make_mesh())
    assert open_checkpoint(tmp_path / "converted").dtype == "float16"
