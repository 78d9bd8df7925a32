"""Compiling before any request waits for it.

Programs depend on shapes and never on lengths or methods, so a token or two compile each:

    for each row bucket   the alignment; the prefill, which serves every method whose signals are built in, and one with
                          the default method's if they are not; on GPUs all layers of a chunk, or those behind the
                          last choice of rows; log-probabilities of prompts, with one or with many most probable
                          tokens; the default method's probe, if it has one: of all layers together where they fit a
                          turn, one by one where they do not
    for 1, 2, 4 ...       the decode of that many sequences together: without and with penalties, biases or
                          log-probabilities, and each of both also where some have a structure. On GPUs for 1, 8, 16
                          ..., and also where some draw from the best tokens only
    with mirrors          for each row bucket the alignment with a patch, and the packing of patch rows
    with tiers            the gathers and scatters of blocks; and host memory is pinned

Requests that name a method of other probes compile what they need when they come.

Calls that compile run one after the other, since they share the store. `steps_ahead` goes through the same calls first,
without running anything, so that several programs are compiled at a time; where there are processors for it, by several
processes (`scheduler.helpers`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sparsex_jax.cache import Segment
from sparsex_jax.cache.derived import Derived
from sparsex_jax.cache.mirrors import Packing
from sparsex_jax.config import MAX_LOGPROBS, ReuseConfig, SamplingParams, Structure
from sparsex_jax.device.ahead import Ahead
from sparsex_jax.device.kept_programs import KeptPrograms
from sparsex_jax.device.sampling import NON_FINITE
from sparsex_jax.device.signals import CROSSED_ALONE, signals_for
from sparsex_jax.device.state import BatchSlot, batch_slots, state_in
from sparsex_jax.errors import NonFiniteLogitsError, StructureError
from sparsex_jax.reuse.methods import Method, Phase, method_of
from sparsex_jax.reuse.planner import RequestPlan, slots_of
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.scheduler.constrained import ConstrainedDecode
from sparsex_jax.scheduler.helpers import Helpers, num_helpers, with_room
from sparsex_jax.scheduler.loop import Loop
from sparsex_jax.scheduler.policy import few_steps

log = logging.getLogger(__name__)


def steps(loop: Loop, usual: SamplingParams | None = None) -> list[Callable[[], None]]:
    """Calls that compile a few programs each, and one that measures what they take. They leave nothing in the store.
    Call them before the loop runs.

    Args:
      usual: what requests ask for that say nothing of sampling.
    """
    wishes = _wishes(loop, usual)
    tiers = [loop.admission.tiers.warm_up] if loop.admission.tiers is not None else []
    whole = [functools.partial(_generate, loop, wish) for wish in wishes]
    return [*_prefills(loop), functools.partial(_measure, loop), *_decodes(loop, wishes), *tiers, *whole]


def steps_ahead(loop: Loop, usual: SamplingParams | None = None) -> list[Callable[[], None]]:
    """Calls after which those of `steps` find most of their programs compiled. They trace one program after the other,
    while others are compiled at the same time; the last call waits for these. Arguments as `steps`. None where several
    processes have the devices: each would have to compile ahead."""
    if loop.runner.relay is not None:
        return []
    steps, kept = programs(loop, usual), KeptPrograms.of(loop.runner.mesh)
    helpers = _helpers(loop, usual, kept, len(steps))
    ahead = Ahead(kept, helpers)

    def compiling(step: Callable[[], None]) -> None:
        with _ending(helpers), loop.runner.compiling(ahead):
            step()

    def wait() -> None:
        with _ending(helpers):
            loop.runner.use(ahead.wait())
        if helpers is not None:
            helpers.end()

    return [*(functools.partial(compiling, step) for step in steps), wait]


def _helpers(loop: Loop, usual: SamplingParams | None, kept: KeptPrograms | None, num_steps: int) -> Helpers | None:
    """Processes that share the steps. None: there are to be none, or they could not leave what they compile."""
    number = num_helpers(loop.runner.decoder.ops.backend.platform, with_room(loop.runner))
    if kept is None or not number:
        return None
    if not kept.may_keep:
        log.warning("Programs that are not in %s yet are compiled at each start: it may not be written to", kept.root)
        return None
    return Helpers(number, loop, usual, kept, num_steps)


@contextlib.contextmanager
def _ending(helpers: Helpers | None) -> Iterator[None]:
    """End the helpers where something fails within, or is interrupted."""
    try:
        yield
    except BaseException:
        if helpers is not None:
            helpers.end(at_once=True)
        raise


def programs(loop: Loop, usual: SamplingParams | None = None) -> list[Callable[[], None]]:
    """Those of the steps that call programs which take long to compile; those that take longest come first. Arguments
    as `steps`."""
    return [*_prefills(loop), *_decodes(loop, _wishes(loop, usual))]


def _prefills(loop: Loop) -> list[Callable[[], None]]:
    buckets = loop.runner.shapes.buckets
    mirrors = (_mirror,) if loop.admission.mirroring is not None else ()
    return [functools.partial(step, loop, bucket) for bucket in buckets for step in (_prefill, _probe, *mirrors)]


def _decodes(loop: Loop, wishes: list[SamplingParams]) -> list[Callable[[], None]]:
    batches = _batches(loop.policy.max_num_seqs, loop.runner.shapes.row_multiple)
    return [functools.partial(_decode, loop, number, wish) for wish in wishes for number in batches]


def _wishes(loop: Loop, usual: SamplingParams | None) -> list[SamplingParams]:
    """What requests may ask for, as far as programs differ."""
    ranked = (SamplingParams(temperature=1.0, top_k=1),) if loop.runner.host_steers else ()
    frees = dict.fromkeys((SamplingParams(), usual or SamplingParams(), *ranked, SamplingParams(logprobs=0)))
    return [one for free in frees for one in (free, *_structured(loop, free))]


def _structured(loop: Loop, sampling: SamplingParams) -> list[SamplingParams]:
    """The same with a structure that answers of this model can have; none if its tokens cannot be constrained."""
    structure = Structure("json_object")
    try:
        loop.requests.matcher(structure)
    except StructureError:
        return []
    return [dataclasses.replace(sampling, structure=structure)]


def _batches(most: int, multiple: int) -> list[int]:
    """A number of sequences for each size that a batch is padded to: 1, 2, 4, 6 for a most of 6."""
    by_size = {batch_slots(number, multiple): number for number in range(1, most + 1)}
    return list(by_size.values())


def _prefill(loop: Loop, bucket: tuple[int, int]) -> None:
    """The copy of a token, a plan of one token behind it, and log-probabilities of what would follow."""
    prompt = PromptMap(np.zeros(2, np.int32), np.array([TokenKind.REUSED, TokenKind.FRESH], np.uint8))
    steers = loop.runner.host_steers
    at_once = loop.runner.shapes.at_once_in(bucket) if steers else ()
    with loop.admission.lend(len(prompt)) as pages, loop.runner.padding_to(bucket):
        copied = Segment(0, 1, 0, slots_of(pages, np.arange(1), loop.runner.engine.page_size), exact=True)
        for phases in _phases(loop, prompt):
            run = loop.runner.begin([RequestPlan(prompt, phases, pages, (copied,))])
            loop.runner.advance(run, 1 if steers else None)  # there, all layers are other programs
        everything, choices = Phase(0, prompt.computed | prompt.reused), (None, *CROSSED_ALONE)
        schedules = [(everything, Phase(1, prompt.fresh, signal)) for signal in choices]
        for size, phases in itertools.product(at_once, (*schedules, (everything,))):
            with loop.runner.padding_to(bucket, size):
                run = loop.runner.begin([RequestPlan(prompt, phases, pages)])
                loop.runner.advance(run)
        for number in (1, MAX_LOGPROBS):
            loop.runner.score(run, [np.zeros(1, np.int32)], number)
    assert run.logits is not None
    loop.runner.are_finite(run.logits)  # which is asked where no token is wanted, as of texts to remember
    loop.runner.logits_of(run.logits, 0)


def _phases(loop: Loop, prompt: PromptMap) -> list[tuple[Phase, ...]]:
    """A schedule for each set of signals that a prefill is compiled with: without signals of methods, and with the
    default method's, if it has some that are not in all programs."""
    method = _default_method(loop)
    signals = [phase.signal for phase in method.phases(prompt, loop.runner.model.num_layers)]
    plain = (Phase(0, prompt.fresh),)
    if signals_for(signals).keys() == signals_for([]).keys():
        return [plain]
    return [plain, (*plain, *(Phase(1, prompt.fresh, signal) for signal in signals if signal))]


