"""`sparsex serve`: the OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path

from sparsex_jax.cli.generate import EngineChoice
from sparsex_jax.cli.terminal import messages
from sparsex_jax.serving.access import Access, Limits
from sparsex_jax.serving.app import create_app
from sparsex_jax.serving.loop import Loop
from sparsex_jax.serving.server import Server
from sparsex_jax.serving.worker import Worker


def run(
    choice: EngineChoice,
    limits: Limits,
    *,
    host: str,
    port: int,
    api_keys: Path | None,
    name: str | None,
    max_waiting: int,
) -> None:
    """Serve until SIGTERM or SIGINT."""
    access = Access.load(api_keys, limits.max_concurrent) if api_keys else Access.open(limits.max_concurrent)
    engine = choice.load()
    worker = Worker(engine, Loop(engine, max_waiting=max_waiting))
    name = name or Path(choice.model).name
    app = create_app(worker, model=name, access=access, limits=limits)
    messages().print(f"Serving {name} at http://{host}:{port}/ (the page) and http://{host}:{port}/v1", soft_wrap=True)
    if api_keys is None:
        warning = "No --api-keys: everybody who reaches this port may ask, and shares what is stored."
        messages().print(warning, soft_wrap=True)
    Server(app, host, port).run()
