"""What replicas say to each other about blocks, as bytes.

    POST /lookup    {model, namespace, reuse, num_prefix, ranges, tokens}  ->  [[begin, end, [a block's fields]], ...]
    POST /block     {model, key}                                           ->  a block file (`tiers.block_file`)

`model` is the digest of the fingerprint. Each request is sealed with its path; each response with the seal of its
request, so that none can be sent again in another one's place. Of a block, what is sealed is the header, in which the
checksums of the rest are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsex_jax.config import ReuseConfig
from sparsex_jax.scheduler.peering import Lookup
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.index import Run

LOOKUP, BLOCK = "/lookup", "/block"
MOST_TOLD_BYTES = 64 << 20  # of a response that tells of blocks


def lookup_to_bytes(lookup: Lookup, model: str) -> bytes:
    fields = {
        "model": model,
        "namespace": lookup.namespace,
        "reuse": lookup.reuse.to_dict(),
        "num_prefix": lookup.num_prefix,
        "ranges": lookup.ranges,
        "tokens": lookup.tokens.astype("<i4").tobytes().hex(),
    }
    return json.dumps(fields).encode()


def lookup_of(fields: dict[str, Any]) -> Lookup:
    """Raises KeyError, TypeError, ValueError."""
    tokens = np.frombuffer(bytes.fromhex(fields["tokens"]), "<i4").astype(np.int32)
    ranges = tuple((int(begin), int(end)) for begin, end in fields["ranges"])
    return Lookup(str(fields["namespace"]), tokens, ReuseConfig(**fields["reuse"]), int(fields["num_prefix"]), ranges)


def told_to_bytes(runs: Sequence[Run]) -> bytes:
    return json.dumps([[run.begin, run.end, run.block.to_json()] for run in runs]).encode()


def told_of(data: bytes | bytearray) -> list[Run]:
    """Raises TypeError, ValueError."""
    return [Run(Block.from_json(fields), int(begin), int(end)) for begin, end, fields in json.loads(data)]


def key_to_bytes(key: bytes, model: str) -> bytes:
    return json.dumps({"model": model, "key": key.hex()}).encode()
