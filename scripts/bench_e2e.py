"""Measures the time to the first token with and without reuse, and the speed of decode, at a real model's size.

    python scripts/bench_e2e.py [--model llama-3.1-8b] [--lengths 8192 32768] [--segments 16 1 64] [--reused 0.95 0.5]

The weights are random and in bfloat16, since the figures depend on shapes alone. A prompt has stored segments with
fresh text before, between and behind them. The first value of --segments and --reused runs with every length, the
others only with the last; with every length, the same share is also stored as a prefix. Times are medians, without the
run that compiles, until the first token is on the host. Each comes with two predictions: a bound, full recompute's time
multiplied by the share of its operations that was done, attention to the keys that the rows really have included; and
the cost model's. The same run measures a plain program (a scan over stacked weights, cuDNN's attention, no pages) where
there is memory for it, transformers with SDPA if torch is installed, decode and the time that its bytes take at the
bandwidth of a copy, and a round of agents that read each other's outputs. Writes `e2e-<model>-<device>.json` to
`scripts/results`.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.config import ModelConfig, named_config
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel
from sparsex_jax.eval.flops import flops_fraction
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.model.decoder import inv_freq, logits
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import Layers, Params
from sparsex_jax.reuse.cost import prefill_seconds
from sparsex_jax.reuse.report import Report
from sparsex_kernels.norm import rms_norm
from sparsex_kernels.rope import apply_rope

RESULTS = Path(__file__).resolve().parent / "results"
FULL = "full"
AGENTS, SHARED, ANSWER = (
    8,
    24 * 1024,
    32,
)  # of the round of agents: agents, tokens that all of them read, new tokens of each
FEW, MANY = 16, 144  # new tokens of two batches, whose difference is decode alone


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure and its predictions.

    Attributes:
      bound: by the share of operations, or by the bytes.
      predicted: by the cost model.
      computed: the share of token-layers computed.
    """

    work: str
    implementation: str
    figure: float
    unit: str
    bound: float | None = None
    predicted: float | None = None
    computed: float | None = None

    def __str__(self) -> str:
        beside = "".join(
            f"  {name} {value:.3g}"
            for name, value in (("bound", self.bound), ("predicted", self.predicted), ("work", self.computed))
            if value is not None
        )
        return f"{self.work:44}{self.implementation:26}{self.figure:10.1f} {self.unit}{beside}"


def methods(num_layers: int) -> dict[str, ReuseConfig]:
    """The methods, full recompute first. Boundaries are at 0, 10 % and 20 % of the layers; a second one at 50 %."""
    tenth = round(num_layers / 10)
    found = {
        FULL: ReuseConfig(FULL),
        "naive": ReuseConfig("naive"),
        "sparsex l*=0, 5 %": ReuseConfig(boundary_layer=0, recompute_ratio=0.05),
        f"sparsex l*={tenth}, 15 %": ReuseConfig(boundary_layer=tenth),
        f"sparsex l*={2 * tenth}, 15 %": ReuseConfig(boundary_layer=2 * tenth),
        f"sparsex l*={tenth}, then {num_layers // 2}": ReuseConfig(
            boundary_layer=tenth, second_boundary=num_layers // 2
        ),
        "focus, 5 %": ReuseConfig("focus", recompute_ratio=0.05),
        "cacheblend, 15 %": ReuseConfig("cacheblend"),
    }
    return {name: reuse.updated(only_if_faster=False) for name, reuse in found.items()}  # whatever they cost


# What is asked. `bench_vllm.py` asks the same -----------------------------------------------------------------


