"""Reads PEFT's `adapter_config.json`: which modules an adapter acts on, with which rank and scale, from which token on.

The fields and what they mean are those of `peft.LoraConfig`, version 0.21. A field that is not read here is refused by
its name, unless it says nothing (null, false, empty) or is about training alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.config import ModelConfig
from sparsex_jax.config.checks import is_int
from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
_READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern", "bias"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("alora_invocation_tokens", "init_lora_weights"),
}
# They change how an adapter is trained or loaded, and not what it computes. The configurations of initialisations are
# among them, since PEFT reads them only where `init_lora_weights` asks for it.
_NO_MATTER = {
    *("auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "runtime_config", "megatron_core"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
}
_WHY = {
    "use_dora": "DoRA divides each output by the norm of the sum of both weights",
    "lora_bias": "biases are not added",
    "modules_to_save": "modules that are trained as a whole replace the model's own",
    "trainable_token_indices": "embeddings are not changed",
    "target_parameters": "experts are not adapted",
    "layer_replication": "the model's layers are not repeated",
    "fan_in_fan_out": "the weights of this decoder's modules are stored as (outputs, inputs)",
    "use_qalora": "inputs are not pooled",
    "use_bdlora": "no matrix is diagonal in blocks",
    "kasa_config": "KaSA changes the model's own weights",
    "arrow_config": "tokens are not routed between adapters",
    "monteclora_config": "weights are not sampled",
    "megatron_config": "Megatron's layers are not read",
}
# Initialisations that leave the model's own weights alone. PEFT repeats the others' changes to them at each loading.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What the file says. Modules are named as in the model, such as `model.layers.0.self_attn.q_proj`.

    Attributes:
      fields: those of the file.
      ranks, alphas: patterns of modules' names, and their values in place of `r` and `lora_alpha`. The first that fits
        counts.
      targets, excluded: names or ends of names of modules, or one pattern for whole names.
      layers: the only ones that `targets` counts for. None: all.
      layers_names: patterns of the word before a layer's number in a module's name; none: any word.
      invocation: as in `AdapterWeights`.
      base: the model that the adapter was trained for, if it says so.
    """

    fields: Fields
    ranks: Mapping[re.Pattern[str], int]
    alphas: Mapping[re.Pattern[str], float]
    targets: re.Pattern[str] | tuple[str, ...] | None  # None: every linear module of the layers
    excluded: re.Pattern[str] | tuple[str, ...]
    layers: frozenset[int] | None
    layers_names: tuple[re.Pattern[str], ...]
    invocation: tuple[int, ...]
    base: str | None

    def selects(self, module: str) -> bool:
        """Whether the adapter acts on a module of the model."""
        if _is_named(module, self.excluded):
            return False
        if self.targets is None or (isinstance(self.targets, tuple) and module in self.targets):
            return True  # a whole name counts in any layer
        return _is_named(module, self.targets) and self._has_layer(module)

    def rank(self, module: str) -> int:
        return next((rank for key, rank in self.ranks.items() if key.match(module)), self.fields.count("r"))

    def scale(self, module: str) -> float:
        """What B of the module is multiplied with."""
        alpha = next((alpha for key, alpha in self.alphas.items() if key.match(module)), None)
        rank = self.rank(module)
        alpha = self.fields.number("lora_alpha") if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.fields.flag("use_rslora") else rank)

    def _has_layer(self, module: str) -> bool:
        if self.layers is None:
            return True
        found = next((match for pattern in self.layers_names if (match := pattern.match(module))), None)
        return found is not None and int(found["layer"]) in self.layers


def read_adapter_config(path: Path, model: ModelConfig) -> AdapterConfig:
    """The configuration of a LoRA adapter for this model.

    Raises:
      UnknownModelError: there is no such file.
      UnsupportedModelError: it is damaged, or a field has a value that is wrong or would change an answer in a way that
        is not implemented. The message names the field, its value and what may be.
    """
    fields = Fields(str(path), read_json(path))
    _refuse_other_methods(fields)
    _refuse_unread(fields)
    config = AdapterConfig(
        fields=fields,
        ranks=_patterns(fields, "rank_pattern", Fields.count),
        alphas=_patterns(fields, "alpha_pattern", Fields.number),
        targets=_targets(fields),
        excluded=_names(fields, "exclude_modules", ()),
        layers=_layers(fields, model.num_layers),
        layers_names=_layers_names(fields),
        invocation=_invocation(fields, model.vocab_size),
        base=fields.text("base_model_name_or_path"),
    )
    _check_numbers(config)
    return config


