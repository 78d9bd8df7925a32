"""Compiling programs before they run, several at a time, or finding them on disk.

A program is traced and lowered in Python, one after the other, and compiled by XLA, which needs no Python and takes
longer. So what would run a program traces it here, leaves it to a thread, and goes on with zeros in place of
what the program computes. JAX keeps what was compiled: when the program is called in earnest, it is there. One that an
earlier process has left on disk is not traced either. JAX does not know it then, and who calls it has to. Nor is one
that another process is compiling now: that one tells what comes out of it, and leaves it on disk.
"""

from __future__ import annotations

import functools
import logging
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

log = logging.getLogger(__name__)

_MOST_THREADS = 8  # XLA has threads of its own beside these

Key = tuple[Any, ...]


class Results(NamedTuple):
    """What is known of a program once it is traced.

    Attributes:
      tree, types: of its results.
    """

    tree: Any
    types: Sequence[ArrayType]


class Claims:
    """Which of several processes compiles a program, by the path where it is left on disk. By these claims, this
    process compiles all of them."""

    def claim(self, path: Path) -> Results | None:
        """What another process says of a program. None: it is the caller's to trace. Waits while another one traces."""
        return None

    def traced(self, path: Path, results: Results) -> None:
        """The caller has traced what it claimed, and compiles it now."""

    def ended(self, path: Path) -> None:
        """What the caller claimed is on disk, or will not be. From any thread."""

    def wait(self, path: Path) -> None:
        """Wait until it has ended, if another process claimed it. From any thread."""


class _Started(NamedTuple):
    """A program that is being compiled, or loaded.

    Attributes:
      compiled: gives it as `jax.stages.Compiled`.
      found: whether it was on disk, or will be, by another process.
    """

    results: Results
    compiled: Future[Any]
    found: bool


class Ahead:
    """Programs that are being compiled.

    Args:
      kept: where they are looked for first, and left for other processes.
      claims: which of those other processes compile meanwhile.
      threads: that compile at most. None: as many as there are processors.
    """

    def __init__(
        self, kept: KeptPrograms | None = None, claims: Claims | None = None, threads: int | None = None
    ) -> None:
        self._pool = ThreadPoolExecutor(min(threads or num_processors(), _MOST_THREADS), thread_name_prefix="compile")
        self._loads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="load")  # which may wait for other processes
        self._started: dict[Key, _Started] = {}
        self._kept = kept
        self._claims = claims or Claims()

    def run(self, program: Callable[..., Any], store: Any, placed: Sharding, /, *args: Any, **options: Any) -> Any:
        """Begin to compile a jitted program for these arguments, unless it has begun.

        Args:
          store: arrays that are among the arguments and are donated. They stand for the results of their shapes.
          placed: where other results are.
          options: static.

        Returns:
          As the program: zeros. The store is as it was.
        """
        results = self._start((program, args, options)).results
        donated = {(array.shape, array.dtype): array for array in jax.tree.leaves(store)}

        def stand_in(like: ArrayType) -> jax.Array:
            found = donated.get((like.shape, like.dtype))
            return _zeros(like, placed) if found is None else found

        return jax.tree.unflatten(results.tree, [stand_in(like) for like in results.types])

    def call(self, program: Callable[..., Any], store: Any, placed: Sharding, /, *args: Any, **options: Any) -> Any:
        """Run a jitted program now, once it is compiled, or found. Arguments as `run`."""
        started = self._start((program, args, options))
        if started.found and started.compiled.exception() is None:
            return started.compiled.result()(*args)
        wait([started.compiled])
        return program(*args, **options)

    def wait(self) -> dict[Key, jax.stages.Compiled]:
        """Wait for all of them. One that fails fails again where it is called, and says so there.

        Returns:
          By `key_of` their calls, what JAX does not know: those that were found. If there are any, all others too: JAX
          would not know these by what found ones give, whose places it writes in another way.
        """
        wait([each.compiled for each in self._started.values()])
        self._pool.shutdown()
        self._loads.shutdown()
        compiled = {key: each for key, each in self._started.items() if each.compiled.exception() is None}
        if not any(each.found for each in compiled.values()):
            return {}
        return {key: each.compiled.result() for key, each in compiled.items()}

    def _start(self, call: Call) -> _Started:
        key = key_of(*call)
        if key not in self._started:
            path = self._kept.path(call) if self._kept is not None else None
            self._started[key] = self._compile(call) if path is None else self._share(path, call)
        return self._started[key]

    def _share(self, path: Path, call: Call) -> _Started:
        """Begin with a program that other processes may know."""
        return self._find(path, call) or self._leave(path, call) or self._compile(call, path)

    def _find(self, path: Path, call: Call) -> _Started | None:
        """Load what is on disk already."""
        assert self._kept is not None
        if (found := self._kept.find(path, call[1])) is None:
            return None
        return _Started(Results(found.out_tree, found.out_types), self._loading(found.load), True)

    def _leave(self, path: Path, call: Call) -> _Started | None:
        """Leave a program to another process that claimed it first, and load what that one leaves."""
        if (results := self._claims.claim(path)) is None:
            return None
        return _Started(results, self._loading(functools.partial(self._load_later, path, call[1])), True)

    def _loading(self, load: Callable[[], jax.stages.Compiled]) -> Future[Any]:
        return self._loads.submit(load)

    def _load_later(self, path: Path, args: tuple[Any, ...]) -> jax.stages.Compiled:
        assert self._kept is not None
        self._claims.wait(path)
        found = self._kept.find(path, args)
        if found is None:
            log.warning(
                "%s was not left by the process that began with it; the program is compiled at its first call", path
            )
            raise LookupError(path)
        return found.load()

    def _compile(self, call: Call, path: Path | None = None) -> _Started:
        """Trace a program, which this process has claimed if it has a path, and leave the rest to a thread."""
        program, args, options = call
        try:
            traced = program.trace(*args, **options)  # type: ignore[attr-defined]
            # Types and tree apart, since checked dataclasses hold arrays only. `out_info` would not say what is weak.
            results = Results(traced.out_tree, [ArrayType.of(each) for each in traced.jaxpr.out_avals])
            if path is not None:
                self._claims.traced(path, results)
            lowered = traced.lower()
        except BaseException:
            self._end(path)
            raise
        return _Started(results, self._pool.submit(self._finish, lowered, path, results.types), False)

    def _finish(self, lowered: jax.stages.Lowered, path: Path | None, types: Sequence[ArrayType]) -> Any:
        try:
            compiled: jax.stages.Compiled = lowered.compile()
            if self._kept is not None and path is not None:
                self._kept.keep(path, compiled, types)
            return compiled
        finally:
            self._end(path)

    def _end(self, path: Path | None) -> None:
        if path is not None:
            self._claims.ended(path)


class Share(Ahead):
    """What a process compiles for another one: programs are left on disk, and neither loaded nor run here."""

    def call(self, program: Callable[..., Any], store: Any, placed: Sharding, /, *args: Any, **options: Any) -> Any:
        return self.run(program, store, placed, *args, **options)

    def _loading(self, load: Callable[[], jax.stages.Compiled]) -> Future[Any]:
        return self._loads.submit(lambda: None)

    def _finish(self, *about: Any) -> None:
        try:
            super()._finish(*about)  # and let go of it: it has memory of the devices
        except Exception as error:
            log.warning("a program does not compile in this process: %s", error)


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
