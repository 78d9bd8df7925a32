"""SmolLM2's tokenizer with other special tokens, so that marks of thoughts and calls are single tokens, as in models
that were trained on them."""

from __future__ import annotations

from collections.abc import Mapping

from live import make_engine
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from sparsex_jax import Engine

NAMES = ("<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>")


def marked_engine(template: str, *marks: str, **options) -> Engine:
    """A small engine with a chat template, and a tokenizer that has these marks as special tokens."""
    engine = make_engine(**options)
    engine.tokenizer = renamed(engine.tokenizer, dict(zip(NAMES, marks, strict=False)), template)
    return engine


def renamed(tokenizer: PreTrainedTokenizerFast, names: Mapping[str, str], template: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens have other names."""
    text = tokenizer.backend_tokenizer.to_str()
    for old, new in names.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="<|im_end|>")
    other.chat_template = template
    return other
