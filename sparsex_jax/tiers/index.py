"""Which blocks are stored, by what they hold: found as prefixes, page by page, and as segments, by windows.

The index knows blocks wherever they are, in host memory or on disk; it never sees their KV. What it finds is loaded
into the device's store and committed there, and the lookup of `sparsex_jax.cache` then finds that as all else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from sparsex_jax.cache.children import TOKEN_BYTES, common_prefix
from sparsex_jax.cache.windows import WINDOW, run_around, window_hashes
from sparsex_jax.tiers.blocks import BLOCK_PAGES, KEY_BYTES, Block

MOST_COMPARED = 16  # blocks that go on alike, of which the one is looked for that goes on as the prompt does
LEAST_SHARE = 4  # a block is loaded for segments if at least one token in so many of it is wanted

# Whether a block's approximate KV may be in a prefix.
Accepts = Callable[[Block], bool]


@dataclasses.dataclass(frozen=True)
class Found:
    """A block that holds what a prompt wants.

    Attributes:
      num_tokens: how many of its leading tokens are wanted.
    """

    block: Block
    num_tokens: int


class Run(NamedTuple):
    """A block, and from where to where a prompt has what is in it."""

    block: Block
    begin: int
    end: int


@runtime_checkable  # tests check argument types while they run
class BlockObserver(Protocol):
    """Hears which blocks there are. It is called between two changes, so it must be quick and must not raise."""

    def block_stored(self, block: Block) -> None:
        """It can be found from now on."""

    def block_removed(self, block: Block) -> None:
        """It was told of as stored, and cannot be found any more."""


class BlockIndex:
    """The blocks of all namespaces.

    Attributes:
      blocks: by their keys.
      changes: how often a block was added or removed.
      observer: hears of blocks that come and go. None: nobody does.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size, self.changes = page_size, 0
        self.blocks: dict[bytes, Block] = {}
        self._by_pages: dict[bytes, dict[bytes, None]] = {}
        self._windows: dict[str, dict[int, dict[tuple[bytes, int], None]]] = {}
        self._salt = secrets.randbits(64)
        self.observer: BlockObserver | None = None

    def watch(self, observer: BlockObserver | None) -> None:
        """Tell this observer of all blocks, and from now on of changes. None: nobody."""
        self.observer = observer
        if observer is not None:
            for block in self.blocks.values():
                observer.block_stored(block)

    # Storing ------------------------------------------------------------------------------------------------

    def add(self, block: Block) -> None:
        self.changes += 1
        if self.observer is not None and block.key not in self.blocks:
            self.observer.block_stored(block)
        self.blocks[block.key] = block
        for page in self._page_keys(block):
            self._by_pages.setdefault(page, {})[block.key] = None
        windows = self._windows.setdefault(block.namespace, {})
        for offset, value in self._hashes(block):
            windows.setdefault(value, {})[block.key, offset] = None

    def remove(self, key: bytes) -> Block | None:
        """Returns the block; None if it is not there."""
        block = self.blocks.pop(key, None)
        if block is not None:
            self.changes += 1
            if self.observer is not None:
                self.observer.block_removed(block)
            for page in self._page_keys(block):
                _discard(self._by_pages, page, key)
            for offset, value in self._hashes(block):
                _discard(self._windows[block.namespace], value, (key, offset))
            if not self._windows.get(block.namespace):  # what is left is too short for a window, if there is anything
                self._windows.pop(block.namespace, None)
        return block

    def outgrown(self, block: Block) -> list[bytes]:
        """Blocks that stand where this one does, and of which it has all tokens, as exact or more."""
        return [other.key for other in self._beside(block) if _holds(block, other)]

    def holder(self, block: Block) -> Block | None:
        """A block that stands where this one would and has all its tokens, as exact or more; itself, if it is there."""
        beside = (other for other in self._beside(block) if _holds(other, block))
        return self.blocks.get(block.key) or next(beside, None)

    def marks(self, block: Block) -> list[bytes]:
        """By which a block is known again when it has grown: one for each full page. The last stands for all."""
        return list(self._page_keys(block)) or [block.key]

    def _beside(self, block: Block) -> list[Block]:
        """Other blocks that begin with the same page behind the same past."""
        found = self._by_pages.get(next(self._page_keys(block), b""), {})
        return [self.blocks[key] for key in found if key != block.key]

    def _page_keys(self, block: Block) -> Iterator[bytes]:
        """A digest of each full page's tokens and of all that is before them."""
        return self._chain(block.namespace, block.start, block.before, block.tokens)

    def _chain(self, namespace: str, start: int, before: bytes, tokens: bytes) -> Iterator[bytes]:
        key = _digest(namespace.encode(), str(start).encode(), before)
        for page in itertools.batched(range(0, len(tokens), TOKEN_BYTES), self.page_size):
            if len(page) == self.page_size:
                key = _digest(key, tokens[page[0] : page[-1] + TOKEN_BYTES])
                yield key

    def _hashes(self, block: Block) -> Iterator[tuple[int, int]]:
        """Offset and hash of each window on the grid."""
        hashes = window_hashes(np.frombuffer(block.tokens, np.int32), self._salt)
        yield from zip(itertools.count(0, WINDOW), hashes[::WINDOW].tolist(), strict=False)

    # Finding ------------------------------------------------------------------------------------------------

    def prefix(self, tokens: Int32[np.ndarray, "tokens"], namespace: str, accepts: Accepts) -> list[Found]:
        """The blocks that the beginning of a prompt is in, in order."""
        data, found, before = tokens.tobytes(), [], b""
        size = BLOCK_PAGES * self.page_size
        for start in range(0, len(tokens), size):
            own = data[start * TOKEN_BYTES : (start + size) * TOKEN_BYTES]
            best = self._best(namespace, start, before, own, accepts)
            if best is None:
                break
            found.append(best)
            before = best.block.key
            if best.num_tokens < size:
                break
        return found

    def _best(self, namespace: str, start: int, before: bytes, tokens: bytes, accepts: Accepts) -> Found | None:
        """The block with most of these tokens; of two alike, the one that is exact."""
        level: dict[bytes, None] = {}
        for page in self._chain(namespace, start, before, tokens):
            deeper = self._by_pages.get(page)
            if not deeper:
                break
            level = deeper
        candidates = [self.blocks[key] for key in itertools.islice(level, MOST_COMPARED)]
        usable = [block for block in candidates if block.exact == block.num_tokens or accepts(block)]
        if not usable:
            return None
        best = max(usable, key=lambda block: (common_prefix(block.tokens, tokens), block.exact))
        return Found(best, common_prefix(best.tokens, tokens))

    def segments(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str, wanted: Bool[np.ndarray, "tokens"], least: int
    ) -> list[Found]:
        """Whole blocks with runs of at least `least` of the wanted tokens, and enough of them to be worth loading."""
        blocks = {run.block.key: run.block for run in self.runs(tokens, namespace, wanted, least)}
        return [Found(block, block.num_tokens) for block in blocks.values()]

    def runs(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str, wanted: Bool[np.ndarray, "tokens"], least: int
    ) -> list[Run]:
        """Where in the prompt the blocks are that `segments` finds, the longest run first."""
        found, wanted = [], wanted.copy()
        for run in sorted(self._runs(tokens, namespace, wanted), key=lambda run: run.begin - run.end):
            num = int(wanted[run.begin : run.end].sum())
            if num >= max(least, run.block.num_tokens // LEAST_SHARE):
                found.append(run)
                wanted[run.begin : run.end] = False
        return found

    def copies(self, text: Int32[np.ndarray, "text"], namespace: str) -> list[bytes]:
        """The keys of all blocks that hold a window of a text and go on as it does for 15 tokens, or to its end.

        A text that is too short for a window is found where a block has it and nothing else.
        """
        if len(text) < WINDOW:
            own = text.astype(np.int32).tobytes()
            return [key for key, block in self.blocks.items() if (block.namespace, block.tokens) == (namespace, own)]
        everything = np.ones(len(text), bool)
        least = min(2 * WINDOW - 1, len(text))
        runs = self._runs(text, namespace, everything)
        return list(dict.fromkeys(block.key for block, begin, end in runs if end - begin >= least))

    def _runs(
        self, tokens: Int32[np.ndarray, "tokens"], namespace: str, wanted: Bool[np.ndarray, "tokens"]
    ) -> Iterator[Run]:
        """All runs that have some wanted window."""
        windows = self._windows.get(namespace)
        if not windows or len(tokens) < WINDOW or not wanted.any():
            return
        seen: dict[tuple[bytes, int], int] = {}  # to where the block was compared that would begin at this place
        hashes = window_hashes(tokens, self._salt).tolist()
        known = np.fromiter(map(windows.__contains__, hashes), bool, len(hashes))
        for place in np.flatnonzero(known & wanted[: len(known)]).tolist():
            for key, offset in windows[hashes[place]]:
                if seen.get((key, place - offset), -1) <= place:
                    begin, end = run_around(tokens, place, np.frombuffer(self.blocks[key].tokens, np.int32), offset)
                    seen[key, place - offset] = max(end, place + 1)
                    if end > begin:
                        yield Run(self.blocks[key], begin, end)


def _holds(block: Block, other: Block) -> bool:
    same = (block.namespace, block.start, block.before) == (other.namespace, other.start, other.before)
    return same and block.tokens.startswith(other.tokens) and block.exact >= other.exact


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _discard[Key, Value](sets: dict[Key, dict[Value, None]], key: Key, value: Value) -> None:
    sets[key].pop(value, None)
    if not sets[key]:
        del sets[key]
