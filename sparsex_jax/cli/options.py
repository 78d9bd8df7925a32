"""Options that several commands share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsex_jax.config import CALIBRATED, ReuseConfig, find_method
from sparsex_jax.config.checks import require
from sparsex_jax.eval.reorder import Reorder
from sparsex_jax.reuse.methods import Oracle, SparseX

_REUSE = "Reuse"
_SAMPLING = "Sampling"

PromptArgument = Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.")]
# What a server prefills a text to remember behind, at most: of what its namespace has.
COMPANY_TOKENS = 1024

Model = Annotated[
    str, typer.Option(help="An embedded model's name, a GGUF file, a Hugging Face directory or a converted one.")
]
DType = Annotated[
    str,
    typer.Option(
        help="Of weights, activations and KV: float32, bfloat16 or float16; "
        "auto: float32 on a CPU, elsewhere the checkpoint's own, or bfloat16."
    ),
]
StoredDType = Annotated[str, typer.Option("--dtype", help="Of the stored weights: float32, bfloat16 or float16.")]
StoreTokens = Annotated[int, typer.Option(help="Token slots of the KV store.")]
Remember = Annotated[
    list[Path] | None,
    typer.Option(exists=True, dir_okay=False, readable=True, help="A text file to remember, as a donor. Repeatable."),
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


def _reuse(field: str, text: str) -> Any:
    """An option that wins over the file of `--reuse-config`, which wins over SparseX's default."""
    default = getattr(SparseX, field)
    return typer.Option(help=text, rich_help_panel=_REUSE, show_default=False if default is None else str(default))


ReuseFile = Annotated[
    Path | None,
    typer.Option(
        "--reuse-config",
        help="A file that `sparsex calibrate` wrote. Options of reuse that the command has win over it.",
        rich_help_panel=_REUSE,
        show_default=f"{CALIBRATED} in the model's directory, or what comes with this package for its architecture",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="full, prefix, naive, sparsex, excerpt or another method, with options if wanted: excerpt:coverage=0.5.",
        rich_help_panel=_REUSE,
        show_default="as --reuse-config says; sparsex, if only options of it are given",
    ),
]
BoundaryLayer = Annotated[
    int | None, _reuse("boundary_layer", "Layers before it compute every token. Default: a sixth of them.")
]
RecomputeRatio = Annotated[
    float | None, _reuse("recompute_ratio", "Share of the reused tokens recomputed for their key mass.")
]
OverflowTokens = Annotated[
    int | None,
    _reuse("overflow_tokens", "Reused tokens recomputed on both sides of fresh ones; at most 1/8 of a segment."),
]
TailTokens = Annotated[int | None, _reuse("tail_tokens", "Last tokens recomputed where the prompt ends in reuse.")]
SecondBoundary = Annotated[int | None, _reuse("second_boundary", "From this layer on only fresh tokens are computed.")]
MinSegmentTokens = Annotated[
    int | None, _reuse("min_segment_tokens", "Shorter runs are computed, not reused; at least 16.")
]


def given(*, method: str | None = None, **fields: Any) -> dict[str, Any]:
    """The method and the options that were typed. A wrong one is refused here, before a model is read.

    Args:
      method: `NAME` or `NAME:FIELD=VALUE:...`. A field that has an option of its own may be given by that too, which
        wins.
    """
    typed = {name: value for name, value in fields.items() if value is not None}
    if method is not None:
        name, options = _named(method)
        typed = {"method": name} | options | typed
    ReuseConfig(**typed)
    return typed


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


Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, typer.Option(help="Nucleus, in (0, 1].", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int, typer.Option(help="Seed of the random stream.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends the text and is not part of it. Repeatable.", rich_help_panel=_SAMPLING),
]


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
