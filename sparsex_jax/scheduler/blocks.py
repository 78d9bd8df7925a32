"""Cuts what a sequence has in the store into blocks, for the tiers below it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence

from sparsex_jax.cache import PageCache
from sparsex_jax.cache.tree import Node
from sparsex_jax.config import ReuseConfig
from sparsex_jax.tiers.blocks import BLOCK_PAGES, Block


def blocks_of(cache: PageCache, pages: Sequence[int]) -> Iterator[tuple[Block, list[Node], list[int]]]:
    """Blocks of the committed pages of one sequence, with their nodes and pages, up to where one is not
    as it should be."""
    before = b""
    for start in range(0, len(pages), BLOCK_PAGES):
        its_pages = list(pages[start : start + BLOCK_PAGES])
        found = itertools.takewhile(lambda node: node is not None, map(cache.tree.node_of.__getitem__, its_pages))
        nodes = [node for node in found if node is not None]
        whole = _alike(nodes)
        if whole:
            block = _block(nodes[:whole], before)
            yield block, nodes[:whole], its_pages[:whole]
            before = block.key
        if whole < BLOCK_PAGES:
            return


def _alike(nodes: list[Node]) -> int:
    """How many leading nodes follow each other and have one `made_by` at most."""
    first: dict[str, int] = {}
    for i, node in enumerate(nodes):
        if node.exact < node.length:
            first.setdefault(_maker(node), i)
    return sorted(first.values())[1] if len(first) > 1 else len(nodes)


def _maker(node: Node) -> str:
    assert isinstance(node.made_by, ReuseConfig)
    return json.dumps(node.made_by.to_dict())


def _block(nodes: list[Node], before: bytes) -> Block:
    approximate = next((i for i, node in enumerate(nodes) if node.exact < node.length), len(nodes))
    exact = sum(node.length for node in nodes[:approximate])
    rest = nodes[approximate:]
    exact += rest[0].exact if rest else 0
    made_by = _maker(rest[0]) if rest else ""
    return Block(nodes[0].namespace, nodes[0].start, b"".join(node.key for node in nodes), exact, made_by, before)


def maker_of(block: Block) -> ReuseConfig | None:
    """What computed the block's approximate KV; None if it has none."""
    return ReuseConfig(**json.loads(block.made_by)) if block.made_by else None
