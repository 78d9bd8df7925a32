"""Options that several commands share, and the groups that they come in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsex_jax.config import CALIBRATED, METHODS, ReuseConfig, find_method
from sparsex_jax.config.checks import require
from sparsex_jax.config.membership import Membership, Patience
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
Model = Annotated[
    str,
    typer.Option(
        help="An embedded model's name, a GGUF file, a Hugging Face directory, a converted one, or a name on the hub: "
        "OWNER/NAME[@REVISION][:QUANTISATION]."
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="As `--model` of the other commands.")]
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
AdapterNames = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="NAME=PATH of a LoRA adapter in PEFT's format, or NAME=OWNER/NAME[@REVISION] of one on a hub. Repeatable.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to generate.", rich_help_panel=_SAMPLING)]


@dataclasses.dataclass(frozen=True)
class Loading:
    """How a model is loaded, and how much KV it may store."""

    dtype: DType = "auto"
    quantization: Quantization = "auto"
    kv_dtype: KVDType = "auto"
    tensor_parallel: TensorParallel = 1
    store_tokens: StoreTokens = None

    def fields(self) -> dict[str, Any]:
        """Those of `EngineConfig`: all but the number of devices."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "tensor_parallel"}


@dataclasses.dataclass(frozen=True)
class Donors:
    """What a prompt can reuse, and how the prompt is read."""

    remember: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, readable=True, help="A text file to remember, as a donor. Repeatable."
        ),
    ] = None
    namespace: Annotated[str, typer.Option(help="Only KV that was stored under this name is reused.")] = "default"
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Send the prompt as a user's message. Default: if the model has a chat template."
        ),
    ] = None

    @property
    def files(self) -> list[Path]:
        return self.remember or []


def _sampled(default: str, text: str) -> Any:
    """An option whose default the model's files may say."""
    return typer.Option(help=text, rich_help_panel=_SAMPLING, show_default=f"as the model's files recommend; {default}")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. None: as the model's files recommend."""

    max_new_tokens: MaxNewTokens = 128
    temperature: Annotated[float | None, _sampled("0", "0 is greedy.")] = None
    top_p: Annotated[float | None, _sampled("1", "Nucleus, in (0, 1].")] = None
    top_k: Annotated[int | None, _sampled("0", "Keep the k most probable tokens; 0 keeps all.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the random stream.", rich_help_panel=_SAMPLING)] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string that ends the text and is not part of it. Repeatable.", rich_help_panel=_SAMPLING),
    ] = None

    def fields(self) -> dict[str, Any]:
        """Those of `SamplingParams` that were given."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return given | {"stop": tuple(self.stop or ())}


def _of_processes(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_PROCESSES, **settings)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which process of how many this one is."""

    coordinator: Annotated[
        str | None,
        _of_processes(
            "HOST:PORT of process 0, which answers requests; the others compute with it. The next port is used too. "
            "`slurm`: as Slurm says, and how many there are. SPARSEX_GROUP_SECRET must be the same in all.",
            envvar="SPARSEX_COORDINATOR",
            show_default="one process",
        ),
    ] = None
    num_processes: Annotated[
        int | None, _of_processes("How many processes there are.", envvar="SPARSEX_NUM_PROCESSES")
    ] = None
    process_id: Annotated[
        int | None, _of_processes("Which of them this one is, from 0 on.", envvar="SPARSEX_PROCESS_ID")
    ] = None
    join_timeout: Annotated[float, _of_processes("Seconds to wait until all processes are there.")] = Patience.join
    silence_timeout: Annotated[
        float, _of_processes("Seconds without a sign of life after which another process counts as lost.")
    ] = Patience.silence

    def membership(self, stall: float = Patience.stall) -> Membership | None:
        """As `Membership.of`.

        Args:
          stall: as in `Patience`.
        """
        patience = Patience(self.join_timeout, self.silence_timeout, stall)
        return Membership.of(self.coordinator, self.num_processes, self.process_id, patience)


