"""Prints a prompt in colours that show for each token whether it was found in the store and whether it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from sparsex_jax.reuse.report import Report, token_kinds, words_of
from sparsex_jax.text.tokenizer import token_pieces

STYLES = {
    "prefix": "black on bright_blue",
    "approximate_prefix": "black on bright_cyan",
    "reused": "black on bright_green",
    "recomputed": "black on bright_yellow",
    "fresh": "white on red",
    "omitted": "dim",
}


def token_map(tokenizer: Any, tokens: Sequence[int], report: Report) -> Text:
    """The prompt's text, with each token in the colour of its label."""
    text = Text()
    for piece, label in zip(token_pieces(tokenizer, tokens), _labels(report), strict=True):
        text.append(piece, STYLES[label])
    return text


def legend(report: Report) -> Text:
    """The label of each colour, with the number of its tokens."""
    counts = report.tokens_by_kind()
    entries = [Text.assemble((f" {words_of(label)} ", style), f" {counts[label]}") for label, style in STYLES.items()]
    return Text("   ").join(entries)


def _labels(report: Report) -> list[str]:
    """The label of each token, a key of `STYLES`."""
    return token_kinds(report.kind, report.active).tolist()
