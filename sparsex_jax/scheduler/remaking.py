"""Making remembered texts again while nothing is in line: in better company, or without what was forgotten.

Who is remembered first has no company. Once there is twice as much as a text had, it is prefilled again behind that;
and so is a text of whose company something was forgotten, before all others. The tokens before a text and the text are
prefilled a chunk at a time, as in healing, each chunk behind what is stored of them already. The last chunk is a
sequence that remembers: the entry keeps its handle, and its old pages go when it has the new ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from sparsex_jax.cache import Entry
from sparsex_jax.cache.company import Company, company_namespace, text_digest
from sparsex_jax.config import ReuseConfig
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.requests import Requests
from sparsex_jax.scheduler.sequence import Sequence

MUCH_MORE = 2  # times the company that a text had


class Remaking:
    """Decides which text is made again next."""

    def __init__(self, chunk: int, admission: Admission, requests: Requests) -> None:
        """
        Args:
          chunk: tokens that are prefilled at a time.
        """
        self._chunk, self._admission, self._requests = chunk, admission, requests
        self._tried: set[tuple[int, bytes]] = set()  # handles, and the company that came of no use

    def next(self, *, stale: bool) -> Sequence | None:
        """The prefill of the next chunk. None if no text is to be made again, or if there is no room for any.

        Args:
          stale: look at those of whose company something was forgotten, and at no others.
        """
        for entry, company in self._candidates(stale):
            text = self._admission.cache.text(entry.handle)
            if self._has_room(len(company.tokens), len(text)) and self._admission.cache.may_replace(entry.handle):
                return self._chunk_of(entry, company, text)
        return None

    def try_again(self) -> None:
        """What failed may have been at fault for what came of no use."""
        self._tried.clear()

    def _candidates(self, stale: bool) -> Iterator[tuple[Entry, Company]]:
        """The entries to make again, oldest first, each with the company that it would have."""
        admission = self._admission
        for entry in admission.cache.entries() if admission.company_tokens else ():
            had = entry.origin.company
            if had is None or entry.stale is not stale:
                continue
            neighbours = admission.neighbours(entry.namespace)
            if not stale and neighbours.num_tokens < MUCH_MORE * len(had.tokens):
                continue
            company = neighbours.company_of(
                admission.cache.text(entry.handle), admission.company_room(entry.num_tokens)
            )
            if (entry.handle, company.tokens.tobytes()) in self._tried:
                continue
            if stale or self._is_better(entry, company, had):
                yield entry, company

    def _is_better(self, entry: Entry, company: Company, had: Company) -> bool:
        """A text with which prompts begin stays, since they share its pages."""
        more = len(company.tokens) >= max(MUCH_MORE * len(had.tokens), 1)
        return more and not self._admission.cache.begins_prompts(entry.handle)

    def _has_room(self, before: int, num_tokens: int) -> bool:
        """Whether there are pages for the text behind its company, for its copy, and for a tail that is held."""
        pages = self._admission.pages_for
        needed = pages(before + num_tokens) + pages(num_tokens) + 1
        return needed <= self._admission.cache.num_available

    def _chunk_of(self, entry: Entry, company: Company, text: np.ndarray) -> Sequence:
        tokens, size = np.concatenate([company.tokens, text]), self._admission.cache.page_size
        namespace = company_namespace(entry.namespace) if len(company.tokens) else entry.namespace
        done = self._admission.cache.tree.prefix(tokens.tobytes(), namespace).num_tokens
        if len(tokens) - done <= self._chunk:
            self._tried.add((entry.handle, company.tokens.tobytes()))
            return self._requests.remake(entry, text)
        end = max((done + self._chunk) // size, done // size + 1) * size
        with_it = Company(company.opening, company.tokens, company.texts | {text_digest(text)})
        options: dict[str, Any] = {"asked": False, "remakes": entry.handle, "company": with_it}
        return self._requests.prefill(
            tokens[:end], reuse=ReuseConfig(method="prefix"), namespace=namespace, keep=True, **options
        )
