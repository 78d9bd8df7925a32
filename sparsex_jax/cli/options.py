"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsex_jax.config import CALIBRATED, METHODS, ReuseConfig, find_method
from sparsex_jax.config.checks import require
from sparsex_jax.config.reuse import methods_by_option
from sparsex_jax.eval.reorder import Reorder
from sparsex_jax.reuse.methods import Oracle, SparseX

_REUSE = "Reuse"
_PROCESSES = "Several processes"
_SAMPLING = "Sampling"

PromptArgument = Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.")]
PromptArguments = Annotated[
    list[str] | None,
    typer.Argument(help="The prompt; `-` reads it from standard input, and so does none. Several are one round."),
]
# What a server prefills a text to remember behind, at most: of what its namespace has.
COMPANY_TOKENS = 1024

Model = Annotated[
    str,
    typer.Option(
        help="An embedded model's name, a GGUF file, a Hugging Face directory, a converted one, or a name on the hub: "
        "OWNER/NAME[@REVISION][:QUANTISATION]."
    ),
]
DType = Annotated[
    str,
    typer.Option(
        help="Of weights and activations: float32, bfloat16 or float16; "
        "auto: float32 on a CPU, elsewhere the checkpoint's own, or bfloat16; fp8, int8: auto, with weights in 8 bits."
    ),
]
Quantization = Annotated[
    str,
    typer.Option(
        help="Of weights: fp8, int8 (made when they are loaded), stored (as the checkpoint has them: fp8, int8, or "
        "blocks of GGUF), none (in --dtype); auto: stored for fp8 and int8 on a GPU, else none."
    ),
]
KVDType = Annotated[
    str,
    typer.Option("--kv-dtype", help="Of the KV store: fp8 (e4m3), twice the tokens in its memory; auto: as --dtype."),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        help="Devices to split model and store over; query heads, and MLP or experts, must divide. A processor is one "
        "device, or as many as JAX_NUM_CPU_DEVICES says."
    ),
]
StoredDType = Annotated[str, typer.Option("--dtype", help="Of the stored weights: float32, bfloat16 or float16.")]
StoreTokens = Annotated[
    int | None, typer.Option(help="Token slots of the KV store.", show_default="16384; in fp8 twice as many")
]
Remember = Annotated[
    list[Path] | None,
    typer.Option(exists=True, dir_okay=False, readable=True, help="A text file to remember, as a donor. Repeatable."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME=PATH of a LoRA adapter in PEFT's format, or NAME=OWNER/NAME[@REVISION] of one on a hub. Repeatable.",
    ),
]
Namespace = Annotated[str, typer.Option(help="Only KV that was stored under this name is reused.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Send the prompt as a user's message. Default: if the model has a chat template."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to generate.", rich_help_panel=_SAMPLING)]


_METHOD = "full, prefix, naive, sparsex, excerpt or another method, with options if wanted: excerpt:coverage=0.5."
# The options of methods that commands have one of their own for, with their types. The others go into `--method`.
_OF_METHODS: dict[str, tuple[Any, str]] = {
    "boundary_layer": (int, "Layers before it compute every token. Default: a sixth of them."),
    "recompute_ratio": (float, "Share of the reused tokens recomputed for their key mass."),
    "coverage": (
        float,
        "Recompute, or keep in an excerpt, as much as has this share of the attention. Default: 0; 0.9 in an excerpt.",
    ),
    "max_ratio": (float, "Share of the reused tokens that a coverage recomputes at most."),
    "keep_ratio": (float, "Share of what an excerpt may leave out that it keeps at least. Default: 0.05."),
    "overflow_tokens": (int, "Reused tokens recomputed on both sides of fresh ones; at most 1/8 of a segment."),
    "head_tokens": (int, "First tokens of each segment that are recomputed."),
    "tail_tokens": (int, "Last tokens recomputed where the prompt ends in reuse."),
    "second_boundary": (int, "From this layer on only fresh tokens are computed."),
    "min_segment_tokens": (int, "Shorter runs are computed, not reused; at least 16."),
    "only_if_faster": (bool, "Whether what was found is recomputed where that takes less time."),
}


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _reuse_parameters() -> Iterator[inspect.Parameter]:
    """Those of a command that has options of reuse."""
    default = f"{CALIBRATED} in the model's directory, or what comes with this package for its architecture"
    text = "A file that `sparsex calibrate` wrote. Options of reuse that the command has win over it."
    yield _parameter("reuse_config", Path, typer.Option(help=text, rich_help_panel=_REUSE, show_default=default))
    default = "as --reuse-config says; sparsex, if only options of it are given"
    yield _parameter("method", str, typer.Option(help=_METHOD, rich_help_panel=_REUSE, show_default=default))
    for name, (kind, text) in _OF_METHODS.items():
        yield _parameter(name, kind, typer.Option(help=text, rich_help_panel=_REUSE, show_default=_default_of(name)))


def _default_of(name: str) -> str | bool:
    """What SparseX has, unless the help says more."""
    default = getattr(SparseX, name, None)
    return False if default is None or name == "coverage" else str(default)


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What a command was told about reuse.

    Attributes:
      config: the file. None: as `find_defaults`.
      method: `NAME` or `NAME:FIELD=VALUE:...`.
      fields: options of the method that have options of their own here, which win.
    """

    config: Path | None = None
    method: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """The method, if one was named, and its options.

        Raises:
          InvalidRequestError: the method is unknown, or does not have the options or the values. Without a method, no
            method has the options together.
        """
        name, options = (None, {}) if self.method is None else _named(self.method)
        options |= self.fields
        if name is not None:
            ReuseConfig(name, **options)
            return {"method": name} | options
        _require_a_method(options)
        return options


def _require_a_method(options: Mapping[str, Any]) -> None:
    """Raise InvalidRequestError if no method has these options together."""
    having = methods_by_option()
    fitting = [name for name in METHODS if all(name in having[option] for option in options)]
    said = ", ".join(f"{option} ({', '.join(having[option])})" for option in options)
    require(bool(fitting), f"no method has all of these options: {said}")


def with_reuse(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of reuse. It gets what was typed as one argument, `reuse`."""
    signature = inspect.signature(command, eval_str=True)
    own = [each.replace(kind=each.KEYWORD_ONLY) for each in signature.parameters.values() if each.name != "reuse"]

    @functools.wraps(command)
    def run(*, reuse_config: Path | None, method: str | None, **options: Any) -> None:
        fields = {name: options.pop(name) for name in _OF_METHODS}
        typed = {name: value for name, value in fields.items() if value is not None}
        command(reuse=Reuse(reuse_config, method, typed), **options)

    parameters = [*own, *_reuse_parameters()]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in `NAME:FIELD=VALUE:...`."""
    name, *settings = text.split(":")
    return name, dict(_setting(setting) for setting in settings)


def parse_method(text: str) -> ReuseConfig:
    """`NAME` or `NAME:FIELD=VALUE:...`, with the options that the method has. `oracle` and `reorder` are for benches.

    Raises:
      InvalidRequestError: as `ReuseConfig`.

    >>> parse_method("sparsex:boundary_layer=0").boundary_layer
    0
    """
    name, options = _named(text)
    of_benches = {each.method: each for each in (Oracle, Reorder)}
    return of_benches[name](**options) if name in of_benches else find_method(name)(**options)


def _setting(text: str) -> tuple[str, Any]:
    """`FIELD=VALUE` with a number, true, false, null or a word; the method checks what it is given."""
    field, _, value = text.partition("=")
    try:
        return field, json.loads(value.lower())
    except json.JSONDecodeError:
        return field, value


def _sampled(default: str, text: str) -> Any:
    """An option whose default the model's files may say."""
    return typer.Option(help=text, rich_help_panel=_SAMPLING, show_default=f"as the model's files recommend; {default}")


Temperature = Annotated[float | None, _sampled("0", "0 is greedy.")]
TopP = Annotated[float | None, _sampled("1", "Nucleus, in (0, 1].")]
TopK = Annotated[int | None, _sampled("0", "Keep the k most probable tokens; 0 keeps all.")]
Seed = Annotated[int, typer.Option(help="Seed of the random stream.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends the text and is not part of it. Repeatable.", rich_help_panel=_SAMPLING),
]


Coordinator = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of process 0, which answers requests; the others compute with it. The next port is used too. "
        "`slurm`: as Slurm says, and how many there are. SPARSEX_GROUP_SECRET must be the same in all.",
        rich_help_panel=_PROCESSES,
        envvar="SPARSEX_COORDINATOR",
        show_default="one process",
    ),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(help="How many processes there are.", rich_help_panel=_PROCESSES, envvar="SPARSEX_NUM_PROCESSES"),
]
ProcessId = Annotated[
    int | None,
    typer.Option(help="Which of them this one is, from 0 on.", rich_help_panel=_PROCESSES, envvar="SPARSEX_PROCESS_ID"),
]
JoinTimeout = Annotated[
    float, typer.Option(help="Seconds to wait until all processes are there.", rich_help_panel=_PROCESSES)
]
SilenceTimeout = Annotated[
    float,
    typer.Option(
        help="Seconds without a sign of life after which another process counts as lost.", rich_help_panel=_PROCESSES
    ),
]


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """What each adapter is loaded from, by its name.

    >>> parse_adapters(["sql=adapters/sql", "chat=me/chat@main"])
    {'sql': 'adapters/sql', 'chat': 'me/chat@main'}
    """
    adapters: dict[str, str] = {}
    for text in texts:
        name, _, source = text.partition("=")
        require(bool(name and source), f"adapter={text!r} must be NAME=PATH, such as sql=adapters/sql")
        require(name not in adapters, f"adapter={text!r}: there is another adapter of the name {name!r}")
        adapters[name] = source
    return adapters


_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(name: str, text: str) -> int:
    """A number of bytes, with or without a unit.

    >>> parse_bytes("host_store", "1.5GiB")
    1610612736
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    ok = found is not None and (found[2] or "B") in _UNITS
    require(ok, f"{name}={text!r} must be a number with one of the units {', '.join(_UNITS)}")
    assert found is not None
    return int(float(found[1]) * _UNITS[found[2] or "B"])


def parse_disk_store(text: str) -> tuple[str, int]:
    """A path and a number of bytes.

    >>> parse_disk_store("kv:1KiB")
    ('kv', 1024)
    """
    path, colon, size = text.rpartition(":")
    require(bool(path and colon), f"disk_store={text!r} must be PATH:SIZE, such as kv:200GiB")
    return path, parse_bytes("disk_store", size)


def tiers(host_store: str, disk_store: str | None) -> dict[str, Any]:
    """The fields of `EngineConfig` for the tiers below the store."""
    path, size = (None, 0) if disk_store is None else parse_disk_store(disk_store)
    host = parse_bytes("host_store", host_store)
    return {"host_store_bytes": host, "disk_store": path, "disk_store_bytes": size}
