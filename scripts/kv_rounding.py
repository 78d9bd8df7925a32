"""Measures what rounding KV to float8 (e4m3) costs on a model's own keys and values, and what moving rounded keys adds.

    python scripts/kv_rounding.py [--model smollm2-135m-instruct] [--tokens 400] [--moves 10]

Prefills this repository's README in float32, rounds what the store then holds, and prints relative errors in the
Euclidean norm, as means over layers: of keys and values for several scales, and of keys that were moved, and rounded,
several times. Then the same prefix in an engine with `kv_dtype="fp8"`, whose keys are moved to and fro: the divergence
(nats) of the next token's probabilities behind some continuations from those in float32. Writes no file. Runs on a CPU.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.model.decoder import inv_freq
from sparsex_kernels.layout import as_stored
from sparsex_kernels.rope import apply_rope

TEXT = Path(__file__).resolve().parent.parent / "README.md"
LARGEST = 448.0  # of e4m3
CONTINUATIONS, LENGTH = 12, 12  # and their tokens
SCALES = ("none", "layer", "layer and head", "token and head")  # what shares a scale


def load(options: argparse.Namespace, kv_dtype: str = "auto") -> tuple[Engine, np.ndarray]:
    """An engine, and the tokens of the text."""
    size = 2 * options.tokens + 64 * CONTINUATIONS
    engine = Engine.from_pretrained(
        options.model, dtype="float32", kv_dtype=kv_dtype, store_tokens=size, choose="always", healing=0
    )
    assert engine.tokenizer is not None
    return engine, np.asarray(engine.tokenizer.encode(TEXT.read_text()), np.int32)


def stored(engine: Engine, prompt: np.ndarray) -> np.ndarray:
    """K and V of the prompt, `[layers, 2, tokens, kv_heads, head_dim]` in float32. It stays in the store."""
    engine.generate(prompt, SamplingParams(1))
    kv = np.asarray(engine.runner.store)  # [layers, pages, 2, kv_heads, page_size, head_dim]
    used = np.abs(kv).max(axis=(0, 2, 3, 5)) > 0
    return kv.transpose(0, 2, 1, 4, 3, 5)[:, :, used]


def rounded(x: np.ndarray, shared: str) -> np.ndarray:
    """`x` after a store in e4m3, scaled so that the largest number which shares a scale is the largest of the type."""
    axes = {"layer": (1, 2, 3), "layer and head": (1, 3), "token and head": (3,)}
    scale = np.float32(1) if shared == "none" else np.abs(x).max(axes[shared], keepdims=True) / LARGEST
    wide = jnp.clip(jnp.asarray(x / scale), -LARGEST, LARGEST)
    return np.asarray(wide.astype(jnp.float8_e4m3fn).astype(jnp.float32)) * scale


def error(found: np.ndarray, true: np.ndarray) -> float:
    """Relative, the mean over layers."""
    axes = tuple(range(1, true.ndim))
    return float(np.mean(np.sqrt(((found - true) ** 2).sum(axes) / (true**2).sum(axes))))


def moves(keys: np.ndarray, frequencies: np.ndarray, count: int) -> Iterator[tuple[int, float, float]]:
    """After each move by a random shift: its number, the error, and that of one move from what was first stored."""
    rng, true, at = np.random.default_rng(0), keys, 0
    chained = first = rounded(keys, "none")
    for number in range(count + 1):
        once = first if number == 0 else rounded(rotate(first, at, frequencies), "none")
        true = rotate(keys, at, frequencies)
        yield number, error(chained, true), error(once, true)
        by = int(rng.integers(-200, 200))
        chained, at = rounded(rotate(chained, by, frequencies), "none"), at + by


def rotate(keys: np.ndarray, by: int, frequencies: np.ndarray) -> np.ndarray:
    return np.asarray(apply_rope(jnp.asarray(keys), jnp.full(keys.shape[:2], by), jnp.asarray(frequencies)))


def next_logprobs(engine: Engine, text: np.ndarray, prefix: int) -> np.ndarray:
    """Log-probabilities `[continuations, vocab]` of the next token, behind the stored prefix and a continuation."""
    begins = np.linspace(prefix, len(text) - LENGTH, CONTINUATIONS).astype(int)
    prompts = [np.concatenate([text[:prefix], text[begin : begin + LENGTH]]) for begin in begins]
    outs = engine.generate_batch(
        prompts, SamplingParams(1), reuse=ReuseConfig("prefix"), keep=False, return_logits=True
    )
    assert all(out.report.prefix_tokens > prefix - engine.config.page_size for out in outs)
    logits = np.stack([np.asarray(out.logits, np.float64).reshape(-1) for out in outs])
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def move_all_keys(engine: Engine, by: int, frequencies: np.ndarray) -> None:
    """Rotate every key of the store in place, as if all tokens moved, and round it to the store's dtype."""
    store = engine.runner.store
    keys = store[:, :, 0].astype(jnp.float32).swapaxes(2, 3)  # [layers, pages, slots, kv_heads, head_dim]
    moved = apply_rope(keys, jnp.full(keys.shape[:3], by), jnp.asarray(frequencies)).swapaxes(2, 3)
    engine.runner.store = store.at[:, :, 0].set(as_stored(moved, store.dtype))


def print_divergences(options: argparse.Namespace, true: np.ndarray, frequencies: np.ndarray) -> None:
    engine, text = load(options, "fp8")
    stored(engine, text[: options.tokens])
    rng = np.random.default_rng(0)
    for number in range(0, options.moves + 1, 2):
        found = next_logprobs(engine, text, options.tokens)
        divergence = (np.exp(true) * (true - found)).sum(-1).mean()
        same = (found.argmax(-1) == true.argmax(-1)).mean()
        print(f"fp8, moved {number:2} times: divergence {divergence:.5f}; the same most probable token {same:.2f}")
        by = int(rng.integers(50, 400))
        move_all_keys(engine, by, frequencies)
        move_all_keys(engine, -by, frequencies)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--moves", type=int, default=10)
    options = parser.parse_args()
    engine, text = load(options)
    kv, frequencies = stored(engine, text[: options.tokens]), np.asarray(inv_freq(engine.model))
    for kind, x in (("keys", kv[:, 0]), ("values", kv[:, 1])):
        print(f"{kind}: largest {np.abs(x).max():.1f}; median of layers' root mean squares {rms(x):.3f}")
        for shared in SCALES:
            print(f"  scale shared by {shared:16}: error {error(rounded(x, shared), x):.4f}")
    for number, chained, once in moves(kv[:, 0], frequencies, options.moves):
        print(f"moved {number:2} times: error {chained:.4f}; from the first copy in one move {once:.4f}")
    true = next_logprobs(engine, text, options.tokens)
    del engine
    print_divergences(options, true, frequencies)


def rms(x: np.ndarray) -> float:
    return float(np.median(np.sqrt((x**2).mean(axis=(1, 2, 3)))))


if __name__ == "__main__":
    run_script(main)
