"""Blocks that come into the store beside what the devices compute, the first layers of all of them first.

A layer that computes all tokens of a prompt reads nothing of what the prompt found. So a prefill begins while the KV
of its segments is on the link, and each layer waits only for what it reads:

    layer        0 .. l*-1            l* ..
    link         layers 0-7 of all blocks | 8-15 | 16-23 | ...
    devices      compute everybody    | paste, choose, compute the active tokens

What is sent for before the first layer moves beside all of them. What is sent for later waits for the layers that are
on their way, since it may get memory that they still use. So as much is sent at once as the devices have room for; if
that is not all, the prefill runs layer by layer (`Runner.advance`). Small inputs of steps, such as a plan, take the
same way one behind the other, so they have to be sent before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from sparsex_jax.cache import Segment
from sparsex_jax.device.link import TOGETHER, Arriving, HostBlock, Link, Targets
from sparsex_jax.errors import LinkError
from sparsex_kernels.layout import Store


class Load(NamedTuple):
    """Pages of a block, and the pages of the store that they are loaded into."""

    block: HostBlock
    rows: Sequence[int]
    pages: Sequence[int]


class Incoming:
    """Loads that belong together.

    Attributes:
      pages: of the store that all of it goes to. Whoever began it holds them until it is done or has failed.
      nbytes: of it all, with the padding of its blocks.
      error: why the rest will not come.
    """

    def __init__(self, loads: Sequence[Load], num_groups: int) -> None:
        self.pages = frozenset(page for load in loads for page in load.pages)
        self.nbytes = sum(load.block.nbytes for load in loads)
        self.error: LinkError | None = None
        self._lacking = [len(loads)] * num_groups

    def has(self, groups: int) -> bool:
        """Whether the first `groups` groups of layers are in the store."""
        return not any(self._lacking[:groups])

    @property
    def done(self) -> bool:
        return self.has(len(self._lacking))

    def came(self, group: int, loads: int) -> None:
        """So many more loads have this group of layers in the store."""
        self._lacking[group] -= loads


@dataclasses.dataclass(frozen=True)
class Late:
    """Segments of one request that are pasted while its prefill runs, since they are still coming.

    Attributes:
      segments: what is pasted.
      pages: of the request, in order.
      incoming: what the segments are in.
    """

    segments: tuple[Segment, ...]
    pages: Sequence[int]
    incoming: tuple[Incoming, ...]

    @property
    def done(self) -> bool:
        """Whether all has come."""
        return all(each.done for each in self.incoming)

    @property
    def error(self) -> LinkError | None:
        """Why it will not come."""
        return next((each.error for each in self.incoming if each.error is not None), None)


class _Part(NamedTuple):
    """A group of layers of some loads that are moved together, and where they go, on the devices already."""

    incoming: Incoming
    group: int
    loads: Sequence[Load]
    targets: Targets


class Arrivals:
    """All that comes over one link, in the order in which it was asked for.

    Methods that take the store donate it, and give the one that has what came.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: deque[_Part] = deque()
        self._on_the_link: deque[tuple[_Part, Arriving]] = deque()

    def begin(self, loads: Sequence[Load]) -> Incoming:
        """Put loads in line. They are sent on their way with `send`, or when somebody looks for them."""
        groups = range(len(self._link.layers))
        incoming = Incoming(loads, len(groups))
        together = [(some, self._targets(some)) for some in itertools.batched(loads, TOGETHER)]
        self._waiting.extend(_Part(incoming, group, *each) for group in groups for each in together)
        return incoming

    def _targets(self, loads: Sequence[Load]) -> Targets:
        return self._link.targets([load.block for load in loads], [(load.rows, load.pages) for load in loads])

    def pump(self, store: Store) -> Store:
        """Place what has come, and send more. Does not wait."""
        while self._on_the_link and _has_ended(self._on_the_link[0][1]):
            store = self._place_first(store)
        self.send()
        return store

    def bring(self, store: Store, incoming: Incoming, layers: int | None = None) -> Store:
        """Wait until what belongs to the layers before this one is in the store, or all; or until it has failed."""
        groups = self._groups_of(layers)
        self.send()
        while not incoming.has(groups) and incoming.error is None:
            store = self._place_first(store)
            self.send()
        return store

    @property
    def all_sent(self) -> bool:
        """Whether all is on the link, if it has not come."""
        return not self._waiting

    def come_with(self, layers: int) -> int:
        """How many leading layers have come once the first `layers` have: a group of layers comes as a whole."""
        return self._link.layers[self._groups_of(layers) - 1].stop

    def _groups_of(self, layers: int | None) -> int:
        groups = self._link.layers
        return len(groups) if layers is None else sum(group.start < layers for group in groups)

    def drop_all(self) -> None:
        """Nothing comes any more: the store that it was for is lost."""
        self._waiting.clear()
        self._on_the_link.clear()

    def send(self) -> None:
        """Send as much as may be on the way."""
        if not self._waiting:
            return
        room = self._link.room_bytes() - sum(arriving.nbytes for _, arriving in self._on_the_link)
        while self._waiting and room > 0:
            part = self._waiting.popleft()
            if part.incoming.error is None:
                room -= self._fetch(part)

    def _fetch(self, part: _Part) -> int:
        """Send it on its way. Returns its bytes; 0 if that fails at once."""
        try:
            arriving = self._link.fetch_together([load.block for load in part.loads], part.group)
        except LinkError as error:
            part.incoming.error = error
            return 0
        self._on_the_link.append((part, arriving))
        return arriving.nbytes

    def _place_first(self, store: Store) -> Store:
        """Place what was sent first, once it has come. The store is never lost with what does not come."""
        (incoming, group, loads, targets), arriving = self._on_the_link.popleft()
        if incoming.error is not None:
            return store
        try:
            store = self._link.place_together(store, arriving, targets)
        except LinkError as error:
            incoming.error = error
        else:
            incoming.came(group, len(loads))
        return store


def _has_ended(arriving: Arriving) -> bool:
    """Whether it has come, or has failed."""
    try:
        return arriving.ready()
    except LinkError:
        return True
