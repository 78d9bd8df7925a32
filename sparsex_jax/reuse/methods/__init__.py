"""Reuse methods: each is a frozen dataclass of its options with a schedule of phases, in a small file of its own.

Each phase starts at a layer with tokens that the method forces, and optionally a signal, computed by the model at that
layer, that adds the highest-scored of the reused ones. The jitted prefill runs any such schedule, so a new method is a
class and nothing else:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FirstHalfOnly(Method, name="first_half_only"):
        part: Share = 0.5

        def schedule(self, prompt, num_layers):
            return [Phase(0, prompt.computed), Phase(round(self.part * num_layers), prompt.fresh)]

It is registered when it is defined: `ReuseConfig("first_half_only", part=0.25)` makes one. `scripts/new_method.py` is a
complete example, with a signal of its own. Nothing here imports jax, so that the command line's help comes at once.
"""

from sparsex_jax.config import METHODS, find_method
from sparsex_jax.config.checks import Count, Flag, Positive, Share
from sparsex_jax.reuse.methods.base import Method, budget, check_boundaries, method_of
from sparsex_jax.reuse.methods.choosing import ChoosingMethod

# The order of these imports is the order in which error messages and the API's schema list the methods.
# isort: off
from sparsex_jax.reuse.methods.plain import Full, Naive, Prefix
from sparsex_jax.reuse.methods.epic import Epic
from sparsex_jax.reuse.methods.cacheblend import CacheBlend
from sparsex_jax.reuse.methods.sparsex import SparseX
from sparsex_jax.reuse.methods.random import Random
from sparsex_jax.reuse.methods.prophetkv import ProphetKV
from sparsex_jax.reuse.methods.qcfuse import QCFuse
from sparsex_jax.reuse.methods.focus import Focus
from sparsex_jax.reuse.methods.excerpt import Excerpts
from sparsex_jax.reuse.methods.oracle import Oracle

# isort: on
from sparsex_jax.reuse.schedule import Phase, check_schedule

__all__ = [
    "METHODS",
    "CacheBlend",
    "ChoosingMethod",
    "Count",
    "Epic",
    "Excerpts",
    "Flag",
    "Focus",
    "Full",
    "Method",
    "Naive",
    "Oracle",
    "Phase",
    "Positive",
    "Prefix",
    "ProphetKV",
    "QCFuse",
    "Random",
    "Share",
    "SparseX",
    "budget",
    "check_boundaries",
    "check_schedule",
    "find_method",
    "method_of",
]
