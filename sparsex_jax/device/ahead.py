"""Compiling programs before they run, several at a time, or finding them on disk.

A program is traced and lowered in Python, one after the other, and compiled by XLA, which needs no Python and takes
longer. So what would run a program traces it here, leaves it to a thread, and goes on with zeros in place of
what the program computes. JAX keeps what was compiled: when the program is called in earnest, it is there. One that an
earlier process has left on disk is not traced either. JAX does not know it then, and who calls it has to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from sparsex_jax.device.compilation import num_processors
from sparsex_jax.device.kept_programs import ArrayType, Call, KeptPrograms
from sparsex_jax.model.weights import Params

_MOST_THREADS = 8  # XLA has threads of its own beside these

Key = tuple[Any, ...]


class _Started(NamedTuple):
    """A program that is being compiled, or loaded.

    Attributes:
      tree, types: of its results.
      found: whether it was on disk.
    """

    tree: Any
    types: Sequence[ArrayType]
    compiled: Future[jax.stages.Compiled]
    found: bool


class Ahead:
    """Programs that are being compiled.

    Args:
      kept: where they are looked for first, and left for other processes.
    """

    def __init__(self, kept: KeptPrograms | None = None) -> None:
        self._pool = ThreadPoolExecutor(min(num_processors(), _MOST_THREADS), thread_name_prefix="compile")
        self._started: dict[Key, _Started] = {}
        self._kept = kept

    def run(self, program: Callable[..., Any], store: Any, placed: Sharding, /, *args: Any, **options: Any) -> Any:
        """Begin to compile a jitted program for these arguments, unless it has begun.

        Args:
          store: arrays that are among the arguments and are donated. They stand for the results of their shapes.
          placed: where other results are.
          options: static.

        Returns:
          As the program: zeros. The store is as it was.
        """
        started = self._start((program, args, options))
        donated = {(array.shape, array.dtype): array for array in jax.tree.leaves(store)}

        def stand_in(like: ArrayType) -> jax.Array:
            found = donated.get((like.shape, like.dtype))
            return _zeros(like, placed) if found is None else found

        return jax.tree.unflatten(started.tree, [stand_in(like) for like in started.types])

    def call(self, program: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Run a jitted program now, once it is compiled, or found."""
        started = self._start((program, args, options))
        if started.found and started.compiled.exception() is None:
            return started.compiled.result()(*args)
        wait([started.compiled])
        return program(*args, **options)

    def wait(self) -> dict[Key, jax.stages.Compiled]:
        """Wait for all of them. One that fails fails again where it is called, and says so there.

        Returns:
          Those that were found, by `key_of` their calls. JAX does not know them.
        """
        wait([each.compiled for each in self._started.values()])
        self._pool.shutdown()
        found = {key: each.compiled for key, each in self._started.items() if each.found}
        return {key: compiled.result() for key, compiled in found.items() if compiled.exception() is None}

    def _start(self, call: Call) -> _Started:
        key = key_of(*call)
        if key not in self._started:
            path = self._kept.path(call) if self._kept is not None else None
            self._started[key] = self._find(path, call) or self._compile(path, call)
        return self._started[key]

    def _find(self, path: Path | None, call: Call) -> _Started | None:
        found = self._kept.find(path, call[1]) if self._kept is not None and path is not None else None
        if found is None:
            return None
        return _Started(found.out_tree, found.out_types, self._pool.submit(found.load), True)

    def _compile(self, path: Path | None, call: Call) -> _Started:
        program, args, options = call
        traced = program.trace(*args, **options)  # type: ignore[attr-defined]
        lowered = traced.lower()
        # Types and tree apart, since checked dataclasses hold arrays only. `out_info` would not say what is weak.
        types = [ArrayType.of(each) for each in traced.jaxpr.out_avals]

        def compile_and_keep() -> jax.stages.Compiled:
            compiled: jax.stages.Compiled = lowered.compile()
            if self._kept is not None and path is not None:
                self._kept.keep(path, compiled, types)
            return compiled

        return _Started(lowered.out_tree, types, self._pool.submit(compile_and_keep), False)


def _zeros(like: ArrayType, placed: Sharding) -> jax.Array:
    """Zeros of a type that programs cannot tell from the result's, be it weak."""
    zeros = np.zeros(like.shape, like.dtype)
    return jax.device_put(zeros.item() if like.weak_type and not like.shape else zeros, placed)


def key_of(program: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Key:
    """All that says which program of one engine it is: itself, the tree, and of each array its type and place.

    An engine has one model and one mesh. Its parameters, most of the arrays, are passed over: prompts wait for this.
    """
    others = tuple(Params if isinstance(arg, Params) else arg for arg in args)
    leaves, structure = jax.tree.flatten((others, options))
    return program, structure, *map(_described, leaves)


def _described(leaf: Any) -> Any:
    if not hasattr(leaf, "shape"):
        return leaf
    return ArrayType.of(leaf), _place(getattr(leaf, "sharding", None))


def _place(sharding: Any) -> Any:
    """Where an array is on the engine's mesh, in one way: JAX writes P() and P(None, None) for the same place."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = tuple(sharding.spec)
    while axes and axes[-1] is None:
        axes = axes[:-1]
    return axes
