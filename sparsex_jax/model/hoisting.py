"""Taking out of a loop what does not change in it.

XLA does so too, but not where results are larger than what they are made of, nor what is made of those. Rotations,
addresses and a kernel's tiles are such: small, and each a kernel's launch for every turn of a loop over layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import partial_eval_jaxpr_nounits


def hoisted[Result](function: Callable[..., Result], invariant: Any, *rest: Any) -> Callable[..., Result]:
    """`function(invariant, *rest)` as a function of the rest. What it computes of `invariant` alone is computed now.

    Values that the function closes over count as invariant.

    Args:
      rest: arguments like those of later calls, by structure, shapes and dtypes. Their values do not matter.
    """
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(invariant, *rest)
    known = jax.tree.leaves(invariant)
    unknown = [False] * len(known) + [True] * len(jax.tree.leaves(rest))
    now, later, _, _ = partial_eval_jaxpr_nounits(jaxpr, unknown, instantiate=True)
    done = jaxpr_as_fun(now)(*known)

    def remaining(*rest: Any) -> Result:
        return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(later)(*done, *jax.tree.leaves(rest)))

    return remaining
