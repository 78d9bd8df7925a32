"""One sequence on its way through the loop: what was asked, what it holds, how far it is, and what came of it.

    WAITING --admit--> PREFILLING --last stage--> DECODING --end token, length--> FINISHED
       ^                   |    |
       |                   |    +--no new tokens--> FINISHED, or HELD for `Engine.prefilled`
       +- preempt, probed -+---------------------- from DECODING too, if it is preempted

A sequence that is cancelled or fails becomes FINISHED from any state. One that is preempted gives its pages back and
waits again, at its place by age; its answer so far stays.

A prompt that may be answered from an excerpt is probed first: its only stage is a pass that says what to keep of it.
Then it gives its pages back, none of which holds anything that is to be found, and waits at its place by age with the
excerpt as its prompt, which is prefilled as any other.

Who owns what, while it is admitted:

    pages  | prefix pages, shared | own pages                                | copy pages |
    tokens | prompt                                | answer | room for more  | the text that is remembered |
    KV     | found                | computed: up to num_computed | not yet   | copied behind the prefill   |

Prefix pages belong to what was stored before and are never written, but for the columns of its own adapter's part of
values where it shares KV as `base_shared`. Own pages are written by this sequence only, and
become findable when it commits them. Copy pages are there for a text that is prefilled behind others. Donors,
which segments are copied from, are not the sequence's: its match holds them until the copies are made.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int32

from sparsex_jax.cache import Match, PinState
from sparsex_jax.cache.company import Company, company_namespace
from sparsex_jax.cache.counts import Hits
from sparsex_jax.cache.mirrors import Origins
from sparsex_jax.cache.tree import Node
from sparsex_jax.config import ReuseConfig
from sparsex_jax.device.arrivals import Late
from sparsex_jax.device.runner import Computed, PrefillRun, ProbeRun
from sparsex_jax.device.scoring import Scores
from sparsex_jax.device.state import BatchSlot
from sparsex_jax.reuse.adapters import NO_SLOT, Acting
from sparsex_jax.reuse.excerpt import Excerpt
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.report import AdapterShare, Report, SharedKV, make_report, report_of_excerpt
from sparsex_jax.scheduler.lending import Lent
from sparsex_jax.scheduler.output import Output, TokenLogprobs
from sparsex_jax.scheduler.pinning import Pinning, PinRefused
from sparsex_jax.scheduler.prompt_logprobs import PromptLogprobs
from sparsex_jax.scheduler.rounds import Member
from sparsex_jax.scheduler.sharing import Offer, Wanted
from sparsex_jax.scheduler.timeline import UNTIMED, Timeline

DEFAULT_NAMESPACE = "default"


class State(enum.Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # it holds nothing: it is new, or was preempted
    PREFILLING = "prefilling"  # it has pages, and some of its stages are still to run
    DECODING = "decoding"  # it has new tokens, and gets more with each dispatch
    HELD = "held"  # prefilled, and its pages stay until the caller of `Engine.prefilled` has read them
    FINISHED = "finished"  # it holds nothing


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one sequence.

    Attributes:
      text: new since the last event. Never half a character, and held back while it may begin a stop string.
      token_ids: new tokens.
      report: with the first event that has tokens; with the last one of a sequence that is only prefilled.
      finish_reason: stop, length, cancelled or error; the last event has one, and no other.
      error: with the finish reason `error`.
      logprobs: of `token_ids`, where they were asked for.
      prompt_logprobs: of the prompt, with the report, where they were asked for.
      handle: with the last event of a text that was remembered.
      queue_s: seconds from the call until it was first admitted; None if it was not yet.
      stopped_by: with the last event, the stop string that ended the text.
      pin: with the last event, what is pinned of it, or why it is not. None: that was not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    report: Report | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    handle: int | None = None
    queue_s: float | None = None
    stopped_by: str | None = None
    prompt_logprobs: PromptLogprobs | None = None
    pin: PinState | PinRefused | None = None


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of a sequence that has none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Remember:
    """A text that is kept once it is prefilled. What stands before it is not kept: its KV is copied to own pages then.

    Attributes:
      text: its tokens.
      namespace: where prompts find it.
      frozen: whether eviction leaves it alone.
      content: by which the same text is known again: a digest of its tokens, and of the preamble that was asked for.
      in_company: whether the engine chooses what stands before it.
      said: its `said_digest`. None: nothing can be decoded.
      sharing: who finds it, as `Acting.sharing` of those.
    """

    text: Int32[np.ndarray, "text"]
    namespace: str
    frozen: bool
    content: bytes
    in_company: bool = False
    said: bytes | None = None
    sharing: str = "isolated"


@dataclasses.dataclass(eq=False)
class Sequence:
    """A prompt and what is generated behind it.

    What was asked:
      prompt: its tokens; of a text to remember, those before it and the text's. Once it is probed, the tokens of the
        excerpt that it is answered from.
      output: the answer so far. Its `max_new_tokens` is 0 for a sequence that is only prefilled.
      keep: whether it can be found later. False from the moment that something it uses is forgotten.
      submitted: `time.perf_counter()` of the call.
      listener: called with each event.
      remember: what is registered once it is prefilled.
      hold: keep its pages once it is prefilled, for a caller who reads them.
      wants_logits: fetch the logits behind the prompt.
      turns: digests of what the messages of its chat say, each as a whole: no excerpt leaves them out.
      asked: somebody asked for it. Healing and warming up are not counted among the requests.
      remakes: the handle of the text that it makes again, or whose company it prefills for that. None: of none.
      company: what a text to remember is prefilled behind, if the engine chose that. It chooses at each admission.
      prompt_logprobs: those of the prompt that was asked, as far as they are known. None: nobody asks for them.
      lent: the prompt of several answers, of which this is one, that is found while they run but is not kept.
      pinning: pins it once it is answered. Shared by the answers to one request. None: it is not to be pinned.
      member: its place in a round, shared by the answers to its prompt. None: it is of none.
      adapter: acts on some or all of its tokens. None: it is the base model's.
      delay_s: it waits as if it had come so many seconds later, as its priority says. Negative: earlier.
      timeline: when its parts began and ended, if somebody traces it.
      wanted: what it could find of that which others compute.

    In line:
      id: rises with every sequence, so it tells who is older.
      rank: `time.monotonic()` when it was put in line, plus `delay_s`. Of those that wait, the lowest is next.
      cancelled: the submitter does not want the rest.
      suspect: it was in a step that lost the store, or got logits that are not finite. It runs alone from then on.
      from_scratch: its logits were not finite once, or what it found did not come: it is computed again of its own
        tokens, without reuse.
      overtaken: how often a younger one was admitted while it waited for pages.
      blocked_at: `Admission.releases` when there were no pages for it: it is not tried again until that changes.
      approximate: its KV is not what a full prefill would give.
      excerpt: the whole prompt, and what is kept of it, once it is probed.
      queue_s: seconds from `submitted` until it was first admitted.
      coming: keys of the blocks that are read from the disk for it; None before it asked for any.
      restored_tokens: tokens that were loaded for it from a lower tier.
      came_from: the tiers that pages of the store were loaded from for it.
      computed_on_the_way: tokens that were computed because their load would have taken longer.

    While it is admitted:
      admitted_plan: its prefill as its method made it, with its pages.
      num_shared: pages at its beginning that are a prefix it found.
      copy_pages: pages for a text that is prefilled behind others.
      match: what it found, while its pages are held.
      origins: what it is copied from, where it may be stored as a mirror. None: it may not.
      late: copies whose donors are still coming from a lower tier, until its prefill has pasted them.
      found: how many tokens of its prompt were found.
      donors: pages of what it found, now or before, where an excerpt or a part of its answer came of that.
      forgotten: something that it found was forgotten since.
      stages: the plans that are still to run, in order.
      run: the first stage's prefill, while it rests between two layers.
      turn: rises with every stage and every few layers; the sequence with the lowest one is next.
      computed: which prompt tokens each phase of the plan computed.
      confidence: as in `Computed`, of the stage whose signal looked.
      num_computed: tokens at its beginning whose KV is in its pages.
      offer: what others can find once this one is committed.

    What came of it:
      report, logits: of its prefill.
      handle: of what was remembered.
      pin: as in `Event`.
      finish_reason, error: why it ended.
    """

    prompt: Int32[np.ndarray, "tokens"]
    output: Output
    reuse: ReuseConfig
    namespace: str
    keep: bool
    submitted: float
    listener: Listener = ignore
    remember: Remember | None = None
    hold: bool = False
    wants_logits: bool = False
    turns: frozenset[bytes] = frozenset()
    asked: bool = True
    remakes: int | None = None
    company: Company = dataclasses.field(default_factory=Company.nobody)
    prompt_logprobs: PromptLogprobs | None = None
    lent: Lent | None = None
    pinning: Pinning | None = None
    member: Member | None = None
    adapter: Acting | None = None
    delay_s: float = 0.0
    timeline: Timeline = UNTIMED
    wanted: Wanted = dataclasses.field(init=False)

    id: int = 0
    rank: float = 0.0
    state: State = State.WAITING
    cancelled: bool = False
    suspect: bool = False
    from_scratch: bool = False
    overtaken: int = 0
    blocked_at: int = -1
    approximate: bool = False
    queue_s: float | None = None
    excerpt: tuple[PromptMap, Excerpt] | None = None
    coming: set[bytes] | None = None
    restored_tokens: int = 0
    came_from: dict[Node, str] = dataclasses.field(default_factory=dict)
    computed_on_the_way: int = 0

    admitted_plan: RequestPlan | None = None
    num_shared: int = 0
    copy_pages: list[int] = dataclasses.field(default_factory=list)
    match: Match | None = None
    origins: Origins | None = None
    late: Late | None = None
    found: Hits = dataclasses.field(default_factory=Hits)
    donors: frozenset[int] = frozenset()
    forgotten: bool = False
    stages: deque[RequestPlan] = dataclasses.field(default_factory=deque)
    run: PrefillRun | ProbeRun | None = None
    turn: int = 0
    computed: Bool[np.ndarray, "phases tokens"] | None = None
    confidence: float | None = None
    num_computed: int = 0
    offer: Offer | None = None

    report: Report | None = None
    logits: Float32[np.ndarray, "vocab"] | None = None
    handle: int | None = None
    pin: PinState | PinRefused | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    _num_told: int = 0  # new tokens that events had
    _told_end: bool = False

    def __post_init__(self) -> None:
        self.wanted = Wanted(self.to_find(self.prompt), self.reuse)

    # What it is ---------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> Int32[np.ndarray, "tokens"]:
        """The prompt and the answer so far."""
        return np.append(self.prompt, self.output.token_ids).astype(np.int32)

    def keys(self, tokens: Int32[np.ndarray, "tokens"]) -> Int32[np.ndarray, "tokens"]:
        """What the first tokens of it are found by: themselves, but where its adapter acts (`reuse.adapters`)."""
        return tokens if self.adapter is None else self.adapter.keys(tokens)

    @property
    def is_admitted(self) -> bool:
        return self.admitted_plan is not None

    @property
    def was_admitted(self) -> bool:
        """Whether it is admitted, or was before it was preempted."""
        return self.queue_s is not None

    @property
    def is_held(self) -> bool:
        """Whether it waits for others of its round."""
        return self.member is not None and not self.member.has_begun

    @property
    def has_begun(self) -> bool:
        """Whether something of it stays if it gives back its pages: an excerpt, or a part of its answer."""
        return self.excerpt is not None or bool(self.output.token_ids)

    @property
    def plan(self) -> RequestPlan:
        assert self.admitted_plan is not None, "a sequence that holds no pages has no plan"
        return self.admitted_plan

    @property
    def pages(self) -> list[int]:
        """Prefix pages and own pages, in order. Growing the list grows it for all stages."""
        pages = self.plan.pages
        assert isinstance(pages, list)
        return pages

    @property
    def num_before(self) -> int:
        """Tokens that a text to remember is prefilled behind."""
        return len(self.prompt) - len(self.remember.text) if self.remember else 0

    @property
    def num_copied(self) -> int:
        """Tokens of the text that is copied away from those before it; 0 if there are none."""
        return len(self.prompt) - self.num_before if self.num_before else 0

    @property
    def num_kept(self) -> int:
        """How many of its tokens can be found where they are, once they are computed."""
        if not self.keep:
            return len(self.prompt) if self.lent else 0
        return self.num_before or self.num_computed

    def slots(self, ahead: int) -> int:
        """KV slots needed until there are `ahead` more tokens. The very last token is no input and needs none."""
        answer = min(len(self.output.token_ids) + ahead, self.output.max_new_tokens)
        return len(self.prompt) + max(answer - 1, 0)

    @property
    def most_slots(self) -> int:
        """KV slots that it can ever need, besides those of `num_copied`."""
        return self.slots(self.output.max_new_tokens)

    @property
    def batch_slot(self) -> BatchSlot:
        output, slot = self.output, self.adapter.slot_at(len(self.prompt)) if self.adapter else NO_SLOT
        about = output.sampling, output.end_tokens, self.pages, output.matcher, slot
        return BatchSlot(self.prompt, output.token_ids, *about)

    # How it goes on -----------------------------------------------------------------------------------------

    def stand_behind(self, company: Company) -> None:
        """Prefill the text to remember behind this, whose KV is kept beside the namespace."""
        assert self.remember is not None
        before, self.company = self.company, company
        if np.array_equal(company.tokens, before.tokens):
            return  # as in most rounds in which it waits
        name = self.remember.namespace
        self.namespace = company_namespace(name) if len(company.tokens) else name
        self.prompt = np.concatenate([company.tokens, self.remember.text])
        self.wanted = Wanted(self.to_find(self.prompt), self.reuse)

    def act_as(self, adapter: Acting) -> None:
        """Wait with this adapter, and its keys, in place of what it was."""
        self.adapter = adapter
        self.wanted = Wanted(self.to_find(self.prompt), self.reuse)

    def to_prefill(self) -> tuple[Int32[np.ndarray, "tokens"], ReuseConfig]:
        """The tokens to look up, and how.

        After a preemption, exact KV is continued exactly: the answer is part of the prompt, and no segment that was
        stored meanwhile changes it. Approximate KV is made again from the prompt as it was the first time.
        """
        if not self.output.token_ids or self.approximate:
            return self.prompt, ReuseConfig(method="full") if self.from_scratch else self.reuse
        return self.tokens, ReuseConfig(method=self.exact_method)

    @property
    def scores(self) -> PromptLogprobs | None:
        """What its prefill is to find out of the prompt's tokens. None: nothing, or it was found out."""
        return self.prompt_logprobs if self.report is None else None

    def to_find(self, tokens: Int32[np.ndarray, "tokens"]) -> Int32[np.ndarray, "keys"]:
        """The keys that can be found. Tokens behind them are computed, since log-probabilities come of that."""
        return self.keys(tokens)[: len(tokens) - (self.scores.computed if self.scores else 0)]

    @property
    def exact_method(self) -> str:
        """The method that reuses what it may of its own reuse, and only what is exact."""
        return "prefix" if self.reuse.uses_prefix and not self.from_scratch else "full"

    def admit(
        self, plan: RequestPlan, match: Match, num_shared: int, copy_pages: list[int], late: Late | None = None
    ) -> None:
        """It holds the pages of the plan, and its match holds what it found."""
        if self.queue_s is None:
            self.queue_s = time.perf_counter() - self.submitted
        self.admitted_plan, self.match, self.copy_pages, self.late = plan, match, copy_pages, late
        if self.excerpt is None:  # else the probe found more
            self.found = match.hits
        self.num_shared, self.donors = num_shared, self.donors.union(match.pages)

    def start_prefill(self, stages: list[RequestPlan], num_layers: int) -> None:
        """These are the plans that prefill it."""
        plan, self.state, self.stages = self.plan, State.PREFILLING, deque(stages)
        self.computed, self.confidence = np.zeros((len(plan.phases), len(plan.prompt)), bool), None
        self.approximate = plan.exact_tokens(num_layers) < len(plan.prompt)
        is_found = plan.probe is None and (self.adapter is None or self.adapter.writes)
        self.offer = Offer(plan.prompt, self.keys(plan.prompt.tokens)) if is_found else None
        self.timeline.enter("probe" if plan.probe else "prefill")

    def answer_from(self, focus: Float32[np.ndarray, "tokens"]) -> None:
        """From now on its prompt is an excerpt of what was asked, and is computed exactly.

        Args:
          focus: how much its fresh tokens looked at each token of the prompt.
        """
        prompt, probe = self.plan.prompt, self.plan.probe
        assert probe is not None
        excerpt = probe.excerpt(focus)
        self.excerpt, self.prompt = (prompt, excerpt), prompt.tokens[excerpt.keep]
        self.adapter = self.adapter.of_excerpt(excerpt.keep) if self.adapter else None
        self.reuse = ReuseConfig(method=self.exact_method)
        self.wanted = Wanted(self.to_find(self.prompt), self.reuse)

    @property
    def to_score(self) -> Int32[np.ndarray, "rows"]:
        """The token that each row of its first stage has to score; -1: none."""
        stage = self.stages[0]
        return self.scores.following(stage, self._kept) if self.scores else np.full(stage.num_rows, -1, np.int32)

    def take_scores(self, scores: Scores) -> None:
        """What the rows of its first stage say. Raises NonFiniteLogitsError if some of it is not finite."""
        if self.scores is not None:
            self.scores.take(self.stages[0], self._kept, scores)

    @property
    def _kept(self) -> Bool[np.ndarray, "tokens"] | None:
        """Which tokens of the whole prompt `prompt` has, if it is an excerpt."""
        return None if self.excerpt is None else self.excerpt[1].keep

    @property
    def wants_logits_next(self) -> bool:
        """Whether the next stage gives logits that are wanted. Behind its first token it does not, if it was preempted
        there."""
        return self.wants_logits and len(self.stages) == 1 and not self.output.token_ids

    @property
    def decodes_next(self) -> bool:
        """Whether it decodes once its next stage has run, unless the token behind that ends it."""
        return len(self.stages) == 1 and self.output.max_new_tokens > len(self.output.token_ids) + 1

    def finish_stage(self, computed: Computed) -> None:
        """Its first stage has run.

        A chunk has one phase: it computed its tokens for all phases of the plan that may compute them.
        """
        assert self.computed is not None
        stage = self.stages.popleft()
        self.run, self.num_computed = None, len(stage.prompt)
        self.late = None if stage.prompt.reused.any() else self.late
        upto = min(self.num_computed, self.computed.shape[1])
        may = np.array([phase.forced | self.plan.prompt.reused for phase in self.plan.phases])
        self.computed[:, :upto] |= computed.tokens[:, :upto] & may[:, :upto]
        self.confidence = computed.confidence  # only the last stage has signals

    def finish_prefill(self, num_layers: int) -> None:
        """All stages have run, and the next token is there. Prefills after a preemption in decode are not reported."""
        self.state = State.DECODING
        self.timeline.enter("decode")
        if self.output.token_ids:
            return
        assert self.computed is not None
        elapsed = time.perf_counter() - self.submitted
        self.report = make_report(
            self.plan.prompt, self.plan.phases, num_layers, elapsed, self.computed, self.confidence
        )
        if self.excerpt is not None:
            self.report = report_of_excerpt(*self.excerpt, self.report, num_layers)
        computed = self.report.computed_fraction + self.computed_on_the_way / self.report.prompt_tokens
        self.report = dataclasses.replace(
            self.report,
            restored_tokens=self.restored_tokens,
            computed_fraction=min(computed, 1.0),
            round=self.member.share() if self.member else None,
            adapter=self._adapter_share(),
            sharing=self._shared_kv(self.report) if self.adapter and self.adapter.shares else None,
        )

    def _adapter_share(self) -> AdapterShare | None:
        adapter = self.adapter
        if adapter is None or adapter.slot == NO_SLOT:  # or it is for those that read what the model alone computes
            return None
        return AdapterShare(adapter.name, adapter.num_tokens(len(self.prompt)))

    def _shared_kv(self, report: Report) -> SharedKV:
        assert self.adapter is not None
        unseen, shared = self.plan.unseen, report.approximate_prefix_tokens + report.reused_tokens
        return SharedKV(self.adapter.sharing, shared, 0 if unseen is None else int(unseen.sum()))

    def leave(self) -> None:
        """It holds no pages any more, and waits.

        What used forgotten KV is not kept when it is computed again, since tokens of its answer came from it. A text
        to remember is computed again from its own tokens alone.
        """
        self.keep &= not self.forgotten or self.remember is not None
        self.admitted_plan = self.match = self.late = self.run = self.offer = self.computed = self.origins = None
        self.stages.clear()
        self.copy_pages, self.forgotten, self.num_computed = [], False, 0
        self.donors = self.donors if self.has_begun else frozenset()
        self.coming = None
        self.state = State.WAITING
        self.timeline.enter("queue")

    def finish(self, reason: str, error: Exception | None = None) -> None:
        self.state, self.finish_reason, self.error = State.FINISHED, reason, error

    # What it tells ------------------------------------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        ended = self.state is State.FINISHED and not self._told_end
        return ended or self._num_told < len(self.output.token_ids)

    def news(self) -> Event:
        """What came since this was called last."""
        new = slice(self._num_told, len(self.output.token_ids))
        first = self._num_told == 0 and (new.stop > 0 or self.output.max_new_tokens == 0)
        self._num_told, self._told_end = new.stop, self.state is State.FINISHED
        return Event(
            text=self.output.new_text(),
            token_ids=tuple(self.output.token_ids[new]),
            report=self.report if first else None,
            prompt_logprobs=self.prompt_logprobs if first else None,
            finish_reason=self.finish_reason,
            error=self.error,
            logprobs=tuple(self.output.logprobs[new]),
            handle=self.handle,
            queue_s=self.queue_s,
            stopped_by=self.output.stopped_by,
            pin=self.pin,
        )


class Ticket:
    """A submitted sequence, as its submitter sees it.

    Attributes:
      id: rises with every sequence.
      prompt_tokens: of its prompt.
      timeline: when its parts began and ended, once its last event came; empty if the loop traces nothing.
    """

    def __init__(self, sequence: Sequence, wake: Callable[[], None]) -> None:
        self.id, self.prompt_tokens, self.timeline = sequence.id, len(sequence.prompt), sequence.timeline
        self._sequence, self._wake = sequence, wake

    def cancel(self) -> None:
        """From any thread. Its pages are free at the next step; its last event says `cancelled`, if it was not done."""
        self._sequence.cancelled = True
        self._wake()
