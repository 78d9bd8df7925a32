"""Measures vLLM at what `bench_e2e.py` measures this engine at: first tokens, decode, and a round of agents.

    python scripts/bench_vllm.py [--model llama-3.1-8b] [--tensor-parallel 2] [--lengths 4096 8192] [--add]

It needs vLLM (0.26 or later) and a GPU, but no checkpoint and no tokenizer: the weights are random, in a directory that
has a `config.json` only, and prompts are the token ids of `bench_e2e.py`. Its settings are its defaults, which means
prefix caching, CUDA graphs, chunked prefill and as many sequences at once as it likes. The rows have the names that
`bench_e2e.py` gives them, so that both files can be read side by side:

    TTFT, N tokens                     a prompt of which nothing is stored
    TTFT, N tokens, 95% reused in 16   segments stored one by one, in a prompt with fresh text around each
    TTFT, N tokens, 95% a prefix       the stored text is the prompt's beginning
    decode, R x N                      a step, from the additional time of 128 tokens of R stored prompts
    round of 8 agents                  each reads the outputs of all, in an order of its own, and answers

A time to the first token is that of a call that asks for one token. It is the median of some runs behind one that does
not count, and before each the cache is emptied and filled again. `cached` says how many of the prompt's tokens vLLM
found. Writes `vllm-<model>-<device>.json` to `scripts/results`; --add keeps the rows of other numbers of GPUs that are
there.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from bench_e2e import (
    AGENTS,
    AGENTS_WORK,
    ANSWER,
    FEW,
    MANY,
    SHARED,
    Agents,
    decode_prompts,
    decode_work,
    prefix_and_prompt,
    prefix_work,
    segments_and_prompt,
    segments_work,
)

from sparsex_jax.config import config_dir, named_config
from sparsex_jax.config.files import read_json
from sparsex_jax.eval.results import provenance, rows_of_file, write_json

RESULTS = Path(__file__).resolve().parent / "results"
SEGMENTS, REUSED = 16, 0.95


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
      cached: tokens of the prompt that were found in the cache; None where there are several prompts.
    """

    work: str
    implementation: str
    figure: float
    unit: str
    cached: int | None = None

    def __str__(self) -> str:
        found = "" if self.cached is None else f"  cached {self.cached}"
        return f"{self.work:44}{self.implementation:26}{self.figure:10.2f} {self.unit}{found}"


