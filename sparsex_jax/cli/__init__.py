"""The command line, `sparsex`: generate, demo, convert, cache, calibrate, bench.

`commands` declares what can be typed; each command's work is in a module of its own, imported when it runs.
"""

from sparsex_jax.cli.commands import app

__all__ = ["app"]
