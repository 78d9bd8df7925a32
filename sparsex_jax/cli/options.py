"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_REUSE = "Reuse"
_SAMPLING = "Sampling"

PromptArgument = Annotated[str, typer.Argument(help="The prompt; `-` reads it from standard input.")]
Model = Annotated[
    str, typer.Option(help="An embedded model's name, a GGUF file, a Hugging Face directory or a converted one.")
]
DType = Annotated[str, typer.Option(help="Of weights, activations and KV: float32, bfloat16 or float16.")]
StoreTokens = Annotated[int, typer.Option(help="Token slots of the KV store.")]
Remember = Annotated[
    list[Path] | None,
    typer.Option(
        exists=True, dir_okay=False, readable=True, help="A text file to remember alone, as a donor. Repeatable."
    ),
]
Namespace = Annotated[str, typer.Option(help="Whose KV may be reused.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Send the prompt as a user's message. Default: if the model has a chat template."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
MaxNewTokens = Annotated[int, typer.Option(help="At most so many tokens are generated.", rich_help_panel=_SAMPLING)]

Method = Annotated[str, typer.Option(help="full, prefix, naive, sparsex or another method.", rich_help_panel=_REUSE)]
BoundaryLayer = Annotated[
    int | None,
    typer.Option(help="Layers before it compute every token. Default: a sixth of them.", rich_help_panel=_REUSE),
]
RecomputeRatio = Annotated[
    float, typer.Option(help="Share of the reused tokens recomputed for their key mass.", rich_help_panel=_REUSE)
]
OverflowTokens = Annotated[
    int, typer.Option(help="Reused tokens recomputed on both sides of fresh ones.", rich_help_panel=_REUSE)
]
TailTokens = Annotated[
    int, typer.Option(help="Last tokens recomputed where the prompt ends in reuse.", rich_help_panel=_REUSE)
]
SecondBoundary = Annotated[
    int | None, typer.Option(help="From this layer on only fresh tokens are computed.", rich_help_panel=_REUSE)
]
MinSegmentTokens = Annotated[
    int, typer.Option(help="Shorter runs are computed, not reused; at least 16.", rich_help_panel=_REUSE)
]

Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopP = Annotated[float, typer.Option(help="Nucleus, in (0, 1].", rich_help_panel=_SAMPLING)]
TopK = Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.", rich_help_panel=_SAMPLING)]
Seed = Annotated[int, typer.Option(help="Of the random stream.", rich_help_panel=_SAMPLING)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends the text and is not part of it. Repeatable.", rich_help_panel=_SAMPLING),
]
