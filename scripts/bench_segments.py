"""Measures what segments cost that are in host memory: loaded first, and beside the first layers of the prompt.

    python scripts/bench_segments.py [--model llama-3.1-8b] [--length 32768] [--boundary-layer 3] [--rates 0 25]

The weights are random, since the figures depend on shapes alone. Documents are prefilled one by one and spilled to host
memory; then a prompt has them all in another order, and some tokens around them. SparseX computes every token below its
boundary layer, and reads nothing of the documents there. For each way, the median time to the first token in
milliseconds: the documents are in the store; they are in host memory and are all loaded before the prefill begins; they
are in host memory, and come while it runs, as the engine does it. A rate in GB/s throttles the link: what arrives
earlier counts as arriving later. The rate 0 is the link as it is. Prints a line for each and writes
`scripts/results/segments-<model>-<device>.json`.
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np

from sparsex_jax import ReuseConfig
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.device.link import Link
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel, make_engine
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.reuse.methods import method_of

RESULTS = Path(__file__).resolve().parent / "results"
NEW = 64  # tokens around the documents, half of them before these
NAMESPACE = "default"


class Bench:
    """An engine whose host memory has some documents, and a prompt of them."""

    def __init__(self, args: argparse.Namespace, rate: float) -> None:
        page = args.page_size
        store = 2 * args.length + NEW + 2 * args.documents * page
        sizes = {"dtype": args.dtype, "page_size": page, "choose": "always", "tensor_parallel": args.tensor_parallel}
        probe = make_engine(args.model, store_tokens=page, **sizes)
        host = 3 * args.length * probe.runner.store.nbytes // page
        del probe
        with patch("sparsex_jax.engine.Link", functools.partial(Link, bytes_per_s=1e9 * rate or None)):
            self.engine = make_engine(args.model, store_tokens=store, host_store_bytes=host, **sizes)
        assert self.engine.admission.tiers is not None
        self.engine.admission.tiers.warm_up()
        rng = np.random.default_rng(0)
        size = args.length // args.documents
        documents = rng.integers(1, self.engine.model.vocab_size, (args.documents, size)).astype(np.int32)
        for document in documents:
            self.engine.prefill(document, reuse=ReuseConfig("full"))
        self.engine.loop.settle()
        new = rng.integers(1, self.engine.model.vocab_size, NEW)
        self.prompt = np.concatenate([new[: NEW // 2], *documents[::-1], new[NEW // 2 :]]).astype(np.int32)
        self.reuse = ReuseConfig(
            boundary_layer=args.boundary_layer, recompute_ratio=args.recompute_ratio, only_if_faster=False
        )
        self.loaded_tokens = 0
        gc.collect()
        gc.freeze()  # as the server does

    def on_device(self) -> float:
        return self._prefill()

    def loaded_first(self) -> float:
        began = self._evicted()
        loading = self.engine.admission.loading
        assert loading is not None
        loading.load(self.engine.cache, self.prompt, NAMESPACE, method_of(self.reuse), {})
        loading.settle(loading.pages)
        jax.block_until_ready(self.engine.runner.store)
        self._prefill()
        return time.perf_counter() - began

    def beside(self) -> float:
        self._evicted()
        return self._prefill()

    def _prefill(self) -> float:
        began = time.perf_counter()
        report = self.engine.prefill(self.prompt, reuse=self.reuse, keep=False).report
        assert report.reused_tokens > 0
        self.loaded_tokens = report.restored_tokens
        return time.perf_counter() - began

    def _evicted(self) -> float:
        """Leave nothing in the store. Returns when that was so."""
        self.engine.loop.settle()
        self.engine.cache.clear()
        jax.block_until_ready(self.engine.runner.store)
        return time.perf_counter()


def rows_of(bench: Bench, rate: float, runs: int) -> Iterator[dict[str, object]]:
    link = f"link throttled to {rate:g} GB/s" if rate else "link as it is"
    ways: dict[str, Callable[[], float]] = {
        "in the store": bench.on_device,
        "loaded first": bench.loaded_first,
        "loaded beside the first layers": bench.beside,
    }
    for name, way in ways.items():
        way()
        figure = 1e3 * statistics.median([way() for _ in range(runs)])
        work = f"{len(bench.prompt)} tokens, {link}"
        yield {
            "work": work,
            "implementation": name,
            "figure": figure,
            "unit": "ms",
            "loaded_tokens": bench.loaded_tokens,
        }


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    small = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2-135m" if small else "llama-3.1-8b", help="a named configuration")
    add("--dtype", default="float32" if small else "bfloat16")
    add("--length", type=count, default=1024 if small else 32768, help="tokens of all documents")
    add("--documents", type=count, default=4 if small else 16)
    add("--boundary-layer", type=int, default=3)
    add("--recompute-ratio", type=float, default=0.15)
    add("--rates", type=float, nargs="+", default=[0] if small else [0, 25, 10], help="in GB/s")
    add("--page-size", type=count, default=16 if small else 64)
    add("--runs", type=count, default=3)
    add_tensor_parallel(parser)
    options = parser.parse_args(arguments)
    about: dict[str, object] = {"bench": "segments", "model": options.model} | provenance(options.tensor_parallel)
    print(write_rows(about | {"settings": vars(options)}, all_rows(options), folder))


def all_rows(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    for rate in options.rates:
        for row in rows_of(Bench(options, rate), rate, options.runs):
            print(f"{row['work']:44}{row['implementation']:34}{row['figure']:10.1f} ms", flush=True)
            yield row


if __name__ == "__main__":
    run_script(main)
