"""Entries: what the user asked to remember. Each has a handle, its pages, and a count of the lookups it served."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache.company import Company
from sparsex_jax.errors import UnknownHandleError


@dataclasses.dataclass(frozen=True)
class Origin:
    """How the KV of an entry was made.

    Attributes:
      company_tokens: how many tokens the text was prefilled behind, a company or a preamble of its own. 0: alone.
      prefilled_tokens: how many tokens were prefilled for it when it was remembered, those before the text too.
      company: what was chosen for it. None: nothing was to be chosen, so it stays as it is.
      adapter: the name of the adapter that acted on it. None: none did.
      sharing: which of the adapters' requests find it, as they ask for that (`reuse.adapters.SHARING`).
    """

    company_tokens: int = 0
    prefilled_tokens: int = 0
    company: Company | None = None
    adapter: str | None = None
    sharing: str = "isolated"


@dataclasses.dataclass
class Entry:
    """A remembered text.

    Attributes:
      handle: its number. No other entry ever gets the same one.
      namespace: lookups under this name find it.
      num_tokens: how many tokens it has.
      pages: the pages of its tokens, in order. Entries that begin alike share pages.
      frozen: its pages stay until it is forgotten.
      uses: how many lookups found one of its pages.
      content: a digest of what it was computed of, by which the same text is known again. None: it is never.
      said: a digest of the text, as which a message of a chat may have it. None: it is no message.
      origin: how its KV was made.
      stale: a text of its company was forgotten since. Its KV has seen that one until it is made again.
    """

    handle: int
    namespace: str
    num_tokens: int
    pages: tuple[int, ...]
    frozen: bool
    uses: int = 0
    content: bytes | None = dataclasses.field(default=None, repr=False)
    said: bytes | None = dataclasses.field(default=None, repr=False)
    origin: Origin = dataclasses.field(default=Origin(), repr=False)
    stale: bool = False


class EvictedTexts:
    """Entries whose pages were evicted. A lower tier may still have their texts. The oldest are dropped first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[int, tuple[Entry, Int32[np.ndarray, "text"]]] = {}

    def add(self, entry: Entry, text: Int32[np.ndarray, "text"]) -> list[int]:
        """Returns the handles of those that are known no longer, the oldest."""
        self._known[entry.handle] = dataclasses.replace(entry, pages=(), frozen=False), text
        gone = list(self._known)[: max(len(self._known) - self._most, 0)]
        for handle in gone:
            del self._known[handle]
        return gone

    def pop(self, handle: int) -> None:
        self._known.pop(handle, None)

    def text(self, handle: int) -> Int32[np.ndarray, "text"]:
        return self._known[handle][1]

    def of_content(self, namespace: str, content: bytes | None) -> int | None:
        about = ((entry.namespace, entry.content, entry.handle) for entry, _ in self._known.values())
        return next((handle for *what, handle in about if content is not None and what == [namespace, content]), None)

    def __getitem__(self, handle: int) -> Entry:
        return self._known[handle][0]

    def __contains__(self, handle: int) -> bool:
        return handle in self._known

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry, _ in self._known.values())


class EntryBook:
    """All entries by handle, and the handles that hold each page."""

    def __init__(self, handles: Iterator[int]) -> None:
        """
        Args:
          handles: yields numbers that no entry had before.
        """
        self._entries: dict[int, Entry] = {}
        self._holders: dict[int, set[int]] = {}
        self._by_content: dict[tuple[str, bytes | None], int] = {}
        self._handles = handles

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, handle: int) -> bool:
        return handle in self._entries

    def __getitem__(self, handle: int) -> Entry:
        """Raises UnknownHandleError if there is no such entry."""
        if handle not in self._entries:
            raise UnknownHandleError(f"handle {handle!r} is not known: never given out, forgotten, or evicted since")
        return self._entries[handle]

    def of_content(self, namespace: str, content: bytes) -> Entry | None:
        """The entry of this content, or None if there is none."""
        handle = self._by_content.get((namespace, content))
        return None if handle is None else self._entries[handle]

    def add(
        self,
        namespace: str,
        num_tokens: int,
        pages: tuple[int, ...],
        frozen: bool,
        content: bytes | None,
        said: bytes | None,
        origin: Origin,
        handle: int | None = None,
    ) -> Entry:
        """
        Args:
          handle: that of an entry which was evicted. None: a new one.
        """
        handle = next(self._handles) if handle is None else handle
        entry = Entry(handle, namespace, num_tokens, pages, frozen, 0, content, said, origin)
        self._entries[entry.handle] = entry
        if content is not None:
            self._by_content[namespace, content] = entry.handle
        self._hold(entry)
        return entry

    def move(self, handle: int, pages: tuple[int, ...]) -> None:
        """The entry has these pages now, and no others. Raises UnknownHandleError if there is no such entry."""
        entry = self[handle]
        self._let_go(entry)
        entry.pages = pages
        self._hold(entry)

    def _hold(self, entry: Entry) -> None:
        for page in entry.pages:
            self._holders.setdefault(page, set()).add(entry.handle)

    def _let_go(self, entry: Entry) -> None:
        for page in entry.pages:
            self._holders[page].discard(entry.handle)
            if not self._holders[page]:
                del self._holders[page]

    def remove(self, handle: int) -> Entry:
        """Remove and return an entry. Raises UnknownHandleError if there is no such entry."""
        entry = self[handle]
        del self._entries[handle]
        self._by_content.pop((entry.namespace, entry.content), None)
        self._let_go(entry)
        return entry

    def holds(self, page: int) -> bool:
        return page in self._holders

    def holding(self, pages: Iterable[int]) -> set[int]:
        """The handles of all entries that hold any of these pages."""
        return set().union(*(self._holders[page] for page in pages if page in self._holders))

    def count_use(self, pages: Iterable[int]) -> None:
        for handle in self.holding(pages):
            self._entries[handle].uses += 1
