"""Measures how fast a replica gets blocks from another one, over this machine's loopback.

    python scripts/bench_fetch.py [--mebibytes 256] [--page-sizes 8 16] [--threads 1 4]

Two processes have an engine each, whose KV has the shape of an 8B model's (32 layers, 8 KV heads of 128, bfloat16) and
whose weights are few, since nothing is computed. Blocks have 16 pages. One replica has them in host memory. The other
one lacks them, and `Peers.bring` gets them: it looks them up, has them sent, checks them and keeps them. Then it
forgets them, and begins again.

Figures are bytes of blocks by seconds, of the first round, in which the giving side has not summed up its blocks yet
and the asking side's memory is new, and of the best round behind it; and the seconds of processor time that either
side takes for a GB, the least of those rounds. Beside them stands what one thread takes for a GB to copy it and to sum
it up. Writes `scripts/results/fetch-<device>.json`.
"""

import argparse
import asyncio
import hashlib
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_link import Row

from sparsex_jax import Engine, ModelConfig
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.device.pieces import layer_groups
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.scheduler.peering import Peering
from sparsex_jax.serving.fleet.peer_server import PeerServer
from sparsex_jax.serving.fleet.peers import PeerConfig, Peers
from sparsex_jax.serving.fleet.preview import Prompt
from sparsex_jax.serving.fleet.seal import Seal
from sparsex_jax.serving.worker import Worker
from sparsex_jax.tiers.blocks import BLOCK_PAGES, Block

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS = 5  # behind the first
SPACE, SEAL = "bench", Seal(b"a bench's secret")
GROUPS = 4  # of layers, as a link has them
PROBE = 32 << 20  # bytes that are copied and summed up


class Setup(NamedTuple):
    """What is sent: about `mebibytes` of blocks of 16 pages."""

    layers: int
    page_size: int
    mebibytes: int

    @property
    def block_bytes(self) -> int:
        return BLOCK_PAGES * self.page_size * self.layers * 2 * 8 * 128 * 2

    @property
    def num_blocks(self) -> int:
        return max((self.mebibytes << 20) // self.block_bytes, 1)

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def engine(self) -> Engine:
        """With room for the blocks in host memory, and hardly any weights."""
        heads: dict[str, Any] = {"num_q_heads": 8, "num_kv_heads": 8, "head_dim": 128, "num_layers": self.layers}
        model = ModelConfig(vocab_size=97, hidden_size=16, intermediate_size=16, max_position=1 << 15, **heads)
        about: dict[str, Any] = {"page_size": self.page_size, "dtype": "bfloat16", "host_store_bytes": 2 * self.nbytes}
        return Engine.from_config(model, store_tokens=BLOCK_PAGES * self.page_size, **about)

    def blocks(self) -> list[Block]:
        """Of one sequence."""
        size = BLOCK_PAGES * self.page_size
        made: list[Block] = []
        for own in np.random.default_rng(0).integers(1, 97, (self.num_blocks, size)).astype(np.int32):
            made.append(Block(SPACE, len(made) * size, own.tobytes(), size, "", made[-1].key if made else b""))
        return made

    def prompt(self) -> Prompt:
        """That goes on behind the blocks."""
        tokens = np.frombuffer(b"".join(block.tokens for block in self.blocks()), np.int32)
        return Prompt(SPACE, np.append(tokens, np.int32(0)), {"method": "prefix", "only_if_faster": False}, None)


# The giving side, in a process of its own ------------------------------------------------------------------


def fill(engine: Engine, blocks: Sequence[Block]) -> None:
    """Have these blocks in host memory, with KV that is random."""
    tiers, model, random = engine.admission.tiers, engine.model, np.random.default_rng(0)
    assert tiers is not None
    shape = 2, model.num_kv_heads, engine.config.page_size, model.head_dim
    for block in tiers.expect(blocks):
        sizes = [(BLOCK_PAGES, len(layers), *shape) for layers in layer_groups(model.num_layers, GROUPS)]
        pieces = [random.integers(0, 1 << 15, size, np.uint16).view("bfloat16") for size in sizes]
        tiers.arrived(block.key, tiers.host_block(pieces))


def give(setup: Setup, pipe: Connection) -> None:
    """Serve until the pipe says so. It tells the address, and then its processor time as often as it is asked."""
    asyncio.run(_give(setup, pipe))


async def _give(setup: Setup, pipe: Connection) -> None:
    engine = setup.engine()
    fill(engine, setup.blocks())
    worker = Worker(engine).start()
    peering = Peering(engine.admission, engine.model)
    server = PeerServer(worker, peering, peering.tiers.model, SEAL)
    pipe.send(await server.start("127.0.0.1", 0))
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())
    await server.stop()
    worker.stop()