def _refuse_other_methods(fields: Fields) -> None:
    if fields.get("peft_type") != "LORA":
        fields.refuse("peft_type", "is not supported; supported: LORA")
    if fields.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        fields.refuse("task_type", "is not supported; supported: CAUSAL_LM")
    if fields.get("bias", "none") != "none":
        fields.refuse("bias", "is not supported; supported: none")
    start = fields.get("init_lora_weights", True)
    if not isinstance(start, (bool, str)) or start not in _PLAIN_STARTS:
        known = ", ".join(map(str, _PLAIN_STARTS)).lower()
        fields.refuse("init_lora_weights", f"may change the model's own weights; supported: {known}")


def _refuse_unread(fields: Fields) -> None:
    for name, value in fields.values.items():
        if name in _READ | _NO_MATTER or value is None or value is False or value in ([], {}, ""):
            continue
        fields.refuse(name, f"is not supported: {_WHY.get(name, 'the field is not known here')}")


def _check_numbers(config: AdapterConfig) -> None:
    """Refuse numbers that are needed later, and an alpha that is too large for a float."""
    config.fields.count("r")
    config.fields.flag("use_rslora")
    for alpha in (config.fields.number("lora_alpha"), *config.alphas.values()):
        if not math.isfinite(alpha):
            config.fields.refuse("lora_alpha", "or a value of alpha_pattern is too large for a number of 64 bits")


def _patterns(fields: Fields, name: str, read: Any) -> dict[re.Pattern[str], Any]:
    """The values of an object by its keys, which are patterns of the ends of modules' names."""
    values = fields.object(name)
    return {_compiled(fields, name, rf"(.*\.)?({key})$"): read(values, key) for key in values.values}


def _targets(fields: Fields) -> re.Pattern[str] | tuple[str, ...] | None:
    found = _names(fields, "target_modules", None)
    if not found:
        fields.refuse("target_modules", "must be a list of modules' names, a pattern, or all-linear")
    named = fields.values["target_modules"]
    return None if isinstance(named, str) and named.lower() == _ALL_LINEAR else found


def _names(fields: Fields, name: str, default: Any) -> Any:
    """A list of names, or a pattern."""
    value = fields.get(name)
    if value is None or value == []:
        return default
    if isinstance(value, str):
        return _compiled(fields, name, value)
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        fields.refuse(name, "must be a list of names, or a pattern as text")
    return tuple(value)


def _compiled(fields: Fields, name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        fields.refuse(name, f"has no regular expression in {pattern[:60]!r}: {error}")


def _is_named(module: str, names: re.Pattern[str] | Sequence[str]) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layers(fields: Fields, number: int) -> frozenset[int] | None:
    value = fields.get("layers_to_transform")
    if value is None or value == []:
        return None
    layers = value if isinstance(value, list) else [value]
    if not all(is_int(layer) and 0 <= layer < number for layer in layers):
        fields.refuse("layers_to_transform", f"must be layers of the model, from 0 to {number - 1}")
    if isinstance(fields.get("target_modules"), str):
        fields.refuse("layers_to_transform", "needs a list of names as target_modules, which is text")
    return frozenset(layers)


def _layers_names(fields: Fields) -> tuple[re.Pattern[str], ...]:
    """Patterns of a module's name up to its first number, which is the layer's."""
    names = _names(fields, "layers_pattern", ())
    words = (names.pattern,) if isinstance(names, re.Pattern) else names
    words = tuple(word for word in words if word)
    if not words:
        return (re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\."),)
    return tuple(_compiled(fields, "layers_pattern", rf"(?:^|.*?\.)(?:{word})\.(?P<layer>\d+)\.") for word in words)


def _invocation(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """No ids if it acts on all tokens. An empty list is refused: by PEFT an adapter that has one never acts."""
    ids = fields.get("alora_invocation_tokens")
    if ids is None:
        return ()
    if not isinstance(ids, list) or not ids or not all(is_int(id_) and 0 <= id_ < vocab_size for id_ in ids):
        fields.refuse("alora_invocation_tokens", f"must be a list of token ids from 0 to {vocab_size - 1}, or null")
    return tuple(ids)
