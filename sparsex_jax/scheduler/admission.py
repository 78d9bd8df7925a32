"""What sequences hold of the store: they get pages, grow, make what they computed findable, and give pages back.

    admit -> (prefill) -> let go of donors -> (decode) <-> grow -> commit -> leave

All of it is on the host. It says which pages a sequence's KV is in, and never sees the KV itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int32, Int64

from sparsex_jax.cache import Forgotten, Match, Origin, PageCache, PinState
from sparsex_jax.cache.company import Company, company_namespace, having_seen, is_plain
from sparsex_jax.cache.counts import CacheCounts
from sparsex_jax.cache.windows import Observer
from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig
from sparsex_jax.device.arrivals import Late
from sparsex_jax.errors import ContextLengthError, FrozenLimitError, InvalidRequestError, NoRoomError, StoreFullError
from sparsex_jax.reuse.adapters import NO_SLOT, Acting
from sparsex_jax.reuse.cost import Speeds
from sparsex_jax.reuse.methods import Method, method_of
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.scheduler.adapters import Adapter, Adapters
from sparsex_jax.scheduler.choice import Choice, look_up
from sparsex_jax.scheduler.company import Neighbours
from sparsex_jax.scheduler.loading import Loading
from sparsex_jax.scheduler.mirroring import Mirroring
from sparsex_jax.scheduler.neutral import NeutralTexts
from sparsex_jax.scheduler.origins import with_tiers
from sparsex_jax.scheduler.restoring import Restoring
from sparsex_jax.scheduler.sequence import Remember, Sequence
from sparsex_jax.scheduler.tiers import Tiers
from sparsex_jax.tiers.index import BlockObserver

ANSWERED = ("stop", "length")  # reasons to finish
MOST_TEXTS = 4096  # remembered texts that are known after their eviction, where there are lower tiers


class StoreObserver(Observer, BlockObserver, Protocol):
    """Hears what is in the store and in the tiers below it."""


class Admission:
    """What the sequences of one engine hold of its store.

    Attributes:
      cache: what is in the store. A new one after `start_over`.
      choice: what of that a plan uses.
      adapters: which are loaded, and the keys of what was computed under them.
      neutral: texts to prefill without them, for those that share that.
      company_tokens: `EngineConfig.company_tokens`.
      tiers, restoring, loading: what is below the store, and what comes back from there; None: nothing.
      mirroring: stores sequences as mirrors; None: none is.
      clock: gives the time in seconds by which pins end.
      releases: how often pages were given back or let go. A sequence that found no pages finds none until it rises.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig, measure: Callable[[], Speeds] | None = None) -> None:
        """
        Args:
          measure: gives the speeds of the devices. It is called when they are first needed, and may `lend` itself
            pages. None: what was found is always reused.
        """
        self._model, self._config = model, config
        self.tiers: Tiers | None = None
        self.restoring: Restoring | None = None
        self.loading: Loading | None = None
        self.mirroring: Mirroring | None = None
        self.choice = Choice(model, config.page_size, measure)
        self.adapters = Adapters(model, config)
        self.neutral = NeutralTexts()
        self.company_tokens = config.company_tokens
        self._handles = itertools.count(1)  # an old handle must not be another text's after the store was lost
        self._counts = CacheCounts()  # they go on where the store is lost
        self._holders: set[Sequence] = set()
        self._returning: set[Sequence] = set()  # they wait with an excerpt, or with a part of their answer
        self.releases = 0
        self.clock: Callable[[], float] = time.monotonic
        self._neighbours: dict[str, Neighbours] = {}
        self._neighbours_at = -1  # `releases` then
        self._observer: StoreObserver | None = None
        self.cache = self._new_cache()

    def start_over(self) -> None:
        """The KV is lost, and with it all that the cache says of it. All admitted sequences wait again."""
        for sequence in self._holders:
            sequence.leave()
        self._holders, self._returning = set(), set()
        lost, self.cache = self.cache, self._new_cache()
        self.cache.know_texts_of(lost)
        if self._observer is not None:
            self._observer.cleared()
            self.watch(self._observer)
        if self.tiers and self.restoring and self.loading:
            self.tiers.lose()
            self.loading.lose()
            self.restoring.cancel_all(self.cache, again=True)
        self.releases += 1

    def watch(self, observer: StoreObserver | None) -> None:
        """Tell this observer what cache and tiers can find, and of changes, those of later caches too. None: nobody."""
        self._observer = observer
        self.cache.watch(observer)
        if self.tiers:
            self.tiers.index.watch(observer)

    def _new_cache(self) -> PageCache:
        config = self._config
        keep_texts = MOST_TEXTS if config.host_store_bytes else 0
        about = (config.frozen_limit, self._handles, self._counts, keep_texts, config.max_pinned)
        num_layers = self._model.num_layers if config.mirrors else 0
        return PageCache(config.num_pages, config.page_size, *about, clock=lambda: self.clock(), num_layers=num_layers)

    # For those who measure ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lend(self, num_tokens: int) -> Iterator[list[int]]:
        """Pages for this many tokens, or as many as are free, but one at least. Nothing finds what is written there.

        Raises:
          StoreFullError: every page is in use.
        """
        pages = self.cache.allocate(max(min(self.pages_for(num_tokens), self.cache.stats().free), 1))
        try:
            yield pages
        finally:
            self.cache.release(pages)

    # Coming in ----------------------------------------------------------------------------------------------

    def check(self, sequence: Sequence) -> None:
        """Raise what can be said against a sequence before its turn comes.

        Raises:
          InvalidRequestError: its namespace or its reuse is wrong.
          ContextLengthError: the store could not hold it even if nothing else were in it.
        """
        nothing = PromptMap.of(sequence.prompt, Match.nothing())
        if sequence.asked:
            _require_name(sequence.namespace)
        method_of(sequence.reuse).phases(nothing, self._model.num_layers)
        needed = self.pages_for(sequence.most_slots) + self.pages_for(sequence.num_copied)
        if needed > self._config.num_pages:
            raise ContextLengthError(
                f"the request needs KV for {sequence.most_slots + sequence.num_copied} tokens, {needed} pages of "
                f"{self._config.page_size}; store_tokens={self._config.store_tokens} gives {self._config.num_pages}"
            )

    def admit(self, sequence: Sequence, tokens: np.ndarray, slots: int, reuse: ReuseConfig) -> None:
        """Look tokens up, lay out their prefill, and take pages for this many slots.

        Raises:
          InvalidRequestError: the method does not take this prompt.
          StoreFullError: there are not enough pages now. Nothing is held.
          NoRoomError: there will not be either, unless something frozen is forgotten.
        """
        method = method_of(reuse)
        with sequence.timeline.during("lookup"):
            match, plan = self._lay_out(sequence, tokens, method)
            try:
                self._require_room(sequence, plan.pages)
                wanted = self._pages_wanted(sequence, slots, plan.pages)
                pages, copy_pages = self._take_pages(plan.pages, wanted, sequence)
            except BaseException:
                self.cache.let_go(match)
                raise
        if sequence.asked and not sequence.was_admitted:
            self.cache.count_use(match)
        num_shared = len(plan.pages)
        plan = self._with_unseen(plan, sequence.adapter)
        plan = with_tiers(plan, match.prefix_tail, self.cache, sequence.came_from)
        plan, origins = self.mirroring.located(self.cache, plan) if self.mirroring else (plan, None)
        plan, late = self._without_late(dataclasses.replace(plan, pages=pages, adapter=sequence.adapter))
        sequence.admit(plan, match, num_shared, copy_pages, late)
        sequence.origins = origins
        self._holders.add(sequence)
        self._returning.discard(sequence)

    def _lay_out(
        self, sequence: Sequence, tokens: np.ndarray, method: Method, *, load: bool = True
    ) -> tuple[Match, RequestPlan]:
        """The plan, with no pages yet but the shared ones, and what it found, which is held.

        Args:
          load: what lower tiers have of the prompt is loaded first.
        """
        loaded, findable, began = 0, sequence.to_find(tokens), time.perf_counter()
        if self.loading and load:
            loaded = self.loading.load(self.cache, findable, sequence.namespace, method, sequence.came_from)
        if loaded:
            sequence.timeline.add("load", began, loaded)
        may_pay = functools.partial(self.choice.segments_may_pay, method, len(tokens))
        about = (findable, sequence.namespace, method, self._model.num_layers)
        member = sequence.member
        last_used = member.gathering.recency(self.cache) if member and not member.is_late else None
        sharing = sequence.adapter.sharing if sequence.adapter else "isolated"
        match = look_up(self.cache, *about, segments=may_pay, last_used=last_used, sharing=sharing)
        try:
            plan = self.choice.plan(tokens, match, method, lambda: self._may_be_left_out(sequence, tokens))
            if self._comes_in_time(plan):
                sequence.restored_tokens += loaded
                return match, plan
        except BaseException:
            self.cache.let_go(match)
            raise
        self.cache.let_go(match)
        return self._lay_out(sequence, tokens, method, load=False)  # without what did not come

    def _with_unseen(self, plan: RequestPlan, adapter: Acting | None) -> RequestPlan:
        """The plan with what was found and an adapter has not run through yet, if it is to. It has no pages yet but
        those of its prefix."""
        if adapter is None or not adapter.runs_through:
            return plan
        size, unseen = self._config.page_size, np.zeros(len(plan.prompt), bool)
        found = [(at * size, (at + 1) * size, page) for at, page in enumerate(plan.pages)]
        found += [(copy.start, copy.end, copy.pages(size)[0]) for copy in plan.copies]  # the tail, in one page
        for start, end, page in found:
            unseen[start:end] = not self.cache.tree.has_seen(page, adapter.number)
        return plan.running_through(unseen)

    def _comes_in_time(self, plan: RequestPlan) -> bool:
        """Wait for what its prefill reads from the first layer on. False if that has failed to come."""
        if self.loading is None or not self.loading.active:
            return True
        reads_at_once = plan.first_reading_layer(self._model.num_layers) == 0
        read = [copy for copy in plan.copies if reads_at_once or copy.start < plan.prompt.num_prefix]
        return self._settle([*plan.pages, *(page for copy in read for page in copy.pages(self._config.page_size))])

    def _settle(self, pages: Several[int]) -> bool:
        """Wait for what is coming into these pages. False if some of it has failed to come."""
        assert self.loading is not None
        with self._noting_releases(self.loading):
            return self.loading.settle(pages)

    @contextlib.contextmanager
    def _noting_releases(self, mover: Loading | Restoring) -> Iterator[None]:
        """Within, what ends gives its pages back."""
        before = mover.num_ended
        yield
        self.releases += mover.num_ended - before

    def _without_late(self, plan: RequestPlan) -> tuple[RequestPlan, Late | None]:
        """The plan with those copies that can be made at once, and the others."""
        if self.loading is None or not self.loading.active:
            return plan, None
        coming = {copy: self.loading.coming_into(copy.pages(self._config.page_size)) for copy in plan.copies}
        late = tuple(copy for copy in plan.copies if coming[copy])
        if not late:
            return plan, None
        incoming = tuple(dict.fromkeys(each for copy in late for each in coming[copy]))
        at_once = tuple(copy for copy in plan.copies if not coming[copy])
        return dataclasses.replace(plan, copies=at_once), Late(late, plan.pages, incoming)

    def take_loaded(self) -> None:
        """Place what has come for those who were admitted."""
        if self.loading is not None:
            with self._noting_releases(self.loading):
                self.loading.pump()

    def is_coming(self, sequence: Sequence) -> bool:
        """Whether something comes from a lower tier that a waiting sequence will find. Asking makes it come."""
        if self.restoring is None:
            return False
        with self._noting_releases(self.restoring):
            return self.restoring.is_coming(self.cache, sequence)

    def end_transfers(self, *, again: bool = False) -> bool:
        """Take back the pages of prefixes that are under way, and have those of segments come. Whether there were any.

        Args:
          again: those that the prefixes are for may ask again.
        """
        if self.restoring is None or self.loading is None or not (self.restoring.active or self.loading.active):
            return False
        self.restoring.cancel_all(self.cache, again=again)
        self._settle(self.loading.pages)
        self.releases += 1
        return True

    @property
    def moves_blocks(self) -> bool:
        """Whether something is on its way between the store and the tiers below."""
        return bool((self.tiers and self.tiers.busy) or (self.loading and self.loading.active))

    def _may_be_left_out(self, sequence: Sequence, tokens: np.ndarray) -> Int64[np.ndarray, "tokens"]:
        """As `PageCache.remembered`. Nothing of a prompt that was answered in part: it goes on as it began."""
        if sequence.output.token_ids:
            return np.full(len(tokens), -1)
        remembered = self.cache.remembered(sequence.keys(tokens), sequence.namespace, sequence.turns)
        remembered[len(sequence.to_find(tokens)) :] = -1
        return remembered

    def count_found(self, sequence: Sequence) -> None:
        """Count what was found of a prompt. Once, when its prefill is reported, however often it was admitted."""
        self._counts.found(sequence.found)

    def _require_room(self, sequence: Sequence, shared: Several[int]) -> None:
        """Raise NoRoomError if frozen texts and pins leave too little for a sequence that shares these pages.

        One that has a part of its answer needs no room for more: it ends there if it must.
        """
        slots = sequence.slots(1) if sequence.output.token_ids else self._promised(sequence)
        own = self._own_pages(sequence, slots, shared)
        if own > self.cache.num_beside_kept:
            raise self._no_room(sequence, own)
        if sequence.remember and sequence.remember.frozen:
            text = self.pages_for(len(sequence.remember.text))
            kept = [] if sequence.num_copied else shared  # a text behind others shares nothing with what is stored
            self.cache.require_frozen_room(kept, text - len(kept))

    @staticmethod
    def _promised(sequence: Sequence) -> int:
        """Slots without which a sequence is not admitted. If it says so, its answer may end where the store is full."""
        return sequence.slots(1) if sequence.output.sampling.ends_where_full else sequence.most_slots

    def _own_pages(self, sequence: Sequence, slots: int, shared: Several[int]) -> int:
        """How many pages a sequence needs, besides those of these pages that stay anyway."""
        return self.pages_for(slots) + self.pages_for(sequence.num_copied) - self.cache.num_kept_of(shared)

    def _no_room(self, sequence: Sequence, own: int) -> NoRoomError:
        left, size, pins = self.cache.num_beside_kept, self._config.page_size, len(self.cache.pins)
        said = f"the request needs {own} pages of {size} tokens of its own, and frozen texts "
        said += f"{f'and {pins} pins ' if pins else ''}leave {left} of {self._config.num_pages}"
        if sequence.remember:
            return FrozenLimitError(said)
        context = min(self._model.max_position, left * size)
        # The beginning is OpenAI's, and gateways look for it to try a model of longer context.
        return NoRoomError(f"This model's maximum context length is {context} tokens now. However, {said}")

    def _pages_wanted(self, sequence: Sequence, slots: int, shared: Several[int]) -> int:
        """Pages for this many slots, or for the next token alone where frozen texts and pins do not leave more."""
        copied = self.pages_for(sequence.num_copied)
        most = self.cache.num_beside_kept + self.cache.num_kept_of(shared) - copied
        return min(self.pages_for(slots), max(self.pages_for(sequence.slots(1)), most))

    def _take_pages(self, shared: Several[int], wanted: int, sequence: Sequence) -> tuple[list[int], list[int]]:
        """The shared prefix pages with new ones behind them, `wanted` together, and the copy pages."""
        stored = [page for page in shared if not self.cache.mirrors.is_derived(page)]
        num_restored, num_own = len(shared) - len(stored), wanted - len(stored)
        new = self.cache.allocate(num_own + self.pages_for(sequence.num_copied))
        if self.mirroring and num_restored:
            try:
                shared = self.mirroring.restored(self.cache, shared, new[:num_restored])
            except BaseException:
                self.cache.release(new)
                raise
        self.cache.share(stored)
        return [*shared, *new[num_restored:num_own]], new[num_own:]

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-num_tokens // self._config.page_size)

    # Adapters that share ------------------------------------------------------------------------------------

    def renew(self, sequence: Sequence) -> None:
        """Have a sequence that waits find, and write, what its group shares now: an adapter may have come or gone
        since it was put in line. One that has begun goes on alone, as it began."""
        adapter = sequence.adapter
        if adapter and not sequence.has_begun and (renewed := self.adapters.renewed(adapter)) != adapter:
            sequence.act_as(renewed)

    def is_outdated(self, sequence: Sequence) -> bool:
        """Whether a text was prefilled for adapters that shared until then, and share anew since: nobody finds it."""
        adapter = sequence.adapter
        return sequence.remember is not None and adapter is not None and self.adapters.renewed(adapter) != adapter

    # Company ------------------------------------------------------------------------------------------------

    def accompany(self, sequence: Sequence) -> None:
        """Choose what a text to remember is prefilled behind, of what its namespace has now."""
        asked = sequence.remember
        if asked is not None and asked.in_company:
            neighbours = self.neighbours(asked.namespace)
            sequence.stand_behind(neighbours.company_of(asked.text, self.company_room(len(asked.text))))

    def go_alone(self, sequence: Sequence) -> None:
        """There are not enough pages for a new text and its company."""
        if sequence.remember and sequence.remember.in_company and sequence.remakes is None:
            sequence.stand_behind(Company.nobody())

    def neighbours(self, namespace: str) -> Neighbours:
        """What texts of a namespace can be prefilled behind, as it was when pages were given back last."""
        if self._neighbours_at != self.releases:
            self._neighbours, self._neighbours_at = {}, self.releases
        if namespace not in self._neighbours:
            about = namespace, self.company_tokens, self.adapters.num_base
            self._neighbours[namespace] = Neighbours.of(self.cache, *about)
        return self._neighbours[namespace]

    def company_room(self, num_tokens: int) -> int:
        """Tokens that can stand before a text of this length, by what the model takes and the store can hold.

        The text is held twice for a moment: behind its company, and in pages of its own.
        """
        slots = (self.cache.num_beside_kept - self.pages_for(num_tokens)) * self._config.page_size
        return max(min(self._model.max_position, slots) - num_tokens, 0)

    # While it runs ------------------------------------------------------------------------------------------

    def grow(self, sequence: Sequence, steps: int) -> bool:
        """Take pages for this many more tokens. False if there are not enough; nothing is taken then."""
        lacking = self.pages_for(sequence.slots(steps)) - len(sequence.pages)
        if lacking <= 0:  # as in most rounds: nothing is looked at then, however much is stored
            return True
        try:
            sequence.pages.extend(self.cache.allocate(lacking))
        except StoreFullError:
            return False
        return True

    def grow_together(self, sequences: list[Sequence], steps: int) -> bool:
        """Take pages for this many more tokens of each. False if there are not enough, and one more for each, so that
        nobody is preempted soon because of this; nothing is taken then."""
        lacking = sum(max(self.pages_for(one.slots(steps)) - len(one.pages), 0) for one in sequences)
        if lacking and lacking + len(sequences) > self.cache.num_available:
            return False
        return all(self.grow(one, steps) for one in sequences)

    def let_go_of_donors(self, sequence: Sequence) -> None:
        """The copies are made, or on their way. Idempotent."""
        if sequence.match is not None:
            self.cache.let_go(sequence.match)
            sequence.match = None
            self.releases += 1

    def commit(self, sequence: Sequence) -> None:
        """Make findable what is computed so far, if it is to be kept. Again as the sequence grows.

        Exactness of an answer's KV is that of the whole prompt's.
        """
        keys = sequence.keys(sequence.tokens[: min(sequence.num_computed, sequence.num_kept)])
        adapter = sequence.adapter
        is_gone = self._is_gone(sequence) or (adapter is not None and not self.adapters.may_write(adapter))
        if sequence.forgotten or is_gone:
            return
        if len(keys):
            self._commit(sequence, keys)
        if adapter and adapter.runs_through:
            self.cache.tree.mark_seen(sequence.pages, sequence.num_computed, adapter.number)

    def _commit(self, sequence: Sequence, keys: Int32[np.ndarray, "keys"]) -> None:
        adapter = sequence.adapter
        if adapter and adapter.shares:  # one kind of KV, which is as good as those who share it take it for
            self.cache.commit(sequence.pages, keys, sequence.namespace, exact_tokens=len(keys), twins=False)
        else:
            exact = sequence.plan.exact_tokens(self._model.num_layers)
            exact = len(keys) if exact == len(sequence.plan.prompt) else min(exact, len(keys))
            made_by = sequence.reuse
            self.cache.commit(sequence.pages, keys, sequence.namespace, exact_tokens=exact, made_by=made_by)
        if sequence.lent and not sequence.keep:
            sequence.lent.commit(self.cache, sequence.pages[sequence.num_shared : self.pages_for(len(keys))])

    def _is_gone(self, sequence: Sequence) -> bool:
        """Whether it makes a text again that was forgotten or evicted since."""
        return sequence.remakes is not None and not self.cache.has_entry(sequence.remakes)

    def remembered(self, sequence: Sequence) -> int | None:
        """The handle of the same text behind the same preamble, which is frozen from now on if this one is to be.

        None if it was not remembered, or is gone. Raises FrozenLimitError as `register`.
        """
        asked = sequence.remember
        assert asked is not None
        entry = self.cache.entry_of(asked.namespace, asked.content)
        if entry is None or sequence.remakes is not None:
            return None
        if asked.frozen:
            self.cache.freeze(entry.handle)
        return entry.handle

    def register(self, sequence: Sequence) -> int | None:
        """Keep what was prefilled as its `remember` says, and return the handle.

        None if it was to be made again and is as good as it was, or is gone.

        Raises:
          FrozenLimitError: frozen texts would fill more of the store than they may.
        """
        asked = sequence.remember
        assert asked is not None
        if (known := self.remembered(sequence)) is not None:  # it came twice at the same time
            return known
        assert sequence.report is not None
        company = sequence.company if asked.in_company else None
        origin = Origin(sequence.num_before, sequence.report.fresh_tokens, company, _acts_on(sequence), asked.sharing)
        if sequence.remakes is not None:
            return self._replace(sequence, asked, sequence.remakes, origin)
        pages = self._commit_text(sequence, asked)
        about = (asked.frozen, asked.content, origin, asked.said)
        return self.cache.register(pages, len(asked.text), asked.namespace, *about)

    def _replace(self, sequence: Sequence, asked: Remember, handle: int, origin: Origin) -> int | None:
        """Give an entry what was made again of its text, if it is still there and that is better than what it has."""
        if self._is_gone(sequence) or not self.cache.may_replace(handle):
            return None
        entry = self.cache.entry(handle)
        if not entry.stale and origin.company_tokens <= entry.origin.company_tokens:
            return None
        if self.tiers:
            self.tiers.forget(asked.text, asked.namespace)  # what was made in the old company
        made_first = dataclasses.replace(origin, prefilled_tokens=entry.origin.prefilled_tokens)
        self.cache.replace(handle, self._commit_text(sequence, asked), made_first)
        self.releases += 1
        return handle

    def _commit_text(self, sequence: Sequence, asked: Remember) -> list[int]:
        """Make the text findable where prompts look for it, and give its pages."""
        pages = sequence.copy_pages if sequence.num_before else sequence.pages
        pages = pages[: self.pages_for(len(asked.text))]
        at, keys = sequence.num_before, sequence.keys(sequence.prompt)[sequence.num_before :]
        self.cache.commit(pages, keys, asked.namespace, exact_tokens=len(keys), start=at)
        self._keep_below(pages, remembered=True)
        return pages

    def _keep_below(self, pages: Several[int], *, remembered: bool = False) -> None:
        """Put what was computed or found of a sequence in line to go to the tiers below, as far as no adapter acted:
        the mark of a version means nothing in another process, nor to one who loads it anew."""
        if self.tiers is None:
            return
        nodes = map(self.cache.tree.node_of.__getitem__, pages)
        of_base = [node is None or self.adapters.is_base(np.frombuffer(node.key, np.int32)) for node in nodes]
        self.tiers.keep(
            self.cache, pages[: len(of_base) if all(of_base) else of_base.index(False)], remembered=remembered
        )

    # Pinning ------------------------------------------------------------------------------------------------

    def _pin(self, sequence: Sequence) -> None:
        """Pin an answered sequence, if it asks for that. What others run with is not taken from them."""
        pinning = sequence.pinning
        if pinning is None:
            return
        pinning.key = pinning.key or f"request-{sequence.id}"
        keys = sequence.keys(sequence.tokens[: min(sequence.num_computed, sequence.num_kept)])
        self.expire_pins()
        promised = functools.partial(self._keeps_promises, sequence)
        sequence.pin = pinning.take(self.cache, keys, sequence.namespace, promised)

    def _keeps_promises(self, ended: Sequence) -> bool:
        """Whether frozen texts and pins leave all others that were admitted what they were admitted for."""
        return all(
            self._own_pages(other, self._promised(other), other.pages if other.is_admitted else ())
            <= self.cache.num_beside_kept
            for other in self._holders | self._returning
            if other is not ended
        )

    def unpin(self, namespace: str, key: str) -> PinState:
        """End a pin. Raises UnknownPinError if the namespace has none of this key."""
        self.expire_pins()
        state = self.cache.unpin(namespace, key)
        self.releases += 1
        return state

    def expire_pins(self) -> None:
        """End the pins whose time is over."""
        self.releases += self.cache.pins.expire()

    # Going out ----------------------------------------------------------------------------------------------

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; it waits again, at its place by age.

        What is exact is committed, so that the sequence finds itself again. What is approximate would find its own
        copies, and its answer would be another one than without the preemption: that is withdrawn.
        """
        if sequence.approximate:
            self.withdraw(sequence)
        else:
            self.commit(sequence)
        self.leave(sequence)

    def withdraw(self, sequence: Sequence) -> None:
        """Nothing that the sequence wrote can be found from now on. The pages of its prefix are not its own."""
        if sequence.is_admitted:
            self.cache.withdraw(sequence.pages[sequence.num_shared :])

    def withdraw_broken(
        self, pages: Several[int], are_finite: Callable[[Several[int]], Bool[np.ndarray, "pages page_size"]]
    ) -> int:
        """Withdraw those pages that have a token whose slot is not finite. Returns how many.

        Args:
          are_finite: which slots of pages of the store are.
        """
        slots = {page: self.cache.mirrors.slots_of(page) for page in pages}
        stored = np.unique(np.concatenate([[], *slots.values()]).astype(np.int64) // self._config.page_size)
        finite = np.ones((self._config.num_pages, self._config.page_size), bool)
        finite[stored] = are_finite(stored.tolist())
        broken = [page for page, own in slots.items() if not finite.ravel()[own].all()]
        if self.tiers and broken:
            self.end_transfers(again=True)  # it may compute behind what is broken
            self.tiers.withdraw(self.cache, broken)
        self.cache.withdraw(broken)
        return len(broken)

    def leave(self, sequence: Sequence) -> None:
        """Give back all that it holds; it waits. Nothing happens to a sequence that holds nothing."""
        if sequence.is_admitted:
            self.let_go_of_donors(sequence)
            pages = [*sequence.pages, *sequence.copy_pages]
            self._holders.discard(sequence)
            sequence.leave()  # before the pages go, so that they cannot be given back twice
            self.cache.release(pages)
            self.releases += 1
            if sequence.has_begun:
                self._returning.add(sequence)

    def finish(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        """End it, whatever its state. Nothing can be found of one that failed."""
        sequence.timeline.end()
        if reason in ANSWERED:
            self._pin(sequence)
        if error is not None:
            self.withdraw(sequence)
        elif sequence.is_admitted and sequence.keep and not sequence.remember:
            self._keep_below(sequence.pages)
        if self.mirroring and error is None and reason in ANSWERED:
            self.mirroring.keep(self.cache, sequence)
        if error is None and reason in ANSWERED:
            self._rebase(sequence)
        if self.restoring:
            self.restoring.cancel(self.cache, sequence)
        self.leave(sequence)
        self._returning.discard(sequence)
        if sequence.lent:
            sequence.lent.end_one(self.cache)
        sequence.finish(reason, error)

    def _rebase(self, ended: Sequence) -> None:
        """Put a text in line to be prefilled without adapters, if those that read it share that."""
        adapter = ended.adapter
        if adapter and not adapter.writes and ended.keep and not ended.forgotten and ended.excerpt is None:
            self.neutral.add(ended.namespace, ended.tokens)

    def forget(self, handle: int) -> Forgotten:
        """Stop serving what a handle stands for, and the copies of it in other prompts, whichever adapter ran them.

        Sequences that found some of it go on, but what they have not committed yet is not kept: it would bring the
        text back, in the pages that they share with it or in copies of them. Nor is that of those which wait with an
        excerpt or a part of their answer that came from it. Texts that are being prefilled in its
        company are prefilled again without it. Raises UnknownHandleError.
        """
        alike, namespace = self.adapters.alike(self.cache.text(handle)), self.cache.entry(handle).namespace
        self.end_transfers(again=True)  # some of it may be on its way, and what has come is committed by this
        self.neutral.forget(namespace)
        text = alike[0]
        has_seen, forgotten = having_seen(text), self.cache.forget(handle, alike)
        if self.tiers:
            self.tiers.forget(text, namespace)
            # Those that are stale are served while they are in the store, but must not outlive that in the tiers.
            for entry in (*self.cache.entries(namespace), *self.cache.evicted_entries(namespace)):
                if entry.origin.company and has_seen(entry.origin.company):
                    self.tiers.forget(self.cache.text(entry.handle), namespace)
        for sequence in self._holders | self._returning:
            used = sequence.donors.union(sequence.pages if sequence.is_admitted else ())
            near = sequence.namespace in (namespace, company_namespace(namespace))
            sequence.forgotten |= (near and has_seen(sequence.company)) or not used.isdisjoint(forgotten.pages)
        self.releases += 1
        return forgotten

    def let_go_of(self, adapter: Adapter | None) -> None:
        """Nothing finds any more what was computed under an adapter, whose sequences have all ended, nor what adapters
        shared until now; None: that alone."""
        numbers = self.adapters.share_anew() | ({adapter.number} if adapter else set())
        if numbers:
            self.cache.withdraw_all(functools.partial(self.adapters.is_of, numbers))
            self.releases += 1

    def check_books(self) -> None:
        """Raise AssertionError unless sequences hold what the cache says. For tests: it walks the whole store."""
        coming = [*self.restoring.pages, *self.loading.pages] if self.restoring and self.loading else []
        self.cache.check([*coming, *(page for one in self._holders for page in (*one.pages, *one.copy_pages))])


def _acts_on(sequence: Sequence) -> str | None:
    """The name of the adapter that acts on a prompt. None too where it is not invoked, or the prompt is prefilled for
    those that read what the model computes without it: the KV is the base model's."""
    adapter = sequence.adapter
    acts = adapter and adapter.slot != NO_SLOT and adapter.num_tokens(len(sequence.prompt))
    return adapter.name if adapter and acts else None


def _require_name(namespace: str) -> None:
    """Raise InvalidRequestError unless callers may use this namespace."""
    if not isinstance(namespace, str) or not namespace or not is_plain(namespace):
        raise InvalidRequestError(f"namespace={namespace!r} must be a non-empty string without NUL characters")