def _default_method(loop: Loop) -> Method:
    return method_of(loop.requests.reuse).fitted(loop.runner.model.windows)


def _probe(loop: Loop, bucket: tuple[int, int]) -> None:
    """What the default method looks at before it answers: two segments of a token, by a third one."""
    segments = tuple(Segment(at, 1, 0, np.zeros(1, np.int64), exact=True) for at in range(2))
    prompt = PromptMap(np.zeros(3, np.int32), np.array([*[TokenKind.REUSED] * 2, TokenKind.FRESH], np.uint8), segments)
    probe = _default_method(loop).probe(prompt, lambda: np.arange(3), loop.runner.model.num_layers)
    if probe is None:
        return
    with loop.admission.lend(len(prompt)) as pages, loop.runner.padding_to(bucket):
        for layers in _turns(loop, bucket):
            run = loop.runner.begin_probe([RequestPlan(prompt, (Phase(0, prompt.fresh),), pages, probe=probe)])
            loop.runner.advance_probe(run, layers)
            run.focus()


def _mirror(loop: Loop, bucket: tuple[int, int]) -> None:
    """A row that is packed, and a token that is copied with it."""
    slot, depth = np.zeros(1, np.int64), np.ones(1, np.int64)
    with loop.admission.lend(2 * loop.runner.engine.page_size) as pages, loop.runner.padding_to(bucket):
        first, last = (slots_of(pages, slot + place, loop.runner.engine.page_size) for place in (0, 1))
        loop.runner.pack(Packing((), first, last, slot, depth))
        copied = Segment(0, 1, 0, last, exact=True, rows=Derived(last, slot, depth, last, slot))
        loop.runner.copy([(copied, pages)])


