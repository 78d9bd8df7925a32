"""Prints a prompt in colours that show for each token whether it was found in the store and whether it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text

from sparsex_jax.reuse.prompt import TokenKind
from sparsex_jax.reuse.report import Report
from sparsex_jax.text.tokenizer import token_pieces

STYLES = {
    "prefix": "black on bright_blue",
    "reused": "black on bright_green",
    "recomputed": "black on bright_yellow",
    "fresh": "white on red",
}


def token_labels(report: Report) -> list[str]:
    """The label of each token, a key of `STYLES`. A reused token that is computed again is `recomputed`."""
    names = np.array(["prefix", "reused", "fresh"])[report.kind]
    return np.where((report.kind == TokenKind.REUSED) & report.active, "recomputed", names).tolist()


def token_map(tokenizer: Any, tokens: Sequence[int], report: Report) -> Text:
    """The prompt's text, with each token in the colour of its label."""
    text = Text()
    for piece, label in zip(token_pieces(tokenizer, tokens), token_labels(report), strict=True):
        text.append(piece, STYLES[label])
    return text


def legend(report: Report) -> Text:
    """The label of each colour, with the number of its tokens."""
    labels = token_labels(report)
    entries = [Text.assemble((f" {label} ", style), f" {labels.count(label)}") for label, style in STYLES.items()]
    return Text("   ").join(entries)
