"""The tokens in every page: a forest in which each page is the child of the page before it in its sequence.

One sequence writes a page, so the tokens that precede it are unique, and sequences with a common prefix share the
pages of that prefix. A `Node` is the content of one page behind one particular past:

    root("docs") --- [the system prompt] --+-- [question one]
                                           +-- [question two] --- [its answer]

Two sequences that prefill the same text at the same time write the same content into two pages. These pages are
twins: both belong to one node, which lives until the last of them is evicted. Nodes are objects and not numbers, so
that a reference to a removed node is never mistaken for the content that its page gets next.

A page may also hold approximate KV. Then the same tokens may stand in the tree several times behind the same past, each
time with other KV, as nodes of their own:

    root("docs") --- [the system prompt] --+-- [two notes], exact
                                           +-- [two notes], made by `sparsex` from pasted KV --- [a question]

Once the exact node comes, it takes the children of the others, and they go: `PageTree.supersede`.

A node may have a *derived* page beside its pages in the store, or instead of them: numbers behind those of the store,
whose content is made of other pages (`sparsex_jax.cache.derived`).

A node's tokens are kept as bytes, four for each token. A dictionary then finds a child at C speed, and finding one
proves that all its tokens are equal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

from sparsex_jax.cache.children import MOST_TIES, TOKEN_BYTES, Children

# Whether a lookup takes approximate KV into its prefix, by what made it (`Node.made_by`).
Accepts = Callable[[object], bool]


def common_suffix(a: bytes, b: bytes) -> int:
    """How many trailing tokens `a` and `b` share. The highest bit of the exclusive or is the last difference."""
    size = min(len(a), len(b))
    differ = int.from_bytes(a[len(a) - size :], "little") ^ int.from_bytes(b[len(b) - size :], "little")
    return (8 * size - differ.bit_length()) // 32


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """The content of one page.

    Attributes:
      namespace: lookups under this name find it.
      key: its tokens, int32 as bytes; `page_size` of them, or fewer in the last page of a sequence.
      start: the position that its first token was computed at.
      exact: how many of its leading tokens have the KV that full recompute gives.
      made_by: what computed the other tokens, as the caller of `commit` names it.
      in_place: all tokens before it, from position 0 on, are those of its parents, so that it can be in a prefix.
      sharable: the page is in place, full and exact: any sequence can have it in its prefix.
      parent: the node before it in its sequence. None for a root, and for an orphan, whose parent was evicted.
      children: the nodes that may follow it.
      pages: the pages with this content, oldest first, and the derived one behind them; none for a root.
      derived: the derived one; None if there is none.
      uses: how many lookups found it.
      hashes: the hash of each of its windows in the window index.
      seen_by: who has a part of their own in its first page, where adapters share it (`PageTree.mark_seen`).
    """

    namespace: str
    key: bytes = b""
    start: int = 0
    exact: int = 0
    made_by: object = None
    in_place: bool = False
    sharable: bool = False
    parent: Node | None = None
    children: Children[Node] = dataclasses.field(default_factory=Children)
    pages: list[int] = dataclasses.field(default_factory=list)
    derived: int | None = None
    uses: int = 0
    hashes: list[int] = dataclasses.field(default_factory=list)
    seen_by: frozenset[int] = frozenset()

    @property
    def length(self) -> int:
        return len(self.key) // TOKEN_BYTES

    @property
    def donor(self) -> int:
        """The page that segments are copied from: the derived one, so that they come from where its own rows came."""
        return self.pages[0] if self.derived is None else self.derived

    def sharable_child(self, key: bytes) -> Node | None:
        """The sharable child with exactly these tokens, or None."""
        found = self.children.of(key)
        return found[0] if found and found[0].sharable else None

    def prefix_children(self, key: bytes, accepts: Accepts | None) -> list[Node]:
        """The children with exactly these tokens that a prefix can go on in."""
        return [child for child in self.children.of(key) if child.is_prefix(accepts)]

    def is_prefix(self, accepts: Accepts | None) -> bool:
        """Whether all its tokens can be in a prefix: they are exact, or approximate and accepted."""
        exact = self.exact == self.length
        return self.in_place and (exact or (accepts is not None and accepts(self.made_by)))

    def child(self, key: bytes) -> Node | None:
        """The child with exactly these tokens, or None. If there are several: the sharable one, else the newest."""
        found = self.children.of(key)
        return None if not found else found[0] if found[0].sharable else found[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt's prefix in the tree.

    Attributes:
      nodes: its full pages, in order.
      tail: the node whose first `tail_tokens` tokens follow them; None if no more tokens are stored.
    """

    nodes: list[Node]
    tail: Node | None
    tail_tokens: int

    @functools.cached_property
    def num_tokens(self) -> int:
        return sum(node.length for node in self.nodes) + self.tail_tokens

    @functools.cached_property
    def exact_tokens(self) -> int:
        """How many of them are exact. No exact token follows an approximate one."""
        tail = min(self.tail.exact, self.tail_tokens) if self.tail else 0
        return sum(node.exact for node in self.nodes) + tail


