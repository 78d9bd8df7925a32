"""Measures the kernels on this device, compared with XLA's versions, cuDNN, PyTorch, FlashInfer, a copy and a matmul.

    python scripts/bench_kernels.py [--quick] [--only SUBSTRING]

With 32 query heads and 8 KV heads of 128, in bfloat16. Prints a table while it runs, and writes
`scripts/results/kernels-<device>.json` and, if matplotlib is installed, a roofline plot. A figure is the median of five
calls, each of which repeats the work many times on the device, one repetition after the other. Triton and FlashInfer
are measured if `jax_triton` and `flashinfer` are installed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import sparsex_kernels.api as kernels
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.results import provenance, write_json
from sparsex_kernels import key_mass as mass_versions
from sparsex_kernels import paged_attention as attention_versions
from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import default_backend

RESULTS = Path(__file__).resolve().parent / "results"
Q_HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64
CALLS, SECONDS = 5, 0.1  # timed calls, and device time of each


class Row(NamedTuple):
    """One figure: the seconds of a repetition, and its operations and bytes."""

    work: str
    implementation: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def rates(self) -> tuple[float, float]:
        """Operations and bytes in a second."""
        return self.flops / self.seconds, self.bytes / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The row in the result file."""
        figures = {"figure": 1e3 * self.seconds, "unit": "ms"}
        rates = {"tflops": self.rates[0] / 1e12, "terabytes_per_second": self.rates[1] / 1e12}
        return {"work": self.work, "implementation": self.implementation} | figures | rates


def median_seconds(step: Callable[[Any, Any], Any], state: Any, data: Any) -> float:
    """Seconds of one `state = step(state, data)`; `state` is donated."""

    def repeated(state: Any, data: Any, times: jax.Array) -> Any:
        return lax.fori_loop(0, times, lambda _, state: step(state, data), state)

    run = jax.jit(repeated, donate_argnums=0)
    state = jax.block_until_ready(run(state, data, jnp.int32(2)))
    begin = time.perf_counter()
    state = jax.block_until_ready(run(state, data, jnp.int32(3)))
    times = max(3, min(1000, int(SECONDS / max(time.perf_counter() - begin, 1e-6) * 3)))
    taken = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        state = jax.block_until_ready(run(state, data, jnp.int32(times)))
        taken.append((time.perf_counter() - begin) / times)
    return statistics.median(taken)


def after(q: jax.Array, result: jax.Array) -> jax.Array:
    """`q` with one element of `result` in it, so that a loop can neither drop the work nor move it out.

    An optimisation barrier is not enough, because the compiler drops results behind it that are unused.
    """
    return q.at[(0,) * q.ndim].set(result[(0,) * result.ndim].astype(q.dtype))