@contextmanager
def giving(setup: Setup) -> Iterator[tuple[str, Callable[[], float]]]:
    """A replica that has the blocks: its address, and what gives its processor time."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=give, args=(setup, theirs), daemon=True)
    process.start()
    theirs.close()  # the other process has one of its own, whose end this one could not notice beside it

    def used() -> float:
        ours.send(True)
        return float(ours.recv())

    try:
        yield ours.recv(), used
    finally:
        ours.send(False)
        process.join(30)


# The asking side -------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """What one round took, in seconds: on the clock, and of processor time on both sides."""

    wall: float
    giving: float
    asking: float


async def rounds(setup: Setup, address: str, used: Callable[[], float], threads: int) -> list[Taken]:
    """Get all blocks, forget them, and again. The first round is among them."""
    engine, prompt = setup.engine(), setup.prompt()
    worker = Worker(engine).start()
    peering = Peering(engine.admission, engine.model)
    config = PeerConfig(threads=threads, most_s=120.0, most_bytes=2 * setup.nbytes)
    peers, taken = Peers(worker, peering, peering.tiers.model, SEAL, config), []
    for number in range(1, ROUNDS + 2):
        before = used(), time.process_time()
        began = time.perf_counter()
        await peers.bring(address, prompt)
        wall, own = time.perf_counter() - began, time.process_time() - before[1]
        if peers.counts.blocks != number * setup.num_blocks:
            raise RuntimeError(f"not all blocks came: {peers.counts}")
        taken.append(Taken(wall, used() - before[0], own))
        for block in setup.blocks():
            await worker.call(peering.tiers.forget, np.frombuffer(block.tokens, np.int32), SPACE)
    await peers.stop()
    worker.stop()
    return taken


def fetched(setup: Setup, threads: int) -> Iterator[Row]:
    with giving(setup) as (address, used):
        first, *others = asyncio.run(rounds(setup, address, used, threads))
    work = f"{setup.block_bytes / 2**20:g} MiB a block, {setup.num_blocks} of them, {threads} at once"
    yield Row(work, "first round", setup.nbytes / first.wall / 1e9, "GB/s")
    yield Row(work, "later round", setup.nbytes / min(each.wall for each in others) / 1e9, "GB/s")
    yield Row(work, "processor, giving", min(each.giving for each in others) / setup.nbytes * 1e9, "s/GB")
    yield Row(work, "processor, asking", min(each.asking for each in others) / setup.nbytes * 1e9, "s/GB")


def floor() -> Iterator[Row]:
    """What one thread takes for bytes that it does not have in a cache."""
    data = np.random.default_rng(0).integers(0, 256, PROBE, np.uint8)
    into = np.zeros_like(data)
    works: dict[str, Callable[[], Any]] = {
        "copy": lambda: np.copyto(into, data),
        "copy into new memory": data.copy,
        "zlib.crc32": lambda: zlib.crc32(data),
        "SHA-256": lambda: hashlib.sha256(data),
        "BLAKE2b": lambda: hashlib.blake2b(data),
    }
    for name, work in works.items():
        yield Row("one thread", name, min(_processor(work) for _ in range(ROUNDS)) / PROBE * 1e9, "s/GB")


def _processor(work: Callable[[], Any]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def all_rows(args: argparse.Namespace) -> Iterator[Row]:
    yield from floor()
    for page_size in args.page_sizes:
        for threads in args.threads:
            yield from fetched(Setup(args.layers, page_size, args.mebibytes), threads)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The content of the result file but for its rows."""
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    return {"bench": "fetch"} | provenance() | {"settings": settings}


def told(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows, each printed as it is measured."""
    for row in all_rows(args):
        print(f"{row.work:44}{row.implementation:24}{row.figure:10.4g} {row.unit}", flush=True)
        yield row.to_dict()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--mebibytes", type=count, default=256, help="of blocks that a prompt lacks, about")
    add("--page-sizes", type=count, nargs="+", default=[8, 16], help="in tokens; a block has 16 pages")
    add("--threads", type=count, nargs="+", default=[1, 4], help="blocks on their way at once")
    add("--layers", type=count, default=32, help="of the model")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    print(write_rows(about(args), told(args), args.out))


if __name__ == "__main__":
    run_script(main)