def _chain(node: Node) -> list[Node]:
    """The nodes from the first page on to this one. None for a root."""
    nodes = []
    while node.pages:
        nodes.append(node)
        assert node.parent is not None
        node = node.parent
    return nodes[::-1]


class PageTree:
    """The forest: a root for each namespace, and the node of each page.

    Attributes:
      roots: namespace to root.
      node_of: page number to node; None for pages that are not committed.
      approximate: the nodes in place with approximate tokens, oldest first. Some may be orphans.
      num_tokens: tokens in all committed pages.
      num_approximate: how many of those are approximate, in the nodes of `approximate`.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        """
        Args:
          num_pages: with the numbers of derived ones.
        """
        self.page_size = page_size
        self.roots: dict[str, Node] = {}
        self.node_of: list[Node | None] = [None] * num_pages
        self.approximate: dict[Node, None] = {}
        self.num_tokens = self.num_approximate = 0

    def __getitem__(self, page: int) -> Node:
        """The node of a committed page. Raises ValueError if the page is not committed."""
        node = self.node_of[page]
        if node is None:
            raise ValueError(f"page {page} was never committed, or was dropped since")
        return node

    def live_nodes(self) -> list[Node]:
        """Every node with a page, once."""
        return list(dict.fromkeys(node for node in self.node_of if node is not None))

    def exact_node(self, parent: Node | None, namespace: str, key: bytes, start: int) -> Node | None:
        """The sharable node with these tokens behind `parent` (None: the root), or None."""
        parent = parent or self.roots.get(namespace)
        found = parent.sharable_child(key) if parent else None
        return found if found and found.start == start else None

    def attach(
        self,
        page: int,
        parent: Node | None,
        namespace: str,
        key: bytes,
        start: int,
        exact: int,
        made_by: object = None,
    ) -> Node:
        """Add a page's content as a child of `parent` (None: the root), and return its node.

        If `parent` has a sharable child with the same tokens already, the page becomes its twin.
        """
        parent = parent or self.roots.setdefault(namespace, Node(namespace, in_place=True, sharable=True))
        in_place = parent.in_place and start == self._end(parent)
        sharable = in_place and exact == self.page_size
        node = parent.sharable_child(key) if sharable else None
        if node is None:
            node = Node(namespace, key, start, exact, made_by, in_place, sharable, parent)
            parent.children.add(node)
            if in_place and exact < node.length:
                self.approximate[node] = None
                self.num_approximate += node.length - node.exact
        self.num_tokens += node.length
        node.pages.append(page)
        self.node_of[page] = node
        return node

    def add_derived(self, node: Node, page: int) -> None:
        """A derived page has the content of a node too."""
        node.pages.append(page)
        node.derived = page
        self._has(node, page)

    def add_restored(self, node: Node, page: int) -> None:
        """A page of the store has the content of a node that only a derived one had."""
        node.pages.insert(0, page)
        self._has(node, page)

    def _has(self, node: Node, page: int) -> None:
        self.num_tokens += node.length
        self.node_of[page] = node

    def _end(self, node: Node) -> int:
        """The position behind a full node; 0 for a root."""
        return node.start + self.page_size if node.pages else 0

    def supersede(self, node: Node, spared: Callable[[int], bool]) -> list[int]:
        """Give a sharable node the children of the approximate ones with the same tokens in the same place.

        The children keep KV that was computed behind approximate KV, and are as approximate as before.

        Args:
          spared: whether a page's node stays as it is.

        Returns:
          The pages of the approximate nodes, which are of no more use as prefix or donor.
        """
        assert node.parent is not None
        approximate = [other for other in node.parent.children.of(node.key) if other.in_place and not other.sharable]
        worse = [other for other in approximate if not any(map(spared, other.pages))]
        for other in worse:
            node.uses = max(node.uses, other.uses)
            for child in other.children:
                node.children.add(child)
                child.parent = node
            other.children = Children()
        return [page for other in worse for page in other.pages]

    def detach(self, page: int) -> Node | None:
        """Remove a page.

        If it was the last page of its node, the node's children become orphans and the node is returned; else None.
        """
        node = self[page]
        self.node_of[page] = None
        self.num_tokens -= node.length
        node.pages.remove(page)
        node.derived = None if page == node.derived else node.derived
        if node.pages:
            node.seen_by = frozenset()  # they may not have it in its twin
            return None
        for child in node.children:
            child.parent = None
        self.settle(node)
        self._unlink(node)
        return node

    def settle(self, node: Node) -> None:
        """Its approximate tokens, if it has any, are not to be healed any more."""
        if node in self.approximate:
            del self.approximate[node]
            self.num_approximate -= node.length - node.exact

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return
        parent.children.remove(node)
        if not parent.pages and not parent.children:
            del self.roots[parent.namespace]

    def prefix(self, prompt: bytes, namespace: str, accepts: Accepts | None = None) -> Prefix:
        """The longest prefix of `prompt` that is stored: exact, or approximate where `accepts` takes that.

        Approximate nodes with equal tokens are all followed, page by page. Of several chains that cover equally many
        tokens, the one with the most exact tokens is taken, and of those the newest.
        """
        width = self.page_size * TOKEN_BYTES
        last, at = [self.roots.get(namespace, Node(namespace))], 0
        while at + width <= len(prompt):
            key = prompt[at : at + width]
            further = [child for node in last for child in node.prefix_children(key, accepts)]
            if not further:
                break
            last, at = further, at + width
        found = [Prefix(_chain(node), *self._tail(node, prompt[at:], accepts)) for node in last]
        return max(reversed(found), key=lambda prefix: (prefix.tail_tokens, prefix.exact_tokens))

    def mark_seen(self, pages: Sequence[int], end: int, reader: int) -> None:
        """A reader has run through the first `end` tokens of these pages of a sequence, and what it adds to values
        there is its own.

        Up to the first page that prompts do not read, because it was not committed or is a twin: what the reader has
        behind it came of that page, and not of the one that stands for it.

        Args:
          reader: the number of an adapter's version.
        """
        for number, page in enumerate(pages):
            node = self.node_of[page]
            if node is None or node.pages[0] != page or number * self.page_size + node.length > end:
                return
            node.seen_by |= {reader}

    def has_seen(self, page: int, reader: int) -> bool:
        """Whether `mark_seen` said so of all tokens of a page."""
        return reader in self[page].seen_by

    def beginnings(self, namespace: str, most: int, spared: Callable[[int], bool]) -> Iterator[bytes]:
        """Yield the first `most` tokens of each stored prompt: of what is in place with nothing behind it.

        Args:
          spared: whether a page that nothing follows is not of a prompt.
        """
        root, width = self.roots.get(namespace), most * TOKEN_BYTES
        rest = [(root, b"")] if root else []
        while rest:
            node, before = rest.pop()
            tokens = before + node.key if len(before) < width else before
            further = [(child, tokens) for child in node.children if child.in_place]
            rest += further
            if not further and not any(map(spared, node.pages)):
                yield tokens[:width]

    def approximate_chains(self, most: int) -> Iterator[list[Node]]:
        """Yield, for at most `most` sequences with approximate content, their pages from position 0 on.

        The most used sequence comes first, the older one of two that were used equally often. Between two chains, nodes
        may be removed.
        """
        seen: set[Node] = set()
        for node in sorted(self.approximate, key=lambda node: -node.uses):
            if node in seen or node not in self.approximate:
                continue
            if not self._is_rooted(node):
                self.settle(node)  # an orphan: what stood before it is gone for good
                continue
            chain = _chain(self._most_used_end(node))
            yield chain
            seen.update(chain)
            most -= 1
            if most == 0:
                return

    def _most_used_end(self, node: Node) -> Node:
        """The last node behind an approximate one, in the most used child of each."""
        while further := [child for child in node.children if child in self.approximate]:
            node = max(further, key=lambda child: child.uses)
        return node

    def _is_rooted(self, node: Node) -> bool:
        while node.parent is not None:
            node = node.parent
        return not node.pages

    def _tail(self, last: Node, rest: bytes, accepts: Accepts | None) -> tuple[Node | None, int]:
        """The child of `last` that shares the most leading tokens with `rest`, and how many. Else (None, 0)."""
        best, most = None, (0, 0)
        for number, (shared, child) in enumerate(last.children.near(rest)):
            if shared < most[0] or most == (shared, shared) or number == MOST_TIES:
                break
            usable = child.length if child.is_prefix(accepts) else child.exact if child.in_place else 0
            shared = min(usable, shared)
            if (shared, min(child.exact, shared)) > most:
                best, most = child, (shared, min(child.exact, shared))
        return best, most[0]

    def check(self) -> None:
        """Raise AssertionError unless pages, nodes and links agree with each other."""
        for page, node in enumerate(self.node_of):
            assert node is None or page in node.pages
        for node in self.live_nodes():
            assert all(self.node_of[page] is node for page in node.pages)
            assert len(set(node.pages)) == len(node.pages)
            assert 0 < node.length <= self.page_size
            assert 0 <= node.exact <= node.length
            assert node.sharable == (node.in_place and node.exact == self.page_size)
            assert node.derived is None or (node.pages[-1] == node.derived and not node.sharable)
            assert node.sharable or len(node.pages) == 1 + (node.derived is not None and len(node.pages) > 1)
            assert node not in self.approximate or (node.in_place and node.exact < node.length)
        assert self.num_tokens == sum(node.length for node in self.node_of if node is not None)
        assert self.num_approximate == sum(node.length - node.exact for node in self.approximate)
        for node in self.live_nodes():
            self._check_links(node)
        assert all(root.children and not root.pages for root in self.roots.values())

    def _check_links(self, node: Node) -> None:
        node.children.check()
        for child in node.children:
            assert child.parent is node
            assert child in node.children.of(child.key)
        parent = node.parent
        if parent is None:
            return
        assert node in parent.children.of(node.key)
        assert parent.namespace == node.namespace
        if parent.pages:
            assert node.start == parent.start + self.page_size
            assert parent.length == self.page_size
            assert node.exact == 0 or parent.exact == self.page_size
        else:
            assert parent is self.roots[node.namespace]
        assert not node.sharable or (parent.sharable and node.exact == self.page_size)
