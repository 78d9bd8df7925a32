"""From what a caller asks to a sequence that waits. All checks of arguments are here, and each is made once."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsex_jax.config import ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.errors import ContextLengthError, InvalidRequestError
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.output import Output
from sparsex_jax.scheduler.sequence import Remember, Sequence
from sparsex_jax.text.encoding import Prompt, encode


class Requests:
    """Makes sequences. From any thread.

    Attributes:
      tokenizer: a transformers tokenizer, or None for token ids only.
      reuse: of a request that names none.
    """

    def __init__(self, model: ModelConfig, tokenizer: Any | None, admission: Admission, reuse: ReuseConfig) -> None:
        self._model, self.tokenizer, self._admission, self.reuse = model, tokenizer, admission, reuse
        self._tokenizing = threading.Lock()  # fast tokenizers are not made for several threads

    def generation(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        reuse: ReuseConfig | None,
        namespace: str,
        keep: bool,
        **options: Any,
    ) -> Sequence:
        """A sequence that is prefilled and decoded.

        Args:
          options: fields of `Sequence`.

        Raises:
          InvalidRequestError: an argument is wrong; the message names it and its limit.
          ContextLengthError: prompt and answer are longer than the model takes, or than an empty store can hold.
        """
        started = time.perf_counter()
        _require_type("sampling", sampling, SamplingParams)
        sampling.check_vocabulary(self._model.vocab_size)
        output = self._output(sampling)
        tokens = self.encode(prompt, sampling.max_new_tokens)
        output.follow(tokens)
        return self._checked(Sequence(tokens, output, self._method(reuse), namespace, keep, started, **options))

    def prefill(
        self, prompt: Prompt, *, reuse: ReuseConfig | None, namespace: str, keep: bool, **options: Any
    ) -> Sequence:
        """A sequence that is prefilled only. Arguments and errors as `generation`."""
        started = time.perf_counter()
        tokens, output = self.encode(prompt), self._output(None)
        return self._checked(Sequence(tokens, output, self._method(reuse), namespace, keep, started, **options))

    def remember(
        self, prompt: Prompt, *, namespace: str, frozen: bool, preamble: Prompt | None, **options: Any
    ) -> Sequence:
        """A sequence whose prompt is registered once it is prefilled. Arguments and errors as `Engine.remember`."""
        started = time.perf_counter()
        _require_type("frozen", frozen, bool)
        text = self.encode(prompt, add_special_tokens=False)
        before = text[:0] if preamble is None else self.encode(preamble)
        length, limit = len(before) + len(text), self._model.max_position
        if length > limit:
            raise ContextLengthError(
                f"preamble has {len(before)} tokens and prompt {len(text)}: together {length}, "
                f"and the model's limit is {limit}"
            )
        exact, keep = ReuseConfig(method="prefix"), len(before) == 0  # else the text alone is kept, not both
        asked = Remember(len(before), frozen)
        tokens = np.concatenate([before, text])
        output = self._output(None)
        return self._checked(Sequence(tokens, output, exact, namespace, keep, started, remember=asked, **options))

    def encode(
        self, prompt: Prompt, new_tokens: int = 0, *, add_special_tokens: bool = True
    ) -> Int32[np.ndarray, "tokens"]:
        """A prompt as token ids. Raises InvalidRequestError if it is none, or too long with `new_tokens`."""
        with self._tokenizing:
            tokens = encode(prompt, self.tokenizer, self._model, add_special_tokens=add_special_tokens)
        limit, length = self._model.max_position, len(tokens) + new_tokens
        if length > limit:
            raise ContextLengthError(
                f"prompt has {len(tokens)} tokens and max_new_tokens={new_tokens}: together {length}, "
                f"and the model's limit is {limit}"
            )
        return tokens

    def _output(self, sampling: SamplingParams | None) -> Output:
        return Output(sampling, self._model.eos_token_ids, self.tokenizer)

    def _method(self, reuse: ReuseConfig | None) -> ReuseConfig:
        return self.reuse if reuse is None else reuse

    def _checked(self, sequence: Sequence) -> Sequence:
        _require_type("keep", sequence.keep, bool)
        if not callable(sequence.listener):
            raise InvalidRequestError(f"listener={sequence.listener!r} must be callable")
        self._admission.check(sequence)
        return sequence


def _require_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{name}={value!r} must be a {kind.__name__}")
