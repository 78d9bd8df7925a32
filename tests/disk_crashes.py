"""Kills a process that writes blocks, again and again: `python disk_crashes.py DIRECTORY ROUNDS SEED`.

Fails if a block was torn or wrong afterwards, or if anything was left behind. JAX is not loaded, so forking is safe.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from disk_blocks import TINY, chain, is_whole, pieces_of

from sparsex_jax.tiers import disk
from sparsex_jax.tiers.disk import DiskStore

BLOCKS = [*chain(20, "a"), *chain(20, "b")]
PAGES = 40  # 30 KB a block
LIMIT = 25 * 32_000


def write_slowly(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """As a slow disk would, so that most kills fall into a write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(parts)
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(data), 4096):
            file.write(data[at : at + 4096])
            time.sleep(0.0005)


def use(path: str, seed: int) -> None:
    rng = random.Random(seed)
    disk._write_synced = write_slowly
    with DiskStore(path, LIMIT, TINY) as store:
        while True:
            block = rng.choice(BLOCKS)
            store.put(block, pieces_of(block, PAGES))
            store.get(rng.choice(BLOCKS).key)
            store.delete([rng.choice(BLOCKS).key] if rng.random() < 0.2 else [])


def killed(path: str, seed: int) -> None:
    process = os.fork()
    if not process:
        try:
            use(path, seed)
        finally:
            os._exit(1)
    time.sleep(random.Random(seed).uniform(0.01, 0.15))
    os.kill(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1]), "the process failed before it was killed"


def check(path: str) -> int:
    with DiskStore(path, LIMIT, TINY) as store:
        blocks = list(store.blocks())
        assert all(is_whole(block, store.get(block.key), PAGES) for block in blocks)
        assert all(block in BLOCKS for block in blocks)
        assert store.counts.corrupt == 0
        files = {file for file in Path(path).rglob("*") if file.is_file()}
        ours = {file for file in files if file.suffix == ".safetensors"}
        assert {file.name for file in files - ours} <= {"fingerprint.json", "sparsex.lock"}
        assert sum(file.stat().st_size for file in ours) == store.nbytes <= LIMIT
        return len(blocks)


def main(path: str, rounds: int, seed: int) -> None:
    most = 0
    for i in range(rounds):
        killed(path, seed + i)
        most = max(most, check(path))
    assert most > 0, "no block was ever stored"
    print(most)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
