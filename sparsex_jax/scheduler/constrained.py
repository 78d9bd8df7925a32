"""Decode of a batch in which some answer has a structure: token by token, and the device never waits for a mask.

    device    forward     choose  forward     choose  forward
    host      masks 1             token 1,            token 2,
                                  masks 2             masks 3

A forward pass needs the last token, which is on the device, and no mask. So it is dispatched before the host has seen
that token. While it runs, the host follows the answers through their grammars, and says what may come next.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.runner import Runner
from sparsex_jax.device.sampling import Sampled
from sparsex_jax.device.state import allowed_tokens
from sparsex_jax.text.matcher import Matcher


class ConstrainedDecode:
    """Some tokens of each sequence, the first of which is on its way."""

    def __init__(self, runner: Runner, state: DecodeState, matchers: Sequence[Matcher | None], max_tokens: int) -> None:
        """
        Args:
          matchers: of each sequence's structure, if it has one. They stay as they are.
          max_tokens: at most so many of each sequence.
        """
        self._runner, self._state, self._max_tokens = runner, runner.place(state), max_tokens
        self._ahead = [matcher.copy() if matcher else None for matcher in matchers]
        self._scores = runner.start_forward(self._state)

    def finish(self) -> tuple[DecodeState, Sampled]:
        """The state behind all tokens, and these, as NumPy arrays. It can be called once.

        Raises:
          StructureError: a grammar got too complex.
        """
        tokens: list[Sampled] = []
        goes_on = True
        while goes_on and len(tokens) < self._max_tokens:
            sampled, position = self._next(last=len(tokens) + 1 == self._max_tokens)
            tokens.append(sampled)
            goes_on = self._follow(sampled, position)
        return self._state, jax.tree.map(lambda *steps: np.concatenate(steps, axis=1), *tokens)

    def _next(self, *, last: bool) -> tuple[Sampled, Int[np.ndarray, "requests"]]:
        """The next token of each, and its position or -1 behind the end. The forward pass behind it is on its way."""
        allowed = allowed_tokens(self._ahead, len(self._state.token), self._runner.model.vocab_size)
        self._state, sampled = self._runner.choose(self._scores, self._state, allowed)
        if not last:
            self._scores = self._runner.start_forward(self._state)
        return jax.device_get((sampled, self._state.position))

    def _follow(self, sampled: Sampled, position: Int[np.ndarray, "requests"]) -> bool:
        """Take the matchers behind this token. Returns whether to go on: some sequence does, and no token is to be
        replaced, for which the host makes the state anew."""
        goes_on = position >= 0
        for slot, matcher in enumerate(self._ahead):
            if matcher is None:
                continue
            if not matcher.accept([int(sampled.token[slot, 0])]):
                return False
            if not goes_on[slot] or matcher.done:
                self._ahead[slot], goes_on[slot] = None, False
        return bool(goes_on.any())
