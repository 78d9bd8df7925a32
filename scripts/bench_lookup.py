"""Measures how long the lookup of one prompt takes, compared with simpler indexes. It runs on the host only.

    uv run python scripts/bench_lookup.py

Prints a table and writes `scripts/results/lookup.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sparsex_jax.cache import PageCache
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count

VOCABULARY = 32_000


class PrefixHashes:
    """The usual prefix cache, a dictionary of chained page hashes. It finds nothing behind the first new token."""

    def __init__(self, page_size: int) -> None:
        self.page_size, self.pages = page_size, {}

    def _keys(self, tokens):
        key = b""
        for at in range(0, len(tokens) - self.page_size + 1, self.page_size):
            key = hash((key, tokens[at : at + self.page_size].tobytes()))
            yield key

    def add(self, tokens) -> None:
        self.pages.update((key, None) for key in self._keys(tokens))

    def lookup(self, tokens) -> int:
        found = 0
        for key in self._keys(tokens):
            if key not in self.pages:
                break
            found += self.page_size
        return found


class WindowDictionary:
    """The simplest segment index: a dictionary of 8-token tuples, which a lookup probes at every offset."""

    def __init__(self) -> None:
        self.tokens, self.windows = [], {}

    def add(self, tokens) -> None:
        begin = len(self.tokens)
        self.tokens += [*tokens.tolist(), -1]
        for at in range(begin, len(self.tokens) - 8, 8):
            self.windows[tuple(self.tokens[at : at + 8])] = at

    def lookup(self, tokens) -> int:
        prompt, found, at = tokens.tolist(), 0, 0
        while at + 8 <= len(prompt):
            donor = self.windows.get(tuple(prompt[at : at + 8]))
            length = 0
            if donor is not None:
                while at + length < len(prompt) and self.tokens[donor + length] == prompt[at + length]:
                    length += 1
            found += length if length >= 16 else 0
            at += length if length >= 16 else 1
        return found


def fill(cache: PageCache, documents: list[np.ndarray]) -> None:
    for tokens in documents:
        pages = cache.allocate(-(-len(tokens) // cache.page_size))
        cache.commit(pages, tokens, "bench", exact_tokens=len(tokens))
        cache.release(pages)


def cached_lookup(cache: PageCache, prompt: np.ndarray) -> int:
    match = cache.lookup(prompt, "bench")
    cache.let_go(match)
    return match.num_prefix_tokens + sum(segment.length for segment in match.segments)


def fresh_tokens(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY, count).astype(np.int32)


def mixed_prompt(rng: np.random.Generator, documents: list[np.ndarray], length: int, share: float, segments: int):
    """A prompt with `share` of its tokens in `segments` segments of different documents, and new tokens before each."""
    reused, new = int(length * share / segments), int(length * (1 - share) / segments)
    parts = []
    for document in documents[:segments]:
        parts += [fresh_tokens(rng, max(new, 1)), document[137 : 137 + reused]]
    return np.concatenate(parts)


def timed(call: Callable[[], int], repeats: int) -> tuple[float, int]:
    """The shortest time of the repeats in milliseconds, since other work on the machine adds time; and the result."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - begin) * 1e3)
    return min(times), result


def measure(args: argparse.Namespace) -> list[dict]:
    rng = np.random.default_rng(0)
    documents = [fresh_tokens(rng, 10_000) for _ in range(args.stored // 10_000)]
    cache = PageCache(args.stored // args.page_size + 2 * len(documents), args.page_size)
    chained, plain = PrefixHashes(args.page_size), WindowDictionary()
    begin = time.perf_counter()
    fill(cache, documents)
    rows = [row(f"commit {args.stored} tokens", "PageCache", (time.perf_counter() - begin) * 1e3, "ms")]
    for document in documents:
        chained.add(document)
        plain.add(document)
    work = {
        "nothing stored": fresh_tokens(rng, args.prompt),
        "exact prefix of one document, rest new": np.concatenate(
            [documents[0], fresh_tokens(rng, args.prompt - 10_000)]
        ),
    }
    for share in (0.5, 1.0):
        for segments in (16, 32):
            name = f"{share:.0%} stored in {segments} segments"
            work[name] = mixed_prompt(rng, documents, args.prompt, share, segments)
    implementations = {
        "PageCache": lambda prompt: cached_lookup(cache, prompt),
        "chained page hashes (prefix only)": chained.lookup,
        "dictionary of 8-token tuples": plain.lookup,
    }
    for name, prompt in work.items():
        for implementation, lookup in implementations.items():
            milliseconds, found = timed(lambda lookup=lookup, prompt=prompt: lookup(prompt), args.repeats)
            rows.append(row(name, implementation, milliseconds, "ms"))
            rows.append(row(name, implementation, found, "tokens found"))
    return rows + repetitive(args)


def repetitive(args: argparse.Namespace) -> list[dict]:
    """A prompt and a store of the same token everywhere, so that every window is stored at every place."""
    same = np.full(args.prompt, 7, np.int32)
    cache = PageCache(6 * (args.prompt // args.page_size + 1), args.page_size)
    fill(cache, [np.concatenate([np.int32([i]), same[1:]]) for i in range(5)])
    milliseconds, found = timed(lambda: cached_lookup(cache, np.concatenate([np.int32([99]), same])), args.repeats)
    name = "one token repeated, 5 such prompts stored"
    return [row(name, "PageCache", milliseconds, "ms"), row(name, "PageCache", found, "tokens found")]


def row(work: str, implementation: str, figure: float, unit: str) -> dict:
    return {"work": work, "implementation": implementation, "figure": round(float(figure), 3), "unit": unit}


def surroundings() -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "commit": commit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=count, default=100_000, help="tokens of the prompt")
    parser.add_argument("--stored", type=count, default=1_000_000, help="tokens in the store")
    parser.add_argument("--page-size", type=count, default=64)
    parser.add_argument("--repeats", type=count, default=15, help="the shortest time of this many lookups is reported")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lookup.json")
    args = parser.parse_args()
    rows = measure(args)
    for r in rows:
        print(f"{r['work']:<44} {r['implementation']:<34} {r['figure']:>12,.2f} {r['unit']}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**surroundings(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
