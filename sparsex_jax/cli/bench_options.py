"""The options of `sparsex bench` and `sparsex calibrate`: what is asked, how often, and what counts as good."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # these import jax, which takes seconds, and so they are imported where they are made
    from sparsex_jax.cli.bench import BenchSettings
    from sparsex_jax.eval.calibration import Target

_REGIMES_HELP = (
    "How segments are stored: joint; shuffled (one prompt had them in another order); independent; preamble; company:N "
    "(each behind the prompt's opening and N segments of other samples); strangers:N (of another task)."
)

Length = Annotated[int, typer.Option(help="Tokens of reused body in each prompt, about.")]
Segments = Annotated[int, typer.Option(help="Segments of the body.")]
Batch = Annotated[int, typer.Option(help="Prompts that run together. An accelerator needs 32 or more.")]
Seed = Annotated[int, typer.Option(help="Seed of the prompts.", min=0)]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `bench quality` measures."""

    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks, separated by commas. Of few words that any model knows: niah, mq_niah, mk_niah, vt, cwe, fwe, "
            "qa, chat, agents. In English: notes_(codes, people, years), of fixed length. On documents in English: "
            "report_(codes, people), log_cargo, mv_niah, mv_ports, mq_codes, vt_keys, cwe_goods, qa_people, two_hop, "
            "changed, email_rooms; on Python modules: module_(constants, returns)."
        ),
    ] = "vt,mq_niah"
    regimes: Annotated[str, typer.Option(help=_REGIMES_HELP)] = "joint,independent"
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas, with options if wanted: sparsex:boundary_layer=0:recompute_ratio=0.3. "
            "Also oracle, and reorder: documents in the order of an earlier prompt, and its prefix."
        ),
    ] = "full,naive,sparsex:boundary_layer=0,sparsex"
    length: Length = 2048
    segments: Segments = 4
    segment_length: Annotated[
        int | None,
        typer.Option(help="Tokens of each segment, about, instead of --length: 20 segments of 512, say.", min=1),
    ] = None
    samples: Annotated[int, typer.Option(help="Prompts for each task and regime.")] = 8
    batch: Batch = 4
    seed: Seed = 0

    def settings(self) -> BenchSettings:
        """Raises InvalidRequestError if one is out of range."""
        from sparsex_jax.cli.bench import BenchSettings

        length = self.segment_length * self.segments if self.segment_length else self.length
        names = _split(self.methods), _split(self.tasks), _split(self.regimes)
        return BenchSettings(*names, length, self.segments, self.samples, self.batch, self.seed)


@dataclasses.dataclass(frozen=True)
class Trials:
    """What `calibrate` measures."""

    tasks: Annotated[str, typer.Option(help="As in `bench quality`. Choose tasks that the model can do.")] = "niah,qa"
    regimes: Annotated[
        str, typer.Option(help=_REGIMES_HELP + " Each gets a selection of its own; the server makes company.")
    ] = "independent,company"
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods to try, separated by commas. One with options, as in `bench quality`, is tried as it is.",
            show_default="all that choose what to recompute",
        ),
    ] = None
    length: Length = 1024
    segments: Segments = 4
    samples: Annotated[
        int, typer.Option(help="Prompts for each task and regime, and as many others to confirm the choice.")
    ] = 16
    batch: Batch = 4
    seed: Seed = 0

    def settings(self) -> BenchSettings:
        """Raises InvalidRequestError if one is out of range."""
        from sparsex_jax.cli.bench import BenchSettings
        from sparsex_jax.eval.calibration.candidates import METHODS

        methods = list(METHODS) if self.methods is None else _split(self.methods)
        names = methods, _split(self.tasks), _split(self.regimes)
        return BenchSettings(*names, self.length, self.segments, self.samples, self.batch, self.seed)


@dataclasses.dataclass(frozen=True)
class Demands:
    """What a calibration has to keep."""

    max_loss: Annotated[
        float | None,
        typer.Option(help="How much less than full recompute the answers may score, on average.", show_default="0.02"),
    ] = None
    min_agreement: Annotated[
        float | None,
        typer.Option(help="Instead: the share of full recompute's greedy continuation that must be equal, on average."),
    ] = None
    confident: Annotated[
        bool,
        typer.Option("--confident", help="Require that the whole 95 % interval meets the target. Needs many samples."),
    ] = False

    def target(self) -> Target:
        """Raises InvalidRequestError as `target_of`."""
        from sparsex_jax.cli.calibrate import target_of

        return target_of(self.max_loss, self.min_agreement, self.confident)


Folder = Annotated[
    Path | None,
    typer.Option(
        help="A folder for the results: rows as they come, then JSON, a Markdown table and a plot. The same "
        "command goes on where it was stopped; tasks, regimes, methods and samples can be added.",
        file_okay=False,
    ),
]
WithMaps = Annotated[
    bool, typer.Option("--maps", help="Also plot what is looked at and what deviates, for each task and regime.")
]
Use = Annotated[
    str | None,
    typer.Option(
        help="The regime whose selection the file names.", show_default="the cheapest that holds in all of them"
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        help="The file to write. Rows are kept beside it (.rows.jsonl): the same command goes on where it stopped.",
        dir_okay=False,
        show_default="sparsex.json, in the model's directory if the model is one",
    ),
]


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
