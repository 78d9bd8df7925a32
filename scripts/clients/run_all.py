"""Runs every client in this directory against a server of the embedded model, and prints a table of what happened.

    uv run python scripts/clients/run_all.py --environments /tmp/clients --install

Each client has a virtual environment of its own, and those for node share one `node_modules`. `--install` installs
those that are missing, with the newest packages; without it the table says so. The exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"


@dataclasses.dataclass(frozen=True)
class Client:
    """A client, its script, and how it is installed.

    Attributes:
      name: of the client.
      script: file of this directory. It gets the URL with /v1, the model's name and a directory with its tokenizer.
      packages: what to install; the first one's version is told.
      exercises: what the script tries.
    """

    name: str
    script: str
    packages: tuple[str, ...]
    exercises: str

    @property
    def for_node(self) -> bool:
        return self.script.endswith(".mjs")

    @property
    def package(self) -> str:
        """The name of the package whose version is told."""
        return self.packages[0].partition("[")[0]

    @property
    def install(self) -> str:
        quoted = [f"'{name}'" if "[" in name else name for name in self.packages]
        return f"{'npm install' if self.for_node else 'uv pip install'} {' '.join(quoted)}"


CLIENTS = (
    Client("openai", "openai_parse.py", ("openai",), "`chat.completions.parse`, a forced call"),
    Client("openai for node", "openai_parse.mjs", ("openai", "zod"), "`chat.completions.parse` with zod"),
    Client(
        "Anthropic",
        "anthropic_client.py",
        ("anthropic",),
        "`messages`: whole, as a stream, `parse`, a call and its result, `count_tokens`",
    ),
    Client(
        "Vercel AI SDK",
        "vercel_generate_object.mjs",
        ("ai", "@ai-sdk/openai-compatible", "zod"),
        "`generateObject`",
    ),
    Client("LangChain", "langchain_client.py", ("langchain-openai",), "`with_structured_output`: a schema, a call"),
    Client(
        "LlamaIndex",
        "llama_index_client.py",
        ("llama-index-llms-openai-like",),
        "chat, stream, `structured_predict`: a schema, a call; `chat_with_tools` and its result",
    ),
    Client("pydantic-ai", "pydantic_ai_client.py", ("pydantic-ai-slim[openai]",), "an agent's output: call, schema"),
    Client("instructor", "instructor_client.py", ("instructor",), "modes `TOOLS` and `JSON_SCHEMA`"),
    Client("LiteLLM", "litellm_client.py", ("litellm",), "`response_format` of a pydantic model, as `hosted_vllm`"),
    Client("llm", "llm_schema.sh", ("llm",), "`llm --schema`"),
    Client("smolagents", "smolagents_client.py", ("smolagents[openai]",), "`ToolCallingAgent`: forced calls, results"),
    Client(
        "AutoGen",
        "autogen_rounds.py",
        ("autogen-agentchat", "autogen-ext[openai]"),
        "three agents, whose requests are members of [rounds](../../sparsex_jax/serving/README.md#rounds)",
    ),
    Client("lm-eval", "lm_eval_client.py", ("lm_eval[api]", "transformers"), "log-likelihoods, generated answers"),
    Client("guidellm", "guidellm_load.sh", ("guidellm",), "streams of chats, with the usage in every chunk"),
    Client("aiperf", "aiperf_load.sh", ("aiperf",), "streams of chats, completions, responses and messages"),
)


@dataclasses.dataclass(frozen=True)
class Environments:
    """Where clients are installed."""

    root: Path

    def place(self, client: Client) -> Path:
        return self.root / ("node" if client.for_node else client.name)

    def install(self, client: Client) -> None:
        place = self.place(client)
        place.mkdir(parents=True, exist_ok=True)
        if client.for_node:
            command = ["npm", "install", "--silent", *client.packages]
        else:
            subprocess.run(["uv", "venv", "--quiet", "--allow-existing", place], check=True)
            command = ["uv", "pip", "install", "--quiet", "--python", str(place), *client.packages]
        subprocess.run(command, cwd=place, check=True)

    def version(self, client: Client) -> str | None:
        """The version that is installed, if it is."""
        place = self.place(client)
        if client.for_node:
            path = place / "node_modules" / client.package / "package.json"
            return json.loads(path.read_text())["version"] if path.is_file() else None
        python = place / "bin/python"
        if not python.exists():
            return None
        code = f"from importlib.metadata import version; print(version({client.package!r}))"
        return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() or None

    def command(self, client: Client) -> list[str | Path]:
        place, script = self.place(client), HERE / client.script
        if client.for_node:  # modules are looked for beside the script
            return ["node", shutil.copy(script, place)]
        return [script] if client.script.endswith(".sh") else [place / "bin/python", script]

    def environ(self, client: Client) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.place(client) / 'bin'}:{os.environ['PATH']}"}


@contextlib.contextmanager
def server(log: Path, port: int) -> Iterator[str]:
    """A server of the embedded model. Yields its URL with /v1."""
    command = ["sparsex", "serve", MODEL, "--port", str(port), "--max-num-seqs", "4"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait(process, f"http://127.0.0.1:{port}/health/ready", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: subprocess.Popen, url: str, log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url):
            return
        time.sleep(0.5)
    sys.exit(f"the server ended with {process.returncode}: {log}")


def write_tokenizer(directory: Path) -> Path:
    """Writes the embedded model's tokenizer as transformers reads it, since load generators have their own."""
    from sparsex_jax.checkpoints import open_checkpoint

    open_checkpoint(MODEL).tokenizer.save_pretrained(directory)
    return directory


def run(client: Client, environments: Environments, url: str, tokenizer: Path) -> str:
    """What became of a client: `passes` or `fails`. What it printed is in a file beside its environment."""
    log = environments.root / f"{client.name}.log"
    with log.open("w") as output:
        done = subprocess.run(
            [*environments.command(client), url, MODEL, tokenizer],
            env=environments.environ(client),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        print(f"{client.name} failed: {log}", file=sys.stderr)
    return "fails" if done.returncode else "passes"


def row(client: Client, version: str | None, result: str) -> str:
    name = f"[{client.name}]({client.script})"
    return f"| {name} | {version or ''} | {client.exercises} | {result} | `{client.install}` |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="directory of the clients' environments")
    parser.add_argument("--install", action="store_true", help="install clients that are missing")
    parser.add_argument("--only", nargs="+", choices=[client.name for client in CLIENTS], help="clients to run")
    parser.add_argument("--port", type=int, default=8123, help="of the server that is started")
    parser.add_argument("--url", help="of a server of the embedded model that runs already, with /v1")
    return parser.parse_args()


def main() -> None:
    # As an exception, so that the server and the client that runs are ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args = parse()
    environments = Environments(args.environments.resolve())
    environments.root.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(environments.root / "tokenizer")
    clients = [client for client in CLIENTS if not args.only or client.name in args.only]
    for client in clients:
        if args.install and environments.version(client) is None:
            environments.install(client)
    print("| client | version | what is exercised | result | install |\n| --- | --- | --- | --- | --- |")
    running = contextlib.nullcontext(args.url) if args.url else server(environments.root / "server.log", args.port)
    results = []
    with running as url:
        for client in clients:
            version = environments.version(client)
            results.append(run(client, environments, url, tokenizer) if version else "not installed")
            print(row(client, version, results[-1]), flush=True)
    sys.exit("fails" in results)


if __name__ == "__main__":
    main()
