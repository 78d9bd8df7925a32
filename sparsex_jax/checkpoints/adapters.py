"""Reads LoRA adapters as PEFT saves them: a directory with `adapter_config.json` and `adapter_model.safetensors`.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    [rank, inputs]
base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    [outputs, rank]
                 --------------- module --------
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sparsex_jax.checkpoints.adapter_config import ADAPTER_CONFIG, AdapterConfig, read_adapter_config
from sparsex_jax.checkpoints.base import spread_rotary, stored_shape
from sparsex_jax.checkpoints.hub import fetch_files
from sparsex_jax.checkpoints.names import require_name
from sparsex_jax.checkpoints.safetensors_file import open_safetensors
from sparsex_jax.config import ModelConfig
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
from sparsex_jax.errors import UnknownModelError, UnsupportedModelError
from sparsex_jax.model.adapters import TARGETS, AdapterWeights, Pair
from sparsex_jax.model.weights import describe, leaf_name

log = logging.getLogger(__name__)

_WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_DTYPES = ("BF16", "F16", "F32", "F64")
# Modules of a layer -> the weights that their outputs belong to, one behind another.
_MODULES = {
    "self_attn.q_proj": ("wq",),
    "self_attn.k_proj": ("wk",),
    "self_attn.v_proj": ("wv",),
    "self_attn.o_proj": ("wo",),
    "mlp.gate_proj": ("w_gate",),
    "mlp.up_proj": ("w_up",),
    "mlp.down_proj": ("w_down",),
}
# Phi-3's, each in place of several of the above.
_FUSED = {
    "self_attn.qkv_proj": ("wq", "wk", "wv"),
    "mlp.gate_up_proj": ("w_gate", "w_up"),
}
_KINDS: dict[str, tuple[str, ...]] = _MODULES | _FUSED
# What the layers are called in a model of text, and in old and new files of one that also sees pictures.
_MODELS = ("model.", "language_model.model.", "model.language_model.")
_TENSOR = re.compile(
    rf"base_model\.model\.(?P<model>{'|'.join(map(re.escape, _MODELS))})layers\.(?P<layer>0|[1-9][0-9]{{0,8}})"
    rf"\.(?P<kind>{'|'.join(map(re.escape, _KINDS))})\.lora_[AB]\.weight"
)


def read_adapter(source: str | Path, config: ModelConfig, *, base: str | None = None) -> AdapterWeights:
    """A LoRA adapter for this model.

    Args:
      source: its directory, or a name on the Hugging Face hub, `OWNER/NAME[@REVISION]`, of which two files are fetched.
      base: what the model is called. The log warns where the adapter was trained for one of another name.

    Raises:
      UnknownModelError: there is no such directory or repository, or a file is missing.
      UnsupportedModelError: a file is damaged, the adapter does something that is not implemented, or it does not fit
        the model: the message names the field or the tensor, its value and what may be.
      HubError: the hub cannot be reached and not all is in the cache, or it refuses access.
    """
    folder = _find(source)
    try:
        return _read(folder, config, base)
    except OSError as error:
        raise UnknownModelError(f"{folder} cannot be read: {error}") from error


def _read(folder: Path, config: ModelConfig, base: str | None) -> AdapterWeights:
    said = read_adapter_config(folder / ADAPTER_CONFIG, config)
    _tell_of_base(folder, said.base, base)
    stored = _Stored(_weights_file(folder), config)
    _check_modules(stored, said)
    pairs = _read_pairs(stored, said)
    return AdapterWeights(
        rank=max(pair.a.shape[-1] for pair in pairs.values()),
        pairs=pairs,
        invocation=said.invocation,
        digest=adapter_digest(pairs, said.invocation),
    )


def stated_rank(source: str | Path) -> int:
    """The largest rank that the configuration of an adapter names, before there is a model to read it for. Raises as
    `read_adapter`."""
    path = _find(source) / ADAPTER_CONFIG
    fields = Fields(str(path), read_json(path))
    others = fields.object("rank_pattern")
    return max([fields.count("r"), *(others.count(name) for name in others.values)])


def adapter_digest(pairs: Mapping[str, Pair], invocation: Iterable[int]) -> str:
    """64 hexadecimal digits, from every bit of what an adapter computes with."""
    digest = hashlib.sha256(repr(tuple(invocation)).encode())
    for name, pair in sorted(pairs.items()):
        digest.update(f"{name} {pair.a.shape} {pair.b.shape}".encode())
        for part in pair:
            digest.update(np.ascontiguousarray(part, "<f4").data)
    return digest.hexdigest()


def _find(source: str | Path) -> Path:
    otherwise = "no directory of an adapter"
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, or no home is known
        raise UnknownModelError(f"{str(source)!r:.300} is {otherwise}: {error}") from error
    if exists:
        raise UnknownModelError(f"{str(source)!r} is {otherwise}")
    return fetch_files(require_name(source, otherwise, "OWNER/NAME[@REVISION]"), (ADAPTER_CONFIG, _WEIGHTS))


def _weights_file(folder: Path) -> Path:
    if (folder / _PICKLE).is_file() and not (folder / _WEIGHTS).is_file():
        raise UnsupportedModelError(
            f"{folder} has {_PICKLE}, a pickle, which can run any program when it is read; save it as {_WEIGHTS}"
        )
    return folder / _WEIGHTS


def _tell_of_base(folder: Path, trained: str | None, served: str | None) -> None:
    """Names differ where models do not, such as of a copy or of quantised weights: shapes decide."""
    if trained and served and _last_part(trained) != _last_part(served):
        log.warning("%s was trained for %r; it is used with %r", folder, trained, served)


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


class _Module(NamedTuple):
    """A module of one layer.

    Attributes:
      model: what stands before its layers' names, one of `_MODELS`.
      layer: the layer's number.
      kind: a key of `_KINDS`.
    """

    model: str
    layer: int
    kind: str

    @property
    def name(self) -> str:
        """In the model, such as `model.layers.0.self_attn.q_proj`."""
        return f"{self.model}layers.{self.layer}.{self.kind}"

    def tensor(self, side: str) -> str:
        """The name of its A or B."""
        return f"base_model.model.{self.name}.lora_{side}.weight"


class _Stored:
    """The tensors of an adapter for a model.

    Attributes:
      path: their file.
      num_layers: of the model.
      sizes: the outputs and inputs of each weight that adapters may add to.
      modules: those that tensors are stored of.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Raises UnsupportedModelError if the file is damaged, or has tensors of something else than these modules."""
        self.path, self.num_layers = path, config.num_layers
        self._config, self._file = config, open_safetensors(path)
        self.sizes = _sizes(config)
        self._names = set(self._file.keys())
        found = {name: _TENSOR.fullmatch(name) for name in self._names}
        unread = [name for name, match in found.items() if match is None or not self._has(match["kind"])]
        _refuse_unread(path, unread, [kind for kind in _KINDS if self._has(kind)])
        self.modules = {_Module(each["model"], int(each["layer"]), each["kind"]) for each in found.values() if each}

    def every_module(self) -> set[_Module]:
        """All modules that an adapter of the model may act on. Those that are stored tell whether some are fused."""
        fused = {module.kind for module in self.modules} & _FUSED.keys()
        within = {weight for kind in fused for weight in _FUSED[kind]}
        kinds = [*fused, *(kind for kind, weights in _MODULES.items() if self._has(kind) and weights[0] not in within)]
        model = min((module.model for module in self.modules), default=_MODELS[0])
        return {_Module(model, layer, kind) for layer in range(self.num_layers) for kind in kinds}

    def read(self, module: _Module, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """A of `[rank, inputs]` and B of `[outputs, rank]`. Raises UnsupportedModelError if one is missing or wrong."""
        weights = _KINDS[module.kind]
        outputs, inputs = sum(self.sizes[name][0] for name in weights), self.sizes[weights[0]][1]
        return self._tensor(module.tensor("A"), (rank, inputs)), self._tensor(module.tensor("B"), (outputs, rank))

    def by_weight(self, module: _Module, b: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """B's rows of each weight whose outputs the module computes, in this package's order."""
        first = 0
        for name in _KINDS[module.kind]:
            rows = b[first : first + self.sizes[name][0]]
            first += len(rows)
            yield name, spread_rotary(name, rows, self._config)

    def _has(self, kind: str) -> bool:
        """Whether the model has the weights of such modules; one with experts has no MLP."""
        return set(_KINDS[kind]) <= self.sizes.keys()

    def _tensor(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        if name not in self._names:
            raise UnsupportedModelError(f"{self.path} has no tensor {name!r}")
        stored = self._file.get_slice(name)
        if stored.get_dtype() not in _DTYPES:
            said = f"{name} has elements of type {stored.get_dtype()}; read are {', '.join(_DTYPES)}"
            raise UnsupportedModelError(f"{self.path}: {said}")
        if tuple(stored.get_shape()) != shape:
            raise UnsupportedModelError(
                f"{self.path}: {name} is stored as {tuple(stored.get_shape())}; the model and the rank in "
                f"{ADAPTER_CONFIG} need {shape}"
            )
        return self._file.get_tensor(name).astype(np.float32)


def _sizes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Outputs and inputs of the weights of a layer that adapters may add to, as far as the model has them."""
    weights = {leaf_name(path)[-1]: weight for path, weight in jax.tree.leaves_with_path(describe(config))}
    return {name: stored_shape(name, weights[name]) for name in TARGETS if name in weights}