class Bench:
    """vLLM with random weights, on some GPUs."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM, SamplingParams

        self._sampling, self._runs = SamplingParams, options.runs
        self._vocabulary = named_config(options.model).vocab_size
        self.name = f"vLLM, {options.tensor_parallel} GPU{'s' * (options.tensor_parallel > 1)}"
        self._folder = tempfile.TemporaryDirectory()  # removed with the bench
        self._llm = LLM(
            model=str(write_model(options.model, Path(self._folder.name))),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=options.dtype,
            max_model_len=longest(options),
            tensor_parallel_size=options.tensor_parallel,
        )

    def full(self, length: int) -> Row:
        work = f"TTFT, {length} tokens"
        _, prompt = prefix_and_prompt(self._vocabulary, length, REUSED, work)
        return self._first_token(work, [], prompt)

    def reordered(self, length: int) -> Row:
        work = segments_work(length, SEGMENTS, REUSED)
        return self._first_token(work, *segments_and_prompt(self._vocabulary, length, SEGMENTS, REUSED, work))

    def prefix(self, length: int) -> Row:
        work = prefix_work(length, REUSED)
        stored, prompt = prefix_and_prompt(self._vocabulary, length, REUSED, work)
        return self._first_token(work, [stored], prompt)

    def decode(self, context: int, requests: int) -> Row:
        prompts = decode_prompts(self._vocabulary, context, requests)
        self._start_with(prompts)
        taken = {}
        for new in (FEW, MANY, FEW, MANY):
            taken[new], _ = self._answer(prompts, new)
        step = 1e3 * (taken[MANY] - taken[FEW]) / (MANY - FEW)
        return Row(decode_work(requests, context), self.name, step, "ms a step")

    def agents(self) -> Row:
        asking = Agents(self._vocabulary)
        self._start_with(asking.said)
        taken = [self._answer(asking.prompts(), ANSWER)[0] for _ in range(2)]
        return Row(AGENTS_WORK, self.name, AGENTS / taken[-1], "prompts a second")

    def _first_token(self, work: str, stored: Sequence[np.ndarray], prompt: np.ndarray) -> Row:
        taken = []
        for _ in range(self._runs + 1):
            self._start_with(stored)
            seconds, cached = self._answer([prompt], 1)
            taken.append(1e3 * seconds)
        return Row(work, self.name, statistics.median(taken[1:]), "ms", cached)

    def _start_with(self, stored: Sequence[np.ndarray]) -> None:
        """Empty the cache, and store these texts one by one."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")
        for text in stored:
            self._answer([text], 1)

    def _answer(self, prompts: Sequence[np.ndarray], new: int) -> tuple[float, int | None]:
        """The seconds until each prompt has `new` tokens, and what of the last one was found in the cache.

        Raises:
          RuntimeError: one has fewer.
        """
        sampling = self._sampling(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        began = time.perf_counter()
        answers = self._llm.generate(asked, sampling, use_tqdm=False)
        seconds = time.perf_counter() - began
        if any(len(answer.outputs[0].token_ids) != new for answer in answers):
            raise RuntimeError(f"vLLM gave fewer than {new} new tokens")
        return seconds, answers[-1].num_cached_tokens


def write_model(name: str, folder: Path) -> Path:
    """A directory of a named configuration, as vLLM reads it where no weights are loaded."""
    content = read_json(config_dir() / "models" / f"{name}.json")
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def longest(options: argparse.Namespace) -> int:
    """Tokens of the longest prompt and its answer."""
    agents = [SHARED + 256] if options.agents else []
    return max([length + 1 for length in options.lengths] + [options.context + MANY] + agents)


def all_rows(options: argparse.Namespace) -> Iterator[Row]:
    began = time.perf_counter()
    bench = Bench(options)
    yield Row("start", bench.name, time.perf_counter() - began, "s")
    for length in options.lengths:
        yield bench.full(length)
        yield bench.reordered(length)
        yield bench.prefix(length)
    for requests in options.decode:
        yield bench.decode(options.context, requests)
    if options.agents:
        yield bench.agents()


def about(options: argparse.Namespace) -> dict[str, Any]:
    """How the figures are made. JAX is not asked for the device, because it would take the GPU's memory."""
    import torch
    from vllm.platforms import current_platform

    device = current_platform.get_device_name()
    found = {"bench": "vllm", "model": options.model} | provenance(kind=device)
    found["versions"] |= {"vllm": version("vllm"), "torch": torch.__version__}
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-3.1-8b", help="a named configuration")
    add("--dtype", default="bfloat16")
    add("--tensor-parallel", type=int, default=1, help="GPUs that share the model")
    add("--lengths", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    add("--runs", type=int, default=3)
    add("--decode", type=int, nargs="*", default=[1, 32], help="requests decoded together")
    add("--context", type=int, default=8192, help="tokens before each decoded request")
    add("--agents", action=argparse.BooleanOptionalAction, default=True, help="the round of agents")
    add("--add", action="store_true", help="keep the file's rows of other works and other numbers of GPUs")
    options = parser.parse_args(arguments)
    if options.runs < 1 or options.tensor_parallel < 1:
        parser.error("--runs and --tensor-parallel must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    options = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be fetched
    os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # JAX's threads do not survive a fork
    content = about(options)
    before = rows_of_file(content, folder) if options.add else []
    rows: list[dict[str, Any]] = []
    for row in all_rows(options):
        print(row, flush=True)
        rows.append(dataclasses.asdict(row))
        measured = {(each["work"], each["implementation"]) for each in rows}
        kept = [each for each in before if (each["work"], each["implementation"]) not in measured]
        write_json(content | {"rows": kept + rows}, folder)  # after each row, so that it stays if a later one fails


if __name__ == "__main__":
    main()
