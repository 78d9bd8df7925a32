"""`sparsex tier`: moves what a disk tier has to other machines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from sparsex_jax.cli.terminal import clear_errors
from sparsex_jax.cli.values import parse_disk_store
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.tiers import archive
from sparsex_jax.tiers.blocks import Block
from sparsex_jax.tiers.disk import DiskStore, fingerprints
from sparsex_jax.tiers.fingerprint import Fingerprint

tier = typer.Typer(no_args_is_help=True, help="Move the KV of a disk tier between machines.")
_EVERYTHING = 1 << 62  # bytes; a store that is only read evicts nothing

Archive = Annotated[Path, typer.Argument(help="The file.", dir_okay=False)]


@tier.command("export")
def export(
    directory: Annotated[Path, typer.Argument(help="A `--disk-store` that no server has open.", file_okay=False)],
    file: Archive,
    namespace: Annotated[str | None, typer.Option(help="Only what was stored under this name.")] = None,
    weights: Annotated[str | None, typer.Option(help="Of which model, by its weights' digest.")] = None,
) -> None:
    """Write the blocks of one model to a file."""
    with clear_errors():
        fingerprint = _chosen(directory, weights)
        with DiskStore(directory, _EVERYTHING, fingerprint) as store:
            count = archive.export(file, fingerprint, _blocks(store, namespace))
    typer.echo(f"{count} blocks in {file}")


@tier.command("import")
def import_(
    file: Archive,
    disk_store: Annotated[str, typer.Argument(help="PATH:SIZE, as the server's `--disk-store`.")],
) -> None:
    """Put the blocks of a file into a disk tier, where servers of the same model find them."""
    with clear_errors():
        path, size = parse_disk_store(disk_store)
        fingerprint = archive.fingerprint_of(file)
        with DiskStore(path, size, fingerprint) as store:
            for block, pieces in archive.import_(file, fingerprint):
                store.put(block, pieces)
            count = len(store)
    typer.echo(f"{path} has {count} blocks of this model now")


def _blocks(store: DiskStore, namespace: str | None) -> Iterator[tuple[Block, list[np.ndarray]]]:
    """Those that are whole, the least recently used first."""
    wanted = (block for block in store.blocks() if namespace in (None, block.namespace))
    yield from (found for block in wanted if (found := store.get(block.key)) is not None)


def _chosen(directory: Path, weights: str | None) -> Fingerprint:
    found = fingerprints(directory)
    fitting = [each for each in found if weights in (None, each.get("weights"))]
    if len(fitting) != 1:
        there = ", ".join(str(each.get("weights")) for each in found) or "none"
        raise InvalidRequestError(f"weights={weights!r} must name one of the models in {directory}: {there}")
    return fitting[0]
