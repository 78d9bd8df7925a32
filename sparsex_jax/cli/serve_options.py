"""The options of `sparsex serve`, grouped by what they configure; the help shows them in panels, by what for."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsex_jax.cli.options import AdapterNames
from sparsex_jax.cli.values import parse_adapters, parse_bytes, parse_disk_store
from sparsex_jax.config import EngineConfig

if TYPE_CHECKING:  # these import jax, which takes seconds, and so they are imported where they are made
    from sparsex_jax.serving.access import Limits
    from sparsex_jax.serving.methods import Cors

_PLACE, _KEYS, _SCRIPTS, _STORE = "Address", "Keys and names", "Scripts of other origins (CORS)", "Model and store"
_LIMITS, _WATCHING = "Limits", "Operations"

# What a server prefills a text to remember behind, at most: of what its namespace has.
COMPANY_TOKENS = 1024


def _in(panel: str, text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the server listens."""

    host: Annotated[
        str, _in(_PLACE, "Name or address to listen at; 0.0.0.0 for all interfaces, :: for those of IPv6.")
    ] = "127.0.0.1"
    port: Annotated[int, _in(_PLACE, "Port to listen at; 0 takes a free one.", min=0, max=65535)] = 8000
    uds: Annotated[Path | None, _in(_PLACE, "Unix domain socket to listen at, in place of host and port.")] = None

    def bound(self) -> contextlib.AbstractContextManager[list[socket.socket]]:
        """As `serving.sockets.bound`."""
        from sparsex_jax.serving.sockets import bound

        return bound(self.host, self.port, self.uds)


@dataclasses.dataclass(frozen=True)
class Callers:
    """Who may send requests, under which names, and what they may change."""

    api_keys: Annotated[
        Path | None, _in(_KEYS, "A TOML file of API keys. Without it, requests need no key.", dir_okay=False)
    ] = None
    name: Annotated[str | None, _in(_KEYS, "The model's name in requests.", show_default="MODEL")] = None
    allow_adapter_updates: Annotated[
        bool,
        _in(
            _KEYS,
            "Requests may load and unload adapters (/v1/load_lora_adapter), from any directory that the server can "
            "read and from the hub. With API keys, those whose entry says adapters = true.",
            "--allow-adapter-updates",
        ),
    ] = False


@dataclasses.dataclass(frozen=True)
class Scripts:
    """Which scripts of other origins may send requests."""

    allowed_origins: Annotated[
        list[str] | None,
        _in(
            _SCRIPTS,
            "An origin whose scripts may send requests, such as https://chat.example; * is every origin. Can be given "
            "several times.",
            show_default="none but the page",
        ),
    ] = None
    allowed_methods: Annotated[
        list[str] | None, _in(_SCRIPTS, "A method that scripts of these origins may use.", show_default="all")
    ] = None
    allowed_headers: Annotated[
        list[str] | None, _in(_SCRIPTS, "A header that scripts of these origins may send.", show_default="all")
    ] = None
    allow_credentials: Annotated[
        bool, _in(_SCRIPTS, "Scripts of these origins may send cookies, as for a proxy.", "--allow-credentials")
    ] = False

    def cors(self) -> Cors:
        from sparsex_jax.serving.methods import Cors

        methods, headers = (tuple(each or ("*",)) for each in (self.allowed_methods, self.allowed_headers))
        return Cors(tuple(self.allowed_origins or ()), methods, headers, self.allow_credentials)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """How much the engine holds and runs, and what it does while idle: fields of `EngineConfig`."""

    max_num_seqs: Annotated[
        int | None,
        _in(
            _STORE, "Sequences that run at once; the others wait.", show_default="by device and store: 8 to 256", min=1
        ),
    ] = EngineConfig.max_num_seqs
    max_context: Annotated[
        int | None,
        _in(
            _STORE,
            "Tokens of prompt and answer together. Phi-3's longrope and dynamic scaling are computed for this length.",
            show_default="what the model takes",
            min=1,
        ),
    ] = EngineConfig.max_context
    frozen_limit: Annotated[
        float, _in(_STORE, "Share of the store that knowledge may fill. More is refused (507).")
    ] = EngineConfig.frozen_limit
    max_pinned: Annotated[
        float, _in(_STORE, "Share of what knowledge leaves of the store that pins may have. 0: nothing is pinned.")
    ] = EngineConfig.max_pinned
    mirrors: Annotated[
        bool,
        _in(
            _STORE,
            "Store sequences that share texts as what sets them apart, and copy the rest again when they come back.",
            "--mirrors/--no-mirrors",
        ),
    ] = EngineConfig.mirrors
    healing: Annotated[
        float, _in(_STORE, "Share of idle time in which approximate KV is made exact; 0 leaves it as it is.")
    ] = EngineConfig.healing
    company_tokens: Annotated[
        int, _in(_STORE, "Prefill knowledge behind at most this many tokens of its namespace. 0: alone.")
    ] = COMPANY_TOKENS
    max_waiting: Annotated[int, _in(_LIMITS, "Requests that may wait. More are refused (503).", min=1)] = (
        EngineConfig.max_waiting
    )


