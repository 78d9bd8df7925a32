"""Shared fixtures. Eight virtual CPU devices, so that sharded engines are tested on any machine."""

import importlib.util
import os

import jax
import pytest

# The suite compiles far more than it computes, so LLVM optimises little: programs compile in a third of the time, and
# SmolLM2 runs as fast. XLA reads this at its first use. Not where JAX has CUDA: it would reach the kernels for GPUs.
if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"

jax.config.update("jax_num_cpu_devices", 8)

from sparsex_jax import Engine, ModelConfig  # noqa: E402  (devices are fixed at the first use of jax)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs under pytest's cache, so that no worker or later run compiles a program again."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_compilation_cache_max_size", 1 << 28)  # bytes; with a limit, files are locked
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session")
def smollm() -> Engine:
    """SmolLM2-135M-Instruct in float32. All tests share it, so each uses namespaces of its own."""
    return Engine.from_pretrained("smollm2-135m-instruct", dtype="float32", store_tokens=16384)


TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=1024,
)

# With the vocabulary of SmolLM2, whose tokenizer it can use.
TALKING = ModelConfig(
    vocab_size=49152,
    hidden_size=32,
    intermediate_size=64,
    num_layers=6,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    max_position=2048,
    tied_embeddings=True,
)


@pytest.fixture
def tiny() -> Engine:
    """A small random model with pages of 16 tokens and an empty store."""
    return Engine.from_config(TINY, store_tokens=2048, page_size=16, max_num_seqs=4, chunk_rows=32)
