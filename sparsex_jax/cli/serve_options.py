"""The options of `sparsex serve`, in the groups that its help shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_PLACE, _KEYS, _SCRIPTS, _STORE = "Address", "Keys and names", "Scripts of other origins (CORS)", "Model and store"
_LIMITS, _WATCHING = "Limits", "Operations"


def _in(panel: str, text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


Host = Annotated[str, _in(_PLACE, "Name or address to listen at; 0.0.0.0 for all interfaces, :: for those of IPv6.")]
Port = Annotated[int, _in(_PLACE, "Port to listen at; 0 takes a free one.", min=0, max=65535)]
Socket = Annotated[Path | None, _in(_PLACE, "Unix domain socket to listen at, in place of host and port.")]

ApiKeys = Annotated[
    Path | None, _in(_KEYS, "A TOML file of API keys. Without it, requests need no key.", dir_okay=False)
]
Name = Annotated[str | None, _in(_KEYS, "The model's name in requests.", show_default="MODEL")]
MaxConcurrent = Annotated[
    int | None,
    _in(
        _KEYS,
        "Concurrent requests of an API key, each prompt counted. More are refused (429).",
        show_default="as many as run and wait",
    ),
]
MaxKnowledgeTokens = Annotated[
    int | None,
    _in(
        _KEYS,
        "Tokens of frozen knowledge that an API key may keep. More are refused (403).",
        show_default="as many as the store holds",
    ),
]

AllowedOrigins = Annotated[
    list[str] | None,
    _in(
        _SCRIPTS,
        "An origin whose scripts may send requests, such as https://chat.example; * is every origin. Can be given "
        "several times.",
        show_default="none but the page",
    ),
]
AllowedMethods = Annotated[
    list[str] | None, _in(_SCRIPTS, "A method that scripts of these origins may use.", show_default="all")
]
AllowedHeaders = Annotated[
    list[str] | None, _in(_SCRIPTS, "A header that scripts of these origins may send.", show_default="all")
]
AllowCredentials = Annotated[
    bool, _in(_SCRIPTS, "Scripts of these origins may send cookies, as for a proxy.", "--allow-credentials")
]

MaxNumSeqs = Annotated[
    int | None,
    _in(_STORE, "Sequences that run at once; the others wait.", show_default="by device and store: 8 to 256", min=1),
]
MaxContext = Annotated[
    int | None,
    _in(
        _STORE,
        "Tokens of prompt and answer together. Phi-3's longrope and dynamic scaling are computed for this length.",
        show_default="what the model takes",
        min=1,
    ),
]
FrozenLimit = Annotated[float, _in(_STORE, "Share of the store that knowledge may fill. More is refused (507).")]
MaxPinned = Annotated[
    float, _in(_STORE, "Share of what knowledge leaves of the store that pins may have. 0: nothing is pinned.")
]
Mirrors = Annotated[
    bool,
    _in(
        _STORE,
        "Store sequences that share texts as what sets them apart, and copy the rest again when they come back.",
        "--mirrors/--no-mirrors",
    ),
]
MaxAdapters = Annotated[
    int | None,
    _in(
        _STORE,
        "LoRA adapters that can be loaded at once. Each takes room on the devices, and time in every product, also "
        "where it is not loaded.",
        show_default="as many as --adapter names; 8 with --allow-adapter-updates",
        min=0,
    ),
]
ShareAdapters = Annotated[
    bool,
    _in(
        _STORE,
        "Let requests under different adapters share KV, as each asks. Adapters on keys are refused then, and so are "
        "activated ones on values.",
        "--share-adapters/--no-share-adapters",
    ),
]
MaxAdapterRank = Annotated[
    int | None,
    _in(
        _STORE,
        "The largest rank of an adapter, a multiple of 8, at most 128.",
        show_default="16, or that of those that are named",
        min=8,
        max=128,
    ),
]
AllowAdapterUpdates = Annotated[
    bool,
    _in(
        _KEYS,
        "Requests may load and unload adapters (/v1/load_lora_adapter), from any directory that the server can read "
        "and from the hub. With API keys, those whose entry says adapters = true.",
        "--allow-adapter-updates",
    ),
]
HostStore = Annotated[
    str,
    _in(_STORE, "Host memory for KV that was computed, such as 64GiB: what is evicted is loaded from there."),
]
DiskStore = Annotated[
    str | None,
    _in(_STORE, "PATH:SIZE of a directory for the same, such as kv:200GiB. It is found after a restart."),
]
Healing = Annotated[
    float, _in(_STORE, "Share of idle time in which approximate KV is made exact; 0 leaves it as it is.")
]
CompanyTokens = Annotated[
    int, _in(_STORE, "Prefill knowledge behind at most this many tokens of its namespace. 0: alone.")
]
GenerationConfig = Annotated[
    str,
    _in(
        _STORE,
        "auto: requests that do not say otherwise sample as the model's generation_config.json recommends. none: they "
        "have OpenAI's defaults.",
    ),
]
ReasoningParser = Annotated[
    str,
    _in(
        _STORE,
        "How thoughts are told from answers: qwen3, deepseek_r1, mistral, none, or auto, which looks into the chat "
        "template.",
    ),
]

MaxWaiting = Annotated[int, _in(_LIMITS, "Requests that may wait. More are refused (503).", min=1)]
MaxTokens = Annotated[int, _in(_LIMITS, "New tokens that a request gets at most.")]
MaxBodyBytes = Annotated[int, _in(_LIMITS, "Bytes in a request's body. Larger ones are refused (413).")]
RequestTimeout = Annotated[float, _in(_LIMITS, "Seconds after which a request is cancelled (504).")]
ClientTimeout = Annotated[
    float,
    _in(_LIMITS, "Seconds that a client may take to send a request, or to take the next part of an answer."),
]
MaxConnections = Annotated[
    int | None,
    _in(
        _LIMITS,
        "Open connections. With more, those without a whole request are closed.",
        show_default="by what may run and wait",
    ),
]

DrainTimeout = Annotated[float, _in(_WATCHING, "Seconds that running requests may still take after SIGTERM.")]
HangTimeout = Annotated[
    float,
    _in(_WATCHING, "Seconds of work in which nothing gets done, after which /health/live says that it hangs (503)."),
]
RequestLog = Annotated[
    Path | None,
    _in(_WATCHING, "A file for a line of JSON about each request; - for standard output.", dir_okay=False),
]
OtlpEndpoint = Annotated[
    str | None,
    _in(
        _WATCHING,
        "URL of an OpenTelemetry collector, such as http://127.0.0.1:4318, which gets a trace of each request. Needs "
        "the extra `tracing`.",
        show_default="as OTEL_EXPORTER_OTLP_ENDPOINT says; no traces",
    ),
]
WarmUp = Annotated[bool, _in(_WATCHING, "Compile the programs before listening.", "--warm-up/--no-warm-up")]