def rows_of(
    lengths: list[int],
    share: float,
    seed: int = 0,
    last_only: bool = False,
    bucket: int = 0,
    stored: Any = jnp.bfloat16,
) -> AttentionArgs:
    """Rows for a random share of the tokens of each request, or for its last token, and one layer of a store.

    There are at least `bucket` rows: the others are padding. The store has the dtype `stored`.
    """
    rng = np.random.default_rng(seed)
    pages = -(-max(lengths) // PAGE)
    tables = rng.permutation(len(lengths) * pages).reshape(len(lengths), pages).astype(np.int32)
    chosen = [
        np.array([n - 1]) if last_only else np.sort(rng.permutation(n)[: max(1, int(n * share))]) for n in lengths
    ]
    positions = np.concatenate(chosen).astype(np.int32)
    requests = np.repeat(np.arange(len(lengths)), [len(c) for c in chosen]).astype(np.int32)
    padding = max(bucket - len(positions), 0)
    positions, requests = np.pad(positions, (0, padding), constant_values=-1), np.pad(requests, (0, padding))
    keys = jax.random.split(jax.random.key(seed))
    q = jax.random.normal(keys[0], (len(positions), Q_HEADS, DIM), jnp.bfloat16)
    store = jax.random.normal(keys[1], (1, tables.size, 2, KV_HEADS, PAGE, DIM), jnp.bfloat16).astype(stored)
    addresses = map(jnp.asarray, (positions, requests, tables))
    return AttentionArgs(q, store, jnp.int32(0), *addresses, scale=DIM**-0.5, backend=default_backend())


def pairs_of(rows: AttentionArgs) -> float:
    """Pairs of a row and a key that it sees; padding, at position -1, sees none."""
    return float(np.asarray(rows.positions, np.float64).sum() + len(rows.positions))


def seconds_of(operation: Callable[[AttentionArgs], Any], rows: AttentionArgs) -> float:
    """Seconds of an operation on these rows, each repetition's queries waiting for the result before."""

    def step(q: jax.Array, rows: AttentionArgs) -> jax.Array:
        return after(q, operation(dataclasses.replace(rows, query=q)))

    return median_seconds(step, jnp.array(rows.query), rows)


def attention(work: str, rows: AttentionArgs, implementation: str) -> Row:
    rank = 0 if rows.low_rank is None else rows.low_rank.rank
    flops = (4 * DIM + 2 * rank) * Q_HEADS * pairs_of(rows) + 2 * rank * DIM * Q_HEADS * len(rows.positions)
    numbers = 2 * KV_HEADS * DIM + rank  # of a key; Y is read once for all heads
    read = rows.store.dtype.itemsize * numbers * float(np.asarray(last_positions(rows), np.float64).sum())
    seconds = seconds_of(attention_versions.IMPLEMENTATIONS[implementation], rows)
    return Row(work, implementation, seconds, flops, read)


def with_adapters(rows: AttentionArgs, rank: int, adapters: int = 8) -> AttentionArgs:
    """The rows with adapters, in turn, each with `rank` columns of Y."""
    layers, pages, page_size, dtype = len(rows.store), rows.store.shape[1], rows.store.shape[4], rows.query.dtype
    keys, number = jax.random.split(jax.random.key(1)), jnp.arange(len(rows.page_tables)) % adapters
    store = jax.random.normal(keys[0], (layers, pages, page_size, adapters * rank), dtype)
    matrices = jax.random.normal(keys[1], (layers, adapters, KV_HEADS, rank, DIM), dtype)
    return dataclasses.replace(rows, low_rank=kernels.LowRank(store, matrices, number * rank, number))


def last_positions(rows: AttentionArgs) -> np.ndarray:
    positions, requests = np.asarray(rows.positions), np.asarray(rows.requests)
    return np.array([positions[requests == r].max() + 1 for r in np.unique(requests)])


def key_mass(work: str, rows: AttentionArgs, implementation: str) -> Row:
    flops = 2 * 2 * DIM * Q_HEADS * pairs_of(rows)  # scores are computed twice
    return Row(work, implementation, seconds_of(mass_versions.IMPLEMENTATIONS[implementation], rows), flops)


def cudnn(work: str, tokens: int) -> Row:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, tokens, heads, DIM), jnp.bfloat16)
        for key, heads in zip(keys, (Q_HEADS, KV_HEADS, KV_HEADS), strict=True)
    )

    def step(q: jax.Array, kv: Any) -> jax.Array:
        return after(q, jax.nn.dot_product_attention(q, *kv, is_causal=True, implementation="cudnn"))

    return Row(work, "cudnn", median_seconds(step, q, (k, v)), 4 * DIM * Q_HEADS * tokens * (tokens + 1) / 2)


def torch_seconds(run: Callable[[], Any]) -> float:
    import torch

    for _ in range(3):
        run()
    taken = []
    for _ in range(CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            run()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e4)
    return statistics.median(taken)


def torch_inputs(rows: int, tokens: int) -> Any:
    import torch

    shapes = ((Q_HEADS, rows), (KV_HEADS, tokens), (KV_HEADS, tokens))
    return [torch.randn(1, heads, n, DIM, device="cuda", dtype=torch.bfloat16) for heads, n in shapes]


def sdpa(work: str, tokens: int) -> Row:
    from torch.nn import functional

    q, k, v = torch_inputs(tokens, tokens)
    seconds = torch_seconds(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return Row(work, "torch sdpa", seconds, 4 * DIM * Q_HEADS * tokens * (tokens + 1) / 2)


def flex(work: str, rows: AttentionArgs) -> Row:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    positions = torch.tensor(np.asarray(rows.positions), device="cuda")
    tokens = rows.page_tables.size * PAGE
    q, k, v = torch_inputs(len(positions), tokens)
    mask = create_block_mask(lambda b, h, i, j: positions[i] >= j, None, None, len(positions), tokens, device="cuda")
    compiled = torch.compile(flex_attention)
    seconds = torch_seconds(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True))
    return Row(work, "torch flex", seconds, 4 * DIM * Q_HEADS * pairs_of(rows))


