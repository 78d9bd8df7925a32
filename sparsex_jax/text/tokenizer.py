"""Tokenizers, read from a directory as transformers saves them, or built from a GGUF file's metadata.

The functions import transformers and tokenizers when they run, because these imports take seconds.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
from sparsex_jax.errors import UnsupportedModelError
from sparsex_jax.text.detokenizer import Detokenizer
from sparsex_jax.text.templates import gguf_templates, legacy_template
from sparsex_jax.text.vocabulary import Vocabulary

_FILE = "tokenizer.json"
# Files of other tokenizers, or of a part of one. A directory that has one of them and no tokenizer.json is refused.
OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt")
_OTHER_FILES = (
    *(*OTHER_TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
READ_FILES = (_FILE, *_OTHER_FILES)
_NO_LIMIT = int(1e30)  # as transformers says that a tokenizer has no limit


def read_tokenizer(directory: Path) -> Any | None:
    """The tokenizer saved in a directory, or None if there is none. Nothing is downloaded.

    `tokenizer.json` alone says how text becomes tokens. transformers would replace parts of it by the class that
    `tokenizer_config.json` names or by the model's type; what it reads here are names of tokens and chat templates.

    Raises:
      UnsupportedModelError: there are files of a tokenizer but no `tokenizer.json`, or a file is damaged.
    """
    path = directory / _FILE
    if not path.is_file():
        _refuse_others(directory)
        return None
    for name in (_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (directory / name).is_file():
            read_json(directory / name)
    with _refused(f"{path} or a file beside it cannot be read"):
        from tokenizers import Tokenizer

        tokenizer = _transformers().PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        tokenizer._tokenizer = Tokenizer.from_file(str(path))  # as no class has changed it
        tokenizer.chat_template = tokenizer.chat_template or legacy_template(directory)
    tokenizer.model_max_length = _NO_LIMIT  # the model's configuration has the limit
    _check(tokenizer, path)
    return tokenizer


def _check(tokenizer: Any, path: Path) -> None:
    if not len(tokenizer):
        raise UnsupportedModelError(f"{path} has an empty vocabulary")
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates] if templates is not None else []
    if not all(isinstance(text, str) for text in texts):
        raise UnsupportedModelError(f"{path.parent}: chat_template={reprlib.repr(templates)} must be text")


def _refuse_others(directory: Path) -> None:
    found = [name for name in _OTHER_FILES if (directory / name).is_file()]
    if found:
        raise UnsupportedModelError(
            f"{directory} has {', '.join(found)}, but no {_FILE}, and no other tokenizer is read. Download it, or "
            "write it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Refuse what the libraries cannot read. Their errors are of any type; those of Rust code are no Exception."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UnsupportedModelError(f"{what}: {type(error).__name__}: {error}") from error


def _transformers() -> Any:
    """Import transformers without its warning that models need torch, since tokenizers do not."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def token_pieces(tokenizer: Any, tokens: Sequence[int]) -> Iterator[str]:
    """Yield the text of each token, special ones included; together they are the text of all.

    A character that is spread over several tokens belongs to the last of them, or to the one behind it.
    """
    text = Detokenizer(tokenizer, skip_special_tokens=False)
    for number, token in enumerate(tokens, start=1):
        piece = text.push(token)
        yield piece if number < len(tokens) else piece + text.finish()


class _Own:
    """Deep copies are the tokenizer itself: transformers would copy what nobody else has, which takes a second."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: Any) -> Any:
        return self._tokenizer


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Any | None:
    """A transformers `PreTrainedTokenizerFast` of the vocabulary in a GGUF file, or None if the file has none.

    Raises:
      UnsupportedModelError: the vocabulary is not a BPE, its pre-tokenizer is unknown, or a field is missing or wrong.
    """
    prefix = "tokenizer.ggml."
    values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if values.get("tokens") is None:
        return None
    kind = values.get("model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(f"tokenizer.ggml.model={kind!r} is not supported; supported: gpt2, llama")
    vocabulary = Vocabulary(Fields("tokenizer.ggml", values))
    with _refused("the vocabulary of the GGUF file cannot be read"):
        tokenizer = vocabulary.byte_level_bpe() if kind == "gpt2" else vocabulary.sentencepiece_bpe()
        tokenizer.add_tokens(vocabulary.added_tokens())
        return _transformers().PreTrainedTokenizerFast(
            tokenizer_object=_Own(tokenizer),
            chat_template=gguf_templates(metadata),
            clean_up_tokenization_spaces=False,  # it would drop spaces before punctuation
            **vocabulary.named_tokens(),
            **vocabulary.added_at_the_ends(),
        )
