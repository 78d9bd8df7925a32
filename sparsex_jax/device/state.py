"""From what the host knows of the sequences of a batch to the arrays that sampling and decode take: NumPy's, which the
runner sends to the devices together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from sparsex_jax.config import SamplingParams
from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.sampling import Adjustment, Sampling
from sparsex_jax.reuse.adapters import NO_SLOT
from sparsex_jax.reuse.planner import Shapes, page_tables
from sparsex_jax.text.matcher import Matcher

# Fields of `SamplingParams` that every step takes.
_DTYPES = {"temperature": np.float32, "top_p": np.float32, "top_k": np.int32, "min_p": np.float32, "seed": np.uint32}


@dataclasses.dataclass(frozen=True, eq=False)
class BatchSlot:
    """The sequence in one slot of a batch.

    Attributes:
      prompt: its token ids, which the repetition penalty looks at.
      answer: its new tokens so far.
      sampling: how the next one is chosen.
      end_tokens: tokens that end it; -1 is none. All sequences of an engine have the same number of them.
      pages: physical pages of its KV, in order.
      matcher: of its structure, if it has one.
      adapter: the slot of the adapter that acts on its new tokens; -1: none.
    """

    prompt: Sequence[int] | np.ndarray
    answer: Sequence[int]
    sampling: SamplingParams
    end_tokens: Sequence[int] = ()
    pages: Sequence[int] = ()
    matcher: Matcher | None = None
    adapter: int = NO_SLOT

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, which is the position of the next token."""
        return len(self.prompt) + len(self.answer)


def allowed_tokens(
    matchers: Sequence[Matcher | None], size: int, vocab_size: int
) -> UInt32[np.ndarray, "requests words"]:
    """Which tokens may come next in a batch of `size` slots, as `Sampling.allowed` has it.

    Args:
      matchers: of the requests in the first slots; None: any token may come.

    Raises:
      StructureError: a grammar got too complex.
    """
    allowed = np.full((size, -(-vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    for line, matcher in zip(allowed, matchers, strict=False):
        if matcher is not None:
            line[:] = matcher.allowed()
    return allowed


def sampling_arrays(slots: Sequence[BatchSlot], size: int, vocab_size: int) -> Sampling:
    """How the next token of each sequence is chosen, in arrays of `size` slots; those that are left over are greedy.

    It depends on the prompts and on the answers so far only, so it can be made anew between any two dispatches, for
    any batch.
    """
    params = [slot.sampling for slot in slots]
    filled = [*params, *[SamplingParams()] * (size - len(params))]
    numbers: dict[str, Any] = {
        name: np.array([getattr(p, name) for p in filled], dtype) for name, dtype in _DTYPES.items()
    }
    wishes = any(p.adjusts_logits or p.logprobs is not None for p in params)
    return Sampling(
        **numbers,
        adjustment=_adjustment(filled, slots, vocab_size) if wishes else None,
        logprobs=wishes,
    )


def _adjustment(filled: Sequence[SamplingParams], slots: Sequence[BatchSlot], vocab_size: int) -> Adjustment:
    """The arrays over the vocabulary. `filled` has an entry for each slot of the arrays, used or not."""
    shape = (len(filled), vocab_size)
    bias, counts = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    in_prompt, ends, may_end = np.zeros(shape, bool), np.zeros(shape, bool), np.zeros(len(filled), np.int32)
    for number, slot in enumerate(slots):
        bias[number] = _bias(slot.sampling, vocab_size)
        ends[number, [token for token in (*slot.end_tokens, *slot.sampling.stop_token_ids) if token >= 0]] = True
        may_end[number] = len(slot.prompt) + slot.sampling.min_new_tokens
        in_prompt[number, np.asarray(slot.prompt)] = True
        counts[number] = np.bincount(np.array(slot.answer, np.int64), minlength=vocab_size)
    penalties = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in filled]
    repetition, presence, frequency = np.array(penalties, np.float32).T
    arrays: Any = {"bias": bias, "ends": ends, "may_end": may_end, "in_prompt": in_prompt, "counts": counts}
    return Adjustment(repetition=repetition, presence=presence, frequency=frequency, **arrays)


def _bias(sampling: SamplingParams, vocab_size: int) -> np.ndarray:
    """What is added to each logit: minus infinity where the token is not allowed."""
    allowed = sampling.allowed_token_ids
    bias = np.full(vocab_size, 0 if allowed is None else -np.inf, np.float32)
    bias[list(allowed or ())] = 0
    for token, value in sampling.logit_bias.items():
        bias[token] += value
    return bias


def batch_slots(sequences: int, multiple: int = 1) -> int:
    """How many slots the batch of this many sequences has: a power of two. Of several sequences, at least `multiple`,
    to which the device pads rows anyway: so there are fewer programs. One is not padded, for its sampling's sake."""
    return 1 if sequences == 1 else max(1 << (sequences - 1).bit_length(), multiple)


def decode_state(
    slots: Sequence[BatchSlot], max_pages: int, vocab_size: int, *, adapters: bool = False, multiple: int = 1
) -> DecodeState:
    """The state in which each sequence continues behind its last token, padded to a power of two of slots.

    Args:
      slots: the last token of every sequence is a new one, whose KV is not in the store yet. Where there is none, it
        comes by `decode.behind_prefill`.
      max_pages: width of the page tables.
      adapters: whether the engine has slots for adapters.
      multiple: as in `batch_slots`.
    """
    size = batch_slots(len(slots), multiple)
    width = max(1, *(len(slot.end_tokens) for slot in slots))
    stops: Any = np.full((size, width), -1, np.int32)
    for number, slot in enumerate(slots):
        stops[number, : len(slot.end_tokens)] = slot.end_tokens
    progress: dict[str, Any] = {
        "token": _padded([slot.answer[-1] if slot.answer else 0 for slot in slots], size, 0),
        "position": _padded([slot.length - 1 for slot in slots], size, -1),
        "remaining": _padded([slot.sampling.max_new_tokens - len(slot.answer) for slot in slots], size, 0),
    }
    if adapters:
        progress["adapter"] = _padded([slot.adapter for slot in slots], size, NO_SLOT)
    return DecodeState(
        **progress,
        stops=stops,
        page_tables=page_tables([slot.pages for slot in slots], size, max_pages),
        sampling=sampling_arrays(slots, size, vocab_size),
    )


def state_in(slots: Sequence[BatchSlot], shapes: Shapes, vocab_size: int) -> DecodeState:
    """`decode_state` in the shapes of an engine."""
    about: Any = {"adapters": shapes.adapters, "multiple": shapes.row_multiple}
    return decode_state(slots, shapes.max_pages, vocab_size, **about)


def _padded(values: Sequence[int], size: int, fill: int) -> Any:
    return np.array([*values, *[fill] * (size - len(values))], np.int32)
