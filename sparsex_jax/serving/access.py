"""Who may ask: API keys, the namespaces they are bound to, and how much each may ask at once.

A namespace of the store is derived from the key's namespace and the request's `cache_salt` by a hash over both,
so no choice of a salt leads into another key's namespace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.cache import Entry
from sparsex_jax.errors import InvalidRequestError, SparsexError

_NUMBERS = {"max_concurrent": 1, "max_knowledge_tokens": 0}  # and the least each may be
_FIELDS = {"key": str, "sha256": str, "namespace": str, **dict.fromkeys(_NUMBERS, int), "metrics": bool}


class UnauthorizedError(SparsexError):
    """No API key, or one that nobody has."""


class ForbiddenError(SparsexError):
    """The API key is known, but not for this."""


class ConcurrencyError(SparsexError):
    """The key has as many requests under way as it may."""


class QuotaError(SparsexError):
    """The key keeps as much knowledge as it may."""


class Quota:
    """How much frozen knowledge a key keeps. For the loop's thread, where it comes and goes."""

    def __init__(self, most: int | None) -> None:
        """
        Args:
          most: tokens; None: as much as the store holds.
        """
        self._most = most
        self._handles: set[int] = set()

    def require(self, num_tokens: int, entries: Iterable[Entry]) -> None:
        """Raises QuotaError if the key may not keep so many tokens more.

        Args:
          entries: all that are in the store. What was deleted or evicted counts no more.
        """
        own = {entry.handle: entry.num_tokens for entry in entries if entry.handle in self._handles}
        self._handles = set(own)
        kept = sum(own.values())
        if self._most is not None and kept + num_tokens > self._most:
            raise QuotaError(
                f"text has {num_tokens} tokens, and this key keeps {kept} already: together {kept + num_tokens}, and "
                f"max_knowledge_tokens={self._most} is its limit"
            )

    def add(self, handle: int) -> None:
        self._handles.add(handle)


class Tenant:
    """The holder of a key, or everybody where the server has no keys.

    Attributes:
      name: of the key, for people to read.
      namespace: what it is bound to; keys of the same namespace share what is stored.
      max_concurrent: requests it may have under way at once.
      metrics: whether it may see the figures of the whole server.
      knowledge: how much it keeps.
    """

    def __init__(
        self, name: str, namespace: str, max_concurrent: int, metrics: bool, max_knowledge_tokens: int | None
    ) -> None:
        self.name, self.namespace, self.max_concurrent, self.metrics = name, namespace, max_concurrent, metrics
        self.knowledge = Quota(max_knowledge_tokens)
        self._running = 0

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the places for running requests. Raises ConcurrencyError if all are taken."""
        if self._running >= self.max_concurrent:
            raise ConcurrencyError(
                f"{self._running} requests of this key are under way; max_concurrent={self.max_concurrent} is its limit"
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def store_namespace(self, salt: str | None) -> str:
        """The namespace in the store. JSON keeps the two parts apart, whatever characters they have."""
        return hashlib.sha256(json.dumps([self.namespace, salt]).encode()).hexdigest()


class Access:
    """The tenants by the digests of their keys. Keys themselves are not kept."""

    def __init__(self, tenants: Mapping[str, Tenant], everybody: Tenant | None) -> None:
        self._tenants, self._everybody = dict(tenants), everybody

    @classmethod
    def open(cls, limits: Limits) -> Access:
        """No keys: everybody is one tenant."""
        everybody = Tenant("everybody", "", limits.max_concurrent, True, limits.max_knowledge_tokens)
        return cls({}, everybody)

    @classmethod
    def load(cls, path: Path, limits: Limits) -> Access:
        """Read a TOML file with a table for each key:

            [alice]
            key = "sk-..."          # or sha256 = "...", the hex digest of the key
            namespace = "research"  # optional; by default the table's name
            max_concurrent = 4      # optional
            max_knowledge_tokens = 100_000  # optional; 0: it may keep none
            metrics = true          # optional: may read /metrics

        Args:
          limits: for entries that say nothing else.

        Raises InvalidRequestError: no such file, no TOML, or an entry is wrong.
        """
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"{path} cannot be read as TOML: {error}") from error
        tenants: dict[str, Tenant] = {}
        for name, entry in raw.items():
            digest = _checked_digest(f"{path}: [{name}]", entry)
            if digest in tenants:
                raise InvalidRequestError(f"{path}: [{name}] has the same key as [{tenants[digest].name}]")
            concurrent, knowledge = (entry.get(field, getattr(limits, field)) for field in _NUMBERS)
            namespace, metrics = entry.get("namespace", name), entry.get("metrics", False)
            tenants[digest] = Tenant(name, namespace, concurrent, metrics, knowledge)
        if not tenants:
            raise InvalidRequestError(f"{path} has no keys; it must have a table for each")
        return cls(tenants, None)

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose request it is, from its `Authorization` header. Raises UnauthorizedError."""
        if self._everybody is not None:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError("an API key is needed: Authorization: Bearer KEY")
        # Looked up by digest, so the time it takes says nothing about the keys there are.
        tenant = self._tenants.get(_digest(key.strip()))
        if tenant is None:
            raise UnauthorizedError("the API key is not known")
        return tenant


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _checked_digest(where: str, entry: Any) -> str:
    """The digest of an entry's key, if the entry is right."""
    if not isinstance(entry, dict):
        raise InvalidRequestError(f"{where} must be a table")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise InvalidRequestError(f"{where}: {name!r} is unknown; there are: {', '.join(_FIELDS)}")
        if type(value) is not _FIELDS[name] or value == "":
            raise InvalidRequestError(f"{where}: {name}={value!r} must be a {_FIELDS[name].__name__}, not empty")
    for name, least in _NUMBERS.items():
        if entry.get(name, least) < least:
            raise InvalidRequestError(f"{where}: {name}={entry[name]} must be at least {least}")
    if ("key" in entry) == ("sha256" in entry):
        raise InvalidRequestError(f"{where} must have either key or sha256")
    return entry["sha256"].lower() if "sha256" in entry else _digest(entry["key"])


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask.

    Attributes:
      max_body_bytes: of a request's body.
      max_tokens: new tokens of an answer.
      default_tokens: new tokens of a chat's answer that names no number, if the context has room for them.
      max_prompts: prompts of one completion request.
      max_concurrent: requests that a key may have under way, where its entry says nothing else.
      max_knowledge_tokens: of frozen knowledge that a key may keep, where its entry says nothing else. None: as much as
        the store holds.
      request_timeout: seconds until a request is given up.
      drain_timeout: seconds that running requests get when the server is told to stop.
    """

    max_body_bytes: int = 4 << 20
    max_tokens: int = 4096
    default_tokens: int = 1024
    max_prompts: int = 32
    max_concurrent: int = 64
    max_knowledge_tokens: int | None = None
    request_timeout: float = 300.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise InvalidRequestError(f"{field.name}={value!r} must be more than 0")
