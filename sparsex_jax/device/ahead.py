"""Compiling programs before they run, several at a time.

A program is traced and lowered in Python, one after the other, and compiled by XLA, which needs no Python and takes
longer. So what would run a program traces it here, leaves it to a thread, and goes on with zeros in place of
what the program computes. JAX keeps what was compiled: when the program is called in earnest, it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from sparsex_jax.device.compilation import num_processors

_MOST_THREADS = 8  # XLA has threads of its own beside these


class Ahead:
    """Programs that are being compiled."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(num_processors(), _MOST_THREADS), thread_name_prefix="compile")
        self._started: dict[Any, tuple[Any, Sequence[Any], Future[Any]]] = {}

    def run(self, program: Callable[..., Any], store: Any, placed: Sharding, /, *args: Any, **options: Any) -> Any:
        """Begin to compile a jitted program for these arguments, unless it has begun.

        Args:
          store: arrays that are among the arguments and are donated. They stand for the results of their shapes.
          placed: where other results are.

        Returns:
          As the program: zeros. The store is as it was.
        """
        key = program, *_described((args, options))
        if key not in self._started:
            traced = program.trace(*args, **options)  # type: ignore[attr-defined]
            lowered = traced.lower()
            # Types and tree apart, since checked dataclasses hold arrays only. `out_info` would not say what is weak.
            self._started[key] = lowered.out_tree, traced.jaxpr.out_avals, self._pool.submit(lowered.compile)
        tree, types, _ = self._started[key]
        donated = {(array.shape, array.dtype): array for array in jax.tree.leaves(store)}

        def stand_in(like: Any) -> jax.Array:
            found = donated.get((like.shape, like.dtype))
            return _zeros(like, placed) if found is None else found

        return jax.tree.unflatten(tree, [stand_in(like) for like in types])

    def wait(self) -> None:
        """Wait for all of them. One that fails fails again where it is called, and says so there."""
        wait([future for _, _, future in self._started.values()])
        self._pool.shutdown()


def _zeros(like: Any, placed: Sharding) -> jax.Array:
    """Zeros of a type that programs cannot tell from the result's, be it weak."""
    zeros = np.zeros(like.shape, like.dtype)
    return jax.device_put(zeros.item() if like.weak_type and not like.shape else zeros, placed)


def _described(tree: Any) -> tuple[Any, ...]:
    """All that says which program it is: the tree, and of each array its shape, dtype and place."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, *(
        (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) if hasattr(leaf, "shape") else leaf for leaf in leaves
    )
