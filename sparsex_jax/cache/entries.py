"""Entries: what the user asked to remember. Each has a handle, its pages, and a count of the lookups it served."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from sparsex_jax.errors import UnknownHandleError


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
    """

    handle: int
    namespace: str
    num_tokens: int
    pages: tuple[int, ...]
    frozen: bool
    uses: int = 0
    content: bytes | None = dataclasses.field(default=None, repr=False)


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
        self, namespace: str, num_tokens: int, pages: tuple[int, ...], frozen: bool, content: bytes | None
    ) -> Entry:
        entry = Entry(next(self._handles), namespace, num_tokens, pages, frozen, content=content)
        self._entries[entry.handle] = entry
        if content is not None:
            self._by_content[namespace, content] = entry.handle
        for page in pages:
            self._holders.setdefault(page, set()).add(entry.handle)
        return entry

    def remove(self, handle: int) -> Entry:
        """Remove and return an entry. Raises UnknownHandleError if there is no such entry."""
        entry = self[handle]
        del self._entries[handle]
        self._by_content.pop((entry.namespace, entry.content), None)
        for page in entry.pages:
            self._holders[page].discard(handle)
            if not self._holders[page]:
                del self._holders[page]
        return entry

    def holds(self, page: int) -> bool:
        return page in self._holders

    def holding(self, pages: Iterable[int]) -> set[int]:
        """The handles of all entries that hold any of these pages."""
        return set().union(*(self._holders[page] for page in pages if page in self._holders))

    def count_use(self, pages: Iterable[int]) -> None:
        for handle in self.holding(pages):
            self._entries[handle].uses += 1
