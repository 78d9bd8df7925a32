"""The commands and their options. Each command imports what it needs when it runs, so that `--help` is fast."""

from __future__ import annotations

import contextlib
import importlib.metadata
from pathlib import Path
from typing import Annotated

import typer

from sparsex_jax.cli import options, serve_options
from sparsex_jax.cli.terminal import clear_errors
from sparsex_jax.cli.tier import tier

DEFAULT_MODEL = "smollm2-135m-instruct"
_REGIMES_HELP = (
    "How segments are stored: joint; shuffled (one prompt had them in another order); independent; preamble; company:N "
    "(each behind the prompt's opening and N segments of other samples); strangers:N (of another task)."
)

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
@options.with_reuse
def generate(
    reuse: options.Reuse,
    prompts: options.PromptArguments = None,
    model: options.Model = DEFAULT_MODEL,
    dtype: options.DType = "auto",
    quantization: options.Quantization = "auto",
    kv_dtype: options.KVDType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    store_tokens: options.StoreTokens = None,
    remember: options.Remember = None,
    adapters: options.Adapters = None,
    namespace: options.Namespace = "default",
    chat: options.Chat = None,
    as_json: options.Json = False,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    join_timeout: options.JoinTimeout = 300.0,
    silence_timeout: options.SilenceTimeout = 30.0,
) -> None:
    """Generate text from a prompt, reusing the KV of the files remembered before it.

    Several prompts are a round: they are prefilled together, and what they share has the same donors. With one adapter,
    all prompts have it; with as many as prompts, each has its own.
    """
    from sparsex_jax.cli.generate import EngineChoice, run
    from sparsex_jax.config.membership import Membership, Patience

    filters = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in filters.items() if value is not None}
    with clear_errors():
        patience = Patience(join_timeout, silence_timeout)
        run(
            prompts or ["-"],
            EngineChoice(
                model,
                dtype,
                store_tokens,
                reuse.config,
                reuse.options(),
                kv_dtype,
                tensor_parallel=tensor_parallel,
                quantization=quantization,
                adapters=options.parse_adapters(adapters or ()),
                membership=Membership.of(coordinator, num_processes, process_id, patience),
            ),
            remember or [],
            {"max_new_tokens": max_new_tokens, "seed": seed, "stop": tuple(stop or ())} | given,
            namespace=namespace,
            chat=chat,
            as_json=as_json,
        )


@app.command()
def demo(
    model: options.Model = DEFAULT_MODEL,
    dtype: options.DType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    max_new_tokens: options.MaxNewTokens = 24,
    as_json: options.Json = False,
) -> None:
    """Remember twelve documents, then compare the methods on a prompt that has them in another order."""
    from sparsex_jax.cli.demo import run
    from sparsex_jax.cli.generate import EngineChoice

    with clear_errors():
        company = options.COMPANY_TOKENS
        choice = EngineChoice(model, dtype, 12288, tensor_parallel=tensor_parallel, company_tokens=company)
        run(choice, max_new_tokens, as_json=as_json)


