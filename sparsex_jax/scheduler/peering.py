"""Blocks that engines of one fleet get from each other's lower tiers: what a prompt lacks here, and who has it there.

    here     `lacking`: what neither the store nor a tier has of a prompt
    there    `find`: which blocks of the tiers have that, and where in the prompt
    here     `choose`: those that come sooner than they are computed, and that there is room for
             `Tiers.arrived`, for each that has come; the prompt then finds it as all else in host memory

How any of this travels is not decided here (`sparsex_jax.serving.fleet.peers`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from sparsex_jax.config import ModelConfig, ReuseConfig
from sparsex_jax.reuse.cost import least_seconds
from sparsex_jax.reuse.methods import Method, method_of
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.loading import Loading, chain_of, end_of, lacking_of
from sparsex_jax.scheduler.tiers import Tiers
from sparsex_jax.tiers.blocks import BLOCK_PAGES, Block
from sparsex_jax.tiers.index import Found, Run


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """What an engine lacks of a prompt.

    Attributes:
      reuse: what the prompt asks for.
      num_prefix: how many of its leading tokens it finds.
      ranges: the tokens that it lacks, from where to before where, rising and apart.
    """

    namespace: str
    tokens: Int32[np.ndarray, "tokens"]
    reuse: ReuseConfig
    num_prefix: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def lacking(self) -> Bool[np.ndarray, "tokens"]:
        mask = np.zeros(len(self.tokens), bool)
        for begin, end in self.ranges:
            mask[begin:end] = True
        return mask

    @property
    def method(self) -> Method:
        return method_of(self.reuse)


class Chosen(NamedTuple):
    """Which blocks an engine gets from another one.

    Attributes:
      fetched: they are to be fetched, and are awaited until the tiers hear that they have come, or will not.
      awaited: the keys of those that are being fetched for others already.
      seconds: that computing their tokens would take. None: that is not known, or does not matter.
    """

    fetched: list[Block]
    awaited: list[bytes]
    seconds: float | None


NOTHING = Chosen([], [], None)


class Peering:
    """One engine's side of it. All methods belong to the thread that steps the loop."""

    def __init__(self, admission: Admission, model: ModelConfig) -> None:
        """
        Args:
          admission: of an engine with lower tiers.
        """
        assert admission.tiers is not None
        assert admission.loading is not None
        self._admission, self._model = admission, model
        self.tiers: Tiers = admission.tiers
        self._loading: Loading = admission.loading

    def lacking(self, tokens: Int32[np.ndarray, "tokens"], namespace: str, reuse: ReuseConfig) -> Lookup | None:
        """What neither the store nor a tier has of a prompt. None if that is less than a page, or nothing is reused."""
        method = method_of(reuse)
        if not (method.uses_prefix or method.uses_segments):
            return None
        match = self._loading.look(self._admission.cache, tokens, namespace, method)
        lacking, num_prefix = lacking_of(len(tokens), match), match.num_prefix_tokens
        self._admission.cache.let_go(match)
        chain, runs = self._found(tokens, namespace, method, lacking, num_prefix)
        for begin, end in ((0, end_of(chain)), *((run.begin, run.end) for run in runs)):
            lacking[begin:end] = False
        if lacking.sum() < self.tiers.index.page_size:
            return None
        return Lookup(namespace, tokens, reuse, max(num_prefix, end_of(chain)), _ranges(lacking))

    def find(self, lookup: Lookup) -> list[Run]:
        """The blocks of the tiers that have what another engine lacks, and where in the prompt: prefixes first."""
        about = lookup.tokens, lookup.namespace, lookup.method
        chain, runs = self._found(*about, lookup.lacking, lookup.num_prefix)
        return [*(Run(each.block, each.block.start, each.block.start + each.num_tokens) for each in chain), *runs]

    def _found(
        self,
        tokens: Int32[np.ndarray, "tokens"],
        namespace: str,
        method: Method,
        lacking: Bool[np.ndarray, "tokens"],
        num_prefix: int,
    ) -> tuple[list[Found], list[Run]]:
        index, lacking = self.tiers.index, lacking.copy()
        chain = chain_of(index, tokens, namespace, method, num_prefix, self._model.num_layers)
        lacking[: end_of(chain)] = False
        known = {each.block.key for each in chain}
        runs = index.runs(tokens, namespace, lacking, method.min_segment_tokens) if method.uses_segments else []
        return chain, [run for run in runs if run.block.key not in known]

    def choose(
        self, lookup: Lookup, told: Sequence[Run], bytes_per_s: float, most_bytes: int, streams: int = 1
    ) -> Chosen:
        """Which blocks of another engine to get: none, if that takes longer than computing what they have.

        Args:
          told: what the other one found.
          bytes_per_s: how fast one comes.
          most_bytes: of blocks together.
          streams: how many come at once.
        """
        held = self.tiers.index.holder
        useful = [run for run in told if self._is_of(lookup, run) and held(run.block) is None]
        awaited = [run.block.key for run in useful if self.tiers.awaits(run.block.key)]
        blocks = list({run.block.key: run.block for run in useful if run.block.key not in awaited}.values())
        sizes = itertools.accumulate(map(self.tiers.nbytes_of, blocks))
        blocks = [block for block, nbytes in zip(blocks, sizes, strict=True) if nbytes <= most_bytes]
        keys = {*awaited, *(block.key for block in blocks)}
        seconds = self._seconds(lookup, [run for run in useful if run.block.key in keys])
        nbytes = sum(map(self.tiers.nbytes_of, blocks))
        if seconds is not None and nbytes / (bytes_per_s * max(min(streams, len(blocks)), 1)) >= seconds:
            return NOTHING
        return Chosen(self.tiers.expect(blocks), awaited, seconds)

    def _is_of(self, lookup: Lookup, run: Run) -> bool:
        """Whether it is a block at all, and of the namespace that was asked about."""
        block, size = run.block, BLOCK_PAGES * self.tiers.index.page_size
        fits = 0 < block.num_tokens <= size and block.start >= 0 and 0 <= block.exact <= block.num_tokens
        return block.namespace == lookup.namespace and fits and 0 <= run.begin < run.end <= len(lookup.tokens)

    def _seconds(self, lookup: Lookup, runs: Sequence[Run]) -> float | None:
        """That it takes to compute what these have and the prompt lacks. None: it is not known, or does not matter."""
        speeds = self._admission.choice.speeds if lookup.method.only_if_faster else None
        if speeds is None:
            return None
        had = np.zeros(len(lookup.tokens), bool)
        for run in runs:
            had[run.begin : run.end] = True
        rows = np.flatnonzero(had & lookup.lacking)
        return least_seconds(self._model, rows, (), speeds) if len(rows) else 0.0


def _ranges(mask: Bool[np.ndarray, "tokens"]) -> tuple[tuple[int, int], ...]:
    """
    >>> _ranges(np.array([True, True, False, True]))
    ((0, 2), (3, 4))
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return tuple((int(begin), int(end)) for begin, end in edges.reshape(-1, 2))
