"""Blocks: what moves between the device's store, host memory and the disk."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from sparsex_jax.cache.children import TOKEN_BYTES

BLOCK_PAGES = 16
KEY_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Block:
    """What is known of a run of at most `BLOCK_PAGES` pages of one sequence, wherever its KV is.

    A sequence is cut at every `BLOCK_PAGES` pages from its beginning on, so only its last block may be shorter.

    Attributes:
      namespace: lookups under this name find it.
      start: the position that its first token was computed at.
      tokens: of all its pages, int32 as bytes. Only the last page may have fewer than the page size.
      exact: how many of its leading tokens have the KV that full recompute gives.
      made_by: `ReuseConfig.to_dict()` of what computed the others, as JSON; empty if there are none.
      before: the key of the block before it in its sequence; empty for the first.
    """

    namespace: str
    start: int
    tokens: bytes
    exact: int
    made_by: str
    before: bytes

    @functools.cached_property
    def key(self) -> bytes:
        """16 bytes that stand for all of this and, by `before`, for all that precedes it."""
        said = json.dumps([self.namespace, self.start, self.exact, self.made_by, self.before.hex()])
        return hashlib.blake2b(said.encode() + b"\0" + self.tokens, digest_size=KEY_BYTES).digest()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    def to_json(self) -> list[Any]:
        """All of it, as `from_json` takes it."""
        return [self.namespace, self.start, self.exact, self.made_by, self.before.hex(), self.tokens.hex()]

    @classmethod
    def from_json(cls, fields: Sequence[Any]) -> Block:
        """Raises ValueError and TypeError if these are not the fields of a block."""
        namespace, start, exact, made_by, before, tokens = fields
        return cls(namespace, start, bytes.fromhex(tokens), exact, made_by, bytes.fromhex(before))