@app.command()
@options.with_reuse
def serve(
    reuse: options.Reuse,
    model: Annotated[str, typer.Argument(help="As `--model` of the other commands.")] = DEFAULT_MODEL,
    host: serve_options.Host = "127.0.0.1",
    port: serve_options.Port = 8000,
    uds: serve_options.Socket = None,
    api_keys: serve_options.ApiKeys = None,
    name: serve_options.Name = None,
    max_concurrent: serve_options.MaxConcurrent = None,
    max_knowledge_tokens: serve_options.MaxKnowledgeTokens = None,
    allowed_origins: serve_options.AllowedOrigins = None,
    allowed_methods: serve_options.AllowedMethods = None,
    allowed_headers: serve_options.AllowedHeaders = None,
    allow_credentials: serve_options.AllowCredentials = False,
    dtype: options.DType = "auto",
    quantization: options.Quantization = "auto",
    kv_dtype: options.KVDType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    store_tokens: options.StoreTokens = None,
    max_num_seqs: serve_options.MaxNumSeqs = None,
    max_context: serve_options.MaxContext = None,
    frozen_limit: serve_options.FrozenLimit = 0.5,
    max_pinned: serve_options.MaxPinned = 0.5,
    mirrors: serve_options.Mirrors = False,
    adapters: options.Adapters = None,
    max_adapters: serve_options.MaxAdapters = None,
    max_adapter_rank: serve_options.MaxAdapterRank = None,
    share_adapters: serve_options.ShareAdapters = False,
    allow_adapter_updates: serve_options.AllowAdapterUpdates = False,
    host_store: serve_options.HostStore = "0",
    disk_store: serve_options.DiskStore = None,
    healing: serve_options.Healing = 0.5,
    company_tokens: serve_options.CompanyTokens = options.COMPANY_TOKENS,
    generation_config: serve_options.GenerationConfig = "auto",
    reasoning_parser: serve_options.ReasoningParser = "auto",
    max_waiting: serve_options.MaxWaiting = 256,
    max_tokens: serve_options.MaxTokens = 4096,
    max_body_bytes: serve_options.MaxBodyBytes = 4 << 20,
    request_timeout: serve_options.RequestTimeout = 300.0,
    client_timeout: serve_options.ClientTimeout = 20.0,
    max_connections: serve_options.MaxConnections = None,
    drain_timeout: serve_options.DrainTimeout = 30.0,
    hang_timeout: serve_options.HangTimeout = 300.0,
    request_log: serve_options.RequestLog = None,
    otlp_endpoint: serve_options.OtlpEndpoint = None,
    warm_up: serve_options.WarmUp = True,
    coordinator: options.Coordinator = None,
    num_processes: options.NumProcesses = None,
    process_id: options.ProcessId = None,
    join_timeout: options.JoinTimeout = 300.0,
    silence_timeout: options.SilenceTimeout = 30.0,
) -> None:
    """Serve a model: OpenAI's endpoints, a knowledge base, metrics, and a page that shows what is reused."""
    from sparsex_jax.config.membership import Membership, Patience
    from sparsex_jax.serving.sockets import bound

    with clear_errors(), contextlib.ExitStack() as held:
        patience = Patience(join_timeout, silence_timeout, stall=hang_timeout)
        membership = Membership.of(coordinator, num_processes, process_id, patience)
        listens = membership is None or membership.leads
        sockets = held.enter_context(bound(host, port, uds)) if listens else []
        # What is imported from here on imports jax, which takes seconds.
        from sparsex_jax.cli.generate import EngineChoice
        from sparsex_jax.cli.serve import run
        from sparsex_jax.serving.access import Limits
        from sparsex_jax.serving.methods import Cors

        cors = Cors(
            tuple(allowed_origins or ()),
            tuple(allowed_methods or ("*",)),
            tuple(allowed_headers or ("*",)),
            allow_credentials,
        )
        run(
            EngineChoice(
                model,
                dtype,
                store_tokens,
                reuse.config,
                reuse.options(),
                kv_dtype,
                tensor_parallel=tensor_parallel,
                max_num_seqs=max_num_seqs,
                quantization=quantization,
                max_waiting=max_waiting,
                healing=healing,
                company_tokens=company_tokens,
                max_context=max_context,
                frozen_limit=frozen_limit,
                generation_config=generation_config,
                max_pinned=max_pinned,
                mirrors=mirrors,
                adapters=options.parse_adapters(adapters or ()),
                max_adapters=max_adapters,
                max_adapter_rank=max_adapter_rank,
                share_adapters=share_adapters,
                membership=membership,
                **options.tiers(host_store, disk_store),
            ),
            Limits(
                max_body_bytes=max_body_bytes,
                max_tokens=max_tokens,
                max_concurrent=max_concurrent,
                max_knowledge_tokens=max_knowledge_tokens,
                request_timeout=request_timeout,
                drain_timeout=drain_timeout,
                client_timeout=client_timeout,
                hang_timeout=hang_timeout,
                max_connections=max_connections,
            ),
            sockets=sockets,
            api_keys=api_keys,
            name=name,
            warm_up=warm_up,
            reasoning_parser=reasoning_parser,
            request_log=request_log,
            otlp_endpoint=otlp_endpoint,
            allowed_origins=cors,
            allow_adapter_updates=allow_adapter_updates,
        )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="As `--model` of the other commands.")],
    target: Annotated[Path, typer.Argument(help="A new directory.")],
    dtype: options.StoredDType = "bfloat16",
    tensor_parallel: options.TensorParallel = 1,
) -> None:
    """Convert a model to a checkpoint from which each device loads its shards directly."""
    from sparsex_jax.cli.convert import run

    with clear_errors():
        run(source, target, dtype, tensor_parallel)


