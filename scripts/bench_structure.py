"""Measures what a structure costs: decode of some sequences with a JSON schema, and of the same without.

    python scripts/bench_structure.py [--model smollm2-135m-instruct] [--sequences 8] [--tokens 128] [--runs 3]

The model is one with its tokenizer, or a configuration by name (`llama-3.1-8b`), which gets random weights and
SmolLM2's tokenizer. All answers have the same number of tokens. The time is that of the whole call less that of the
same call for one token each; the median of several runs by turns. On a busy machine, the ratio of the processor's time
says more. Prints a line for each and writes `scripts/results/structure-<model>-<device>.json`.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams, Structure
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import named_config
from sparsex_jax.errors import UnknownModelError
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.scheduler import warmup

RESULTS = Path(__file__).resolve().parent / "results"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "role": {"enum": ["keeper", "visitor", "astronomer", "builder"]},
        "likes": {"type": "array", "items": {"type": "string", "maxLength": 24}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 40}, "number": {"type": "integer"}},
            "required": ["street", "number"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "role", "likes", "address"],
    "additionalProperties": False,
}
SCHEMA = Structure("json_schema", {"type": "array", "items": PERSON, "minItems": 1000})  # longer than any answer
TOWNS = ("Lisbon", "Bergen", "Kyoto", "Quito", "Perth", "Accra", "Turin", "Izmir")
ASKED = (
    "Invent people who work at the observatory of {town}. Write a JSON list; each of them has name, age, role, likes "
    "and address, which has street and number. Write nothing but the list."
)
KINDS = {
    "none": (None, {}),
    "schema": (SCHEMA, {}),
    "none, temperature 1": (None, {"temperature": 1.0}),
    "schema, temperature 1": (SCHEMA, {"temperature": 1.0}),
    "none, top_p": (None, {"temperature": 1.0, "top_p": 0.9}),
    "schema, top_p": (SCHEMA, {"temperature": 1.0, "top_p": 0.9}),
}


def load(args: argparse.Namespace) -> Engine:
    options: dict[str, Any] = {"store_tokens": args.sequences * 1024, "max_num_seqs": args.sequences}
    options |= {"choose": "always", "mesh": make_mesh(args.tensor_parallel)}
    try:
        model = named_config(args.model)
    except UnknownModelError:
        return Engine.from_pretrained(args.model, **options)
    tokenizer = open_checkpoint("smollm2-135m-instruct").tokenizer
    engine = Engine.from_config(dataclasses.replace(model, eos_token_ids=(tokenizer.eos_token_id,)), **options)
    engine.tokenizer = tokenizer
    return engine


def prompts_of(engine: Engine, number: int) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": ASKED.format(town=TOWNS[at % len(TOWNS)])}] for at in range(number)]


class Timer:
    """Times one function of all calls."""

    def __init__(self, function):
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *args, **options):
        started = time.perf_counter()
        try:
            return self.function(*args, **options)
        finally:
            self.seconds, self.calls = self.seconds + time.perf_counter() - started, self.calls + 1


def seconds_of(
    engine: Engine, structures: Sequence[Structure | None], tokens: int, options: dict
) -> tuple[float, float]:
    """Time answers of this many tokens, each with its structure.

    Returns:
      The seconds that passed, and those of the processor.
    """
    samplings = [
        SamplingParams(tokens, seed=seed, ignore_eos=True, structure=structure, **options)
        for seed, structure in enumerate(structures)
    ]
    prompts, wall, cpu = prompts_of(engine, len(structures)), time.perf_counter(), time.process_time()
    outs = engine.generate_batch(prompts, samplings, reuse=ReuseConfig("full"), keep=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert all(len(out.token_ids) == tokens for out in outs), [len(out.token_ids) for out in outs]
    return wall, cpu


def measure(engine: Engine, args: argparse.Namespace, name: str) -> dict[str, float]:
    """One run."""
    structure, options = KINDS[name.removesuffix(", half")]
    structures = [structure] * args.sequences
    if name.endswith(", half"):
        structures[1::2] = [None] * len(structures[1::2])
    first = seconds_of(engine, structures, 1, options)
    whole = seconds_of(engine, structures, args.tokens, options)
    later = args.tokens - 1
    wall, cpu = (1e3 * (whole[at] - first[at]) / later for at in (0, 1))
    return {"figure": wall, "cpu": cpu}


def host_microseconds(engine: Engine) -> dict[str, float]:
    """What the host does for a token: a mask, and taking the token; and what it does once: compile."""
    started = time.perf_counter()
    first = engine.loop.requests.matcher(SCHEMA)
    compiled, rng = 1e6 * (time.perf_counter() - started), np.random.default_rng(0)
    mask, take = Timer(type(first).allowed), Timer(type(first).accept)
    for _ in range(20):
        matcher = engine.loop.requests.matcher(SCHEMA, may_end=False)
        for _ in range(100):
            bits = np.unpackbits(mask(matcher).view(np.uint8), bitorder="little")
            take(matcher, [int(rng.choice(np.flatnonzero(bits)))])
    return {"compile": compiled, "mask": 1e6 * mask.seconds / mask.calls, "take": 1e6 * take.seconds / take.calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sequences", type=count, default=8)
    parser.add_argument("--tokens", type=count, default=128)
    parser.add_argument("--runs", type=count, default=3)
    parser.add_argument("--only", nargs="+", default=[*KINDS, "schema, half"], help="which rows")
    add_tensor_parallel(parser)
    args = parser.parse_args()
    engine, rows = load(args), []
    for step in warmup.steps(engine.loop):  # also batches of those that are left when the first ones have ended
        step()
    host = host_microseconds(engine)
    print("the host, in microseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in host.items()), flush=True)
    runs = [{name: measure(engine, args, name) for name in args.only} for _ in range(args.runs)]  # by turns
    for name in args.only:
        row = {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]}
        rows.append({"work": name, "implementation": "engine", "unit": "ms a token"} | row)
        base = next((row for row in rows if row["work"] == name.replace("schema", "none").removesuffix(", half")), None)
        if base is not None:
            rows[-1] |= {"ratio": row["figure"] / base["figure"], "cpu_ratio": row["cpu"] / base["cpu"]}
        ratios = f", of that without {rows[-1]['ratio']:.3f}, processor {rows[-1]['cpu_ratio']:.3f}" if base else ""
        print(f"{name:24}{row['figure']:9.2f} ms a token{ratios}")
    options = {name: value for name, value in vars(args).items() if name != "model"}
    about = {"bench": "structure", "model": Path(args.model).name} | provenance(args.tensor_parallel)
    print(write_json(about | {"settings": options, "host_us": host, "rows": rows}, RESULTS))


if __name__ == "__main__":
    run_script(main)
