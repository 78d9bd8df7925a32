"""Fingerprints: what KV depends on besides tokens, so that a model is never served that of another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from sparsex_jax.errors import DiskStoreError

Fingerprint = Mapping[str, str | int | float]


def encode(fingerprint: Fingerprint) -> str:
    """As JSON, the same text for fingerprints that are equal."""
    return json.dumps(dict(fingerprint), sort_keys=True, indent=1)


def decode(text: str | bytes) -> Fingerprint:
    """The fingerprint. Raises DiskStoreError."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DiskStoreError(f"a fingerprint cannot be read: {error}") from error


def digest(fingerprint: Fingerprint) -> str:
    """32 hexadecimal digits."""
    return hashlib.blake2b(encode(fingerprint).encode(), digest_size=16).hexdigest()


def differences(ours: Fingerprint, theirs: Fingerprint) -> str:
    """What differs, for the message of an error; empty if they are equal."""
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return ", ".join(f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here" for name in names)