def flashinfer(work: str, lengths: list[int], last_only: bool) -> Row:
    """FlashInfer for all tokens of each request, or its last one, over pages of the same layout."""
    import torch
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Wrapper

    pages, rows = [n // PAGE for n in lengths], [1 if last_only else n for n in lengths]
    row_ends, page_ends = (torch.tensor([0, *np.cumsum(n)], dtype=torch.int32, device="cuda") for n in (rows, pages))
    indices = torch.randperm(sum(pages), device="cuda").int()
    last_page = torch.full((len(lengths),), PAGE, dtype=torch.int32, device="cuda")
    wrapper = Wrapper(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "HND")
    sizes = (Q_HEADS, KV_HEADS, DIM, PAGE)
    wrapper.plan(row_ends, page_ends, indices, last_page, *sizes, causal=True, q_data_type=torch.bfloat16)
    shapes = ((sum(rows), Q_HEADS, DIM), (sum(pages), 2, KV_HEADS, PAGE, DIM))
    q, store = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    pairs = sum(n if last_only else n * (n + 1) / 2 for n in lengths)
    out = torch.empty_like(q)
    seconds = torch_seconds(lambda: wrapper.run(q, store, out=out))
    return Row(work, "flashinfer", seconds, 4 * DIM * Q_HEADS * pairs, 4 * KV_HEADS * DIM * sum(lengths))


class Moves(NamedTuple):
    """A store, and segments of 1024 tokens to copy in it, whose sources and targets do not begin at a page."""

    store: jax.Array
    source: np.ndarray
    target: np.ndarray
    free: int  # the first slot that is neither

    @classmethod
    def of(cls, tokens: int, layers: int, stored: Any = jnp.bfloat16, more: int = 0) -> "Moves":
        """With `more` free slots."""
        page = jax.random.normal(jax.random.key(0), (1, 64, 2, KV_HEADS, PAGE, DIM), jnp.bfloat16).astype(stored)
        pages = (2 * tokens + more) // PAGE + 128
        store = jnp.tile(page, (layers, -(-pages // 64), 1, 1, 1, 1))
        source, target = np.arange(tokens) + 11, np.arange(tokens) + tokens + 64 + 30
        source = source.reshape(-1, 1024)[np.random.default_rng(0).permutation(tokens // 1024)].reshape(-1)
        return cls(store, source, target, 2 * tokens + 128)

    def bytes_of(self, rows: int) -> int:
        """K and V of rows (a token in a layer), read and written."""
        return 2 * 2 * self.store.dtype.itemsize * rows * KV_HEADS * DIM


def align(work: str, tokens: int, layers: int, implementation: str, stored: Any = jnp.bfloat16) -> Row:
    return copy_with(work, Moves.of(tokens, layers, stored), None, implementation)


def copy_with(work: str, moves: Moves, patch: kernels.Patch | None, implementation: str) -> Row:
    store, source, target, _ = moves
    shift = target - source - len(source)
    data = tuple(jnp.asarray(x, jnp.int32) for x in (source, target, shift))
    inv_freq = 500000.0 ** -jnp.linspace(0, 1, DIM // 2, endpoint=False)

    def step(store: jax.Array, data: Any) -> jax.Array:
        moved, patch = data
        return kernels.align_and_copy(store, *moved, patch=patch, implementation=implementation)

    seconds = median_seconds(step, store, ((*data, inv_freq), patch))
    return Row(work, implementation, seconds, 0, moves.bytes_of(len(store) * len(source)))


def restore(work: str, tokens: int, layers: int, share: float, least: int, implementation: str) -> Row:
    """The same copy with a share of the tokens patched in all layers, in blocks of 32, and the others in `least`.

    Blocks begin at no multiple of a kernel's tile. Patch rows lie in the order of their tokens: first those of whole
    tokens, then the others, at layer offsets 0, `least`, 2 `least` and so on, each in a stretch of slots.
    """
    moves = Moves.of(tokens, layers, more=tokens)
    blocks = np.random.default_rng(1).permutation(tokens // 32 - 1)[: int(tokens / 32 * share)]
    whole = np.zeros(tokens, bool)
    whole[(blocks[:, None] * 32 + np.arange(5, 37)).ravel()] = True
    depth = np.where(whole, layers, least)
    slots, offsets = moves.free + np.cumsum(whole) - 1, np.zeros(tokens, int)
    if least:
        others = np.arange(np.count_nonzero(~whole))
        stretch = -(-len(others) * least // layers)
        slots[~whole] = moves.free + np.count_nonzero(whole) + others % stretch
        offsets[~whole] = others // stretch * least
    patch = (jnp.asarray(x, jnp.int32) for x in (slots, offsets, depth, np.zeros(tokens)))
    return copy_with(work, moves, kernels.Patch(*patch), implementation)


def pack(work: str, tokens: int, layers: int, depth: int, implementation: str) -> Row:
    """The first layers of as many tokens, `layers / depth` of them into one slot."""
    moves, stretch = Moves.of(tokens, layers), -(-tokens * depth // layers)
    order = np.arange(tokens)
    lists = moves.source, moves.target[order % stretch], order // stretch * depth, np.full(tokens, depth)
    data = tuple(jnp.asarray(x, jnp.int32) for x in lists)

    def step(store: jax.Array, data: Any) -> jax.Array:
        return kernels.pack_rows(store, *data, implementation=implementation)

    return Row(work, implementation, median_seconds(step, moves.store, data), 0, moves.bytes_of(depth * tokens))


def write(work: str, rows: AttentionArgs, implementation: str) -> Row:
    keys, values = jax.random.normal(jax.random.key(0), (2, len(rows.query), KV_HEADS, DIM), jnp.bfloat16)

    def step(store: jax.Array, data: Any) -> jax.Array:
        return kernels.write_kv(store, jnp.int32(0), *data, implementation=implementation)

    addresses = rows.positions, rows.requests, rows.page_tables
    seconds = median_seconds(step, jnp.array(rows.store), (keys, values, *addresses))
    return Row(work, implementation, seconds, 0, 2 * 2 * 2 * len(rows.query) * KV_HEADS * DIM)


def floor_copy(work: str) -> Row:
    x = jax.random.normal(jax.random.key(0), (1 << 29,), jnp.bfloat16)
    return Row(work, "xla", median_seconds(lambda x, scale: x * scale, x, jnp.bfloat16(1.01)), 0, 4 * x.size)


def floor_matmul(work: str) -> Row:
    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), jnp.bfloat16)
    return Row(work, "xla", median_seconds(lambda a, b: (a @ b) * jnp.bfloat16(0.01), a, b), 2 * 8192**3)


def installed_kernels() -> list[str]:
    return ["hopper", "triton"] if importlib.util.find_spec("jax_triton") else ["hopper"]


def benches(quick: bool) -> Iterator[tuple[str, Callable[..., Row], tuple[Any, ...]]]:
    """The name, function and arguments of every row. An argument may be a function that makes it."""
    ours = [*installed_kernels(), *([] if quick else ["xla"])]
    beside = [flashinfer] if importlib.util.find_spec("flashinfer") else []
    yield "copy 1 GB", floor_copy, ()
    yield "matmul 8192", floor_matmul, ()
    for tokens in (8192, 32768):
        name = f"T={tokens // 1024}K"
        yield f"full prefill {name}", cudnn, (tokens,)
        for implementation in ours:
            yield f"full prefill {name}", attention, (lambda n=tokens: rows_of([n], 1.0), implementation)
            yield f"15% of rows {name}", attention, (lambda n=tokens: rows_of([n], 0.15), implementation)
        yield f"full prefill {name}", sdpa, (tokens,)
        for bench in beside:
            yield f"full prefill {name}", bench, ([tokens], False)
        yield f"15% of rows {name}", flex, (lambda n=tokens: rows_of([n], 0.15),)
    few = functools.partial(rows_of, [10340], 101 / 10340, bucket=1024)
    for implementation in ours:
        yield "attention, 101 of 1024 rows T=10K", attention, (few, implementation)
        yield "key mass, 101 of 1024 rows T=10K", key_mass, (few, implementation)
        yield "attention, 5% of rows T=32K", attention, (lambda: rows_of([32768], 0.05), implementation)
        yield "key mass, 5% of rows T=32K", key_mass, (lambda: rows_of([32768], 0.05), implementation)
        yield "decode 64 x 8K", attention, (lambda: rows_of([8192] * 64, 0, last_only=True), implementation)
        yield "decode 1 x 128K", attention, (lambda: rows_of([131072], 0, last_only=True), implementation)
        yield "write 8192 rows", write, (lambda: rows_of([8192], 1.0), implementation)
        yield "align 32768 tokens x 32 layers", align, (32768, 32, implementation)
    for implementation in ours:
        yield from mirror_benches(implementation)
        yield from stored_benches(implementation)
        yield from adapter_benches(implementation)
    for bench in beside:
        yield "decode 64 x 8K", bench, ([8192] * 64, True)
        yield "decode 1 x 128K", bench, ([131072], True)


def mirror_benches(implementation: str) -> Iterator[tuple[str, Callable[..., Row], tuple[Any, ...]]]:
    """Ways in and out of packed rows, beside the plain copy of as many tokens: `--only 25600`."""
    yield "align 25600 tokens x 32 layers", align, (25600, 32, implementation)
    for least in (0, 1):
        name = "restore 25600 x 32, 5 % patched" + ", rest 1 layer" * least
        yield name, restore, (25600, 32, 0.05, least, implementation)
    yield "pack 25600 tokens x 32 layers", pack, (25600, 32, 32, implementation)
    yield "pack 25600 tokens x 4 of 32 layers", pack, (25600, 32, 4, implementation)


def stored_benches(implementation: str) -> Iterator[tuple[str, Callable[..., Row], tuple[Any, ...]]]:
    """Rows of both dtypes of the store, for one implementation."""
    for stored, name in ((jnp.bfloat16, "bf16"), (jnp.float8_e4m3fn, "fp8")):
        of = functools.partial(rows_of, stored=stored)
        for number in (1, 32):
            rows = functools.partial(of, [8192] * number, 0, last_only=True)
            yield f"decode {number} x 8K, KV {name}", attention, (rows, implementation)
        yield f"full prefill T=8K, KV {name}", attention, (functools.partial(of, [8192], 1.0), implementation)
        yield f"key mass, 15% T=8K, KV {name}", key_mass, (functools.partial(of, [8192], 0.15), implementation)
        yield f"align 32768 x 32 layers, KV {name}", align, (32768, 32, implementation, stored)


def adapter_benches(implementation: str) -> Iterator[tuple[str, Callable[..., Row], tuple[Any, ...]]]:
    """Attention without adapters and with those of two ranks, for one implementation: `--only adapters`."""
    prefill = functools.partial(rows_of, [8192], 1.0)
    decode = functools.partial(rows_of, [8192] * 64, 0, last_only=True)
    for work, make in (("full prefill T=8K", prefill), ("decode 64 x 8K", decode)):
        yield f"{work}, no adapters", attention, (make, implementation)
        for rank in (16, 32):
            rows = functools.partial(lambda make, rank: with_adapters(make(), rank), make, rank)
            yield f"{work}, adapters of rank {rank}", attention, (rows, implementation)


def show(row: Row) -> str:
    rate = f"{row.flops / row.seconds / 1e12:8.0f} TFLOP/s" if row.flops else " " * 16
    moved = f"{row.bytes / row.seconds / 1e12:8.2f} TB/s" if row.bytes else ""
    return f"{row.work:48}{row.implementation:12}{row.seconds * 1e3:10.3f} ms {rate} {moved}"


def save(rows: list[Row]) -> Path:
    return write_json({"bench": "kernels"} | provenance() | {"rows": [row.to_dict() for row in rows]}, RESULTS)


def plot(rows: list[Row], path: Path) -> None:
    """Plot the rows with operations and bytes under the device's roofline."""
    from matplotlib import pyplot

    floors = {row.work: row for row in rows}
    bandwidth = floors["copy 1 GB"].bytes / floors["copy 1 GB"].seconds
    peak = floors["matmul 8192"].flops / floors["matmul 8192"].seconds
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensity = np.geomspace(1, 1e5)
    axes.loglog(intensity, np.minimum(peak, intensity * bandwidth) / 1e12, "k-", lw=1)
    for row in rows:
        if row.flops and row.bytes:
            label = f"{row.work}, {row.implementation}"
            axes.loglog(row.flops / row.bytes, row.flops / row.seconds / 1e12, "o", label=label)
    axes.set(xlabel="operations a byte of K and V", ylabel="TFLOP/s")
    axes.legend(fontsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="skip XLA's versions of the kernels")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # so that PyTorch finds memory
    rows: list[Row] = []
    for work, bench, args in benches(options.quick):
        if options.only in work:
            try:
                row = bench(work, *(arg() if callable(arg) else arg for arg in args))
                rows.append(row)
                print(show(row), flush=True)
            except Exception:  # if one fails, the others run all the same
                print(f"{work} {args[-1:]} failed\n{traceback.format_exc(limit=-3)}", flush=True)
    path = save(rows)
    try:
        plot(rows, path.with_suffix(".svg"))
    except (ImportError, KeyError) as error:
        print(f"no plot: {error!r}")
    print(path)


if __name__ == "__main__":
    run_script(main)