@app.command()
@options.with_reuse
def cache(
    reuse: options.Reuse,
    prompt: options.PromptArgument = "-",
    model: options.Model = DEFAULT_MODEL,
    store_tokens: options.StoreTokens = None,
    remember: options.Remember = None,
    namespace: options.Namespace = "default",
    chat: options.Chat = None,
    as_json: options.Json = False,
) -> None:
    """Show what a prompt would reuse of the files. This reads no weights and computes nothing."""
    from sparsex_jax.cli.cache import run

    with clear_errors():
        run(
            prompt,
            model,
            remember or [],
            reuse.options(),
            reuse.config,
            store_tokens=store_tokens,
            namespace=namespace,
            chat=chat,
            as_json=as_json,
        )


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="As `--model` of the other commands.")] = DEFAULT_MODEL,
    dtype: options.DType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    max_loss: Annotated[
        float | None,
        typer.Option(help="How much less than full recompute the answers may score, on average.", show_default="0.02"),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(help="Instead: the share of full recompute's greedy continuation that must be equal, on average."),
    ] = None,
    confident: Annotated[
        bool,
        typer.Option("--confident", help="Require that the whole 95 % interval meets the target. Needs many samples."),
    ] = False,
    tasks: Annotated[str, typer.Option(help="As in `bench quality`. Choose tasks that the model can do.")] = "niah,qa",
    regimes: Annotated[
        str,
        typer.Option(help=_REGIMES_HELP + " Each gets a selection of its own; the server makes company."),
    ] = "independent,company",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to try, separated by commas. One with options, as in `bench quality`, is tried as it is.",
            show_default="all that choose what to recompute",
        ),
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(
            help="The regime whose selection the file names.", show_default="the cheapest that holds in all of them"
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of reused body in each prompt, about.")] = 1024,
    segments: Annotated[int, typer.Option(help="Segments of the body.")] = 4,
    samples: Annotated[
        int, typer.Option(help="Prompts for each task and regime, and as many others to confirm the choice.")
    ] = 16,
    batch: Annotated[int, typer.Option(help="Prompts that run together. An accelerator needs 32 or more.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write. Rows are kept beside it (.rows.jsonl): the same command goes on where it stopped.",
            dir_okay=False,
            show_default="sparsex.json, in the model's directory if the model is one",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Find the cheapest reuse that keeps a stated quality on this model, and write it to a file that engines read.

    All methods are tried, from the cheapest on. The first that keeps the quality has to keep it again on other prompts.
    """
    from sparsex_jax.cli.bench import BenchSettings
    from sparsex_jax.cli.calibrate import run, target_of
    from sparsex_jax.eval.calibration.candidates import METHODS

    with clear_errors():
        tried = list(METHODS) if methods is None else _split(methods)
        settings = BenchSettings(tried, _split(tasks), _split(regimes), length, segments, samples, batch, seed)
        target = target_of(max_loss, min_agreement, confident)
        run(
            model,
            dtype,
            settings,
            target,
            tensor_parallel=tensor_parallel,
            use=use,
            out=out,
            as_json=as_json,
        )


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


@bench.command()
def quality(
    model: options.Model = DEFAULT_MODEL,
    dtype: options.DType = "auto",
    kv_dtype: options.KVDType = "auto",
    tensor_parallel: options.TensorParallel = 1,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, separated by commas. Of few words that any model knows: niah, mq_niah, mk_niah, vt, cwe, fwe, "
            "qa, chat, agents. In English: notes_(codes, people, years), of fixed length. On documents in English: "
            "report_(codes, people), log_cargo, mv_niah, mv_ports, mq_codes, vt_keys, cwe_goods, qa_people, two_hop, "
            "changed, email_rooms; on Python modules: module_(constants, returns)."
        ),
    ] = ("vt,mq_niah"),
    regimes: Annotated[str, typer.Option(help=_REGIMES_HELP)] = ("joint,independent"),
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas, with options if wanted: sparsex:boundary_layer=0:recompute_ratio=0.3. "
            "Also oracle, and reorder: documents in the order of an earlier prompt, and its prefix."
        ),
    ] = "full,naive,sparsex:boundary_layer=0,sparsex",
    length: Annotated[int, typer.Option(help="Tokens of reused body in each prompt, about.")] = 2048,
    segments: Annotated[int, typer.Option(help="Segments of the body.")] = 4,
    segment_length: Annotated[
        int | None,
        typer.Option(help="Tokens of each segment, about, instead of --length: 20 segments of 512, say.", min=1),
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts for each task and regime.")] = 8,
    batch: Annotated[int, typer.Option(help="Prompts that run together. An accelerator needs 32 or more.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.", min=0)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A folder for the results: rows as they come, then JSON, a Markdown table and a plot. The same "
            "command goes on where it was stopped; tasks, regimes, methods and samples can be added.",
            file_okay=False,
        ),
    ] = None,
    with_maps: Annotated[
        bool, typer.Option("--maps", help="Also plot what is looked at and what deviates, for each task and regime.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compare methods on generated tasks: their scores, and how far their answers are from full recompute's."""
    from sparsex_jax.cli.bench import BenchSettings, run

    with clear_errors():
        length = segment_length * segments if segment_length else length
        settings = BenchSettings(
            _split(methods), _split(tasks), _split(regimes), length, segments, samples, batch, seed
        )
        run(
            model,
            dtype,
            settings,
            kv_dtype=kv_dtype,
            tensor_parallel=tensor_parallel,
            out=out,
            with_maps=with_maps,
            as_json=as_json,
        )
