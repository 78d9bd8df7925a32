"""Measures what rounding KV to float8 (e4m3) costs on a model's own keys and values, and what moving rounded keys adds.

    python scripts/kv_rounding.py [--model smollm2-135m-instruct] [--tokens 400] [--moves 10]

Prefills this repository's README in float32, rounds what the store then holds, and prints relative errors in the
Euclidean norm, as means over layers: of keys and values for several scales, and of keys that were moved, and rounded,
several times. Writes no file. Runs on a CPU.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sparsex_jax import Engine, SamplingParams
from sparsex_jax.model.decoder import inv_freq
from sparsex_kernels.rope import apply_rope

TEXT = Path(__file__).resolve().parent.parent / "README.md"
LARGEST = 448.0  # of e4m3
SCALES = ("none", "layer", "layer and head", "token and head")  # what shares a scale


def stored(model: str, tokens: int) -> tuple[Engine, np.ndarray]:
    """K and V of the text, `[layers, 2, tokens, kv_heads, head_dim]` in float32."""
    engine = Engine.from_pretrained(model, dtype="float32", store_tokens=2 * tokens, choose="always")
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode(TEXT.read_text())[:tokens]
    engine.generate(np.asarray(prompt, np.int32), SamplingParams(1))
    kv = np.asarray(engine.runner.store)  # [layers, pages, 2, kv_heads, page_size, head_dim]
    used = np.abs(kv).max(axis=(0, 2, 3, 5)) > 0
    return engine, kv.transpose(0, 2, 1, 4, 3, 5)[:, :, used]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--moves", type=int, default=10)
    options = parser.parse_args()
    engine, kv = stored(options.model, options.tokens)
    for kind, x in (("keys", kv[:, 0]), ("values", kv[:, 1])):
        print(f"{kind}: largest {np.abs(x).max():.1f}; median of layers' root mean squares {rms(x):.3f}")
        for shared in SCALES:
            print(f"  scale shared by {shared:16}: error {error(rounded(x, shared), x):.4f}")
    for number, chained, once in moves(kv[:, 0], np.asarray(inv_freq(engine.model)), options.moves):
        print(f"moved {number:2} times: error {chained:.4f}; from the first copy in one move {once:.4f}")


def rms(x: np.ndarray) -> float:
    return float(np.median(np.sqrt((x**2).mean(axis=(1, 2, 3)))))


if __name__ == "__main__":
    main()