def _turns(loop: Loop, bucket: tuple[int, int]) -> list[int | None]:
    """How plans of this bucket may run: all layers together, or some at a time."""
    smaller = [size for size, _ in loop.runner.shapes.buckets if size < bucket[0]]
    together = [None] if max(smaller, default=0) < loop.policy.prefill_tokens else []
    return [*together, *([loop.runner.model.num_layers] if bucket[0] > loop.policy.prefill_tokens else [])]


def _measure(loop: Loop) -> None:
    """The speeds by which admission chooses, which the first request to find something would wait for."""
    _ = loop.admission.choice.speeds


def _decode(loop: Loop, number: int, wish: SamplingParams) -> None:
    """A dispatch of this many sequences. They share one page, and all write the same into it."""
    runner, ends = loop.runner, loop.requests.end_tokens
    matcher = loop.requests.matcher(wish.structure) if wish.structure else None
    with loop.admission.lend(2) as pages:
        slot = BatchSlot([0], [0], dataclasses.replace(wish, max_new_tokens=2), ends, pages, matcher)
        state = state_in([slot] * number, runner.shapes, runner.model.vocab_size)
        if matcher is None:
            most = runner.engine.decode_steps
            for steps in {few_steps(most), most}:  # each number of programs has its own one that joins their tokens
                sampled = jax.device_get(runner.start_decode(state, steps)[1])
        else:
            sampled = ConstrainedDecode(runner, state, [None] * number, 2).finish()[1]  # stand-ins are in no grammar
    if (sampled.token == NON_FINITE).any():
        raise NonFiniteLogitsError("the logits behind a prompt of one token are not all finite")


def _generate(loop: Loop, wish: SamplingParams) -> None:
    """A whole request, for what is between prefill and decode."""
    full = ReuseConfig(method="full")
    sampling = dataclasses.replace(wish, max_new_tokens=2, ignore_eos=True)
    options: dict[str, Any] = {"reuse": full, "namespace": "warm-up", "keep": False, "asked": False}
    loop.complete([loop.requests.generation([0], sampling, **options)])
