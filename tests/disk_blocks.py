"""Blocks for the tests of the disk tier. Neither this nor what it imports needs JAX, so a process starts quickly."""

import dataclasses

import ml_dtypes
import numpy as np

from sparsex_jax.tiers.blocks import Block

TINY = {"model": "tiny", "layers": 4, "rope_theta": 10000.0, "dtype": "bfloat16"}
OTHER = {**TINY, "dtype": "float32"}


def chain(length: int, namespace: str = "a", tokens: int = 8) -> list[Block]:
    """The blocks of a sequence."""
    blocks: list[Block] = []
    for i in range(length):
        content = np.arange(tokens * i, tokens * (i + 1), dtype=np.int32).tobytes()
        blocks.append(Block(namespace, tokens * i, content, tokens, "", blocks[-1].key if blocks else b""))
    return blocks


def pieces_of(block: Block, pages: int = 2) -> list[np.ndarray]:
    """The same for equal blocks, other bytes for others, NaNs among them: two of bfloat16 and one of float32."""
    rng = np.random.default_rng(list(block.key))
    halves = [rng.integers(0, 2**16, (pages, layers, 2, 2, 4, 2), np.uint16) for layers in (3, 1)]
    whole = rng.integers(0, 2**32, (pages, 1, 2, 2, 4, 2), np.uint32)
    return [*(half.view(ml_dtypes.bfloat16) for half in halves), whole.view(np.float32)]


def is_whole(block: Block, found: tuple[Block, list[np.ndarray]] | None, pages: int = 2) -> bool:
    return found is not None and found[0] == block and same(found[1], pieces_of(block, pages))


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    """Shape, dtype and every byte."""
    return [(a.shape, a.dtype, a.tobytes()) for a in ours] == [(a.shape, a.dtype, a.tobytes()) for a in theirs]


def approximate(block: Block) -> Block:
    return dataclasses.replace(block, exact=3, made_by="sparsex(boundaries=3)")
