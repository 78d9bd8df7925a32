"""Tokenizers, read from a directory as transformers saves them, or built from a GGUF file's metadata.

The functions import transformers and tokenizers when they run, because these imports take seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.errors import UnsupportedModelError
from sparsex_jax.text.detokenizer import Detokenizer

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's token types; text is split at tokens of the last two

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# `tokenizer.ggml.pre` -> the rule that splits text into words. None is GPT-2's rule, which `ByteLevel` applies itself.
_SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": r"\p{N}",  # splits off every digit, then GPT-2's rule splits the rest
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def read_tokenizer(directory: Path) -> Any | None:
    """The tokenizer saved in a directory, or None if there is none. Nothing is downloaded."""
    if not any((directory / file).is_file() for file in _FILES):
        return None
    return _transformers().AutoTokenizer.from_pretrained(directory, local_files_only=True)


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


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Any | None:
    """A transformers `PreTrainedTokenizerFast` of the vocabulary in a GGUF file, or None if the file has none.

    Raises:
      UnsupportedModelError: the vocabulary is not a BPE, or its pre-tokenizer is unknown.
    """
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if "tokens" not in fields:
        return None
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    kind = fields.get("model")
    if kind not in builders:
        raise UnsupportedModelError(f"tokenizer.ggml.model={kind!r} is not supported; supported: {', '.join(builders)}")
    tokenizer = builders[kind](fields)
    tokenizer.add_tokens(_added_tokens(fields["tokens"], fields.get("token_type", ())))
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        # Files of Llama models may lack this field, but their prompts begin with the token all the same.
        add_bos_token=fields.get("add_bos_token", kind == "llama" or fields.get("pre") == "llama-bpe"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,  # it would drop spaces before punctuation
        **_named_tokens(fields),
    )


def _byte_level_bpe(fields: Mapping[str, Any]) -> Any:
    """GPT-2's kind of BPE: text becomes UTF-8 bytes, each a visible character, and the file stores the merges."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    pre = fields.get("pre", "default")
    # Llama 3's vocabulary has words that no sequence of its merges produces.
    tokenizer = Tokenizer(BPE(_ids(fields["tokens"]), merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(fields: Mapping[str, Any]) -> Any:
    """SentencePiece's kind of BPE (Llama 2, Mistral): `▁` stands for a space, and unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens = fields["tokens"]
    unknown = tokens[fields.get("unknown_token_id", 0)]
    model = BPE(_ids(tokens), _merges_by_score(fields), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefixed = fields.get("add_space_prefix", True)
    prepend = [normalizers.Prepend("▁")] if prefixed else []
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges, which SentencePiece does not store: two pieces join if the vocabulary has both together as a piece.

    Merges into the piece with the best score come first.
    """
    tokens, kinds = fields["tokens"], fields["token_type"]
    scores = {t: score for t, score, kind in zip(tokens, fields["scores"], kinds, strict=True) if kind == _NORMAL}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(scores, key=lambda token: -scores[token])
        for cut in range(1, len(token))
    ]
    return [(left, right) for left, right in merges if left in scores and right in scores]


def _ids(tokens: list[str]) -> dict[str, int]:
    return {token: id_ for id_, token in enumerate(tokens)}


def _pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if name not in _SPLITS:
        raise UnsupportedModelError(f"tokenizer.ggml.pre={name!r} is not supported; supported: {', '.join(_SPLITS)}")
    pattern = _SPLITS[name]
    gpt2_rule = name in ("default", "gpt-2", "smollm")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_rule)
    if pattern is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _added_tokens(tokens: list[str], kinds: Any) -> list[Any]:
    """The control and user-defined tokens. Only control tokens are special, so that decoding can skip them."""
    from tokenizers import AddedToken

    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _named_tokens(fields: Mapping[str, Any]) -> dict[str, str]:
    """Arguments such as `bos_token="<s>"`, for the special tokens that the file names."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {ours: fields.get(f"{theirs}_token_id") for theirs, ours in names.items()}
    return {name: fields["tokens"][id_] for name, id_ in ids.items() if id_ is not None}
