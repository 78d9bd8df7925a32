"""Configuration as frozen dataclasses, checked where it is made."""

from sparsex_jax.config.calibration import CALIBRATED, architecture
from sparsex_jax.config.defaults import Defaults, find_defaults
from sparsex_jax.config.engine import EngineConfig
from sparsex_jax.config.model import ModelConfig, config_dir, named_config
from sparsex_jax.config.pins import Pin
from sparsex_jax.config.reuse import METHODS, ReuseConfig, find_method, methods_by_option
from sparsex_jax.config.rounds import Round
from sparsex_jax.config.sampling import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from sparsex_jax.config.structure import Behind, Lazy, Structure

__all__ = [
    "CALIBRATED",
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "METHODS",
    "Behind",
    "Defaults",
    "EngineConfig",
    "Lazy",
    "ModelConfig",
    "Pin",
    "ReuseConfig",
    "Round",
    "SamplingParams",
    "Structure",
    "architecture",
    "config_dir",
    "find_defaults",
    "find_method",
    "methods_by_option",
    "named_config",
]
