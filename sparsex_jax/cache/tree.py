"""What is stored: a forest of pages, each below the page that came before it in its sequence.

A page is written by one sequence, so what precedes it is unique, and sequences with a common prefix share its
pages. A `Node` is one page's worth of content behind one particular past:

    root("docs") --- [the system prompt] --+-- [question one]
                                           +-- [question two] --- [its answer]

Two requests that prefill the same text at the same time write the same content into two pages. Both pages then
realise one node (they are twins), and the node lives until the last of them is gone. Nodes are objects, never
numbers, so nothing that points to a dead one can be mistaken for its page's next tenant.

Tokens are kept as bytes, four each: a dictionary finds them at C speed, and equality *is* verification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

TOKEN_BYTES = 4


def common_prefix(a: bytes, b: bytes) -> int:
    """How many leading tokens `a` and `b` share.

    As little-endian integers their first difference is the lowest bit of the exclusive or:

    >>> common_prefix(np.int32([7, 8, 9]).tobytes(), np.int32([7, 8, 5]).tobytes())
    2
    """
    size = min(len(a), len(b))
    differ = int.from_bytes(a[:size], "little") ^ int.from_bytes(b[:size], "little")
    return ((differ & -differ).bit_length() - 1) // 32 if differ else size // TOKEN_BYTES


def common_suffix(a: bytes, b: bytes) -> int:
    """How many trailing tokens `a` and `b` share."""
    size = min(len(a), len(b))
    differ = int.from_bytes(a[len(a) - size :], "little") ^ int.from_bytes(b[len(b) - size :], "little")
    return (8 * size - differ.bit_length()) // 32


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One page of content.

    Attributes:
      namespace: who may see it.
      key: its tokens, int32 as bytes; `page_size` of them, or fewer in the last page of a sequence.
      start: the position of its first token when its KV was computed.
      exact: how many of its leading tokens have exact KV (full prefill, everything before them exact too).
      sharable: full, exact and at its own position: it can be a page of another prompt's prefix.
      parent: None for a root, and for an orphan, whose parent was evicted.
      children: by key; a sharable child comes first under its key, then the others, oldest first.
      pages: the pages that hold it, oldest first; none for a root.
      hashes: of its windows, as the window index knows them.
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
        """The child that is an exact full page of exactly these tokens."""
        found = self.children.get(key)
        return found[0] if found and found[0].sharable else None

    def child(self, key: bytes) -> Node | None:
        """The child that holds exactly these tokens: the sharable one, else the latest."""
        found = self.children.get(key)
        return None if not found else found[0] if found[0].sharable else found[-1]


class PageTree:
    """The forest, and the node of every page."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.roots: dict[str, Node] = {}
        self.node_of: list[Node | None] = [None] * num_pages

    def __getitem__(self, page: int) -> Node:
        """The node of a committed page."""
        node = self.node_of[page]
        if node is None:
            raise ValueError(f"page {page} was never committed, or was dropped since")
        return node

    def live_nodes(self) -> list[Node]:
        """Every node with a page, once."""
        return list(dict.fromkeys(node for node in self.node_of if node is not None))

    def attach(self, page: int, parent: Node | None, namespace: str, key: bytes, start: int, exact: int) -> Node:
        """Put a page's content below `parent` (None: the root), as a new node or as a twin of one that is there."""
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
        """Take a page out. Returns its node if that was the last page of it; its children are orphans then."""
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
        """The longest chain of sharable pages that `prompt` begins with: the root, then its pages."""
        chain = [self.roots.get(namespace, Node(namespace))]
        width = self.page_size * TOKEN_BYTES
        for at in range(0, len(prompt) - width + 1, width):
            node = chain[-1].sharable_child(prompt[at : at + width])
            if node is None:
                break
            chain.append(node)
        return chain

    def prefix_tail(self, last: Node, rest: bytes) -> tuple[Node | None, int]:
        """The page behind `last` that shares most leading exact tokens with `rest`, and how many."""
        position = last.start + self.page_size if last.pages else 0
        best, most = None, 0
        for child in last.all_children():
            shared = min(child.exact, common_prefix(child.key, rest)) if child.start == position else 0
            if shared > most:
                best, most = child, shared
        return best, most

    def check(self) -> None:
        """Raise AssertionError unless pages, nodes and links agree."""
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
