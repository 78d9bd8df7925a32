"""One request on its way through the loop: what it asked for, how far it is, and what it still has to tell."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32

from sparsex_jax.config import ReuseConfig
from sparsex_jax.device.generation import Output, TokenLogprobs
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.admission import Request
from sparsex_jax.scheduler.chunks import stages
from sparsex_jax.scheduler.sharing import Offer, Wanted


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one request.

    Attributes:
      text: new since the last event. Never half a character, and held back while it may begin a stop string.
      token_ids: new tokens.
      report: with the first event that has tokens.
      finish_reason: stop, length, cancelled or error; the last event has one, and no other.
      error: with the finish reason `error`.
      logprobs: of `token_ids`, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    report: Report | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


Listener = Callable[[Event], None]


@dataclasses.dataclass(eq=False)
class Task:
    """A submitted request, wherever it is: waiting, being prefilled, decoding.

    Attributes:
      tokens: the prompt.
      output: the answer so far.
      submitted: `time.perf_counter()` then.
      keep: whether it is to be found later. Not any more once something that it uses was forgotten.
      request: while it is admitted: its plan and the pages it holds.
      stages: the plans still to run before it decodes.
      computed: which prompt tokens each phase of the plan computed, `[phases, tokens]`.
      done: how many tokens of the sequence have their KV in the pages.
      approximate: the KV is not what a full prefill would give.
      cancelled: nobody wants the rest.
      suspect: it was in a step that took the store with it, or got logits that are not finite. It runs alone.
      overtaken: how often a younger one was admitted while it waited for pages.
      shared_pages: so many of its pages are those of a prefix that it found.
      blocked_at: the loop's count of changes when there were no pages for it. Until the next one there are none.
    """

    id: int
    tokens: Int32[np.ndarray, "tokens"]
    output: Output
    reuse: ReuseConfig
    namespace: str
    keep: bool
    listener: Listener
    submitted: float
    request: Request | None = None
    stages: deque[RequestPlan] = dataclasses.field(default_factory=deque)
    computed: Bool[np.ndarray, "phases tokens"] | None = None
    done: int = 0
    approximate: bool = False
    cancelled: bool = False
    suspect: bool = False
    overtaken: int = 0
    blocked_at: int = -1
    shared_pages: int = 0
    report: Report | None = None
    offer: Offer | None = None
    _told: int = 0  # tokens that events had

    def __post_init__(self) -> None:
        self.wanted = Wanted(self.tokens, self.reuse)

    @property
    def sequence(self) -> Int32[np.ndarray, "tokens"]:
        """The prompt and the answer so far."""
        return np.append(self.tokens, self.output.token_ids).astype(np.int32)

    @property
    def admitted(self) -> Request:
        assert self.request is not None
        return self.request

    @property
    def pages(self) -> list[int]:
        """Those it holds, in order. Growing the list grows it for all stages."""
        pages = self.admitted.plan.pages
        assert isinstance(pages, list)
        return pages

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return len(self.tokens) + len(self.output.token_ids)

    def slots(self, ahead: int) -> int:
        """KV slots needed until there are so many more tokens. The last one of all is no input and needs none."""
        answer = min(len(self.output.token_ids) + ahead, self.output.sampling.max_new_tokens)
        return len(self.tokens) + answer - 1

    def to_prefill(self) -> tuple[Int32[np.ndarray, "tokens"], ReuseConfig]:
        """What to look up, and how.

        After a preemption, exact KV is continued exactly: the answer is part of the prompt, and no segment that was
        stored meanwhile changes it. Approximate KV is made again from the prompt as it was the first time.
        """
        if not self.output.token_ids or self.approximate:
            return self.tokens, self.reuse
        exact = "prefix" if self.reuse.uses_prefix else "full"
        return self.sequence, ReuseConfig(method=exact)

    def admit(self, request: Request, chunk: int, num_layers: int) -> None:
        """It has its pages."""
        plan = request.plan
        self.request = request
        self.shared_pages = len(request.match.prefix_pages) if request.match else 0
        self.stages = deque(stages(plan, self.sequence, chunk))
        self.computed = np.zeros((len(plan.phases), len(plan.prompt)), bool)
        self.approximate = plan.exact_tokens(num_layers) < len(plan.prompt)
        self.offer = Offer(plan.prompt)

    def advance(self, computed: Bool[np.ndarray, "phases tokens"]) -> None:
        """A stage is done. A chunk has one phase: it computed its tokens for all of the plan's that compute them."""
        assert self.computed is not None
        self.done = len(self.stages.popleft().prompt)
        plan, upto = self.admitted.plan, min(self.done, self.computed.shape[1])
        may = np.array([phase.forced | plan.prompt.reused for phase in plan.phases])
        self.computed[:, :upto] |= computed[:, :upto] & may[:, :upto]

    def leave(self) -> None:
        """It has no pages any more, and waits or is done."""
        self.keep &= not self.admitted.forgotten
        self.request = self.offer = self.computed = None
        self.stages.clear()
        self.done = 0

    def news(self, finish_reason: str | None = None, error: Exception | None = None) -> Event:
        """What came since this was called last."""
        new = slice(self._told, len(self.output.token_ids))
        first = self._told == 0 and new.stop > 0
        self._told = new.stop
        return Event(
            text=self.output.new_text(),
            token_ids=tuple(self.output.token_ids[new]),
            report=self.report if first else None,
            finish_reason=finish_reason,
            error=error,
            logprobs=tuple(self.output.logprobs[new]),
        )
