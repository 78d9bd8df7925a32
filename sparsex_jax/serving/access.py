"""API keys: the namespace that each is bound to, and the limits of its requests.

The namespace in the store is a hash of the key's namespace and the request's `cache_salt`, so no client can reach
another key's namespace by choosing a salt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.cache import Entry
from sparsex_jax.errors import InvalidRequestError, SparsexError
from sparsex_jax.scheduler.pinning import PinShare

_NUMBERS = {
    "max_concurrent": 1,
    "max_knowledge_tokens": 0,
    "max_pinned_tokens": 0,
}  # fields of an entry, and the least value of each
_FIELDS = {
    "key": str,
    "sha256": str,
    "namespace": str,
    **dict.fromkeys(_NUMBERS, int),
    "metrics": bool,
    "adapters": bool,
}
_WORDS = {str: "a text, not empty", int: "an integer", bool: "true or false"}


class UnauthorizedError(SparsexError):
    """The request has no API key, or an unknown one."""


class ForbiddenError(SparsexError):
    """The API key is known, but does not permit this request."""


class ConcurrencyError(SparsexError):
    """The API key has as many concurrent requests as it may have.

    Attributes:
      retry_after_s: an estimate of the seconds until it may have one more.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuotaError(SparsexError):
    """The API key keeps as much knowledge as it may keep."""


class Quota:
    """How much frozen knowledge a key keeps. For the loop's thread, where it comes and goes."""

    def __init__(self, most: int | None) -> None:
        """
        Args:
          most: tokens; None: as much as the store holds.
        """
        self._most = most
        self._handles: set[int] = set()
        self._reserved = 0  # tokens of texts that are being prefilled

    def reserve(self, num_tokens: int, entries: Iterable[Entry], known: int | None = None) -> None:
        """Count a text that is about to be prefilled. `settle` must follow, whatever becomes of it.

        Args:
          entries: all that are in the store. What was deleted or evicted counts no more.
          known: the handle of the same text, if it is kept already. The key that keeps it may send it again.

        Raises:
          QuotaError: the key's quota does not allow this number of tokens more.
        """
        own = {entry.handle: entry.num_tokens for entry in entries if entry.handle in self._handles}
        self._handles = set(own)
        kept = sum(own.values()) + self._reserved
        if self._most is not None and known not in own and kept + num_tokens > self._most:
            raise QuotaError(
                f"text has {num_tokens} tokens, and this key keeps {kept} already: together {kept + num_tokens}, and "
                f"max_knowledge_tokens={self._most} is its limit"
            )
        self._reserved += num_tokens

    def settle(self, num_tokens: int, handle: int | None) -> None:
        """A text that was reserved for is kept under this handle, or is not kept."""
        self._reserved -= num_tokens
        if handle is not None:
            self._handles.add(handle)


class Tenant:
    """The holder of an API key. If the server has no keys, all clients are one tenant.

    Attributes:
      name: the key's name in the file.
      namespace: keys of the same namespace share what is stored.
      max_concurrent: how many requests it may have at once, each prompt counted. None: as many as the server takes.
      metrics: whether it may read `/metrics`.
      adapters: whether it may load and unload adapters, where the server does that while it runs.
      knowledge: the frozen knowledge that it keeps.
      pins: how much it may pin.
    """

    def __init__(
        self,
        name: str,
        namespace: str,
        max_concurrent: int | None,
        metrics: bool,
        max_knowledge_tokens: int | None,
        pins: PinShare | None = None,
        adapters: bool = False,
    ) -> None:
        self.name, self.namespace, self.max_concurrent, self.metrics = name, namespace, max_concurrent, metrics
        self.knowledge = Quota(max_knowledge_tokens)
        self.pins, self.adapters = pins or PinShare(), adapters

    def store_namespace(self, salt: str | None) -> str:
        """The namespace in the store. As JSON, no two pairs of namespace and salt are the same text."""
        return hashlib.sha256(json.dumps([self.namespace, salt]).encode()).hexdigest()


