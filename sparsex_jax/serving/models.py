"""What requests may name as their model: the one that is served, and the adapters that are loaded."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.model.adapters import AdapterWeights
from sparsex_jax.serving.faults import RequestError


class Served(NamedTuple):
    """A model that requests may name.

    Attributes:
      name: in requests.
      source: what it was loaded from, as it was named.
      created: when, in seconds since 1970.
      parent: the model that an adapter adds to. None: it is no adapter.
    """

    name: str
    source: str
    created: int
    parent: str | None = None


class Models:
    """For the event loop's thread, but for what says otherwise.

    Attributes:
      base: the model's name in requests.
      loading: is held while an adapter is read and loaded, since several at once would fill the memory.
    """

    def __init__(self, engine: Engine, base: str, sources: Mapping[str, str]) -> None:
        """
        Args:
          sources: what the adapters that are loaded already were loaded from, by name.

        Raises:
          InvalidRequestError: an adapter has the model's name.
        """
        self.base, self._engine, self._created = base, engine, int(time.time())
        self._sources = {name: Served(name, source, self._created, base) for name, source in sources.items()}
        self.loading = asyncio.Lock()
        self._loaded = engine.admission.adapters  # may be read from any thread
        self._requests: collections.Counter[str] = collections.Counter()
        self._leaving: set[str] = set()
        for adapter in self._loaded:
            self._require_other(adapter.name)

    def __iter__(self) -> Iterator[Served]:
        """The model, and the adapters in the order in which they were loaded."""
        yield Served(self.base, self.base, self._created)
        for name in [adapter.name for adapter in self._loaded]:
            yield self._sources.get(name) or Served(name, name, self._created, self.base)

    def named(self, name: str) -> Served:
        """Raises RequestError if nothing of that name is served."""
        found = next((each for each in self if each.name == name), None)
        if found is None or name in self._leaving:
            raise self._unknown(
                name, "is being unloaded, and not served here any more" if found else "is not served here"
            )
        return found

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a request names as its model; None: the model alone. Raises as `named`."""
        return None if name is None or self.named(name).parent is None else name

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """While a request is under way, its adapter is not unloaded."""
        if adapter is None:
            yield
            return
        self._requests[adapter] += 1
        try:
            yield
        finally:
            self._requests[adapter] -= 1

    def _unknown(self, name: str, why: str) -> RequestError:
        names = [each.name for each in self if each.name not in self._leaving]
        served = f"{names[0]!r} is" if len(names) == 1 else f"{', '.join(map(repr, names))} are"
        return RequestError(f"model {name!r:.300} {why}; {served}", param="model", code="model_not_found", status=404)

    def _require_other(self, name: str) -> None:
        if name == self.base:
            raise InvalidRequestError(f"adapter {name!r} has the name of the model; requests could not tell them apart")

    # Coming and going ---------------------------------------------------------------------------------------

    def check_new(self, name: str) -> None:
        """Raises InvalidRequestError if the name is taken, or is none, or there is no room for one more."""
        self._require_other(name)
        self._loaded.check_new(name)

    def load(self, name: str, source: str, weights: AdapterWeights) -> None:
        """On the loop's thread. Raises as `Engine.load_adapter`."""
        self._engine.load_adapter(name, weights)
        self._sources[name] = Served(name, source, int(time.time()), self.base)

    @contextlib.contextmanager
    def leaving(self, name: str) -> Iterator[None]:
        """Within this, an adapter is unloaded: no request can name it any more.

        Raises RequestError if no adapter of that name is loaded, or it is being unloaded.
        """
        adapters = [each.name for each in self if each.parent and each.name not in self._leaving]
        if name not in adapters:
            said = f"lora_name: no adapter {name!r:.300} is loaded; there are: {', '.join(adapters) or 'none'}"
            raise RequestError(said, param="lora_name", code="adapter_not_found", status=404)
        self._leaving.add(name)
        try:
            yield
        finally:
            self._leaving.discard(name)

    def num_requests(self, name: str) -> int:
        """How many requests with this adapter are under way."""
        return self._requests[name]

    def unload(self, name: str) -> None:
        """On the loop's thread. Raises as `Engine.unload_adapter`, which waits for nothing here."""
        self._engine.unload_adapter(name, timeout_s=0.0)
        self._sources.pop(name, None)
