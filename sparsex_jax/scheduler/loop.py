"""The serving loop: requests come and go between dispatches, and nobody waits for the longest of them.

One round, `Loop.step`:

    take in      new requests, cancellations
    decode       everybody who has a first token, several tokens a dispatch; fewer where somebody waits
    admit        lookup, schedule and pages for those who wait, while the device decodes
    prefill      one plan: the next stage of whoever's turn it is, and of others that fit in with it

Pages. A request is admitted with pages for its prompt and a few tokens, and takes more as it grows. If there are none,
the youngest is put off: its pages go back, and later it is computed again (mostly it is found again: what was exact
is committed). The oldest is never put off for another, so it always gets on.

Order. The oldest waits first. Others overtake it only where it waits for pages and they find theirs, and only so many
times. Among those being prefilled, turns go round: a prompt of many chunks comes last after each.

Faults. What fails for several is tried with each alone, and then fails only for the one whose fault it is. If a step
takes the store with it, everybody is computed again from an empty cache, those who were in that step one by one.

Everything but `submit`, `wait`, `stats` and `Ticket.cancel` belongs to one thread, and so does the engine meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.device.generation import Output
from sparsex_jax.device.sampling import Sampled
from sparsex_jax.engine import DEFAULT_NAMESPACE, Engine
from sparsex_jax.errors import InvalidRequestError, NonFiniteLogitsError, OverloadedError, StoreFullError
from sparsex_jax.scheduler.counts import Counts, LoopStats
from sparsex_jax.scheduler.dispatch import Dispatch, Dispatcher
from sparsex_jax.scheduler.sequence import Event, Listener, Task
from sparsex_jax.text.encoding import Prompt

__all__ = ["Event", "Listener", "Loop", "LoopStats", "Ticket"]

FEW_STEPS = 4  # tokens a dispatch while somebody waits for a prefill
# A dispatch of more tokens should not take longer: who comes meanwhile waits for its end. It matters on slow devices.
MOST_SECONDS = 0.2

log = logging.getLogger(__name__)


class Ticket:
    """A submitted request.

    Attributes:
      id: rises with every request.
      prompt_tokens: of its prompt.
    """

    def __init__(self, task: Task, wake: Callable[[], None]) -> None:
        self.id, self.prompt_tokens = task.id, len(task.tokens)
        self._task, self._wake = task, wake

    def cancel(self) -> None:
        """From any thread. Its pages are free at the next step; its last event says `cancelled`, if it was not done."""
        self._task.cancelled = True
        self._wake()


class Loop:
    """Continuous batching on one engine."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int = 256,
        prefill_tokens: int | None = None,
        max_overtakes: int = 16,
    ) -> None:
        """
        Args:
          max_waiting: more waiting requests are refused.
          prefill_tokens: rows of a chunk of a long prompt, and of plans with several requests. None: what the
            engine's second smallest plan holds, 4 times the rows that go through a layer at a time.
          max_overtakes: how many younger requests may pass one that waits for pages.
        """
        self._engine = engine
        self._max_waiting, self._max_overtakes = max_waiting, max_overtakes
        shapes = engine.runner.shapes
        self._prefill_tokens = shapes.buckets[1][0] if prefill_tokens is None else prefill_tokens
        if not 1 <= self._prefill_tokens <= shapes.max_rows:
            raise InvalidRequestError(f"prefill_tokens={prefill_tokens} must be from 1 to {shapes.max_rows}")
        self._ids = itertools.count(1)
        self._inbox: list[Task] = []
        self._news = threading.Condition()
        self._tokenizing = threading.Lock()
        self._waiting: list[Task] = []  # by age
        self._prefilling: deque[Task] = deque()  # whose turn it is first
        self._decoding: list[Task] = []
        self._cache = engine.cache  # what the pages of the admitted are pages of
        self._changes = 0  # how often pages were given back
        self._dispatcher = Dispatcher(engine)
        self._counts = Counts()

    # From any thread ----------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        keep: bool = True,
        listener: Listener,
    ) -> Ticket:
        """Check a request and put it in line. Arguments as `Engine.generate`.

        Args:
          listener: is called with each `Event`, on the thread that steps. One that raises is heard no more, and its
            request is cancelled.

        Raises:
          InvalidRequestError: an argument is wrong; the message names it and its limit.
          StoreFullError: the store could not hold prompt and answer even if nothing else were in it.
          OverloadedError: too many wait already; says when to try again.
        """
        task = self._task(prompt, sampling or SamplingParams(), reuse or self._engine.reuse, namespace, keep, listener)
        with self._news:
            waiting = len(self._inbox) + len(self._waiting)
            if waiting >= self._max_waiting:
                raise OverloadedError(
                    f"{waiting} requests wait already, and max_waiting is {self._max_waiting}", self._retry()
                )
            task.id = next(self._ids)
            self._inbox.append(task)
            self._news.notify_all()
        return Ticket(task, self._wake)

    def wait(self, timeout: float) -> None:
        """Block until there may be work, or for so many seconds."""
        with self._news:
            if not (self._inbox or self._waiting or self._prefilling or self._decoding):
                self._news.wait(timeout)

    @property
    def stats(self) -> LoopStats:
        return self._counts.stats(
            waiting=len(self._inbox) + len(self._waiting), running=len(self._prefilling) + len(self._decoding)
        )

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _task(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        reuse: ReuseConfig,
        namespace: str,
        keep: bool,
        listener: Listener,
    ) -> Task:
        output = Output(sampling, self._engine.model.eos_token_ids, self._engine.tokenizer)
        with self._tokenizing:  # fast tokenizers are not made for several threads
            tokens = self._engine.encode(prompt, sampling.max_new_tokens)
        self._engine.admission.check(tokens, sampling, reuse, namespace)
        return Task(0, tokens, output, reuse, namespace, keep, listener, time.perf_counter())

    def _retry(self) -> float:
        """Seconds until a quarter of the line has moved on, if requests end as fast as the last ones did."""
        interval = self._counts.seconds_between_ends()
        return 1.0 if interval is None else min(max(interval * self._max_waiting / 4, 1.0), 60.0)

    # One round ----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One round of work; False when nothing is running or waiting."""
        self._take_in()
        decoding = self._start_decode()
        self._admit()
        self._finish_decode(decoding)
        self._prefill()
        return bool(self._inbox or self._waiting or self._running)

    def check(self) -> None:
        """Raise AssertionError unless requests hold what the cache says. For tests: it walks the whole store."""
        self._cache.check([page for task in self._running for page in task.pages])

    @property
    def _running(self) -> list[Task]:
        """The admitted, the oldest first."""
        return sorted([*self._prefilling, *self._decoding], key=lambda task: task.id)

    def _take_in(self) -> None:
        with self._news:
            new, self._inbox = self._inbox, []
            self._waiting += new
        if self._engine.cache is not self._cache:
            self._start_over()  # a call to the engine between two steps lost the store
        for task in [*self._waiting, *self._running]:
            if task.cancelled:
                self._end(task, "cancelled")

    # Decoding -----------------------------------------------------------------------------------------------

    def _start_decode(self) -> Dispatch | None:
        """Send a dispatch on its way for all but the suspects, who decode one by one."""
        steps = self._steps()
        self._grow(steps)
        for task in [task for task in self._decoding if task.suspect]:
            self._decode_alone(task, steps)
        tasks = [task for task in self._decoding if not task.suspect]
        if not tasks:
            return None
        try:
            return self._dispatcher.start(tasks, steps)
        except Exception as error:
            self._survive(tasks, error, functools.partial(self._decode_alone, steps=steps))
            return None

    def _finish_decode(self, dispatch: Dispatch | None) -> None:
        if dispatch is None:
            return
        try:
            sampled = self._dispatcher.finish(dispatch)
        except Exception as error:
            self._survive(dispatch.tasks, error, functools.partial(self._decode_alone, steps=dispatch.steps))
            return
        for line, task in enumerate(dispatch.tasks):
            self._take(task, sampled, line)

    def _decode_alone(self, task: Task, steps: int) -> None:
        if task.request is None:
            return  # the store was lost meanwhile, and it waits
        try:
            sampled = self._dispatcher.finish(self._dispatcher.start([task], steps))
        except Exception as error:
            self._survive([task], error)
        else:
            self._take(task, sampled, 0)

    def _steps(self) -> int:
        """As many as a dispatch may have and soon gets done, or few where somebody's first token is near."""
        free = len(self._prefilling) + len(self._decoding) < self._engine.config.max_batch
        near = self._prefilling or (free and any(task.blocked_at != self._changes for task in self._waiting))
        most = self._engine.config.decode_steps
        if not near and self._dispatcher.step_seconds * most <= MOST_SECONDS:
            return most
        return min(FEW_STEPS, most)

    def _take(self, task: Task, sampled: Sampled, line: int, *, first: bool = False) -> None:
        """Give a task its line of what came, as NumPy arrays.

        Args:
          first: the tokens are those behind a prefill. What it wrote can be found from now on.
        """
        try:
            task.output.take(sampled, line)
            task.done = task.length - 1  # the last token's KV is not in the store: it was no input yet
            if first or task.output.finish_reason:
                self._commit(task)
        except Exception as error:
            if isinstance(error, NonFiniteLogitsError) and not task.suspect:
                self._suspect(task)
            else:
                self._fail(task, error)
            return
        if task.output.finish_reason:
            self._end(task, task.output.finish_reason)
        else:
            self._tell(task, task.news())

    def _grow(self, steps: int) -> None:
        """Pages for the tokens to come, the oldest first. Where there are none, the youngest makes room."""
        for task in sorted(self._decoding, key=lambda task: task.id):
            while task.request is not None and not self._has_pages(task, steps):
                self._preempt(self._running[-1])

    def _has_pages(self, task: Task, steps: int) -> bool:
        lacking = self._engine.admission.pages_for(task.slots(steps)) - len(task.pages)
        try:
            task.pages.extend(self._cache.allocate(max(lacking, 0)))
        except StoreFullError:
            return False
        return True

    def _preempt(self, task: Task) -> None:
        """Take a task's pages; it waits again, at its place by age.

        What is exact is committed, so that it finds itself again. What is approximate would find its own copies, and
        be another request than it was: those are dropped.
        """
        self._counts.put_off()
        if task.approximate:
            self._withdraw(task)
        else:
            self._commit(task)
        self._leave(task)
        self._put_back(task)
        task.blocked_at = self._changes

    def _suspect(self, task: Task) -> None:
        """Its logits are not finite, maybe because of another's: in attention, 0 times that one's NaN is NaN.

        So it is computed again, alone, and fails if they are not then either.
        """
        task.suspect = True
        self._withdraw(task)
        self._leave(task)
        self._put_back(task)

    def _put_back(self, task: Task) -> None:
        self._waiting.append(task)
        self._waiting.sort(key=lambda task: task.id)

    # Admitting ----------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """The oldest first. A younger one passes those that wait for pages, or for what another computes."""
        blocked: list[Task] = []
        for task in list(self._waiting):
            full = len(self._prefilling) + len(self._decoding) >= self._engine.config.max_batch
            if full or any(older.overtaken >= self._max_overtakes for older in blocked):
                return
            if self._is_being_computed(task):
                continue
            if self._try_to_admit(task):
                for older in blocked:
                    older.overtaken += 1
            elif task in self._waiting:
                blocked.append(task)

    def _is_being_computed(self, task: Task) -> bool:
        """Whether an older request computes a long run of its tokens now. There are ever fewer of those."""
        return any(
            other.id < task.id and other.keep and other.namespace == task.namespace and task.wanted.shares(other.offer)
            for other in self._prefilling
            if other.offer is not None
        )

    def _try_to_admit(self, task: Task) -> bool:
        """False if there are no pages for it, or it failed and waits no more."""
        if task.blocked_at == self._changes and self._running:
            return False
        tokens, reuse = task.to_prefill()
        try:
            self._admit_with(task, tokens, reuse)
        except StoreFullError:
            task.blocked_at = self._changes
            return not self._running and self._admit_without_reuse(task)
        except Exception as error:
            self._fail(task, error)
            return False
        return True

    def _admit_without_reuse(self, task: Task) -> bool:
        """The task has the store to itself, and still there are not enough pages.

        It can only be for what it shares: one page of a frozen entry in use keeps all others of it. So it shares none.
        """
        try:
            self._admit_with(task, task.sequence, ReuseConfig(method="full"))
        except Exception as error:
            self._fail(task, error)
            return False
        return True

    def _admit_with(self, task: Task, tokens: np.ndarray, reuse: ReuseConfig) -> None:
        slots = task.slots(1 + self._engine.config.decode_steps)
        request = self._engine.admission.admit(tokens, slots - len(tokens) + 1, reuse, task.namespace)
        task.admit(request, self._prefill_tokens, self._engine.model.num_layers)
        self._waiting.remove(task)
        self._prefilling.append(task)

    # Prefilling ---------------------------------------------------------------------------------------------

    def _prefill(self) -> None:
        tasks = self._next_plan()
        if tasks:
            self._prefill_together(tasks)

    def _next_plan(self) -> list[Task]:
        """Whose turn it is, and those behind whose stages fit in with it."""
        chosen: list[Task] = []
        for task in self._prefilling:
            if not chosen or self._fits(task, chosen):
                chosen.append(task)
        return chosen

    def _fits(self, task: Task, chosen: Sequence[Task]) -> bool:
        """Whether the task's next stage has the schedule of these, and their plan room for its rows."""
        if task.suspect or chosen[0].suspect:
            return False
        together = [one.stages[0] for one in (*chosen, task)]
        same = together[-1].starts == together[0].starts
        return same and sum(stage.num_rows for stage in together) <= self._prefill_tokens

    def _prefill_together(self, tasks: list[Task]) -> None:
        try:
            logits, computed = self._engine.runner.prefill([task.stages[0] for task in tasks])
            outputs, prompts = [task.output for task in tasks], [task.tokens for task in tasks]
            sampled = self._engine.first_tokens(logits, prompts, outputs)  # of chunks too: what fails is to fail here
        except Exception as error:
            self._survive(tasks, error, self._prefill_alone)
            return
        for line, (task, mask) in enumerate(zip(tasks, computed, strict=True)):
            self._engine.admission.unpin(task.admitted)  # the copies are on their way
            task.advance(mask)
            self._prefilling.remove(task)
            if task.stages:
                self._prefilling.append(task)
            else:
                self._start_decoding(task, sampled, line)
        self._changes += 1

    def _prefill_alone(self, task: Task) -> None:
        if task.request is not None:
            self._prefill_together([task])

    def _start_decoding(self, task: Task, sampled: Sampled, line: int) -> None:
        self._decoding.append(task)
        if not task.output.token_ids:
            assert task.computed is not None
            task.report = task.admitted.report(self._engine.model.num_layers, task.computed, task.submitted)
        self._take(task, sampled, line, first=True)

    # How it ends --------------------------------------------------------------------------------------------

    def _survive(self, tasks: Sequence[Task], error: Exception, alone: Callable[[Task], None] | None = None) -> None:
        """A step of these tasks failed. One is at fault; several are tried `alone`, or are suspects from now on."""
        lost = self._engine.recover()
        if lost:
            self._start_over()
        if alone is None or len(tasks) == 1:
            self._fail(tasks[0], error)
            return
        log.warning("a step of %d requests failed, they go on one by one", len(tasks), exc_info=error)
        for task in tasks:
            if lost:
                task.suspect = True
            else:
                alone(task)

    def _start_over(self) -> None:
        """The store was lost and the cache is a new, empty one: what ran waits, and is computed again."""
        self._cache = self._engine.cache
        self._dispatcher.forget()
        for task in self._running:
            task.leave()
            self._put_back(task)
        self._prefilling.clear()
        self._decoding.clear()
        self._changes += 1

    def _commit(self, task: Task) -> None:
        """Make what is computed findable, if it is to be kept. Again as it grows."""
        if task.keep and task.done:
            self._engine.admission.commit(task.admitted, task.sequence[: task.done])

    def _withdraw(self, task: Task) -> None:
        """Nobody is to find what it wrote. The pages of its prefix are others'."""
        self._cache.withdraw(task.pages[task.shared_pages :])

    def _fail(self, task: Task, error: Exception) -> None:
        if task.request is not None:
            self._withdraw(task)
        self._end(task, "error", error)

    def _end(self, task: Task, reason: str, error: Exception | None = None) -> None:
        if task.request is not None:
            self._leave(task)
        if task in self._waiting:
            self._waiting.remove(task)
        self._counts.ended(reason)
        self._tell(task, task.news(reason, error))

    def _leave(self, task: Task) -> None:
        self._engine.admission.leave(task.admitted)
        for place in (self._prefilling, self._decoding):
            if task in place:
                place.remove(task)
        task.leave()
        self._changes += 1

    def _tell(self, task: Task, event: Event) -> None:
        self._counts.told(event)
        try:
            task.listener(event)
        except Exception:
            log.exception("the listener of request %d failed; the request is cancelled", task.id)
            task.listener, task.cancelled = _nobody, True


def _nobody(event: Event) -> None:
    """Hears nothing."""
