"""The adapters of an engine: which names stand for which slots of the devices, and which marks their KV is found by.

Each load is a new version, with a mark of its own (`sparsex_jax.reuse.adapters`), also of a name that was there before.
A mark is given out again only after thousands of others. By then nothing is stored under it, since what was is let go
of when an adapter is unloaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Set

import numpy as np
from jaxtyping import Int32

from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.config.checks import require
from sparsex_jax.errors import InvalidRequestError, UnknownAdapterError
from sparsex_jax.model.adapters import AdapterWeights
from sparsex_jax.reuse.adapters import NO_SLOT, SHARING, Acting, last_place

MAX_NAME = 256  # characters
_KEY_BITS = 31  # of a key, an int32 that is not negative
# What requests find that share in the same way has the same mark.
_GROUP_OF = {"pre_lr": "written", "refresh": "written", "rebase": "neutral", "base_shared": "run through"}
_GROUPS = tuple(dict.fromkeys(_GROUP_OF.values()))


def group_of(sharing: str) -> str:
    """The name of those who find the same; empty for who shares nothing."""
    return _GROUP_OF.get(sharing, "")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A version of an adapter that is loaded.

    Attributes:
      name: by which requests ask for it.
      slot: where the devices have its weights.
      number: of the version. The mark of its keys is this number times a power of two.
      rank: the largest of its matrices.
      targets: names of the weights that it adds to, some of `model.adapters.TARGETS`.
      invocation: token ids from whose last occurrence in a prompt it acts; none if it acts on all tokens.
      digest: of its weights, as `AdapterWeights.digest`.
      uses: how many sequences waited, ran or were held with it when the engine was asked.
    """

    name: str
    slot: int
    number: int
    rank: int
    targets: tuple[str, ...]
    invocation: tuple[int, ...]
    digest: str
    uses: int = 0


