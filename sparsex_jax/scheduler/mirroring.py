"""Mirrors on the device: what a sequence was copied from, what of it is kept once it ends, and how it comes back.

admission     `restored`: pages of the prefix that are stored as rows of others get pages of their own
              `located`: where the rows are that are copied
a sequence    `keep`: its pages are derived from those of its donors as far as it was copied; what was computed of
ends          them is packed (`sparsex_jax.cache.mirrors`)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence as Several

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.mirrors import Origins
from sparsex_jax.device.runner import Runner
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.schedule import written_depth
from sparsex_jax.scheduler.sequence import Sequence

log = logging.getLogger(__name__)


class Mirroring:
    """The mirrors of one engine. All methods belong to the thread that steps the loop."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def restored(self, cache: PageCache, shared: Several[int], new: Several[int]) -> list[int]:
        """A prefix whose derived pages are restored into new pages, as many as there are of them.

        The new pages are the caller's. If this fails, nothing finds them.
        """
        derived = [page for page in shared if cache.mirrors.is_derived(page)]
        if not derived:
            return list(shared)
        try:
            copies = cache.mirrors.restore(derived, new)
            self._runner.copy([(copy, new) for copy in copies])
        except BaseException:
            cache.withdraw(new)
            raise
        place = dict(zip(derived, new, strict=True))
        return [place.get(page, page) for page in shared]

    def located(self, cache: PageCache, plan: RequestPlan) -> tuple[RequestPlan, Origins | None]:
        """The plan with the rows that its copies are made of, and what they come from."""
        copies = tuple(cache.mirrors.located(copy) for copy in plan.copies)
        if not copies:
            return plan, None
        return dataclasses.replace(plan, copies=copies), cache.mirrors.origins(copies, len(plan.prompt))

    def keep(self, cache: PageCache, sequence: Sequence) -> None:
        """Store an ended sequence, which holds its pages still, as a mirror of what it was copied from."""
        if sequence.origins is None or sequence.computed is None or not sequence.keep or sequence.forgotten:
            return
        depth = written_depth(sequence.plan.phases, sequence.computed, self._runner.model.num_layers)
        packing = cache.mirrors.derive(sequence.pages, sequence.origins, depth, sequence.num_shared)
        if packing is None:
            return
        try:
            self._runner.pack(packing)
        except Exception:
            log.exception("a sequence could not be stored as a mirror; its pages stay")
            cache.withdraw(packing.pages)
