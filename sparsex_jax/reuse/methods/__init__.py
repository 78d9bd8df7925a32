"""Reuse methods: a method is a schedule of phases over the layers, in a small file of its own.

Each phase begins at a layer with a set of tokens that the host forces, and optionally a signal, computed by the
model at that layer, that adds the highest-scored of the others. A phase's tokens are among the former phase's.
The jitted prefill runs any such schedule, so a new method is a function and nothing else:

    @method("first_half_only", uses_segments=True)
    def first_half_only(prompt, reuse, num_layers):
        return [Phase(0, prompt.computed), Phase(num_layers // 2, prompt.fresh)]

`scripts/new_method.py` is a complete example, with a signal of its own.
"""

# They register themselves, in the order of DESIGN.md's table.
# isort: off
from sparsex_jax.reuse.methods import plain, epic, cacheblend, sparsex, prophetkv, focus  # noqa: F401

# isort: on
from sparsex_jax.reuse.methods.base import METHODS, Method, Phase, boundary_layer, budget, find_method, method

__all__ = ["METHODS", "Method", "Phase", "boundary_layer", "budget", "find_method", "method"]