def segments_and_prompt(
    vocabulary: int, length: int, segments: int, reused: float, name: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """Segments to store, and a prompt of them with fresh tokens before and behind each. Each name has other tokens."""
    rng, each = np.random.default_rng([*name.encode()]), int(length * reused) // segments
    stored = [rng.integers(1, vocabulary, each) for _ in range(segments)]
    fresh = np.array_split(rng.integers(1, vocabulary, length - each * segments), segments + 1)
    pieces = [piece for pair in zip(fresh, stored, strict=False) for piece in pair]
    return stored, np.concatenate([*pieces, fresh[-1]]).astype(np.int32)


def prefix_and_prompt(vocabulary: int, length: int, reused: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A prefix to store, which is this share of the prompt, and the prompt. Each name has other tokens."""
    prompt = np.random.default_rng([*name.encode()]).integers(1, vocabulary, length).astype(np.int32)
    return prompt[: int(length * reused)], prompt


def decode_prompts(vocabulary: int, context: int, requests: int) -> list[np.ndarray]:
    rng = np.random.default_rng(context)
    return [rng.integers(1, vocabulary, context) for _ in range(requests)]


class Agents:
    """Agents who read the outputs of all, each in an order of its own, between texts of its own.

    Attributes:
      said: everybody's output.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self._rng = vocabulary, np.random.default_rng(0)
        self.said = [self._rng.integers(1, vocabulary, SHARED // AGENTS) for _ in range(AGENTS)]

    def prompts(self) -> list[np.ndarray]:
        """Those of one round, other ones each time."""
        return [np.concatenate([self._own(), *self._in_some_order(), [7] * 64]) for _ in range(AGENTS)]

    def _own(self) -> np.ndarray:
        return self._rng.integers(1, self._vocabulary, 64)

    def _in_some_order(self) -> Iterator[np.ndarray]:
        return (self.said[i] for i in self._rng.permutation(AGENTS))


def segments_work(length: int, segments: int, reused: float) -> str:
    return f"TTFT, {length} tokens, {reused:.0%} reused in {segments}"


def prefix_work(length: int, reused: float) -> str:
    return f"TTFT, {length} tokens, {reused:.0%} a prefix"


def decode_work(requests: int, context: int) -> str:
    return f"decode, {requests} x {context}"


AGENTS_WORK = f"round of {AGENTS} agents, {SHARED} tokens shared"

# The engine -------------------------------------------------------------------------------------------------


def make_prompt(engine: Engine, length: int, segments: int, reused: float, namespace: str) -> np.ndarray:
    """Store segments in the namespace, and make a prompt of them with fresh tokens before and behind each."""
    stored, prompt = segments_and_prompt(engine.model.vocab_size, length, segments, reused, namespace)
    remember_all(engine, stored, namespace)
    return prompt


def remember_all(engine: Engine, texts: Sequence[np.ndarray], namespace: str) -> None:
    for text in texts:
        engine.remember(text, namespace=namespace, company=False)


def first_tokens(
    engine: Engine, length: int, segments: int, reused: float, runs: int, asked: dict[str, ReuseConfig]
) -> Iterator[Row]:
    """The TTFT of each method for one prompt, in milliseconds."""
    work = segments_work(length, segments, reused)
    prompt = make_prompt(engine, length, segments, reused, work)
    full = None
    for name, reuse in asked.items():
        milliseconds, report = time_to_first_token(engine, prompt, reuse, work, runs, reused)
        full = full or milliseconds
        bound = full * flops_fraction(engine.model, reuse, report)
        predicted = predict(engine, prompt, reuse, work, report)
        yield Row(work, name, milliseconds, "ms", bound, predicted, report.computed_fraction)
        if name == FULL:
            yield from plain_rows(engine, prompt, runs, work)
    yield Row(work, "host, before the device", host_milliseconds(engine, prompt, reuse, work), "ms")


def first_token_behind_a_prefix(engine: Engine, length: int, reused: float, runs: int) -> Row:
    """The TTFT of a prompt whose beginning is stored, exactly."""
    work, reuse = prefix_work(length, reused), ReuseConfig("prefix")
    prefix, prompt = prefix_and_prompt(engine.model.vocab_size, length, reused, work)
    remember_all(engine, [prefix], work)
    milliseconds, report = time_to_first_token(engine, prompt, reuse, work, runs, reused)
    predicted = predict(engine, prompt, reuse, work, report)
    return Row(work, "prefix", milliseconds, "ms", predicted=predicted, computed=report.computed_fraction)


class EvictedError(RuntimeError):
    """What a prompt was to find is not in the store any more: it is too small for the work."""


def time_to_first_token(
    engine: Engine, prompt: np.ndarray, reuse: ReuseConfig, namespace: str, runs: int, reused: float
) -> tuple[float, Report]:
    """The median of some runs behind one that may compile, in milliseconds, and the report of one of them.

    Args:
      reused: the share of the prompt that is stored.

    Raises:
      EvictedError: the method reuses, and in some run less than nine tenths of that were found.
    """
    prefills = (engine.prefill(prompt, reuse=reuse, namespace=namespace, keep=False) for _ in range(runs + 1))
    _, *reports = (prefill.report for prefill in prefills)
    fewest = min(report.prompt_tokens - report.fresh_tokens for report in reports)
    if reuse.method != "full" and fewest < 0.9 * reused * len(prompt):
        raise EvictedError(
            f"{fewest} of the {reused * len(prompt):.0f} stored tokens were found; the store is too small"
        )
    return 1e3 * statistics.median(report.ttft_s for report in reports), reports[0]


def predict(engine: Engine, prompt: np.ndarray, reuse: ReuseConfig, namespace: str, report: Report) -> float | None:
    """The milliseconds that the cost model predicts for the rows that were chosen, which with random weights are other
    ones than it expects. None for an engine that does not measure its devices."""
    speeds = engine.admission.choice.speeds
    with engine.prefilled(prompt, reuse=reuse, namespace=namespace) as sequence:
        return None if speeds is None else 1e3 * prefill_seconds(engine.model, sequence.plan, speeds, report.active)


def host_milliseconds(engine: Engine, prompt: np.ndarray, reuse: ReuseConfig, namespace: str) -> float:
    """Milliseconds from the call to the first device work, the alignment: the time of lookup and planning."""
    copy, reached = engine.runner.copy, []

    def note(runs: Any) -> None:
        reached.append(time.perf_counter())
        copy(runs)

    begin = time.perf_counter()
    engine.runner.copy = note  # type: ignore[method-assign]
    try:
        engine.prefill(prompt, reuse=reuse, namespace=namespace, keep=False)
    finally:
        engine.runner.copy = copy  # type: ignore[method-assign]
    return 1e3 * (reached[0] - begin)


def decode(engine: Engine, context: int, requests: int, rate: float) -> Row:
    """Milliseconds of a decode step, from the additional time of 128 tokens. The prompts are stored prefixes."""
    prompts = decode_prompts(engine.model.vocab_size, context, requests)
    remember_all(engine, prompts, "decode")
    taken = {}
    for new in (FEW, MANY, FEW, MANY):
        begin = time.perf_counter()
        sampling = SamplingParams(new, ignore_eos=True)
        engine.generate_batch(prompts, sampling, reuse=ReuseConfig("prefix"), namespace="decode", keep=False)
        taken[new] = time.perf_counter() - begin
    step = 1e3 * (taken[MANY] - taken[FEW]) / (MANY - FEW)
    bound = 1e3 * decode_bytes(engine, requests * (context + 80)) / rate
    return Row(decode_work(requests, context), "prefix", step, "ms a step", bound)


def decode_bytes(engine: Engine, tokens: int) -> int:
    """The bytes that a decode step reads: all weights but the embedding table, and K and V of `tokens` tokens."""
    params = engine.runner.params
    head = 0 if engine.model.tied_embeddings else params.embed.nbytes
    config = engine.model
    size = 2 * config.num_layers * config.num_kv_heads * config.head_dim * engine.runner.store.dtype.itemsize
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - head + tokens * size


def agents(engine: Engine, reuse: ReuseConfig, name: str) -> Row:
    """Prompts a second in a round of agents. Each reads the outputs of all, in an order of its own, and answers."""
    asking = Agents(engine.model.vocab_size)
    remember_all(engine, asking.said, name)
    taken = []
    for _ in range(2):
        prompts = asking.prompts()
        begin = time.perf_counter()
        engine.generate_batch(prompts, SamplingParams(ANSWER, ignore_eos=True), reuse=reuse, namespace=name, keep=False)
        taken.append(time.perf_counter() - begin)
    return Row(AGENTS_WORK, name, AGENTS / taken[-1], "prompts a second")


# References -------------------------------------------------------------------------------------------------


def copy_rate() -> float:
    """The bytes a second that copies of 1 GB read and write, 20 of them in one program."""

    @jax.jit
    def copies(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 20, lambda _, x: x + 1, x)

    x = jnp.ones((1 << 29,), jnp.bfloat16)
    return 20 * 2 * x.nbytes / (median_milliseconds(copies, x, runs=3) / 1e3)


def median_milliseconds(run: Callable[..., Any], *args: Any, runs: int) -> float:
    jax.block_until_ready(run(*args))
    taken = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        taken.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(taken)


def plain_rows(engine: Engine, prompt: np.ndarray, runs: int, work: str) -> Iterator[Row]:
    """The time of the plain program; none where the device has no memory for it, beside the engine's."""
    tokens, run = jnp.asarray(prompt), functools.partial(plain, config=engine.model)
    try:
        milliseconds = median_milliseconds(run, engine.runner.params, tokens, runs=runs)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{work}: the plain scan found no memory", file=sys.stderr, flush=True)
    else:
        yield Row(work, "plain scan", milliseconds, "ms")


@functools.partial(jax.jit, static_argnames="config")
def plain(params: Params, tokens: jax.Array, *, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The last token's logits, and K and V of all layers, of one prompt without pages and plans."""
    position = jnp.arange(len(tokens))
    frequencies, eps = inv_freq(config), config.rms_norm_eps
    fused = "cudnn" if jax.default_backend() == "gpu" else None

    def layer(hidden: jax.Array, weights: Layers) -> tuple[jax.Array, jax.Array]:
        normed = rms_norm(hidden, weights.attn_norm, eps)
        q, k, v = (jnp.einsum("rh,hnd->rnd", normed, weight) for weight in (weights.wq, weights.wk, weights.wv))
        if config.qk_norm:
            q, k = rms_norm(q, weights.q_norm, eps), rms_norm(k, weights.k_norm, eps)
        q, k = (apply_rope(x, position, frequencies) for x in (q, k))
        attended = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True, implementation=fused)
        hidden = hidden + jnp.einsum("rnd,ndh->rh", attended[0], weights.wo)
        normed = rms_norm(hidden, weights.mlp_norm, eps)
        hidden = hidden + (jax.nn.silu(normed @ weights.w_gate) * (normed @ weights.w_up)) @ weights.w_down
        return hidden, jnp.stack([k, v])

    hidden, kv = jax.lax.scan(layer, params.embed[tokens], params.layers)
    return logits(params, config, hidden[-1:]), kv


def transformers_rows(name: str, lengths: list[int], runs: int) -> list[Row]:
    """The TTFT of transformers with SDPA on the same shapes. Empty if torch or a GPU for it is missing."""
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    config = named_config(name)
    classes = (Qwen3Config, Qwen3ForCausalLM) if config.qk_norm else (LlamaConfig, LlamaForCausalLM)
    shapes = classes[0](
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_q_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        attn_implementation="sdpa",
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        network = classes[1](shapes).eval()
    rows = []
    for length in lengths:
        tokens, taken = torch.randint(1, config.vocab_size, (1, length), device="cuda"), []
        for _ in range(runs + 1):
            begin = time.perf_counter()
            with torch.no_grad():
                network(tokens, use_cache=True, logits_to_keep=1).logits.argmax().item()
            taken.append(1e3 * (time.perf_counter() - begin))
        rows.append(Row(f"TTFT, {length} tokens", "transformers, SDPA", statistics.median(taken[1:]), "ms"))
    return rows


# The run ----------------------------------------------------------------------------------------------------


def all_rows(options: argparse.Namespace) -> Iterator[Row]:
    with concurrent.futures.ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as apart:  # frees its GPU memory
        others = apart.submit(transformers_rows, options.model, options.lengths, options.runs).result()
    yield from others
    most = max(options.decode, default=1)
    # A case's segments, its prompt, and as much again, so that only earlier cases are evicted.
    needed = max(3 * max(options.lengths) + 8192, (options.context + 256) * most + 8192)
    needed = max(needed, (AGENTS + 1) * (SHARED + 512)) if options.agents else needed
    longest = max(*options.lengths, options.context + 256, SHARED + 512 if options.agents else 0)
    shapes = dataclasses.replace(
        named_config(options.model), max_position=longest
    )  # so that page tables are no longer than needed
    together = max(most, AGENTS)
    engine = Engine.from_config(
        shapes,
        mesh=make_mesh(options.tensor_parallel),
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        store_tokens=needed,
        max_num_seqs=together,
        max_prefill_seqs=together,
    )
    began = time.perf_counter()
    _ = engine.admission.choice.speeds
    yield Row("speeds, measured or read, compilation included", "cost model", time.perf_counter() - began, "s")
    asked = methods(engine.model.num_layers)
    asked = {name: reuse for name, reuse in asked.items() if not options.only or any(o in name for o in options.only)}
    segments, reused = options.segments[0], options.reused[0]
    cases = [(length, segments, reused) for length in options.lengths]
    cases += [(options.lengths[-1], other, reused) for other in options.segments[1:]]
    cases += [(options.lengths[-1], segments, other) for other in options.reused[1:]]
    for length, number, share in cases:
        yield from first_tokens(engine, length, number, share, options.runs, asked)
    for length in options.lengths:
        yield first_token_behind_a_prefix(engine, length, reused, options.runs)
    rate = copy_rate() * options.tensor_parallel  # each device reads its share
    for requests in options.decode:
        yield decode(engine, options.context, requests, rate)
    if options.agents:
        for name, reuse in asked.items():
            yield agents(engine, ReuseConfig("prefix") if name == FULL else reuse, "prefix" if name == FULL else name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-3.1-8b", help="a named configuration")
    add("--dtype", default="bfloat16")
    add("--kv-dtype", default="auto", help="of the store: auto or fp8")
    add("--lengths", type=count, nargs="+", default=[8192, 16384, 32768])
    add("--segments", type=count, nargs="+", default=[16, 1, 64])
    add("--reused", type=float, nargs="+", default=[0.95, 0.5, 0.8, 0.98], help="shares of the prompt that are stored")
    add("--only", nargs="*", default=[], help="methods whose names contain one of these; all by default")
    add("--runs", type=count, default=3)
    add("--decode", type=int, nargs="*", default=[1, 8], help="requests decoded together")
    add("--context", type=count, default=8192, help="tokens before each decoded request")
    add("--agents", action=argparse.BooleanOptionalAction, default=True, help="the round of agents")
    add_tensor_parallel(parser)
    options = parser.parse_args()
    about = {"bench": "e2e", "model": options.model}
    rows: list[Row] = []
    for row in all_rows(options):
        print(row, flush=True)
        rows.append(row)  # written after each row, so that they stay if a later one fails
        made = provenance(options.tensor_parallel)
        write_json(about | made | {"rows": [dataclasses.asdict(row) for row in rows]}, RESULTS)


if __name__ == "__main__":
    run_script(main)
