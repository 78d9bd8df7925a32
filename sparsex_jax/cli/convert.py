"""`sparsex convert`: rewrites a checkpoint so that each device loads its shards directly."""

from __future__ import annotations

from pathlib import Path

from sparsex_jax.checkpoints import convert
from sparsex_jax.cli.terminal import output
from sparsex_jax.model.sharding import make_mesh


def run(source: str, target: Path, dtype: str, tensor_parallel: int) -> None:
    """Read the model `source`, and write it to the new directory `target`."""
    convert(source, target, dtype, make_mesh(tensor_parallel))  # which shows what it loads
    output().print(f"Wrote {target} ({dtype}); load it with --model {target}", soft_wrap=True)