def _refuse_unread(path: Path, names: Collection[str], kinds: Iterable[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UnsupportedModelError(
            f"{path} has tensors that are not read: {', '.join(sorted(names)[:3])}{more}. Read are lora_A.weight and "
            f"lora_B.weight of these modules in the model's layers: {', '.join(kinds)}"
        )


_OUTSIDE = ("model.embed_tokens", "lm_head")  # what a model has beside its layers, as PEFT names it


def _check_modules(stored: _Stored, said: AdapterConfig) -> None:
    """Refuse an adapter whose tensors are not those of the modules that its configuration selects."""
    every = stored.every_module()
    selected = {module for module in every if said.selects(module.name)}
    _refuse_modules(
        stored, stored.modules - every, f"the model has no such module in its layers 0 to {stored.num_layers - 1}"
    )
    _refuse_modules(stored, stored.modules - selected, f"{ADAPTER_CONFIG} does not select them")
    if selected - stored.modules:
        missing = min(selected - stored.modules)
        raise UnsupportedModelError(f"{stored.path} has no tensors of {missing.name}, which {ADAPTER_CONFIG} selects")
    outside = [name for name in _OUTSIDE if said.targets is not None and said.selects(name)]
    if outside:
        said.fields.refuse("target_modules", f"selects {outside[0]}; adapters are read for modules of the layers")
    if not selected:
        said.fields.refuse("target_modules", f"selects none of the model's modules, such as {min(every).name}")


def _refuse_modules(stored: _Stored, modules: Collection[_Module], why: str) -> None:
    if modules:
        raise UnsupportedModelError(f"{stored.path} has tensors of {min(modules).name}: {why}")


def _read_pairs(stored: _Stored, said: AdapterConfig) -> dict[str, Pair]:
    """What is added to each weight."""
    found: dict[str, dict[int, Pair]] = {}
    for module in sorted(stored.modules):
        a, b = stored.read(module, said.rank(module.name))
        with np.errstate(over="ignore", invalid="ignore"):
            b = b * np.float32(said.scale(module.name))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UnsupportedModelError(f"{stored.path}: A or scaled B of {module.name} has NaN or infinities")
        for name, rows in stored.by_weight(module, b):
            found.setdefault(name, {})[module.layer] = Pair(a.T, rows.T)
    return {name: _stacked(found[name], stored.num_layers) for name in TARGETS if name in found}


def _stacked(layers: Mapping[int, Pair], number: int) -> Pair:
    """All layers as one, with zeros for those that have none and behind smaller ranks."""
    rank = max(pair.a.shape[1] for pair in layers.values())
    inputs, outputs = (next(iter(layers.values())).a.shape[0], next(iter(layers.values())).b.shape[1])
    a, b = np.zeros((number, inputs, rank), np.float32), np.zeros((number, rank, outputs), np.float32)
    for layer, pair in layers.items():
        a[layer, :, : pair.a.shape[1]], b[layer, : pair.b.shape[0]] = pair
    return Pair(a, b)
