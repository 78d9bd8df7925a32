"""Measures the kernels' errors against float64 on the same bfloat16 inputs, and those of cuDNN and XLA.

    python scripts/kernel_errors.py [--implementations hopper triton xla] [--tokens 2048]

Prints the relative error of each operation in the Euclidean norm, and writes `kernel-errors-<device>.json`. Queries are
multiplied by 4, so that the softmax is as peaked as in a model and rounding errors show.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import DIM, KV_HEADS, installed_kernels, rows_of

import sparsex_kernels.api as kernels
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_kernels import key_mass, paged_attention
from sparsex_kernels.arguments import AttentionArgs

RESULTS = Path(__file__).resolve().parent / "results"
Error = tuple[str, str, float]  # work, implementation, figure


def relative(out: Any, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(out, np.float64) - exact) / np.linalg.norm(exact))


def keys_values(rows: AttentionArgs) -> np.ndarray:
    """Keys and values `[2, kv_heads, tokens, dim]` of the first request, in float64."""
    pages = np.asarray(rows.store, np.float64)[0, np.asarray(rows.page_tables[0])]
    return pages.transpose(1, 2, 0, 3, 4).reshape(2, KV_HEADS, -1, DIM)


def exact_attention(rows: AttentionArgs) -> tuple[np.ndarray, np.ndarray]:
    """Attention output `[rows, q_heads, dim]` and key mass `[tokens]`, in float64."""
    q = np.asarray(rows.query, np.float64).reshape(len(rows.query), KV_HEADS, -1, DIM)
    keys, values = keys_values(rows)
    hidden = np.arange(keys.shape[1]) > np.asarray(rows.positions)[:, None, None]
    out, mass = np.empty_like(q), np.zeros(keys.shape[1])
    for head in range(KV_HEADS):
        scores = np.where(hidden, -np.inf, q[:, head] @ keys[head].T * DIM**-0.5)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, head] = weights @ values[head]
        mass += weights.sum((0, 1))
    return out.reshape(rows.query.shape), mass


def errors(tokens: int, implementations: list[str]) -> Iterator[Error]:
    cases = {
        "full prefill": rows_of([tokens], 1.0),
        "15% of rows": rows_of([tokens], 0.15),
        "decode": rows_of([tokens], 0, last_only=True),
    }
    for work, rows in cases.items():
        rows = dataclasses.replace(rows, query=4 * rows.query)
        exact, exact_mass = exact_attention(rows)
        for name in implementations:
            yield work, name, relative(paged_attention.IMPLEMENTATIONS[name](rows), exact)
            if work == "15% of rows":
                mass = key_mass.IMPLEMENTATIONS[name](rows)[0, :tokens]
                yield "key mass", name, relative(mass, exact_mass[:tokens])
        if jax.default_backend() == "gpu":
            yield work, "cudnn", relative(cudnn_attention(rows), exact)
    yield from alignment_errors(tokens, implementations)


def cudnn_attention(rows: AttentionArgs) -> jax.Array:
    """cuDNN's output for these rows. It computes all rows of the prompt, on contiguous keys and values."""
    keys, values = jnp.asarray(keys_values(rows), jnp.bfloat16)[:, None].swapaxes(2, 3)
    q = jnp.zeros((1, keys.shape[1], *rows.query.shape[1:]), rows.query.dtype).at[0, rows.positions].set(rows.query)
    attended = jax.nn.dot_product_attention(q, keys, values, is_causal=True, implementation="cudnn")
    return attended[0, rows.positions]


def alignment_errors(tokens: int, implementations: list[str]) -> Iterator[Error]:
    """The errors of keys that are rotated by 12345 positions."""
    rows = rows_of([2 * tokens], 0, last_only=True)
    slots = (np.asarray(rows.page_tables[0])[:, None] * rows.store.shape[4] + np.arange(rows.store.shape[4])).reshape(
        -1
    )
    source, target = jnp.asarray(slots[:tokens], jnp.int32), jnp.asarray(slots[tokens : 2 * tokens], jnp.int32)
    inv_freq = 500000.0 ** -np.linspace(0, 1, DIM // 2, endpoint=False)
    first, second = np.split(keys_values(rows)[0, :, :tokens], 2, axis=-1)
    cos, sin = np.cos(12345 * inv_freq), np.sin(12345 * inv_freq)
    exact = np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    for name in implementations:
        shift = jnp.full(tokens, 12345, jnp.int32)
        frequencies = jnp.asarray(inv_freq, jnp.float32)
        moved = kernels.align_and_copy(rows.store, source, target, shift, frequencies, implementation=name)
        yield (
            "aligned keys",
            name,
            relative(keys_values(dataclasses.replace(rows, store=moved))[0, :, tokens : 2 * tokens], exact),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=[*installed_kernels(), "xla"])
    parser.add_argument("--tokens", type=count, default=2048, help="a multiple of the page size, 64")
    options = parser.parse_args()
    write_rows({"bench": "kernel-errors"} | provenance(), all_rows(options), RESULTS)


def all_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for work, name, figure in errors(options.tokens, options.implementations):
        print(f"{work:20}{name:10}{figure:10.2e}", flush=True)
        found = {"work": f"{work}, {options.tokens} tokens", "implementation": name, "figure": figure}
        yield found | {"unit": "relative to float64"}


if __name__ == "__main__":
    run_script(main)