def _of_reuse(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=_REUSE, **settings)


def _of_method(name: str, text: str) -> Any:
    """An option of methods. Its default is that of SparseX, if that has one."""
    default = getattr(SparseX, name, None)
    return _of_reuse(text, show_default=False if default is None else str(default))


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What a command was told about reuse: a file, a method, and options of methods, which win.

    Options that have none of their own here go into `--method`.
    """

    reuse_config: Annotated[
        Path | None,
        _of_reuse(
            "A file that `sparsex calibrate` wrote. Options of reuse that the command has win over it.",
            show_default=f"{CALIBRATED} in the model's directory, or what comes with this package for its architecture",
        ),
    ] = None
    method: Annotated[
        str | None,
        _of_reuse(
            "full, prefix, naive, sparsex, excerpt or another method, with options if wanted: excerpt:coverage=0.5.",
            show_default="as --reuse-config says; sparsex, if only options of it are given",
        ),
    ] = None
    boundary_layer: Annotated[
        int | None, _of_method("boundary_layer", "Layers before it compute every token. Default: a sixth of them.")
    ] = None
    recompute_ratio: Annotated[
        float | None, _of_method("recompute_ratio", "Share of the reused tokens recomputed for their key mass.")
    ] = None
    coverage: Annotated[
        float | None,
        _of_reuse(
            "Recompute, or keep in an excerpt, as much as has this share of the attention. Default: 0; 0.9 in an "
            "excerpt.",
            show_default=False,
        ),
    ] = None
    max_ratio: Annotated[
        float | None, _of_method("max_ratio", "Share of the reused tokens that a coverage recomputes at most.")
    ] = None
    keep_ratio: Annotated[
        float | None,
        _of_method("keep_ratio", "Share of what an excerpt may leave out that it keeps at least. Default: 0.05."),
    ] = None
    overflow_tokens: Annotated[
        int | None,
        _of_method(
            "overflow_tokens", "Reused tokens recomputed on both sides of fresh ones; at most 1/8 of a segment."
        ),
    ] = None
    head_tokens: Annotated[
        int | None, _of_method("head_tokens", "First tokens of each segment that are recomputed.")
    ] = None
    tail_tokens: Annotated[
        int | None, _of_method("tail_tokens", "Last tokens recomputed where the prompt ends in reuse.")
    ] = None
    second_boundary: Annotated[
        int | None, _of_method("second_boundary", "From this layer on only fresh tokens are computed.")
    ] = None
    min_segment_tokens: Annotated[
        int | None, _of_method("min_segment_tokens", "Shorter runs are computed, not reused; at least 16.")
    ] = None
    only_if_faster: Annotated[
        bool | None,
        _of_method("only_if_faster", "Whether what was found is recomputed where that takes less time."),
    ] = None

    def options(self) -> dict[str, Any]:
        """The method, if one was named, and its options.

        Raises:
          InvalidRequestError: the method is unknown, or does not have the options or the values. Without a method, no
            method has the options together.
        """
        name, options = (None, {}) if self.method is None else _named(self.method)
        options |= self._typed()
        if name is not None:
            ReuseConfig(name, **options)
            return {"method": name} | options
        _require_a_method(options)
        return options

    def _typed(self) -> dict[str, Any]:
        """The options of methods that were given by themselves."""
        fields = dataclasses.asdict(self).items()
        return {name: value for name, value in fields if value is not None and name not in ("reuse_config", "method")}


def _require_a_method(options: Mapping[str, Any]) -> None:
    """Raise InvalidRequestError if no method has these options together."""
    having = methods_by_option()
    fitting = [name for name in METHODS if all(name in having[option] for option in options)]
    said = ", ".join(f"{option} ({', '.join(having[option])})" for option in options)
    require(bool(fitting), f"no method has all of these options: {said}")


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