class Access:
    """The tenants, by the SHA-256 digests of their keys. The keys themselves are not kept in memory."""

    def __init__(self, tenants: Mapping[str, Tenant], anonymous: Tenant | None) -> None:
        self._tenants, self._anonymous = dict(tenants), anonymous

    @property
    def num_keys(self) -> int:
        """At least 1: without keys all clients are one tenant."""
        return max(len(self._tenants), 1)

    @classmethod
    def open(cls, limits: Limits) -> Access:
        """Access without keys: all clients are one tenant."""
        pins = PinShare(limits.max_pinned_tokens)
        anonymous = Tenant("anonymous", "", limits.max_concurrent, True, limits.max_knowledge_tokens, pins, True)
        return cls({}, anonymous)

    @classmethod
    def load(cls, path: Path, limits: Limits) -> Access:
        """Read a TOML file with a table for each key:

            [alice]
            key = "sk-..."          # or sha256 = "...", the hex digest of the key
            namespace = "research"  # optional; by default the table's name
            max_concurrent = 4      # optional; each prompt counts
            max_knowledge_tokens = 100_000  # optional; with 0 it may keep none
            max_pinned_tokens = 20_000  # optional; with 0 it may pin nothing
            metrics = true          # optional; it may read /metrics
            adapters = true         # optional; it may load and unload adapters

        Args:
          limits: the limits of entries that do not set their own.

        Raises:
          InvalidRequestError: the file cannot be read as TOML, or an entry is wrong.
        """
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"{path} cannot be read as TOML: {error}") from error
        tenants: dict[str, Tenant] = {}
        for name, entry in raw.items():
            digest = _checked_digest(f"{path}: [{name}]", entry)
            if digest in tenants:
                raise InvalidRequestError(f"{path}: [{name}] has the same key as [{tenants[digest].name}]")
            concurrent, knowledge, pinned = (entry.get(field, getattr(limits, field)) for field in _NUMBERS)
            namespace, metrics = entry.get("namespace", name), entry.get("metrics", False)
            pins = PinShare(pinned, 1 / len(raw))
            may_load = entry.get("adapters", False)
            tenants[digest] = Tenant(name, namespace, concurrent, metrics, knowledge, pins, may_load)
        if not tenants:
            raise InvalidRequestError(f"{path} has no keys; it must have a table for each")
        return cls(tenants, None)

    def tenant(self, authorization: str | None, api_key: str | None = None) -> Tenant:
        """The tenant of a request.

        Args:
          authorization: the header of this name.
          api_key: the header `x-api-key`, in which Anthropic's clients send the key.

        Raises:
          UnauthorizedError: neither has a known key.
        """
        if self._anonymous is not None:
            return self._anonymous
        scheme, _, bearer = (authorization or "").partition(" ")
        sent = [bearer.strip() if scheme.lower() == "bearer" else "", (api_key or "").strip()]
        keys = [key for key in sent if key]
        if not keys:
            raise UnauthorizedError("an API key is needed: Authorization: Bearer KEY")
        # A lookup by digest takes the same time for every wrong key, so its time does not help to guess one.
        found = [tenant for key in keys if (tenant := self._tenants.get(_digest(key))) is not None]
        if not found:
            raise UnauthorizedError("the API key is not known")
        return found[0]


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _checked_digest(where: str, entry: Any) -> str:
    """The digest of an entry's key. Raises InvalidRequestError if a field of the entry is wrong."""
    if not isinstance(entry, dict):
        raise InvalidRequestError(f"{where} must be a table")
    for name, value in entry.items():
        if name not in _FIELDS:
            raise InvalidRequestError(f"{where}: {name!r} is unknown; there are: {', '.join(_FIELDS)}")
        if type(value) is not _FIELDS[name] or value == "":
            raise InvalidRequestError(f"{where}: {name}={value!r} must be {_WORDS[_FIELDS[name]]}")
    for name, least in _NUMBERS.items():
        if entry.get(name, least) < least:
            raise InvalidRequestError(f"{where}: {name}={entry[name]} must be at least {least}")
    if ("key" in entry) == ("sha256" in entry):
        raise InvalidRequestError(f"{where} must have either key or sha256")
    if "key" in entry and not re.fullmatch("[!-~]+", entry["key"]):
        raise InvalidRequestError(f"{where}: key must be ASCII without blanks: clients cannot send another in a header")
    if "sha256" in entry and not re.fullmatch("[0-9a-fA-F]{64}", entry["sha256"]):
        raise InvalidRequestError(f"{where}: sha256={entry['sha256']!r} must be 64 hex digits, the key's SHA-256")
    return entry["sha256"].lower() if "sha256" in entry else _digest(entry["key"])


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of requests and of connections. Each is more than 0.

    Attributes:
      max_body_bytes: bytes in a request's body.
      max_tokens: new tokens that a request gets at most. One that asks for more gets so many.
      max_prompts: answers to one request: its prompts times `n`.
      max_concurrent: concurrent requests of a key, if its entry does not set another limit; each answer counts. None:
        as many as run and wait.
      max_knowledge_tokens: tokens of frozen knowledge that a key may keep, if its entry does not set another limit.
        None: as many as the store holds.
      max_pinned_tokens: tokens in whole pages that a key may pin, if its entry does not set another limit. None: its
        part of what all pins may have, which is divided by the number of keys.
      request_timeout: seconds after which a request is cancelled.
      drain_timeout: seconds that running requests may still take after SIGTERM.
      client_timeout: seconds that a client may take to send a request's head, then its body, where it has a second more
        for every 16 KiB, and to take the next part of an answer.
      hang_timeout: seconds after which a server is not live if it works and gets nothing done. No round of the loop
        takes nearly as long but one that compiles, and each program that is compiled counts as done.
      max_connections: open connections. With more, those without a whole request are closed, the oldest first. None:
        twice as many as requests may run and wait, and 512.
    """

    max_body_bytes: int = 4 << 20
    max_tokens: int = 4096
    max_prompts: int = 32
    max_concurrent: int | None = None
    max_knowledge_tokens: int | None = None
    max_pinned_tokens: int | None = None
    request_timeout: float = 300.0
    drain_timeout: float = 30.0
    client_timeout: float = 20.0
    hang_timeout: float = 300.0
    max_connections: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise InvalidRequestError(f"{field.name}={value!r} must be more than 0")
