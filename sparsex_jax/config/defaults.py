"""The default reuse of a model: from a file beside it, from a calibration in this package, or the built-in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config.calibration import CALIBRATED, Calibrated, shipped_for
from sparsex_jax.config.model import ModelConfig
from sparsex_jax.config.reuse import ReuseConfig


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a request does that does not say how it reuses KV.

    Attributes:
      reuse: the method and its options.
      origin: where they are from, for people to read.
    """

    reuse: ReuseConfig
    origin: str

    def __str__(self) -> str:
        return f"Reuse by default: {self.reuse.spec()} ({self.origin})"


def find_defaults(
    source: str | Path,
    model: ModelConfig,
    reuse: ReuseConfig | str | Path | None = None,
    *,
    company: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Defaults:
    """How a model's KV is reused where a request does not say: as given, or as the file says whose path is given.

    None takes the file `sparsex.json` in the model's directory. If there is none, it takes the calibration that comes
    with this package for a model of the same architecture; for other models, the built-in defaults.

    Args:
      source: the model, as for `open_checkpoint`.
      company: whether the engine makes donors in company (`EngineConfig.company_tokens`). A file may have other options
        for these, which would not hold for donors that are made alone.
      options: a method, or options, that win over what was found, as in `ReuseConfig.updated`.

    Raises:
      InvalidRequestError: a file cannot be read or is another model's, or what it says is wrong, or the options are.
    """
    found = _found(source, model, reuse, company)
    if not options:
        return found
    return Defaults(found.reuse.updated(**options), f"as given, on top of {found.reuse.spec()}, {found.origin}")


def _found(source: str | Path, model: ModelConfig, reuse: ReuseConfig | str | Path | None, company: bool) -> Defaults:
    if isinstance(reuse, ReuseConfig):
        return Defaults(reuse, "as given")
    beside = Path(source).expanduser() / CALIBRATED
    path = reuse or (beside if beside.is_file() else None)
    found = Calibrated.read(Path(path)) if path else shipped_for(model, Path(source).name)
    if found is None:
        return Defaults(ReuseConfig("excerpt"), "built in; no calibration of this model is known")
    return Defaults(ReuseConfig.load(found.path, model, company=company), found.origin(company=company))
