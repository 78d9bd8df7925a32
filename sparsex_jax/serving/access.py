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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.errors import InvalidRequestError, SparsexError

_FIELDS = {"key": str, "sha256": str, "namespace": str, "max_concurrent": int, "metrics": bool}


class UnauthorizedError(SparsexError):
    """No API key, or one that nobody has."""


class ForbiddenError(SparsexError):
    """The API key is known, but not for this."""


class ConcurrencyError(SparsexError):
    """The key has as many requests under way as it may."""


class Tenant:
    """The holder of a key, or everybody where the server has no keys.

    Attributes:
      name: of the key, for people to read.
      namespace: what it is bound to; keys of the same namespace share what is stored.
      max_concurrent: requests it may have under way at once.
      metrics: whether it may see the figures of the whole server.
    """

    def __init__(self, name: str, namespace: str, max_concurrent: int, metrics: bool) -> None:
        self.name, self.namespace, self.max_concurrent, self.metrics = name, namespace, max_concurrent, metrics
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
    def open(cls, max_concurrent: int) -> Access:
        """No keys: everybody is one tenant."""
        return cls({}, Tenant("everybody", "", max_concurrent, metrics=True))

    @classmethod
    def load(cls, path: Path, max_concurrent: int) -> Access:
        """Read a TOML file with a table for each key:

            [alice]
            key = "sk-..."          # or sha256 = "...", the hex digest of the key
            namespace = "research"  # optional; by default the table's name
            max_concurrent = 4      # optional
            metrics = true          # optional: may read /metrics

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
            limit = entry.get("max_concurrent", max_concurrent)
            tenants[digest] = Tenant(name, entry.get("namespace", name), limit, entry.get("metrics", False))
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
    if entry.get("max_concurrent", 1) < 1:
        raise InvalidRequestError(f"{where}: max_concurrent={entry['max_concurrent']} must be at least 1")
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
      request_timeout: seconds until a request is given up.
      drain_timeout: seconds that running requests get when the server is told to stop.
    """

    max_body_bytes: int = 4 << 20
    max_tokens: int = 4096
    default_tokens: int = 1024
    max_prompts: int = 32
    max_concurrent: int = 64
    request_timeout: float = 300.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise InvalidRequestError(f"{field.name}={value!r} must be more than 0")
