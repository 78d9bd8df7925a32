"""The methods that choose nothing: full recompute, exact prefix, and reuse without correction."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from sparsex_jax.reuse.methods.base import Method
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.schedule import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method, name="full"):
    """Look nothing up; compute every token."""

    uses_prefix: ClassVar[bool] = False
    uses_segments: ClassVar[bool] = False
    repairs: ClassVar[bool] = False

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        return [Phase(0, prompt.computed)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix(Method, name="prefix"):
    """Compute all but the exact prefix."""

    uses_segments: ClassVar[bool] = False
    repairs: ClassVar[bool] = False

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        return [Phase(0, prompt.computed)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naive(Method, name="naive"):
    """Paste and align all segments; compute the fresh tokens and nothing else."""

    repairs: ClassVar[bool] = False

    def accepts(self, made_by: object, num_layers: int) -> bool:
        """Every method computes at least the fresh tokens."""
        return isinstance(made_by, Method) and made_by.min_segment_tokens >= self.min_segment_tokens

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        return [Phase(0, prompt.fresh)]
