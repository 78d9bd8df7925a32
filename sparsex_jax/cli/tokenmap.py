"""A prompt in colours, token by token: what was known of each token, and what was done about it."""

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
    """A key of `STYLES` for each token. A reused token that is computed again is `recomputed`."""
    names = np.array(["prefix", "reused", "fresh"])[report.kind]
    return np.where((report.kind == TokenKind.REUSED) & report.active, "recomputed", names).tolist()


def token_map(tokenizer: Any, tokens: Sequence[int], report: Report) -> Text:
    """The prompt, each token on the colour of its label."""
    text = Text()
    for piece, label in zip(token_pieces(tokenizer, tokens), token_labels(report), strict=True):
        text.append(piece, STYLES[label])
    return text


def legend(report: Report) -> Text:
    """What the colours mean, with the number of tokens of each."""
    labels = token_labels(report)
    entries = [Text.assemble((f" {label} ", style), f" {labels.count(label)}") for label, style in STYLES.items()]
    return Text("   ").join(entries)
