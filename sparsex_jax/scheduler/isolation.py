"""Isolation of failures: what fails for several sequences fails in the end only for the one at fault.

A step that fails for several is tried with each alone. If it took the store with it, everything is computed again
from an empty cache, and those who were in that step are suspects: they run one by one from then on.

Where KV that a step waited for could not be loaded, its sequences wait again, and are computed without that.

A sequence whose logits are not finite is computed again as well, alone and of its own tokens only. It fails if they are
not finite then either. The fault may lie in what it found in the store: that is looked at, and what of it is not finite
is withdrawn, so that no other prompt finds it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator

from sparsex_jax.device.runner import Runner
from sparsex_jax.errors import LinkError, NonFiniteLogitsError
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.sequence import Sequence, State

log = logging.getLogger(__name__)


class Isolation:
    """Tries steps of several sequences."""

    def __init__(self, runner: Runner, admission: Admission) -> None:
        self._runner, self._admission = runner, admission

    def attempt[Result](
        self, sequences: list[Sequence], together: Callable[[], Result], alone: Callable[[Sequence], Result]
    ) -> Iterator[tuple[list[Sequence], Result]]:
        """Give the result of a step, or the results of single sequences if it fails. Each is to be used before the
        next is asked for, since the next may lose the store. Sequences at fault are finished.

        Args:
          together: runs the step for all the sequences.
          alone: runs it for one of them.
        """
        try:
            result = together()
        except LinkError:
            self._compute_again(sequences)
        except Exception as error:
            yield from self._alone(sequences, error, alone)
        else:
            yield sequences, result

    def _alone[Result](
        self, sequences: list[Sequence], error: Exception, alone: Callable[[Sequence], Result]
    ) -> Iterator[tuple[list[Sequence], Result]]:
        lost = self.recover()
        if len(sequences) == 1:
            self._admission.finish(sequences[0], "error", error)
            return
        if not sequences:  # it was for some who have all ended since
            return
        log.warning("a step of %d sequences failed, they go on one by one", len(sequences), exc_info=error)
        for sequence in sequences:
            if lost:
                sequence.suspect = True
            elif sequence.state in (State.PREFILLING, State.DECODING):  # not if another one alone lost the store
                yield from self.attempt([sequence], functools.partial(alone, sequence), alone)

    def _compute_again(self, sequences: list[Sequence]) -> None:
        """What some of them waited for did not come. All wait again, those without reuse."""
        for sequence in sequences:
            if sequence.late is not None and sequence.late.error is not None:
                sequence.from_scratch, sequence.restored_tokens = True, 0
            self._admission.leave(sequence)

    def judge(self, sequence: Sequence, error: Exception) -> None:
        """What a sequence's own tokens brought up: it fails, or is computed again alone if another may be at fault.

        In attention, 0 times another sequence's NaN is NaN.
        """
        if isinstance(error, NonFiniteLogitsError) and not sequence.from_scratch:
            self._withdraw_broken(sequence)
            sequence.suspect = sequence.from_scratch = True
            self._admission.withdraw(sequence)
            self._admission.leave(sequence)
        else:
            self._admission.finish(sequence, "error", error)

    def _withdraw_broken(self, sequence: Sequence) -> None:
        """Withdraw what a sequence found and is not finite."""
        try:
            broken = self._admission.withdraw_broken(sorted(sequence.donors), self._runner.finite_slots)
        except Exception:
            log.exception("what a request found could not be looked at")
            self.recover()
            return
        if broken:
            log.warning("%d pages that a request found have KV that is not finite; they are withdrawn", broken)

    def recover(self) -> bool:
        """After a failure: whether the KV is lost. Then store and cache are new, and what ran waits."""
        lost = self._runner.recover()
        if lost:
            self._admission.start_over()
        return lost
