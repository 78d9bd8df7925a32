"""Programs on disk as they were compiled, so that the next process neither traces nor compiles them.

JAX keeps what XLA compiled too, but finds it by the program's text, for which the program is traced and lowered first.
On GPUs that takes seconds for a step of a model, most of them for the kernels in it, and there are dozens of programs.
Here one is found by all that its text follows from: this package's source, the versions and settings of JAX, the
devices, and what the program is called with. A program of which something has no name that another process knows, such
as a signal that a user wrote, is not kept.

As with JAX's own files, whoever can write to the directory can have this process run what they like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import pickle
import shutil
import sys
import tempfile
import types
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import sparsex_kernels
from sparsex_jax.device.compilation import count_loaded

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
_MOST_KINDS = 4  # directories of other sources, versions, settings and devices that are left when a new one is made
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-pjrt", "jax-cuda12-pjrt", "libtpu")
_PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "MOSAIC_", "SPARSEX_")  # of environment variables that change programs
# Of those that do not, though they begin so: they divide memory, or say who compiles.
_WITHOUT_EFFECT = ("XLA_PYTHON_CLIENT_", "SPARSEX_COMPILE_PROCESSES")

type Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]  # a program, and what it is called with


class ArrayType(NamedTuple):
    """What programs tell arrays apart by, but for where they are."""

    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool

    @classmethod
    def of(cls, array: Any) -> ArrayType:
        return cls(array.shape, array.dtype, getattr(array, "weak_type", False))


@dataclasses.dataclass(frozen=True)
class KeptProgram:
    """A program that was found.

    Attributes:
      out_tree, out_types: of its results.
      load: gives it as `jax.stages.Compiled`, to be called without the static arguments. Takes a while, in any thread.
    """

    out_tree: Any
    out_types: Sequence[ArrayType]
    load: Callable[[], jax.stages.Compiled]


class KeptPrograms:
    """The programs of one kind of process: of its source, versions, settings and devices.

    Attributes:
      root: has a directory for each kind.
      directory: where those of this kind are; it may not exist yet.
    """

    def __init__(self, directory: Path, mesh: Mesh) -> None:
        self.root, self._devices = directory, list(mesh.devices.flat)
        self.directory = directory / _digest(_kind_of_process(mesh))

    @classmethod
    def of(cls, mesh: Mesh) -> KeptPrograms | None:
        """Beside the programs that JAX keeps. None: it keeps none on this host, or several processes have the devices,
        or these are CPUs: what JAX loaded from disk cannot be written again there, and tracing takes little."""
        directory, platform = jax.config.jax_compilation_cache_dir, mesh.devices.flat[0].platform
        if directory is None or "://" in directory or not jax.config.jax_enable_compilation_cache:
            return None
        if platform == "cpu" or jax.process_count() > 1:
            return None
        return cls(Path(directory) / "programs", mesh)

    @property
    def may_keep(self) -> bool:
        """Whether this process may write to the directory, or make it. A disk may be full all the same."""
        above = next(each for each in (self.directory, *self.directory.absolute().parents) if os.path.exists(each))
        return os.access(above, os.W_OK | os.X_OK) and os.path.isdir(above)

    def path(self, call: Call) -> Path | None:
        """Where the program is, or would be, by this thread's precision of products. None: something of the call has no
        name that another process knows."""
        program, args, options = call
        leaves, tree = jax.tree.flatten(args)
        name, static = _name_of(program), _described(options)
        about = [name, static, str(tree), *map(_described, leaves), str(jax.config.jax_default_matmul_precision)]
        if any(each is None or " at 0x" in each for each in about):
            return None
        return self.directory / _digest(about)

    def find(self, path: Path, args: tuple[Any, ...]) -> KeptProgram | None:
        """The program that is kept there, if there is one that this process may read; with the arguments that it is
        called with."""
        if not os.access(path, os.R_OK):
            return None
        self._use()
        try:
            (out_tree, out_types), executable = pickle.loads(path.read_bytes())
            tree = jax.tree.structure((args, {})), out_tree
            return KeptProgram(out_tree, out_types, functools.partial(self._load, path, executable, *tree))
        except Exception as error:
            self._drop(path, error)
            return None

    def keep(self, path: Path, compiled: jax.stages.Compiled, out_types: Sequence[ArrayType]) -> None:
        """Write a program to disk. What cannot be kept is compiled by the next process again."""
        try:
            executable, _, out_tree = serialize_executable.serialize(compiled)
            self._write(path, pickle.dumps(((out_tree, list(out_types)), zlib.compress(executable, 1))))
        except Exception as error:
            log.info("a program cannot be kept: %s", error)

    def _load(self, path: Path, executable: bytes, in_tree: Any, out_tree: Any) -> jax.stages.Compiled:
        try:
            trees, devices = (in_tree, out_tree), (self._devices[0].client, self._devices)
            loaded = serialize_executable.deserialize_and_load(zlib.decompress(executable), *trees, *devices)
        except Exception as error:
            self._drop(path, error)
            raise
        count_loaded()
        return loaded

    def _drop(self, path: Path, error: Exception) -> None:
        log.warning("%s is of no use (%s); the program is compiled anew", path, error)
        with contextlib.suppress(OSError):  # others may have the directory
            path.unlink()

    def _use(self) -> None:
        """Say that this kind is in use, if this process may: the kinds that were used longest ago are removed."""
        with contextlib.suppress(OSError):
            os.utime(self.directory)

    def _write(self, path: Path, content: bytes) -> None:
        if not self.directory.is_dir():
            self._make_room()
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=self.directory, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except BaseException:  # as on a full disk
                os.unlink(file.name)
                raise

    def _make_room(self) -> None:
        """Remove the kinds that were used longest ago."""
        kinds = sorted(self.directory.parent.glob("*"), key=lambda kind: kind.stat().st_mtime, reverse=True)
        for kind in kinds[_MOST_KINDS - 1 :]:
            shutil.rmtree(kind, ignore_errors=True)


def _described(value: Any) -> str | None:
    """A text that is the same in each process for what programs do not tell apart. None: there is none."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{ArrayType.of(value)} {getattr(value, 'sharding', None)}"
    if isinstance(value, dict | tuple):
        return _all_described(value.items() if isinstance(value, dict) else value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = _all_described(getattr(value, field.name) for field in dataclasses.fields(value))
        return fields and type(value).__qualname__ + fields
    return _name_of(value) if hasattr(value, "__qualname__") else repr(value)


def _all_described(values: Iterable[Any]) -> str | None:
    parts = [_described(each) for each in values]
    return None if None in parts else f"({', '.join(filter(None, parts))})"


def _name_of(value: Callable[..., Any]) -> str | None:
    """Where a function of this package is found. Two programs may be of the same function."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if not isinstance(module, types.ModuleType) or module.__name__.partition(".")[0] != _PACKAGE.name:
        return None
    return next((f"{module.__name__}.{name}" for name, found in vars(module).items() if found is value), None)


def _kind_of_process(mesh: Mesh) -> list[str]:
    devices = [f"{device.id} {device.device_kind} {device.client.platform_version}" for device in mesh.devices.flat]
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    versions = [f"{dist.name}-{dist.version}" for dist in metadata.distributions() if dist.name in _PACKAGES]
    telling = [each for each in os.environ if each.startswith(_PREFIXES) and not each.startswith(_WITHOUT_EFFECT)]
    environment = [f"{name}={os.environ[name]}" for name in telling if "CACHE" not in name]
    about = *sorted(versions), *sorted(environment), *devices, str(mesh.axis_names), str(jax.device_count())
    return [_source(), sys.version, repr(sorted(settings.items(), key=str)), *about]


@functools.cache
def _source() -> str:
    """A digest of both packages' files."""
    digest = hashlib.sha256()
    for root in (_PACKAGE, Path(sparsex_kernels.__file__ or "").parent):
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]
