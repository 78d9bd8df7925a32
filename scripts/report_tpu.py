"""Compiles the engine's steps for TPUs and predicts times by a roofline. Nothing runs.

    uv run --group tpu-aot python scripts/report_tpu.py

Writes `results/tpu-aot.json`, which `report_results.py` makes tables of. Compiles for minutes, on any machine with
`libtpu`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from sparsex_jax.config import EngineConfig, ModelConfig, named_config
from sparsex_jax.device import aot
from sparsex_jax.device.described import described_mesh
from sparsex_jax.model.sharding import check_mesh
from sparsex_jax.model.weights import num_parameters
from sparsex_jax.reuse.planner import CHUNKS

MODEL = "llama-3.1-8b"
ENGINE = EngineConfig(store_tokens=1 << 15, dtype="bfloat16")
TOPOLOGIES = {"v5e": "v5e:2x4", "v6e": "v6e:2x4"}
PLACES = [("v5e", 4), ("v5e", 8), ("v6e", 1), ("v6e", 4), ("v6e", 8)]
STEPS: dict[str, Callable] = {
    "align 8192": lambda model, mesh: aot.lower_align(model, ENGINE, mesh, 8192),
    "prefill 8192, sparsex": lambda model, mesh: aot.lower_prefill(model, ENGINE, mesh, 8192),
    "decode 8 x 16": lambda model, mesh: aot.lower_decode(model, ENGINE, mesh, 8),
}
WIDTHS = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's peaks: bfloat16 operations and HBM bytes a second, HBM bytes, ICI bytes a second in both directions."""

    flops: float
    hbm_rate: float
    hbm: float
    ici: float


# Google Cloud's pages: docs.cloud.google.com/tpu/docs/v5e, .../v6e and .../tpu7x, "System architecture".
CHIPS = {
    "v5e": Chip(197e12, 819e9, 16 * 2**30, 400e9),
    "v6e": Chip(918e12, 1640e9, 32 * 2**30, 800e9),
    "v7": Chip(2307e12, 7380e9, 192 * 2**30, 1200e9),  # a chip is two devices to JAX
}
ROOFLINE_PLACES = [("v5e", 4), ("v5e", 8), ("v6e", 1), ("v6e", 4), ("v6e", 8), ("v7", 1), ("v7", 4)]
LENGTHS = [8192, 16384, 32768, 65536, 131072]
FRESH, RATIO, BOUNDARY = 0.05, 0.15, 1 / 6  # of the prompt; of the reused tokens; of the layers
CHUNK, ROW_TILE = CHUNKS["tpu"], 128


# Compiling ----------------------------------------------------------------------------------------------------


def compiled_step(chip: str, devices: int, step: str) -> dict:
    model = named_config(MODEL)
    mesh = check_mesh(described_mesh(TOPOLOGIES[chip], devices), model)
    begin = time.perf_counter()
    compiled = STEPS[step](model, mesh).compile()
    seconds = time.perf_counter() - begin
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    store = math.prod(aot.abstract_store(model, ENGINE, mesh).shape) * 2 // devices
    return {
        "chip": chip,
        "devices": devices,
        "step": step,
        "compile_s": round(seconds, 1),
        "store_bytes": store,
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": getattr(memory, "peak_memory_in_bytes", None),
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops_loops_once": cost.get("flops"),
        "bytes_loops_once": cost.get("bytes accessed"),
        "kernel_vmem_bytes": kernel_vmem(text),
        "collectives": collectives(text),
    }


def kernel_vmem(text: str) -> dict[str, int]:
    """The largest VMEM that a call of each Pallas kernel uses, with its double buffers."""
    used: dict[str, int] = defaultdict(int)
    for line in text.splitlines():
        name = re.match(r"\s*(?:ROOT )?%([a-z_]+)[.\d\w]* = .*tpu_custom_call", line)
        sizes = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
        if name and sizes:
            used[name[1]] = max(used[name[1]], int(sizes[1]))
    return dict(used)


