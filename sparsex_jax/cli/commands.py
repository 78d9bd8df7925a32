"""The commands. Each takes options of the modules beside this one, and imports what it needs when it runs, so that
`--help` is fast."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from sparsex_jax.cli import bench_options, options, serve_options
from sparsex_jax.cli.groups import grouped
from sparsex_jax.cli.terminal import clear_errors
from sparsex_jax.cli.tier import tier
from sparsex_jax.cli.values import parse_adapters
from sparsex_jax.config import EngineConfig

DEFAULT_MODEL = "smollm2-135m-instruct"
app = typer.Typer(
    help="Segment-level KV-cache reuse for LLM serving.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)

bench = typer.Typer(help="Measure what reuse costs and saves.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(tier, name="tier")


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"sparsex {importlib.metadata.version('sparsex-jax')}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Segment-level KV-cache reuse for LLM serving."""


@app.command()
@grouped
def generate(
    *,
    prompts: options.PromptArguments = None,
    model: options.Model = DEFAULT_MODEL,
    loading: options.Loading,
    adapters: options.AdapterNames = None,
    donors: options.Donors,
    as_json: options.Json = False,
    sampling: options.Sampling,
    processes: options.Processes,
    reuse: options.Reuse,
) -> None:
    """Generate text from a prompt, reusing the KV of the files remembered before it.

    Several prompts are a round: they are prefilled together, and what they share has the same donors. With one adapter,
    all prompts have it; with as many as prompts, each has its own.
    """
    from sparsex_jax.cli.choice import EngineChoice
    from sparsex_jax.cli.generate import run

    with clear_errors():
        choice = EngineChoice(
            model,
            EngineConfig(**loading.fields()),
            loading.tensor_parallel,
            reuse.reuse_config,
            reuse.options(),
            adapters=parse_adapters(adapters or ()),
            membership=processes.membership(),
        )
        run(prompts or ["-"], choice, donors, sampling.fields(), as_json=as_json)


@app.command()
def demo(
    model: options.Model = DEFAULT_MODEL,
    dtype: options.DType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    max_new_tokens: options.MaxNewTokens = 24,
    as_json: options.Json = False,
) -> None:
    """Remember twelve documents, then compare the methods on a prompt that has them in another order."""
    from sparsex_jax.cli.choice import EngineChoice
    from sparsex_jax.cli.demo import run

    with clear_errors():
        config = EngineConfig(dtype=dtype, store_tokens=12288, company_tokens=serve_options.COMPANY_TOKENS)
        run(EngineChoice(model, config, tensor_parallel), max_new_tokens, as_json=as_json)


@app.command()
@grouped
def serve(
    *,
    model: options.ModelArgument = DEFAULT_MODEL,
    address: serve_options.Address,
    callers: serve_options.Callers,
    scripts: serve_options.Scripts,
    loading: options.Loading,
    capacity: serve_options.Capacity,
    tiers: serve_options.Tiers,
    adapters: serve_options.Adapters,
    answers: serve_options.Answers,
    limits: serve_options.LimitOptions,
    operations: serve_options.Operations,
    processes: options.Processes,
    reuse: options.Reuse,
) -> None:
    """Serve a model: OpenAI's endpoints, a knowledge base, metrics, and a page that shows what is reused."""
    with clear_errors(), contextlib.ExitStack() as held:
        membership = processes.membership(stall=limits.hang_timeout)
        listens = membership is None or membership.leads
        sockets = held.enter_context(address.bound()) if listens else []
        # What is imported from here on imports jax, which takes seconds.
        from sparsex_jax.cli.choice import EngineChoice
        from sparsex_jax.cli.serve import run

        config = EngineConfig(
            **loading.fields(),
            **dataclasses.asdict(capacity),
            **tiers.fields(),
            share_adapters=adapters.share_adapters,
        )
        choice = EngineChoice(
            model,
            config,
            loading.tensor_parallel,
            reuse.reuse_config,
            reuse.options(),
            answers.generation_config,
            adapters.by_name(),
            adapters.max_adapters,
            adapters.max_adapter_rank,
            membership,
        )
        run(
            choice,
            limits.limits(),
            callers,
            operations,
            sockets=sockets,
            cors=scripts.cors(),
            reasoning_parser=answers.reasoning_parser,
        )


@app.command()
def convert(
    source: options.ModelArgument,
    target: Annotated[Path, typer.Argument(help="A new directory.")],
    dtype: options.StoredDType = "bfloat16",
    tensor_parallel: options.TensorParallel = 1,
) -> None:
    """Convert a model to a checkpoint from which each device loads its shards directly."""
    from sparsex_jax.cli.convert import run

    with clear_errors():
        run(source, target, dtype, tensor_parallel)


@app.command()
@grouped
def cache(
    *,
    prompt: options.PromptArgument = "-",
    model: options.Model = DEFAULT_MODEL,
    store_tokens: options.StoreTokens = None,
    donors: options.Donors,
    as_json: options.Json = False,
    reuse: options.Reuse,
) -> None:
    """Show what a prompt would reuse of the files. This reads no weights and computes nothing."""
    from sparsex_jax.cli.cache import run

    with clear_errors():
        run(prompt, model, donors, reuse.options(), reuse.reuse_config, store_tokens=store_tokens, as_json=as_json)


@app.command()
@grouped
def calibrate(
    *,
    model: options.ModelArgument = DEFAULT_MODEL,
    dtype: options.DType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    demands: bench_options.Demands,
    trials: bench_options.Trials,
    use: bench_options.Use = None,
    out: bench_options.CalibrationFile = None,
    as_json: options.Json = False,
) -> None:
    """Find the cheapest reuse that keeps a stated quality on this model, and write it to a file that engines read.

    All methods are tried, from the cheapest on. The first that keeps the quality has to keep it again on other prompts.
    """
    from sparsex_jax.cli.calibrate import run

    with clear_errors():
        run(
            model,
            dtype,
            trials.settings(),
            demands.target(),
            tensor_parallel=tensor_parallel,
            use=use,
            out=out,
            as_json=as_json,
        )


@bench.command()
@grouped
def quality(
    *,
    model: options.Model = DEFAULT_MODEL,
    dtype: options.DType = "auto",
    kv_dtype: options.KVDType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    comparison: bench_options.Comparison,
    out: bench_options.Folder = None,
    with_maps: bench_options.WithMaps = False,
    as_json: options.Json = False,
) -> None:
    """Compare methods on generated tasks: their scores, and how far their answers are from full recompute's."""
    from sparsex_jax.cli.bench import run

    with clear_errors():
        run(
            model,
            dtype,
            comparison.settings(),
            kv_dtype=kv_dtype,
            tensor_parallel=tensor_parallel,
            out=out,
            with_maps=with_maps,
            as_json=as_json,
        )
