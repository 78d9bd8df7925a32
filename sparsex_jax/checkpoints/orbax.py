"""Converted checkpoints: a configuration, and weights of which each device reads only its own shards.

config.json   {"format": "sparsex-jax", "config": {the fields of ModelConfig}}
params/       the weights, written by orbax as nested dictionaries with the names of `Params` and `Layers`
tokenizer/    as transformers saves it; absent where the source had none
generation_config.json   the defaults of sampling; absent where the source had none
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sparsex_jax.checkpoints.base import Checkpoint
from sparsex_jax.config import ModelConfig
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
from sparsex_jax.config.generation import GENERATION_CONFIG, read_generation_config
from sparsex_jax.errors import InvalidRequestError, UnknownModelError, UnsupportedModelError
from sparsex_jax.model.matrices import quantise_params
from sparsex_jax.model.weights import Params, abstract_params, leaf_name
from sparsex_jax.text.tokenizer import read_tokenizer

_FORMAT = "sparsex-jax"


class OrbaxCheckpoint(Checkpoint):
    """A directory written by `save_checkpoint`.

    Raises:
      UnknownModelError: `config.json` or `params` is missing.
      UnsupportedModelError: the configuration has fields that are wrong or that this version does not know.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()  # orbax takes no relative path
        path = directory / "config.json"
        self.config = _config_from_json(Fields(str(path), read_json(path)))
        if not (directory / "params").is_dir():
            raise UnknownModelError(f"{directory} has no params: the conversion was interrupted or it is damaged")

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        return read_tokenizer(self.directory / "tokenizer")

    @property
    def dtype(self) -> str | None:
        dtypes = {str(jnp.dtype(leaf.dtype)) for leaf in self._stored().values()}
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def sampling(self) -> Mapping[str, Any]:
        return read_generation_config(self.directory)

    def load_params(self, dtype: str, mesh: Mesh, quantization: str = "none") -> Params:
        params = self._load_floats(dtype, mesh)
        return (
            params if quantization in ("none", "stored") else quantise_params(self.config, params, quantization, mesh)
        )

    def _load_floats(self, dtype: str, mesh: Mesh) -> Params:
        import orbax.checkpoint as ocp

        target = abstract_params(self.config, dtype, mesh)
        self._check(target)
        with self._readable(), ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(self.directory / "params", _as_dicts(target))
        return _from_dicts(restored, target)

    def _stored(self) -> dict[tuple[str, ...], Any]:
        """What is known of each stored array, such as its shape, by the fields that lead to it."""
        import orbax.checkpoint as ocp

        with self._readable(), ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(self.directory / "params").item_metadata
            return flatten_dict(stored.tree)

    def _check(self, target: Params) -> None:
        """Refuse arrays that are missing, have other shapes, or would not be read."""
        stored = {".".join(name): tuple(leaf.shape) for name, leaf in self._stored().items()}
        needed = {".".join(leaf_name(path)): leaf.shape for path, leaf in jax.tree.leaves_with_path(target)}
        for name in sorted(stored.keys() | needed.keys()):
            if stored.get(name) != needed.get(name):
                raise UnsupportedModelError(
                    f"{self.directory}: {name} is stored as {stored.get(name)}; "
                    f"the configuration needs {needed.get(name)}"
                )

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Orbax raises errors of many types for files that are missing or damaged."""
        try:
            yield
        except Exception as error:
            raise UnsupportedModelError(f"{self.directory / 'params'} cannot be read: {error}") from error


def _as_dicts(params: Params) -> dict[str, Any]:
    """The tree that is on disk. It has no entry for a weight that the model lacks."""
    return unflatten_dict({leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)})


def _from_dicts(tree: dict[str, Any], like: Params) -> Params:
    leaves = flatten_dict(tree)
    return jax.tree.map_with_path(lambda path, _: leaves[leaf_name(path)], like)


def is_converted(raw: Mapping[str, Any]) -> bool:
    """Whether `save_checkpoint` wrote this `config.json`, and not transformers."""
    return raw.get("format") == _FORMAT


def check_target(path: Path) -> None:
    """Refuse a target that would be overwritten, or cannot be made.

    Raises:
      InvalidRequestError: the path is a file or a directory that is not empty, or what is above it ends at something
        in which no directory can be made.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InvalidRequestError(f"target={str(path)!r} exists and is not an empty directory; nothing is overwritten")
    above = next(each for each in path.absolute().parents if each.exists())
    try:
        os.rmdir(tempfile.mkdtemp(dir=above))
    except OSError as error:
        raise InvalidRequestError(f"target={str(path)!r} cannot be made in '{above}': {error.strerror}") from error


def save_checkpoint(
    path: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Any | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `OrbaxCheckpoint` opens.

    An interrupted write leaves nothing that can be opened: everything goes to a directory beside the target, which is
    renamed at the end, and `config.json`, which every checkpoint needs, is written last.

    Args:
      params: the weights; sharded arrays are written shard by shard.
      sampling: as `Checkpoint.sampling`.

    Raises:
      InvalidRequestError: the target exists and is not an empty directory, or it cannot be written.
    """
    target = Path(path).absolute()
    check_target(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write(partial, config, params, tokenizer, sampling or {})
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise InvalidRequestError(f"target={str(path)!r} cannot be written: {error}") from error
        raise


def _write(
    directory: Path, config: ModelConfig, params: Params, tokenizer: Any | None, sampling: Mapping[str, Any]
) -> None:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:  # it writes in the background; the end of the block waits for it
        checkpointer.save(directory / "params", _as_dicts(params))
    if tokenizer is not None:
        tokenizer.save_pretrained(directory / "tokenizer")
    if sampling:
        (directory / GENERATION_CONFIG).write_text(json.dumps(dict(sampling), indent=2) + "\n")
    record = {"format": _FORMAT, "config": dataclasses.asdict(config)}
    (directory / "config.json").write_text(json.dumps(record, indent=2) + "\n")


def _config_from_json(fields: Fields) -> ModelConfig:
    values = dict(fields.object("config").values)
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}  # JSON has no tuples
    known = dataclasses.fields(ModelConfig)
    unknown = sorted(values.keys() - {field.name for field in known})
    if unknown:
        raise UnsupportedModelError(f"config.json has fields that this version does not know: {', '.join(unknown)}")
    missing = [each.name for each in known if each.default is dataclasses.MISSING and each.name not in values]
    if missing:
        raise UnsupportedModelError(f"{fields.where} has no {', '.join(missing)} in config, which is needed")
    return ModelConfig(**values)
