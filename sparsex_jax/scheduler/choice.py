"""The choice of what a plan uses, of all that a lookup found: what pays by the measured speeds of the devices."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import numpy as np
from jaxtyping import Int32, Int64

from sparsex_jax.cache import Match, PageCache, Segment
from sparsex_jax.config import ModelConfig
from sparsex_jax.errors import StoreFullError
from sparsex_jax.reuse.cost import Speeds, can_save, excerpt_seconds, least_seconds, prefill_seconds
from sparsex_jax.reuse.excerpt import Remembered
from sparsex_jax.reuse.methods import Method
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase

log = logging.getLogger(__name__)

# What the seconds of a plan are multiplied with before plans are compared: of an exact plan, and of a plan that has an
# approximate prefix but adds no approximation of its own. The seconds of a plan that pastes segments count in full.
EXACT, PLAIN = 0.85, 0.9


def look_up(
    cache: PageCache,
    tokens: Int32[np.ndarray, "tokens"],
    namespace: str,
    method: Method,
    num_layers: int,
    *,
    segments: Callable[[int], bool] | None = None,
    counted: bool = False,
    last_used: Int64[np.ndarray, "pages"] | None = None,
    sharing: str = "isolated",
) -> Match:
    """`PageCache.lookup` of all that a method takes.

    Args:
      num_layers: of the model.
      segments: says by the number of tokens of the prefix whether to look for segments. None: if the method uses any.
      sharing: one of `reuse.adapters.SHARING`. What others wrote is no exact prefix; for `refresh` it is segments, even
        where it stands in place, so that the method repairs it.
    """
    return cache.lookup(
        tokens,
        namespace,
        prefix=method.uses_prefix and sharing != "refresh",
        exact=sharing == "isolated",
        segments=method.uses_segments if segments is None else segments,
        min_segment=method.min_segment_tokens,
        accepts=functools.partial(method.accepts, num_layers=num_layers),
        counted=counted,
        last_used=last_used,
    )


class Choice:
    """Lays out the plans of requests, for one model on its devices."""

    def __init__(self, model: ModelConfig, page_size: int, measure: Callable[[], Speeds] | None = None) -> None:
        """
        Args:
          measure: gives the speeds. It is called when they are first needed. None: what was found is always reused.
        """
        self._model, self._page_size, self._measure = model, page_size, measure
        self._speeds: Speeds | None = None

    @property
    def speeds(self) -> Speeds | None:
        """By which it sees what is fastest; None if what was found is always reused, or measuring failed."""
        if self._speeds is None and self._measure is not None:
            measure, self._measure = self._measure, None
            try:
                self._speeds = measure()
            except StoreFullError:
                self._measure = measure  # no page is free to measure with: another time
            except Exception:
                log.warning("the speeds of prefills could not be measured; what is found is reused", exc_info=True)
        return self._speeds

    @speeds.setter
    def speeds(self, speeds: Speeds) -> None:
        self._speeds = speeds

    def segments_may_pay(self, method: Method, length: int, num_prefix: int) -> bool:
        """Whether to look for segments in the rest of a prompt: not if no segment there could save enough time."""
        if not method.uses_segments or not method.only_if_faster or self._speeds is None:
            return method.uses_segments
        return can_save(1 - PLAIN, self._model, length, length - num_prefix, self._speeds)

    def plan(self, tokens: np.ndarray, match: Match, method: Method, remembered: Remembered) -> RequestPlan:
        """The plan, with no pages yet but the shared ones: of all that was found, or of as much as pays.

        Approximation has to pay. An exact plan is preferred to one that is hardly faster: the next turn of a
        conversation finds an exact prefix behind it, whatever its method, and nothing is left to heal.

        Args:
          remembered: of the tokens.
        """
        probe = self._probe(tokens, match, method, remembered)
        approximate = match.num_exact_tokens < match.num_prefix_tokens
        may_choose = method.only_if_faster and (approximate or match.segments)
        if not may_choose or (speeds := self.speeds) is None:
            return probe or self._plan_with(PromptMap.of(tokens, match), match, method)
        plain = match.without_segments()
        best = self._plan_with(PromptMap.of(tokens, plain), plain, method)
        cost = self._cost(best, speeds)
        parts = [match.exact_prefix(self._page_size)] if approximate else []
        if match.segments and probe is None:
            parts.append(match)
        for part in parts:
            prompt = PromptMap.of(tokens, part)
            least = least_seconds(self._model, np.flatnonzero(prompt.fresh), part.copies, speeds)
            if (1.0 if part is match else EXACT) * least < cost:  # else no plan needs to be made of it
                plan = self._plan_with(prompt, part, method)
                best, cost = min((best, cost), (plan, self._cost(plan, speeds)), key=lambda priced: priced[1])
        return probe if probe and excerpt_seconds(self._model, probe, speeds) < cost else best

    def _probe(self, tokens: np.ndarray, match: Match, method: Method, remembered: Remembered) -> RequestPlan | None:
        """The plan of a probe, if the method answers from excerpts and this prompt has what may be left out."""
        if not match.segments:
            return None
        prompt = PromptMap.of(tokens, match)
        probe = method.probe(prompt, remembered, self._model.num_layers)
        if probe is None:
            return None
        # What stands behind the last piece looks, also where it was found: a question that came before is one.
        end = probe.last_place + 1
        before = [_upto(segment, end) for segment in match.segments if segment.start < end]
        prompt = prompt.only(before)
        copies = dataclasses.replace(match, segments=before).copies
        return RequestPlan(prompt, (Phase(0, prompt.fresh),), match.prefix_pages, copies, probe)

    def _cost(self, plan: RequestPlan, speeds: Speeds) -> float:
        exact = plan.exact_tokens(self._model.num_layers) == len(plan.prompt)
        weight = EXACT if exact else 1.0 if plan.prompt.segments else PLAIN
        return weight * prefill_seconds(self._model, plan, speeds)

    def _plan_with(self, prompt: PromptMap, match: Match, method: Method) -> RequestPlan:
        prompt, phases = method.lay_out(prompt, self._model.num_layers)
        copies = dataclasses.replace(match, segments=[*prompt.segments]).copies
        return RequestPlan(prompt, phases, match.prefix_pages, copies)


def _upto(segment: Segment, end: int) -> Segment:
    """The part of a segment before this place of the prompt."""
    length = min(segment.length, end - segment.start)
    return dataclasses.replace(segment, length=length, slots=segment.slots[:length])
