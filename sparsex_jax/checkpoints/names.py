"""Names of models on a hub, and how they are told from paths: `OWNER/NAME[@REVISION][:QUANTISATION]`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from sparsex_jax.errors import UnknownModelError

_SCHEME = "hf://"  # what begins with it is a name, whatever directories there are
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(?P<revision>[^@:\s]+))?(?::(?P<quantisation>[\w.-]+))?", re.ASCII
)
_SUFFIXES = (".gguf", ".safetensors", ".json")


@dataclasses.dataclass(frozen=True)
class HubName:
    """A model on a hub.

    Attributes:
      repo: owner and name, such as `Qwen/Qwen3-8B`.
      revision: a branch, a tag or a commit; None: the default branch.
      quantisation: which of the GGUF models in the repository, such as `q4_k_m`. None: it has one, or none.
    """

    repo: str
    revision: str | None = None
    quantisation: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.quantisation}" if self.quantisation else "")


def model_title(source: str | Path) -> str:
    """What to call a model: the last part of its path, or its name on the hub."""
    name = None if Path(source).expanduser().exists() else as_name(source)
    return Path(source).name if name is None else str(name)


def as_name(source: str | Path) -> HubName | None:
    """The name that a text can be; None if it can only be a path, or neither."""
    text = str(source).removeprefix(_SCHEME)
    found = _NAME.fullmatch(text)
    if isinstance(source, Path) or found is None or text.lower().endswith(_SUFFIXES) or ".." in found["repo"]:
        return None
    return HubName(found["repo"], found["revision"], found["quantisation"])


def require_name(source: str | Path, otherwise: str, form: str = "OWNER/NAME[@REVISION][:QUANTISATION]") -> HubName:
    """The name of a model on the hub, for a text that is no path of something that exists.

    Raises:
      UnknownModelError: it is no name, or as likely a path with a mistake: its first part is a directory here.

    Args:
      otherwise: what the text was no name of, for the message.
      form: how names are written, for the message.
    """
    name = as_name(source)
    if name is None:
        raise UnknownModelError(f"{str(source)!r} is {otherwise}, nor a name on the hub, {form}")
    owner = Path(name.repo.partition("/")[0])
    if owner.is_dir() and not str(source).startswith(_SCHEME):
        raise UnknownModelError(
            f"{str(source)!r} does not exist, though there is a directory {str(owner)!r} here. "
            f"If it is a name on the hub, write {_SCHEME}{name}"
        )
    return name