@dataclasses.dataclass(frozen=True)
class Tiers:
    """What is below the store."""

    host_store: Annotated[
        str, _in(_STORE, "Host memory for KV that was computed, such as 64GiB: what is evicted is loaded from there.")
    ] = "0"
    disk_store: Annotated[
        str | None,
        _in(_STORE, "PATH:SIZE of a directory for the same, such as kv:200GiB. It is found after a restart."),
    ] = None

    def fields(self) -> dict[str, Any]:
        """Those of `EngineConfig`."""
        path, size = (None, 0) if self.disk_store is None else parse_disk_store(self.disk_store)
        host = parse_bytes("host_store", self.host_store)
        return {"host_store_bytes": host, "disk_store": path, "disk_store_bytes": size}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Which adapters there are, and for how many there is room."""

    adapters: AdapterNames = None
    max_adapters: Annotated[
        int | None,
        _in(
            _STORE,
            "LoRA adapters that can be loaded at once. Each takes room on the devices, and time in every product, also "
            "where it is not loaded.",
            show_default="as many as --adapter names; 8 with --allow-adapter-updates",
            min=0,
        ),
    ] = None
    max_adapter_rank: Annotated[
        int | None,
        _in(
            _STORE,
            "The largest rank of an adapter, a multiple of 8, at most 128.",
            show_default="16, or that of those that are named",
            min=8,
            max=128,
        ),
    ] = None
    share_adapters: Annotated[
        bool,
        _in(
            _STORE,
            "Let requests under different adapters share KV, as each asks. Adapters on keys are refused then, and so "
            "are activated ones on values.",
            "--share-adapters/--no-share-adapters",
        ),
    ] = EngineConfig.share_adapters

    def by_name(self) -> dict[str, str]:
        """As `parse_adapters`."""
        return parse_adapters(self.adapters or ())


@dataclasses.dataclass(frozen=True)
class Answers:
    """How answers are sampled and read where a request does not say."""

    generation_config: Annotated[
        str,
        _in(
            _STORE,
            "auto: requests that do not say otherwise sample as the model's generation_config.json recommends. none: "
            "they have OpenAI's defaults.",
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        _in(
            _STORE,
            "How thoughts are told from answers: qwen3, deepseek_r1, mistral, none, or auto, which looks into the chat "
            "template.",
        ),
    ] = "auto"


@dataclasses.dataclass(frozen=True)
class LimitOptions:
    """Fields of `serving.access.Limits`."""

    max_concurrent: Annotated[
        int | None,
        _in(
            _KEYS,
            "Concurrent requests of an API key, each prompt counted. More are refused (429).",
            show_default="as many as run and wait",
        ),
    ] = None
    max_knowledge_tokens: Annotated[
        int | None,
        _in(
            _KEYS,
            "Tokens of frozen knowledge that an API key may keep. More are refused (403).",
            show_default="as many as the store holds",
        ),
    ] = None
    max_tokens: Annotated[int, _in(_LIMITS, "New tokens that a request gets at most.")] = 4096
    max_body_bytes: Annotated[int, _in(_LIMITS, "Bytes in a request's body. Larger ones are refused (413).")] = 4 << 20
    request_timeout: Annotated[float, _in(_LIMITS, "Seconds after which a request is cancelled (504).")] = 300.0
    client_timeout: Annotated[
        float, _in(_LIMITS, "Seconds that a client may take to send a request, or to take the next part of an answer.")
    ] = 20.0
    max_connections: Annotated[
        int | None,
        _in(
            _LIMITS,
            "Open connections. With more, those without a whole request are closed.",
            show_default="by what may run and wait",
        ),
    ] = None
    drain_timeout: Annotated[float, _in(_WATCHING, "Seconds that running requests may still take after SIGTERM.")] = (
        30.0
    )
    hang_timeout: Annotated[
        float,
        _in(
            _WATCHING, "Seconds of work in which nothing gets done, after which /health/live says that it hangs (503)."
        ),
    ] = 300.0

    def limits(self) -> Limits:
        from sparsex_jax.serving.access import Limits

        return Limits(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Operations:
    """How the server starts, and who is told of its requests."""

    request_log: Annotated[
        Path | None,
        _in(_WATCHING, "A file for a line of JSON about each request; - for standard output.", dir_okay=False),
    ] = None
    otlp_endpoint: Annotated[
        str | None,
        _in(
            _WATCHING,
            "URL of an OpenTelemetry collector, such as http://127.0.0.1:4318, which gets a trace of each request. "
            "Needs the extra `tracing`.",
            show_default="as OTEL_EXPORTER_OTLP_ENDPOINT says; no traces",
        ),
    ] = None
    warm_up: Annotated[bool, _in(_WATCHING, "Compile the programs before listening.", "--warm-up/--no-warm-up")] = True
