"""Compiles what answers must be into grammars over the model's tokens, by llguidance, and keeps the last ones."""

from __future__ import annotations

import collections
import json
import threading
from typing import Any

from sparsex_jax.config.structure import Structure
from sparsex_jax.errors import StructureError
from sparsex_jax.text.matcher import Matcher
from sparsex_jax.text.patterns import lark_with_ascii_classes, with_ascii_classes
from sparsex_jax.text.place import Place, Tokens, error_of

_KEPT = 256  # compiled grammars
# As Python's `json.dumps` writes JSON. Free white space would let a model write of it without an end.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """The grammars of one tokenizer. From any thread.

    The first use reads the tokenizer, which takes a third of a second for 50,000 tokens.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: tuple[int, ...]) -> None:
        """
        Args:
          tokenizer: of transformers.
          vocab_size: of the model, which may have more tokens than the tokenizer.
          end_tokens: those that end an answer.
        """
        self._tokenizer, self._vocab_size, self._end_tokens = tokenizer, vocab_size, end_tokens
        self._lock = threading.Lock()
        self._tokens: Tokens | None = None
        self._compiled: collections.OrderedDict[tuple[str, str], Any] = collections.OrderedDict()

    def matcher(self, structure: Structure, *, may_end: bool = True) -> Matcher:
        """A matcher for one answer.

        Args:
          may_end: an end token may end the answer where the grammar accepts it. Otherwise it goes on as long as it can.

        Raises:
          StructureError: there is no such grammar: the message says what is wrong or not supported.
        """
        grammar, ends = self.compiled(structure), frozenset(self._end_tokens if may_end else ())
        tokens, end_tokens = self._vocabulary(), frozenset(self._end_tokens)
        return Matcher(structure, lambda: Place(grammar.deep_copy(), tokens, end_tokens, ends), tokens, ends)

    def compiled(self, structure: Structure) -> Any:
        """llguidance's matcher at the beginning. Raises as `matcher`."""
        key = (structure.kind, structure.value)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(structure)
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]

    def _compile(self, structure: Structure) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary().llguidance, _grammar(structure), log_level=0)
        if matcher.is_error():
            raise StructureError(f"structure of kind {structure.kind}: {error_of(matcher)}")
        _require_a_beginning(matcher.deep_copy(), structure.kind)
        if matcher.is_stopped() or _matches_nothing_but_the_empty_text(matcher, self._end_tokens):
            raise StructureError(f"structure of kind {structure.kind} is fulfilled by the empty text only")
        return matcher

    def _vocabulary(self) -> Tokens:
        if self._tokens is None:
            from llguidance import LLTokenizer

            size = max(self._vocab_size, len(self._tokenizer))
            try:
                text = self._tokenizer.backend_tokenizer.to_str()
                tokens = LLTokenizer(text, n_vocab=size, eos_token=list(self._end_tokens))
                self._tokens = Tokens(tokens, self._vocab_size)
            except Exception as error:
                raise StructureError(f"structure: this model's tokenizer cannot be constrained: {error}") from error
        return self._tokens


def _require_a_beginning(matcher: Any, kind: str) -> None:
    """Raises StructureError if no token may come first, as where a schema refers to itself only."""
    matcher.compute_bitmask()
    if matcher.is_error():
        raise StructureError(f"structure of kind {kind} allows no text, or is too complex: {error_of(matcher)}")


def _matches_nothing_but_the_empty_text(matcher: Any, end_tokens: tuple[int, ...]) -> bool:
    if not matcher.is_accepting():
        return False
    allowed = int.from_bytes(matcher.compute_bitmask(), "little")
    return allowed.bit_count() == sum(allowed >> token & 1 for token in end_tokens)


def _grammar(structure: Structure) -> str:
    """In llguidance's own form. Raises StructureError if it is none."""
    from llguidance import LLMatcher, grammar_from

    kind, text = structure.kind, structure.value
    try:
        if structure.is_json:
            schema = {"type": "object"} if kind == "json_object" else json.loads(text)
            return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)  # type: ignore[arg-type]
        if kind == "choice":
            return grammar_from("choice", text)
        if kind == "regex":
            return grammar_from("regex", with_ascii_classes(text))
        if "::=" in text:  # GBNF has no such classes
            return grammar_from("gbnf", text)
        return grammar_from("lark", lark_with_ascii_classes(text))
    except (ValueError, RecursionError) as error:
        raise StructureError(f"structure of kind {kind}: {error}") from error
