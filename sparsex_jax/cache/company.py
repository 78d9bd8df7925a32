"""Company: what a remembered text was prefilled behind, which is not part of it.

The KV of a company is kept as well, since several texts have the same. It is in a namespace of its own beside that of
the texts, where no prompt finds it: as donors its tokens would be of less use than the texts themselves, as those at
its beginning were computed with little before them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache.windows import WINDOW, window_hashes

_MARK = "\0company"
_LEAST_RUN = 16  # tokens; lookups find no shorter ones either
_SALT = secrets.randbits(64)


def company_namespace(namespace: str) -> str:
    """Where the KV of a namespace's companies is. No caller's namespace has this name: `is_plain`."""
    return namespace + _MARK


def is_plain(namespace: str) -> bool:
    """Whether callers may use this name."""
    return "\0" not in namespace


def text_digest(text: Int32[np.ndarray, "tokens"]) -> bytes:
    """By which the same tokens are known again."""
    return hashlib.sha256(text.astype(np.int32).tobytes()).digest()


def share_run(a: Int32[np.ndarray, "a"], b: Int32[np.ndarray, "b"]) -> bool:
    """Whether a run of 16 tokens is in both, by the hashes of its windows of 8."""
    both = np.isin(window_hashes(a, _SALT), window_hashes(b, _SALT))
    windows = _LEAST_RUN - WINDOW + 1
    return len(both) >= windows and bool((np.convolve(both, np.ones(windows, int), "valid") == windows).any())


@dataclasses.dataclass(frozen=True, eq=False)
class Company:
    """What was chosen for a text.

    Attributes:
      opening: the tokens with which most prompts of the namespace begin.
      tokens: the opening and the other texts behind it.
      texts: digests of those texts, each as a whole.
    """

    opening: Int32[np.ndarray, "opening"]
    tokens: Int32[np.ndarray, "tokens"]
    texts: frozenset[bytes] = frozenset()

    @classmethod
    def nobody(cls) -> Company:
        """The text is alone."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int32))

    def knows(self, text: Int32[np.ndarray, "tokens"]) -> bool:
        """Whether this text is in it, as one of the texts or as a run of 16 tokens of the opening."""
        return text_digest(text) in self.texts or share_run(self.opening, text)
