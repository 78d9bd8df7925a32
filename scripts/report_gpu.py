"""Compiles the engine's steps for GPUs that are not there, and counts what they launch. Nothing runs.

    uv run --group gpu-aot python scripts/report_gpu.py

Where few rows go through a layer, launches are what a step takes beside the time of its bytes. Counted are those of a
decode step, of a short prefill, and of a chunk of rows through a layer of a longer one. XLA tries no products of its
own here, so that a process on a GPU may have others. Writes `results/launches-llama-3.1-8b-....json`, on any machine,
in minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from jax.stages import Lowered
from launches import Launches, Program

from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import EngineConfig, named_config
from sparsex_jax.device import aot
from sparsex_jax.device.described import GPUS, compile_options, described_mesh
from sparsex_jax.device.signals import BUILT_IN
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.model.sharding import check_mesh
from sparsex_jax.model.turns import TOGETHER

MODEL = named_config("llama-3.1-8b")
ENGINE = EngineConfig(store_tokens=1 << 15, dtype="bfloat16")
ONE_SIGNAL = {"key_mass": BUILT_IN["key_mass"]}  # those with passes of their own have layers of their own too
CHUNK = "chunk of a layer, prefill of 32768 by layers"
HALVES = 4096  # rows that a mesh takes through all layers at once
AT_ONCE = {rows: f"all layers at once, a chunk of {rows}" for rows in (1024, 2048, HALVES)}


def _at_once(rows: int) -> Callable[[Mesh], Lowered]:
    return lambda mesh: aot.lower_prefill_at_once(MODEL, ENGINE, mesh, rows)


STEPS: dict[str, Callable[[Mesh], Lowered]] = {
    "decode step of 1": lambda mesh: aot.lower_decode(MODEL, ENGINE, mesh, 1),
    "decode step of 32": lambda mesh: aot.lower_decode(MODEL, ENGINE, mesh, 32),
    "layer of a prefill of 512": lambda mesh: aot.lower_prefill(MODEL, ENGINE, mesh, 512, ONE_SIGNAL),
    **{name: _at_once(rows) for rows, name in AT_ONCE.items()},
    CHUNK: lambda mesh: aot.lower_prefill(MODEL, ENGINE, mesh, 32768, ONE_SIGNAL),
}


def launches(step: str, gpu: str, devices: int) -> Launches:
    mesh = check_mesh(described_mesh(gpu, devices), MODEL)
    found = Program(STEPS[step](mesh).compile(compile_options(mesh)).as_text())
    if step in AT_ONCE.values():
        return found.whole()
    return found.turn() / TOGETHER if step == CHUNK else found.turn()


def rows_of(step: str, devices: int, found: Launches) -> Iterator[dict[str, Any]]:
    for name, figure in dataclasses.asdict(found).items():
        work = step if devices == 1 else f"{step}, {devices} GPUs"
        yield {"work": work, "implementation": name, "figure": figure, "unit": "launches"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h100", choices=GPUS)
    parser.add_argument("--devices", type=count, nargs="+", default=[1, 2])
    options = parser.parse_args()
    about = {"bench": "launches", "model": "llama-3.1-8b"} | provenance(kind=f"described {options.gpu}")

    def rows() -> Iterator[dict[str, Any]]:
        for devices in options.devices:
            for step in STEPS:
                if devices > 1 or step != AT_ONCE[HALVES]:
                    yield from rows_of(step, devices, launches(step, options.gpu, devices))

    print(write_rows(about, rows(), Path(__file__).parent / "results"))


if __name__ == "__main__":
    run_script(main)
