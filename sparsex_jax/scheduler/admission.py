"""Requests come in and leave: lookup and pages on the way in, what can be found later, pages back on the way out.

    check -> admit -> (the runner prefills) -> unpin -> (the runner decodes) -> commit -> leave

All of it is on the host. It says which pages a request's KV is in, and never sees the KV itself.
"""

from __future__ import annotations

import dataclasses
import itertools
import time

import numpy as np
from jaxtyping import Bool, Int32

from sparsex_jax.cache import Match, PageCache
from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.errors import InvalidRequestError, StoreFullError
from sparsex_jax.reuse.cost import Speeds, prefill_seconds
from sparsex_jax.reuse.methods import Method, method_of
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.report import Report, make_report


@dataclasses.dataclass(eq=False)
class Request:
    """An admitted request: it holds its pages, and pins its donors until the copies are made.

    Attributes:
      match: what it found, while that is pinned.
      donors: the pages of what it found.
      forgotten: something that it found was forgotten since. Nothing of it is to be found later.
    """

    tokens: Int32[np.ndarray, "tokens"]
    namespace: str
    plan: RequestPlan
    match: Match | None
    donors: frozenset[int]
    forgotten: bool = False

    def report(self, num_layers: int, computed: Bool[np.ndarray, "phases tokens"], started: float) -> Report:
        """How it was prefilled.

        Args:
          computed: which tokens each phase computed.
          started: `time.perf_counter()` when it was asked for.
        """
        elapsed = time.perf_counter() - started
        active = computed[min(1, len(computed) - 1)]
        return make_report(self.plan.prompt, self.plan.phases, num_layers, active, elapsed, computed.sum(1).tolist())


class Admission:
    """What requests hold of one store.

    Attributes:
      cache: what is in the store. A new one after `start_over`.
      speeds: of the device, if they are known: by them it sees when reuse does not pay.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig, speeds: Speeds | None = None) -> None:
        self._model, self._config, self.speeds = model, config, speeds
        self._handles = itertools.count(1)  # an old handle must not be somebody else's after the store was lost
        self.start_over()

    def start_over(self) -> None:
        """The KV is gone, and with it all that the cache says of it and all that requests hold."""
        config = self._config
        self._requests: set[Request] = set()
        self.cache = PageCache(config.num_pages, config.page_size, config.frozen_limit, self._handles)

    def check(self, tokens: np.ndarray, sampling: SamplingParams, reuse: ReuseConfig, namespace: str) -> None:
        """Whatever can be said against a request before it is its turn.

        Raises:
          InvalidRequestError: an argument is wrong.
          StoreFullError: the store could not hold it even if nothing else were there.
        """
        sampling.check_vocabulary(self._model.vocab_size)
        nothing = Match([], None, [], 0, ())
        _method(reuse, namespace).phases(PromptMap.of(tokens, nothing), self._model.num_layers)
        self.pages_for(len(tokens) + sampling.max_new_tokens - 1)

    def admit(self, tokens: np.ndarray, new_tokens: int, reuse: ReuseConfig, namespace: str) -> Request:
        """Look a prompt up, take the pages that it and so many new tokens need, and lay out its prefill.

        The last generated token is never an input, so it needs no slot.

        Raises:
          InvalidRequestError: an argument is wrong.
          StoreFullError: there are not enough pages (now). Nothing is held.
        """
        method = _method(reuse, namespace)
        match = self.cache.lookup(
            tokens,
            namespace,
            prefix=method.uses_prefix,
            segments=method.uses_segments,
            min_segment=method.min_segment_tokens,
        )
        try:
            plan = self._lay_out(tokens, match, method)
            pages = self._take_pages(match, len(tokens) + max(new_tokens - 1, 0))
        except BaseException:
            self.cache.unpin(match)
            raise
        plan = dataclasses.replace(plan, pages=pages)
        request = Request(tokens, namespace, plan, match, frozenset(match.pages))
        self._requests.add(request)
        return request

    def _lay_out(self, tokens: np.ndarray, match: Match, method: Method) -> RequestPlan:
        """The plan without pages: with what was found, or with the prefix alone where that is asked for and faster."""

        def plan(match: Match) -> RequestPlan:
            prompt = PromptMap.of(tokens, match)
            copies = (*([match.prefix_tail] if match.prefix_tail else []), *match.segments)
            return RequestPlan(prompt, method.phases(prompt, self._model.num_layers), (), copies)

        found = plan(match)
        if not (method.only_if_faster and self.speeds and match.segments):
            return found
        plain = plan(dataclasses.replace(match, segments=[]))
        plain_seconds, found_seconds = (prefill_seconds(self._model, one, self.speeds) for one in (plain, found))
        return plain if plain_seconds <= found_seconds else found

    def _take_pages(self, match: Match, num_tokens: int) -> list[int]:
        """The shared prefix pages and new ones behind them."""
        own = self.cache.allocate(self.pages_for(num_tokens) - len(match.prefix_pages))
        self.cache.share(match.prefix_pages)
        return [*match.prefix_pages, *own]

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold so many tokens. Raises StoreFullError if the store has not got them."""
        needed = -(-num_tokens // self._config.page_size)
        if needed > self._config.num_pages:
            raise StoreFullError(
                f"the request needs KV for {num_tokens} tokens, {needed} pages of {self._config.page_size}; "
                f"store_tokens={self._config.store_tokens} gives {self._config.num_pages}"
            )
        return needed

    def unpin(self, request: Request) -> None:
        """Let go of the donors: the copies are made, or on their way. Idempotent."""
        if request.match is not None:
            self.cache.unpin(request.match)
            request.match = None

    def commit(self, request: Request, tokens: Int32[np.ndarray, "tokens"]) -> None:
        """Make the prompt and what follows it findable, unless something that it found was forgotten meanwhile.

        Exactness of an answer's KV is that of the whole prompt's.
        """
        if request.forgotten:
            return
        exact = request.plan.exact_tokens(self._model.num_layers)
        exact = len(tokens) if exact == len(request.tokens) else exact
        self.cache.commit(request.plan.pages, tokens, request.namespace, exact_tokens=exact)

    def leave(self, request: Request) -> None:
        """Give back what it holds."""
        self.unpin(request)
        self.cache.release(request.plan.pages)
        self._requests.discard(request)

    def forget(self, handle: int) -> None:
        """Stop serving what a handle stands for.

        Requests that found some of it go on, but what they have not committed yet is not kept: it would bring the text
        back, in the pages that they share with it or in copies of them. Raises UnknownHandleError.
        """
        gone = self.cache.forget(handle)
        for request in self._requests:
            request.forgotten |= not request.donors.isdisjoint(gone)


def _method(reuse: ReuseConfig, namespace: str) -> Method:
    """Raises InvalidRequestError if one of them is of no use."""
    if not isinstance(namespace, str) or not namespace:
        raise InvalidRequestError(f"namespace={namespace!r} must be a non-empty string")
    return method_of(reuse)
