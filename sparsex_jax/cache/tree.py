"""The tokens in every page: a forest in which each page is the child of the page before it in its sequence.

One sequence writes a page, so the tokens that precede it are unique, and sequences with a common prefix share the
pages of that prefix. A `Node` is the content of one page behind one particular past:

    root("docs") --- [the system prompt] --+-- [question one]
                                           +-- [question two] --- [its answer]

Two sequences that prefill the same text at the same time write the same content into two pages. These pages are
twins: both belong to one node, which lives until the last of them is evicted. Nodes are objects and not numbers, so
that a reference to a removed node is never mistaken for the content that its page gets next.

A node's tokens are kept as bytes, four for each token. A dictionary then finds a child at C speed, and finding one
proves that all its tokens are equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

TOKEN_BYTES = 4


def common_prefix(a: bytes, b: bytes) -> int:
    """How many leading tokens `a` and `b` share.

    Read as little-endian integers, they first differ at the lowest bit of their exclusive or:

    >>> common_prefix(np.int32([7, 8, 9]).tobytes(), np.int32([7, 8, 5]).tobytes())
    2
    """
    size = min(len(a), len(b))
    differ = int.from_bytes(a[:size], "little") ^ int.from_bytes(b[:size], "little")
    return ((differ & -differ).bit_length() - 1) // 32 if differ else size // TOKEN_BYTES


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
      sharable: the page is full and exact, and so is everything before it from position 0 on, so that another
        sequence can have it in its prefix.
      parent: the node before it in its sequence. None for a root, and for an orphan, whose parent was evicted.
      children: the nodes that may follow it, by key. Under one key a sharable child comes first, then the others,
        oldest first.
      pages: the pages with this content, oldest first; none for a root.
      hashes: the hash of each of its windows in the window index.
    """

    namespace: str
    key: bytes = b""
    start: int = 0
    exact: int = 0
    sharable: bool = False
    parent: Node | None = None
    children: dict[bytes, list[Node]] = dataclasses.field(default_factory=dict)
    pages: list[int] = dataclasses.field(default_factory=list)
    hashes: list[int] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.key) // TOKEN_BYTES

    def all_children(self) -> Iterator[Node]:
        return (child for same_key in self.children.values() for child in same_key)

    def sharable_child(self, key: bytes) -> Node | None:
        """The sharable child with exactly these tokens, or None."""
        found = self.children.get(key)
        return found[0] if found and found[0].sharable else None

    def child(self, key: bytes) -> Node | None:
        """The child with exactly these tokens, or None. If there are several: the sharable one, else the newest."""
        found = self.children.get(key)
        return None if not found else found[0] if found[0].sharable else found[-1]


class PageTree:
    """The forest: a root for each namespace, and the node of each page.

    Attributes:
      roots: namespace to root.
      node_of: page number to node; None for pages that are not committed.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.roots: dict[str, Node] = {}
        self.node_of: list[Node | None] = [None] * num_pages

    def __getitem__(self, page: int) -> Node:
        """The node of a committed page. Raises ValueError if the page is not committed."""
        node = self.node_of[page]
        if node is None:
            raise ValueError(f"page {page} was never committed, or was dropped since")
        return node

    def live_nodes(self) -> list[Node]:
        """Every node with a page, once."""
        return list(dict.fromkeys(node for node in self.node_of if node is not None))

    def attach(self, page: int, parent: Node | None, namespace: str, key: bytes, start: int, exact: int) -> Node:
        """Add a page's content as a child of `parent` (None: the root), and return its node.

        If `parent` has a sharable child with the same tokens already, the page becomes its twin.
        """
        parent = parent or self.roots.setdefault(namespace, Node(namespace, sharable=True))
        in_place = start == (parent.start + self.page_size if parent.pages else 0)
        sharable = parent.sharable and in_place and exact == self.page_size
        node = parent.sharable_child(key) if sharable else None
        if node is None:
            node = Node(namespace, key, start, exact, sharable, parent)
            siblings = parent.children.setdefault(key, [])
            siblings.insert(0 if sharable else len(siblings), node)
        node.pages.append(page)
        self.node_of[page] = node
        return node

    def detach(self, page: int) -> Node | None:
        """Remove a page.

        If it was the last page of its node, the node's children become orphans and the node is returned; else None.
        """
        node = self[page]
        self.node_of[page] = None
        node.pages.remove(page)
        if node.pages:
            return None
        for child in node.all_children():
            child.parent = None
        self._unlink(node)
        return node

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        if parent is None:
            return
        siblings = parent.children[node.key]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.key]
        if not parent.pages and not parent.children:
            del self.roots[parent.namespace]

    def prefix(self, prompt: bytes, namespace: str) -> list[Node]:
        """The root, then the longest chain of sharable nodes whose tokens `prompt` begins with."""
        chain = [self.roots.get(namespace, Node(namespace))]
        width = self.page_size * TOKEN_BYTES
        for at in range(0, len(prompt) - width + 1, width):
            node = chain[-1].sharable_child(prompt[at : at + width])
            if node is None:
                break
            chain.append(node)
        return chain

    def prefix_tail(self, last: Node, rest: bytes) -> tuple[Node | None, int]:
        """The child of `last` that shares the most leading exact tokens with `rest`, and how many. Else (None, 0)."""
        position = last.start + self.page_size if last.pages else 0
        best, most = None, 0
        for child in last.all_children():
            shared = min(child.exact, common_prefix(child.key, rest)) if child.start == position else 0
            if shared > most:
                best, most = child, shared
        return best, most

    def check(self) -> None:
        """Raise AssertionError unless pages, nodes and links agree with each other."""
        for page, node in enumerate(self.node_of):
            assert node is None or page in node.pages
        for node in self.live_nodes():
            assert all(self.node_of[page] is node for page in node.pages)
            assert len(set(node.pages)) == len(node.pages)
            assert 0 < node.length <= self.page_size
            assert 0 <= node.exact <= node.length
            assert node.sharable or len(node.pages) == 1
            self._check_links(node)
        assert all(root.children and not root.pages for root in self.roots.values())

    def _check_links(self, node: Node) -> None:
        for key, same_key in node.children.items():
            assert same_key
            assert all(child.parent is node and child.key == key for child in same_key)
            assert not any(child.sharable for child in same_key[1:])
        parent = node.parent
        if parent is None:
            return
        assert node in parent.children[node.key]
        assert parent.namespace == node.namespace
        if parent.pages:
            assert node.start == parent.start + self.page_size
            assert parent.length == self.page_size
            assert node.exact == 0 or parent.exact == self.page_size
        else:
            assert parent is self.roots[node.namespace]
        assert not node.sharable or (parent.sharable and node.exact == self.page_size)