def collectives(text: str) -> list[dict]:
    """The collective operations in the program, with the bytes of their results. A loop's body counts once."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for line in text.splitlines():
        call = re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if call:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", call[1])
            found[call[2], " ".join(f"{kind}[{dims}]" for kind, dims in shapes)] += 1
    return [
        {"kind": kind, "result": shapes, "count": count, "bytes": count * sum(map(_bytes, shapes.split()))}
        for (kind, shapes), count in sorted(found.items())
    ]


def _bytes(shape: str) -> int:
    kind, dims = shape.removesuffix("]").split("[")
    return WIDTHS.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)


# The roofline -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Times of a model on several chips at their peaks: the larger of compute and memory, plus the network."""

    model: ModelConfig
    chip: Chip
    chips: int

    @property
    def layer_weights(self) -> float:
        m = self.model
        heads = 2 * m.num_q_heads + 2 * m.num_kv_heads
        return m.hidden_size * (heads * m.head_dim + 3 * m.mlp_width)

    @property
    def kv_bytes(self) -> float:
        """KV bytes of one token in one layer."""
        return 2 * 2 * self.model.num_kv_heads * self.model.head_dim

    def seconds(self, flops: float, hbm_bytes: float) -> float:
        return max(flops / self.chip.flops, hbm_bytes / self.chip.hbm_rate) / self.chips

    def layer(self, rows: float, context: float, pairs: float) -> float:
        """The time of one layer for some rows, chunk by chunk. `pairs` counts pairs of a row and a key."""
        m, chunks = self.model, math.ceil(rows / CHUNK)
        linear = self.seconds(2 * rows * self.layer_weights, 2 * chunks * self.layer_weights)
        attention = self.seconds(
            4 * pairs * m.num_q_heads * m.head_dim, pairs / min(ROW_TILE, max(rows, 1)) * self.kv_bytes
        )
        # Two all-reduces of the hidden states; a ring sends 2 (n - 1) / n of them, at the rate of one direction.
        sent = 2 * 2 * (self.chips - 1) / self.chips * rows * m.hidden_size * 2
        return linear + attention + sent / (self.chip.ici / 2)

    def full(self, tokens: int) -> float:
        return self.model.num_layers * self.layer(tokens, tokens, tokens**2 / 2)

    def sparsex(self, tokens: int) -> float:
        """Fresh and chosen tokens are spread evenly, so that an active row attends to half the context on average."""
        m, active = self.model, tokens * (FRESH + RATIO * (1 - FRESH))
        before = round(m.num_layers * BOUNDARY)
        dense = before * self.layer(tokens, tokens, tokens**2 / 2)
        kv_weights = 2 * m.hidden_size * m.num_kv_heads * m.head_dim
        fresh_pairs = FRESH * tokens**2 / 2
        scores = self.seconds(2 * 2 * fresh_pairs * m.num_q_heads * m.head_dim, fresh_pairs / ROW_TILE * self.kv_bytes)
        boundary = self.seconds(2 * tokens * kv_weights, 2 * kv_weights) + scores
        sparse = (m.num_layers - before) * self.layer(active, tokens, active * tokens / 2)
        return self.align(tokens * (1 - FRESH)) + dense + boundary + sparse

    def align(self, tokens: float) -> float:
        """Each tile is read twice as a source (it overlaps two targets), once as a target, and written once."""
        return self.seconds(0, 4 * tokens * self.kv_bytes * self.model.num_layers)

    def fits(self, tokens: int) -> bool:
        weights = 2 * num_parameters(self.model)
        kv = tokens * self.kv_bytes * self.model.num_layers
        return (weights + kv) / self.chips < 0.95 * self.chip.hbm


def predictions() -> list[dict]:
    rows = []
    for name, chips in ROOFLINE_PLACES:
        roofline = Roofline(named_config(MODEL), CHIPS[name], chips)
        for tokens in LENGTHS:
            full, sparse = roofline.full(tokens), roofline.sparsex(tokens)
            rows.append(
                {
                    "chip": name,
                    "chips": chips,
                    "tokens": tokens,
                    "full_s": full,
                    "sparsex_s": sparse,
                    "ratio": full / sparse,
                    "donors_fit": roofline.fits(2 * tokens),
                }
            )
    return rows


# The report ---------------------------------------------------------------------------------------------------


def surroundings() -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}, "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--places", default=",".join(f"{chip}x{n}" for chip, n in PLACES), help="of those compiled")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tpu-aot.json")
    args = parser.parse_args()
    report = {**surroundings(), "model": MODEL, "predictions": predictions(), "steps": []}
    for place in args.places.split(","):
        chip, devices = place.split("x")
        for step in STEPS:
            report["steps"].append(compiled_step(chip, int(devices), step))
            print(json.dumps({k: v for k, v in report["steps"][-1].items() if k != "collectives"}), flush=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
