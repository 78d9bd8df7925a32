"""Measures the link between this machine's devices and its memory, as the tiers of the KV cache use it.

    python scripts/bench_link.py [--mebibytes 2048] [--devices 1]

Blocks of 1 to 16 pages, of the shape of an 8B model's KV (8 KV heads of 128, pages of 64, bfloat16, 32 layers), are
moved down to host memory and up again. First into memory that the process has not used before; then what it takes to
write them into the store, and to make them NumPy arrays and back; then GB/s each way and both ways at once, by the
bytes of a piece; then a load beside compute that takes twice as long, dispatched before it, behind it and between its
parts, and how long the calls take while the device is busy. A figure is the median of five. Prints a line for each and
writes `scripts/results/link-<device>.json`.

On a CPU, "device" and "host" are the same memory, so the figures are those of its copies and say nothing of a link; the
model has fewer layers there.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparsex_jax import EngineConfig, ModelConfig
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.device.link import HostBlock, Link
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.store import make_store

RESULTS = Path(__file__).resolve().parent / "results"
CALLS = 5
CELLS = 16  # that compute is cut into where loads are dispatched between them
PAGE = 64
SAME_MEMORY = "Measured on a CPU, whose device memory is the host's: these are copies within it, and no link."


class Row(NamedTuple):
    """One figure. `implementation` is how the work was done."""

    work: str
    implementation: str
    figure: float
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """As the result file has it: four digits are more than are sure."""
        return self._asdict() | {"figure": float(f"{self.figure:.4g}")}


class Setup(NamedTuple):
    """What is measured on.

    Attributes:
      model: of which the KV has the shape.
      engine: whose store has room for `pages` pages.
      devices: that the heads are split over.
      pages: that are moved at a time.
      matrix: rows and columns of the products that loads run beside.
    """

    model: ModelConfig
    engine: EngineConfig
    devices: int
    pages: int
    matrix: int

    @classmethod
    def of(cls, mebibytes: int, devices: int, layers: int, matrix: int) -> "Setup":
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "max_position": 131072}
        model = ModelConfig(num_layers=layers, num_q_heads=32, num_kv_heads=8, head_dim=128, **sizes)
        pages = max((mebibytes << 20) // (layers * 2 * 8 * PAGE * 128 * 2) // 16, 1) * 16
        return cls(
            model, EngineConfig(store_tokens=pages * PAGE, page_size=PAGE, dtype="bfloat16"), devices, pages, matrix
        )

    @property
    def nbytes(self) -> int:
        """Of all pages that are moved."""
        vectors = self.pages * self.engine.page_size * 2 * self.model.num_layers * self.model.num_kv_heads
        return vectors * self.model.head_dim * jnp.dtype(self.engine.dtype).itemsize


def median_seconds(run: Callable[[], Any]) -> float:
    """Seconds until all that a call returns is there; the first call does not count."""

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - began

    timed()
    return statistics.median(timed() for _ in range(CALLS))


class Bench:
    """A store and a link, and the pages of the store as blocks of one size in host memory."""

    def __init__(self, setup: Setup, block_pages: int = 16, num_groups: int = 4) -> None:
        self.setup = setup
        self.mesh = make_mesh(setup.devices)
        self.link = Link(setup.model, setup.engine, self.mesh, num_groups=num_groups)
        self.store = self.link.warm_up(make_store(setup.model, setup.engine, self.mesh))
        self.runs = [range(at, at + block_pages) for at in range(0, setup.pages, block_pages)]
        self.groups = range(len(self.link.layers))
        began = time.perf_counter()
        self.blocks = self.spill()
        for block in self.blocks:
            block.wait()
        self.first_seconds = time.perf_counter() - began

    @property
    def piece_bytes(self) -> int:
        return self.blocks[0].nbytes // len(self.groups)

    def spill(self) -> list[HostBlock]:
        return [self.link.spill(self.store, run) for run in self.runs]

    def down(self) -> list[jax.Array]:
        return [piece for block in self.spill() for piece in block.pieces]

    def up(self, blocks: Sequence[HostBlock] | None = None) -> list[jax.Array]:
        chosen = self.blocks if blocks is None else blocks
        return [piece for block in chosen for piece in self.link.fetch(block, self.groups).pieces]

    def rate(self, run: Callable[[], Any], times: int = 1) -> float:
        """The rate of a call, in GB/s. The call moves all pages `times` times."""
        return times * self.setup.nbytes / median_seconds(run) / 1e9

    def place(self) -> jax.Array:
        """Write all pages that have arrived; the store stays as it is, because they are its own."""
        for run, arriving in zip(self.runs, self.arrived, strict=True):
            self.store = self.link.place(self.store, arriving, range(len(run)), run)
        return self.store

    @functools.cached_property
    def arrived(self) -> list[Any]:
        return [self.link.fetch(block, self.groups) for block in self.blocks]


def rates(setup: Setup) -> Iterator[Row]:
    """Down, up and both, by the size of pieces: all layers in one piece, and in four."""
    for num_groups in (4, 1):
        for block_pages in (1, 2, 4, 8, 16):
            bench = Bench(setup, block_pages, num_groups)
            work = f"pieces of {bench.piece_bytes / 2**20:g} MiB, {block_pages} pages x {num_groups} groups"
            yield Row(work, "down", bench.rate(bench.down), "GB/s")
            yield Row(work, "up", bench.rate(bench.up), "GB/s")
            yield Row(work, "both", bench.rate(lambda bench=bench: (bench.up(), bench.down()), times=2), "GB/s")


def other_steps(setup: Setup) -> Iterator[Row]:
    """What else it takes to move blocks of 16 pages. The process has used next to no host memory before."""
    bench = Bench(setup)
    work = "blocks of 16 pages"
    yield Row(work, "down, into memory that is new", setup.nbytes / bench.first_seconds / 1e9, "GB/s")
    bench.place()
    yield Row(work, "write into the store", bench.rate(bench.place), "GB/s")
    yield Row(work, "to NumPy", bench.rate(lambda: [_copied(bench.link, block) for block in bench.blocks]), "GB/s")
    arrays = _copied(bench.link, bench.blocks[0])
    again = [None] * len(bench.blocks)
    yield Row(work, "from NumPy", bench.rate(lambda: [bench.link.from_numpy(arrays).pieces for _ in again]), "GB/s")


def _copied(link: Link, block: HostBlock) -> list[np.ndarray]:
    return [piece.copy() for piece in link.to_numpy(block)]


class Products:
    """Products of square matrices, one after the other. Together they take about `seconds`."""

    def __init__(self, bench: Bench, seconds: float) -> None:
        everywhere = NamedSharding(bench.mesh, PartitionSpec())
        size = bench.setup.matrix
        self.matrix = jax.device_put(np.full((size, size), 1 / size, jnp.bfloat16), everywhere)
        self._run = jax.jit(lambda a, times: jax.lax.fori_loop(0, times, lambda _, c: a @ c, a))
        one = median_seconds(lambda: self.run(32)) / 32
        self.number = max(round(seconds / one / CELLS), 1) * CELLS

    def run(self, times: int) -> jax.Array:
        return self._run(self.matrix, np.int32(times))

    def all(self) -> jax.Array:
        return self.run(self.number)


def beside_compute(setup: Setup) -> Iterator[Row]:
    """A load beside products that take twice as long, in several orders of dispatch."""
    bench = Bench(setup)
    products = Products(bench, 2 * median_seconds(bench.up))
    parts = np.array_split(np.arange(len(bench.blocks)), CELLS)

    def load_first() -> Any:
        return bench.up(), products.all()

    def load_second() -> Any:
        return products.all(), bench.up()

    def spill_second() -> Any:
        return products.all(), bench.down()

    def between() -> Any:
        """Each part of the load goes before one of the cells."""
        loads = []
        for part in parts:
            loads += bench.up([bench.blocks[i] for i in part])
            result = products.run(products.number // CELLS)
        return loads, result

    work = f"load {setup.nbytes / 2**20:g} MiB beside {products.number} products of {setup.matrix}"
    yield Row(work, "products alone", 1e3 * median_seconds(products.all), "ms")
    yield Row(work, "load alone", 1e3 * median_seconds(bench.up), "ms")
    yield Row(work, "spill alone", 1e3 * median_seconds(bench.down), "ms")
    yield Row(work, "load dispatched first", 1e3 * median_seconds(load_first), "ms")
    yield Row(work, "load dispatched second", 1e3 * median_seconds(load_second), "ms")
    yield Row(work, f"load dispatched between {CELLS} cells", 1e3 * median_seconds(between), "ms")
    yield Row(work, "spill dispatched second", 1e3 * median_seconds(spill_second), "ms")
    for name, call in {"load": bench.up, "spill": bench.down}.items():
        yield Row(work, f"calls that {name}, while busy", 1e3 * _dispatch_seconds(products, call), "ms")


def _dispatch_seconds(products: Products, call: Callable[[], Any]) -> float:
    """Seconds until a call returns that is made while the device has products to compute."""
    taken = []
    for _ in range(CALLS + 1):
        result = products.all()
        began = time.perf_counter()
        moved = call()
        taken.append(time.perf_counter() - began)
        jax.block_until_ready((result, moved))
    return statistics.median(taken[1:])


def all_rows(setup: Setup) -> Iterator[Row]:
    yield from other_steps(setup)
    yield from rates(setup)
    yield from beside_compute(setup)


def about(setup: Setup) -> dict[str, Any]:
    """The content of the result file but for its rows."""
    settings = {"devices": setup.devices, "mebibytes": setup.nbytes >> 20, "layers": setup.model.num_layers}
    note = {"note": SAME_MEMORY} if jax.devices()[0].platform == "cpu" else {}
    bench = "link" if setup.devices == 1 else f"link-{setup.devices}-devices"
    return {"bench": bench} | provenance() | note | {"settings": settings}


def told(setup: Setup) -> Iterator[dict[str, Any]]:
    """All rows, each printed as it is measured."""
    for row in all_rows(setup):
        print(f"{row.work:60}{row.implementation:36}{row.figure:10.4g} {row.unit}", flush=True)
        yield row.to_dict()


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    on_cpu = jax.devices()[0].platform == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=count, default=64 if on_cpu else 2048, help="moved at a time, about")
    parser.add_argument(
        "--layers", type=count, default=4 if on_cpu else 32, help="of the model; 4 groups of them are moved"
    )
    parser.add_argument("--devices", type=count, default=1, help="that share the 8 KV heads")
    parser.add_argument("--matrix", type=count, default=512 if on_cpu else 8192, help="size of the products")
    options = parser.parse_args(arguments)
    make_mesh(options.devices)  # which says how many there are
    if 8 % options.devices:
        parser.error(f"--devices {options.devices} does not divide 8 KV heads")
    setup = Setup.of(options.mebibytes, options.devices, options.layers, options.matrix)
    if on_cpu:
        print(SAME_MEMORY)
    print(write_rows(about(setup), told(setup), folder))


if __name__ == "__main__":
    run_script(main)
