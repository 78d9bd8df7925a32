"""`Vocabulary`: what a GGUF file says about its tokens, as parts of a tokenizer."""

from __future__ import annotations

from typing import Any

from sparsex_jax.config.fields import Fields
from sparsex_jax.text.pre_tokenizers import Rule, pre_tokenizer, rule_named

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # llama.cpp's token types; text is split at tokens of the last two
_NO_TOKEN = 2**32 - 1  # -1 as an unsigned number
_NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


class Vocabulary:
    """The fields `tokenizer.ggml.*`. All methods raise UnsupportedModelError for a field that is missing or wrong."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._tokens = self._names()
        self._ids = {token: id_ for id_, token in enumerate(self._tokens)}
        if len(self._ids) < len(self._tokens):
            twice = next(token for id_, token in enumerate(self._tokens) if self._ids[token] != id_)
            fields.refuse("tokens", f"has the token {twice!r} twice")
        self._is_sentencepiece = fields.get("model") == "llama"

    def byte_level_bpe(self) -> Any:
        """GPT-2's kind of BPE: text becomes UTF-8 bytes, each a visible character, and the file stores the merges."""
        from tokenizers import Tokenizer, decoders
        from tokenizers.models import BPE

        rule = self._rule()
        tokenizer = Tokenizer(BPE(self._ids, self._merges(), ignore_merges=rule.ignore_merges))
        tokenizer.pre_tokenizer = pre_tokenizer(rule)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def sentencepiece_bpe(self) -> Any:
        """SentencePiece's kind of BPE (Llama 2, Mistral): `▁` stands for a space, and unknown characters become
        bytes."""
        from tokenizers import Tokenizer, decoders, normalizers
        from tokenizers.models import BPE

        merges, unknown = self._merges_by_score(), self._token("unknown") or self._tokens[0]
        tokenizer = Tokenizer(BPE(self._ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        prefixed = self._fields.flag("add_space_prefix", True)
        prepend = [normalizers.Prepend("▁")] if prefixed else []
        strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def added_tokens(self) -> list[Any]:
        """The control and user-defined tokens. Only control tokens are special, so that decoding can skip them."""
        from tokenizers import AddedToken

        kinds = self._column("token_type") if self._fields.get("token_type") is not None else []
        return [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(self._tokens, kinds, strict=False)
            if kind in (_CONTROL, _USER_DEFINED)
        ]

    def named_tokens(self) -> dict[str, str]:
        """Arguments such as `bos_token="<s>"`, for the special tokens that the file names."""
        named = {ours: self._token(theirs) for theirs, ours in _NAMED.items()}
        return {name: token for name, token in named.items() if token is not None}

    def added_at_the_ends(self) -> dict[str, bool]:
        """Whether a prompt begins with the begin token and ends with the end token.

        Files of Llama models may lack the former field, but their prompts begin with the token all the same.
        """
        begins = self._is_sentencepiece or self._rule().add_bos
        added = {"add_bos_token": self._fields.flag("add_bos_token", begins)}
        added["add_eos_token"] = self._fields.flag("add_eos_token")
        for name, on in added.items():
            token = name.split("_")[1]
            if on and self._token(token) is None and self._fields.get(name) is not None:
                self._fields.refuse(name, f"needs {token}_token_id, and there is none")
        return added

    def _rule(self) -> Rule:
        return rule_named(self._fields.text("pre") or "default")

    def _names(self) -> list[str]:
        tokens = self._fields.get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            self._fields.refuse("tokens", "must be a list of texts")
        return [token or f"[EMPTY_{id_}]" for id_, token in enumerate(tokens)]  # llama.cpp's name for those without one

    def _column(self, name: str) -> list[Any]:
        """A list with a number for each token."""
        column = self._fields.get(name)
        if not isinstance(column, list) or len(column) != len(self._tokens):
            self._fields.refuse(name, f"must be a list of {len(self._tokens)} numbers, one for each token")
        if not all(isinstance(value, (int, float)) and value == value for value in column):
            self._fields.refuse(name, "must have numbers only")
        return column

    def _token(self, name: str) -> str | None:
        """The token of which the file gives the id, such as `bos_token_id`."""
        default = {"bos": 1, "eos": 2, "unknown": 0}.get(name) if self._is_sentencepiece else None
        field = f"{name}_token_id"
        id_ = self._fields.get(field, default)
        if id_ is None or id_ in (_NO_TOKEN, -1):
            return None
        if not isinstance(id_, int) or isinstance(id_, bool) or not 0 <= id_ < len(self._tokens):
            self._fields.refuse(field, f"must be an id from 0 to {len(self._tokens) - 1}")
        return self._tokens[id_]

    def _merges(self) -> list[tuple[str, str]]:
        """The two parts of each merge, which files write with a space between them."""
        merges = self._fields.get("merges")
        if not isinstance(merges, list):
            self._fields.refuse("merges", "must be a list: without merges no tokens are made of bytes")
        pairs = [self._pair(merge) for merge in merges]
        for left, right in pairs:
            if not (left in self._ids and right in self._ids and left + right in self._ids):
                self._fields.refuse("merges", f"has {left!r} and {right!r}, which are or make no token")
        return pairs

    def _pair(self, merge: Any) -> tuple[str, str]:
        match merge.split(" ", 1) if isinstance(merge, str) else merge:
            case [str(left), str(right)]:
                return left, right
        self._fields.refuse("merges", f"has {merge!r}, which is no pair")

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """The merges, which SentencePiece does not store: two pieces join if the vocabulary has both together as a
        piece. Merges into the piece with the best score come first."""
        rows = zip(self._tokens, self._column("scores"), self._column("token_type"), strict=True)
        scores = {token: score for token, score, kind in rows if kind == _NORMAL}
        merges = [
            (token[:cut], token[cut:])
            for token in sorted(scores, key=lambda token: -scores[token])
            for cut in range(1, len(token))
        ]
        return [(left, right) for left, right in merges if left in scores and right in scores]
