"""What a model's authors recommend for sampling, from `generation_config.json` or a GGUF file's metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.files import read_json
from sparsex_jax.config.sampling import SamplingParams
from sparsex_jax.errors import InvalidRequestError, UnsupportedModelError

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
GENERATION_CONFIGS = ("auto", "none")  # whether what a model's files recommend is the default of requests
# The fields that are applied, as vLLM does, which have the same names in `SamplingParams`.
_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Other fields of sampling, which are not applied. A log says so where one has another value than these.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    **dict.fromkeys(("max_new_tokens", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"), ()),
    **dict.fromkeys(("penalty_alpha", "forced_eos_token_id", "sequence_bias", "top_h"), ()),
}


def read_generation_config(directory: Path) -> dict[str, Any]:
    """The fields of `SamplingParams` that a directory's `generation_config.json` has; none without such a file.

    Raises:
      UnsupportedModelError: the file is damaged, or a value is outside the field's limits.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return {}
    raw = read_json(path)
    left = [name for name, usual in _NOT_APPLIED.items() if raw.get(name) is not None and raw[name] not in usual]
    if left:
        log.warning("%s: not applied: %s", path, ", ".join(left))
    return checked_sampling(str(path), {name: raw[name] for name in _FIELDS if raw.get(name) is not None})


def checked_sampling(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """These fields of `SamplingParams`; a negative `top_k` keeps all tokens, as 0 does.

    Raises:
      UnsupportedModelError: a value is outside the field's limits.
    """
    fields = {name: max(value, 0) if name == "top_k" and value == -1 else value for name, value in fields.items()}
    try:
        params = SamplingParams(**fields)
    except InvalidRequestError as error:
        raise UnsupportedModelError(f"{where}: {error}") from error
    return {name: getattr(params, name) for name in fields}
