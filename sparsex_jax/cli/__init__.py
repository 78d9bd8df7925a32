"""The command line, `sparsex`: generate, demo, serve, convert, cache, calibrate, bench.

`commands` declares the commands. Their options come in groups (`groups`), each declared once: in `options` what several
commands take, in `serve_options` and `bench_options` the rest. Each command's work is in a module of its own, which is
imported when the command runs.
"""

from sparsex_jax.cli.commands import app

__all__ = ["app"]
