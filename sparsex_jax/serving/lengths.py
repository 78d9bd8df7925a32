"""How long prompts and answers may be: what the model takes and the store holds, in the words of OpenAI's errors."""

from __future__ import annotations

from typing import Any

from sparsex_jax.engine import Engine
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.faults import RequestError

_SHRINK = 4  # so many characters may a tokenizer's normalizer make into one, as NFC does of letters with accents
_FEW = 8  # characters that a token hardly ever has on average
_SLACK = 64  # tokens that may differ where a text is cut


class Lengths:
    """The limits of one engine.

    What is longer than an empty store holds is refused here. Frozen texts leave less than that, and how much less is
    known only once a prompt is looked up, which may begin with one of them: admission refuses what does not fit then.
    """

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._most_new = engine, limits.max_tokens
        self._most = min(engine.model.max_position, engine.config.num_pages * engine.config.page_size)
        self._tokenizer = engine.tokenizer
        self._longest = longest_token(engine.tokenizer) if engine.tokenizer else 1

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together now: `max_model_len` in `/v1/models`."""
        return self._engine.max_context

    def new_tokens(self, length: int, named: tuple[str, int] | None, default: int | None, param: str) -> int:
        """The most tokens that the answer may have.

        Args:
          length: tokens of the prompt.
          named: the request's field and its value. None: the request has no such field.
          default: of a request that names no number, as far as it fits. None: what fits.
          param: the field that the prompt comes from.

        Raises:
          RequestError: prompt and answer do not fit together.
        """
        room = self._most - length
        if room < (1 if named is None else named[1]):
            wanted = 1 if named is None else named[1]
            said = f"you requested {length + wanted} tokens ({length} in the {param}, {wanted} in the completion)"
            raise self.error(said, f"{param} or completion", param if named is None or room < 1 else named[0])
        wanted = named[1] if named else room if default is None else min(default, room)
        return min(wanted, self._most_new)

    def require_text_fits(self, text: str, param: str) -> None:
        """Refuse a text that is certainly too long without tokenizing all of it, which takes seconds for megabytes.

        Raises:
          RequestError: it has more tokens than the model takes or the store holds.
        """
        if len(text) > self._most * self._longest:
            raise self.error(f"the text has {len(text)} characters, which are more tokens", param, param)
        begin = text[: self._most * _FEW]
        if len(begin) < len(text) and self._count(begin) > self._most + _SLACK:
            said = f"the first {len(begin)} of {len(text)} characters alone are more tokens"
            raise self.error(said, param, param)

    def end_of(self, text: str, num_tokens: int) -> str:
        """As much of the text's end as surely has so many tokens."""
        return text[-(num_tokens + _SLACK) * self._longest :]

    def error(self, said: str, shorten: str, param: str) -> RequestError:
        return RequestError(
            f"This model's maximum context length is {self.context} tokens. However, {said}. "
            f"Please reduce the length of the {shorten}.",
            param=param,
            code="context_length_exceeded",
        )

    def _count(self, text: str) -> int:
        assert self._tokenizer is not None
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def longest_token(tokenizer: Any) -> int:
    """How many characters of a text one token can stand for: those of the longest name in the vocabulary.

    Names of byte-level tokens have a character for each byte. Not counted is white space that an added token swallows.
    """
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return longest * (_SHRINK if getattr(backend, "normalizer", None) is not None else 1)