class Adapters:
    """What is loaded. Names are looked up from any thread; all else is for the thread that steps the loop."""

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        """Raises InvalidRequestError: keys of this vocabulary have no room for so many adapters."""
        self._max_adapters, self._max_rank = config.max_adapters, config.max_adapter_rank
        self._bits = max(model.vocab_size - 1, 1).bit_length()
        self._most_numbers = (1 << (_KEY_BITS - self._bits)) - 1
        self.share = config.share_adapters
        most = self._most_numbers - (len(_GROUPS) if self.share else 0)
        require(
            self._max_adapters < max(most, 1),
            f"max_adapters={self._max_adapters} must be less than {most} for a vocabulary of {model.vocab_size} tokens",
        )
        self._groups = dict.fromkeys(_GROUPS, 0)  # the numbers of their marks; 0: no adapters share anything
        self._last_number = 0
        self._loaded: Mapping[str, Adapter] = {}  # replaced, never changed, as other threads read it
        self._leaving: Set[str] = frozenset()  # the same

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._loaded.values())

    def __len__(self) -> int:
        return len(self._loaded)

    def named(self, name: str) -> Adapter:
        """Raises UnknownAdapterError, which lists the names, if none is loaded under this one."""
        found = self._loaded.get(name) if isinstance(name, str) else None
        if found is None:
            names = ", ".join(map(repr, self._loaded)) or "none is loaded"
            raise UnknownAdapterError(f"adapter={name!r:.300} is not loaded; there are: {names}")
        if name in self._leaving:
            raise UnknownAdapterError(f"adapter={name!r:.300} is being unloaded, and takes no new requests")
        return found

    @contextlib.contextmanager
    def leaving(self, name: str) -> Iterator[Adapter]:
        """Within this nobody can ask for an adapter: it waits to be unloaded. Raises UnknownAdapterError as `named`."""
        adapter = self.named(name)
        self._leaving |= {name}
        try:
            yield adapter
        finally:
            self._leaving -= {name}

    def on(self, name: str | None, tokens: Int32[np.ndarray, "tokens"], sharing: str = "isolated") -> Acting | None:
        """The adapter of this name on a prompt; None for the base model.

        Raises UnknownAdapterError, and InvalidRequestError if it cannot share as it is to.

        An activated adapter acts from the last occurrence of its invocation sequence on, that included. If the prompt
        has none it does not act, as in PEFT: the report says that it acted on no token.
        """
        self._check_sharing(name, sharing)
        if name is None:
            return None
        found = self.named(name)
        if sharing != "isolated":
            return self._sharing(found, sharing)
        start = last_place(tokens, found.invocation) if found.invocation else 0
        return self._acting(found, start)

    def _check_sharing(self, name: str | None, sharing: str) -> None:
        there = ", ".join(map(repr, SHARING))
        require(sharing in SHARING, f"sharing={sharing!r:.60} must be one of {there}")
        if sharing != "isolated":
            require(self.share, f"sharing={sharing!r} needs an engine with share_adapters")
            require(name is not None, f"sharing={sharing!r} needs an adapter: the base model shares with nobody")

    def _sharing(self, adapter: Adapter, sharing: str) -> Acting:
        late = f"adapter {adapter.name!r} acts from its invocation sequence on, and takes no sharing={sharing!r}"
        require(not adapter.invocation, f"{late}: what stands before that is found by all anyway")
        number = self._groups[_GROUP_OF[sharing]]
        return Acting(adapter.name, adapter.slot, adapter.number, number << self._bits, 0, sharing)

    @property
    def neutral(self) -> Acting:
        """No adapter, on a text that is prefilled for those that ask for `rebase`."""
        number = self._groups["neutral"]
        return Acting("", NO_SLOT, number, number << self._bits)

    def _acting(self, adapter: Adapter, start: int) -> Acting:
        return Acting(adapter.name, adapter.slot, adapter.number, adapter.number << self._bits, start)

    def stands(self, acting: Acting) -> bool:
        """Whether the version that acts is still loaded, and stays."""
        if acting.slot == NO_SLOT:  # a text that is prefilled without adapters needs none
            return True
        return any(acting.number == each.number and each.name not in self._leaving for each in self)

    def renewed(self, acting: Acting) -> Acting:
        """The same with the mark that its group has now (`share_anew`)."""
        if acting.slot == NO_SLOT:
            return self.neutral
        if not acting.shares:
            return acting
        return dataclasses.replace(acting, mark=self._groups[_GROUP_OF[acting.sharing]] << self._bits)

    def may_write(self, acting: Acting) -> bool:
        """Whether what is computed with it may be found under its keys.

        Not where prompts find it otherwise (`rebase`), nor once its mark is given up (`share_anew`).
        """
        return acting.writes and acting.mark >> self._bits in {each.number for each in self} | self._shared

    # Coming and going -----------------------------------------------------------------------------------------

    def new(self, name: str, weights: AdapterWeights) -> Adapter:
        """A version with a free slot and a mark, which nobody finds before `add`.

        Raises:
          InvalidRequestError: the name is none, or is taken; the rank is too large, or there is no free slot.
        """
        self.check_new(name)
        require(
            weights.rank <= self._max_rank,
            f"adapter {name!r} has rank {weights.rank}, and max_adapter_rank={self._max_rank} is the limit",
        )
        slot = next(slot for slot in range(self._max_adapters) if slot not in {each.slot for each in self})
        targets = tuple(weights.pairs)
        return Adapter(name, slot, self._next_number(), weights.rank, targets, weights.invocation, weights.digest)

    def check_new(self, name: str) -> None:
        """Raise InvalidRequestError if the name is none, or is taken, or there is no free slot. From any thread."""
        is_name = isinstance(name, str) and name.isprintable() and name.strip() == name and 0 < len(name) <= MAX_NAME
        require(
            is_name,
            f"adapter name {name!r:.300} must be printable, of 1 to {MAX_NAME} characters, without spaces at its ends",
        )
        require(self._max_adapters > 0, f"adapter {name!r} needs an engine with max_adapters above 0")
        require(name not in self._loaded, f"adapter {name!r} is loaded already; unload it before it is loaded anew")
        require(
            len(self) < self._max_adapters,
            f"adapter {name!r} has no room: max_adapters={self._max_adapters} are loaded; unload one of them",
        )

    def _next_number(self) -> int:
        """Numbers go round, past those that are in use."""
        in_use, number = {each.number for each in self} | self._shared, self._last_number
        while (number := number % self._most_numbers + 1) in in_use:
            pass
        self._last_number = number
        return number

    def add(self, adapter: Adapter) -> None:
        """It can be asked for from now on."""
        self._loaded = {**self._loaded, adapter.name: adapter}

    def remove(self, name: str) -> Adapter:
        """It cannot be asked for any more, and is `leaving` maybe. Raises UnknownAdapterError."""
        removed = self._loaded.get(name) or self.named(name)
        self._loaded = {other: each for other, each in self._loaded.items() if other != name}
        return removed

    def share_anew(self) -> set[int]:
        """Nothing that was shared until now is found from now on. Returns the numbers of those marks.

        What was computed before an adapter was loaded lacks what it adds to values, and has another's in its place.
        """
        if not self.share:
            return set()
        old = self._shared
        for group in _GROUPS:
            self._groups[group] = self._next_number()
        return old

    # Keys -----------------------------------------------------------------------------------------------------

    def num_base(self, keys: Int32[np.ndarray, "tokens"]) -> int:
        """On how many leading ones of these no adapter acted. What acts, acts up to the end."""
        return int((keys >> self._bits == 0).sum())

    def is_base(self, keys: Int32[np.ndarray, "tokens"]) -> bool:
        """Whether no adapter acted on any of these."""
        return len(keys) == 0 or int(keys[-1]) >> self._bits == 0

    def is_of(self, numbers: Set[int], keys: Int32[np.ndarray, "tokens"]) -> bool:
        """Whether a mark of one of these numbers is on some of these."""
        return len(keys) > 0 and int(keys[-1]) >> self._bits in numbers

    def tokens(self, keys: Int32[np.ndarray, "tokens"]) -> Int32[np.ndarray, "tokens"]:
        """The tokens that keys stand for."""
        return keys & np.int32((1 << self._bits) - 1)

    def behind(self, keys: Int32[np.ndarray, "tokens"]) -> Acting | None:
        """The adapter that acted on keys from position 0 on. Raises InvalidRequestError if it is loaded no longer."""
        if self.is_base(keys):
            return None
        number = int(keys[-1]) >> self._bits
        found = next((each for each in self if each.number == number), None)
        if found is None:
            raise InvalidRequestError(f"the adapter of version {number} is loaded no longer")
        return self._acting(found, self.num_base(keys))

    def alike(self, keys: Int32[np.ndarray, "tokens"]) -> list[Int32[np.ndarray, "tokens"]]:
        """The keys of the same tokens, from the first on: the base model's, each adapter's, and what they share."""
        tokens, numbers = self.tokens(keys), [each.number for each in self]
        return [tokens, *(tokens + np.int32(number << self._bits) for number in (*numbers, *sorted(self._shared)))]

    @property
    def _shared(self) -> set[int]:
        """The numbers of marks that are on what adapters share."""
        return set(self._groups.values()) - {0}
