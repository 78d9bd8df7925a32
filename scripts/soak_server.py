"""Loads a server with twice what it sustains, for half an hour, and looks for what wears out.

    uv run python scripts/soak_server.py [MODEL] [--minutes 30] [--overload 2] [--serve-options "--host-store 1GiB"]

Starts `sparsex serve`, and measures the rate that it sustains: eight clients of the same mix, each of which asks again
when it has its answer. Then requests come at random at a multiple of that rate, whatever became of those before: turns
of chats, questions about documents, structures, forced calls, log-probabilities, several answers, other protocols,
knowledge that comes and goes, pins, wrong requests, and streams that are left in the middle. `/health` is asked every
50 ms by a process of its own.

Fails unless: no answer is a 500; nothing compiles; resident memory is flat; no page is in use when all is over and the
knowledge is deleted; and 99 of 100 looks at `/health` take less than 0.1 s. Prints what it saw and writes
`scripts/results/soak-<model>-<device>.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import multiprocessing
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from fuzz_server import memory_mb, percentile, probe

from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.serving.sockets import free_port

RESULTS = Path(__file__).resolve().parent / "results"
TIMEOUT_S = 120.0
CLIENTS = 8  # while the sustained rate is measured
HEALTH_P99_S = 0.1
GROWTH = 1.05  # of resident memory, from the second quarter of the load to the last

Body = dict[str, Any]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "note", "parameters": PERSON}}
WORDS = "tide lamp harbour winter keeper engine letter garden river signal copper valley market winding".split()  # noqa: SIM905


class Traffic:
    """Makes requests of all kinds. Each says what became of it: a status, or how it ended."""

    def __init__(self, client: httpx.AsyncClient, model: str, seed: int = 0) -> None:
        self._client, self._model, self._rng = client, model, random.Random(seed)
        self._documents = [self._text(120) for _ in range(24)]
        self._chats: list[list[Body]] = [[] for _ in range(16)]
        self.kinds: dict[str, tuple[int, Callable[[], Awaitable[str]]]] = {
            "a turn of a chat": (6, self._turn),
            "a question about documents": (6, self._question),
            "a stream": (3, self._stream),
            "a stream left in the middle": (2, self._left),
            "a structure": (2, self._structure),
            "a forced call": (2, self._call),
            "log-probabilities and penalties": (1, self._logprobs),
            "log-probabilities of the prompt": (1, self._scored),
            "several answers": (1, self._several),
            "responses": (1, self._responses),
            "messages": (1, self._messages),
            "knowledge that comes and goes": (1, self._knowledge),
            "a pin": (1, self._pinned),
            "a wrong request": (1, self._wrong),
        }

    async def one(self) -> tuple[str, str]:
        """A request of a random kind: which, and what became of it."""
        names, weights = list(self.kinds), [weight for weight, _ in self.kinds.values()]
        [name] = self._rng.choices(names, weights)
        try:
            return name, await self.kinds[name][1]()
        except httpx.TimeoutException:
            return name, "no answer in time"
        except httpx.HTTPError as error:
            return name, type(error).__name__

    # Kinds --------------------------------------------------------------------------------------------------

    async def _turn(self) -> str:
        chat = self._rng.choice(self._chats)
        if len(chat) >= 8:
            chat.clear()
        said = [*chat, {"role": "user", "content": self._text(12)}]
        answer = await self._ask("chat/completions", messages=said)
        if answer.status_code == 200:
            chat[:] = [*said, answer.json()["choices"][0]["message"]]
        return str(answer.status_code)

    async def _question(self) -> str:
        documents = self._rng.sample(self._documents, 3)
        return await self._chat(self._text(8), system="\n\n".join(documents))

    async def _stream(self) -> str:
        async with self._streamed() as answer:
            text = [line async for line in answer.aiter_lines()]
        ended = answer.status_code != 200 or "data: [DONE]" in text
        broken = any('"error"' in line for line in text if answer.status_code == 200)
        return f"{answer.status_code}{'' if ended else ', cut'}{' 500 in the stream' * broken}"

    async def _left(self) -> str:
        async with self._streamed() as answer:
            async for _ in answer.aiter_lines():
                break
        return str(answer.status_code)

    async def _structure(self) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
        return await self._chat("Invent a person.", response_format=form)

    async def _call(self) -> str:
        return await self._chat("Note a person.", tools=[TOOL], tool_choice="required", temperature=1.0)

    async def _logprobs(self) -> str:
        return await self._chat(self._text(9), logprobs=True, top_logprobs=5, presence_penalty=0.5, logit_bias={"5": 1})

    async def _scored(self) -> str:
        return self._said(await self._ask("completions", prompt=self._text(60), echo=True, logprobs=1, max_tokens=0))

    async def _several(self) -> str:
        return await self._chat(self._text(9), n=3, temperature=1.0, cache_salt=self._rng.choice("abc"))

    async def _responses(self) -> str:
        return self._said(await self._ask("responses", input=self._text(20), max_output_tokens=12))

    async def _messages(self) -> str:
        return self._said(await self._ask("messages", messages=[{"role": "user", "content": self._text(20)}]))

    async def _knowledge(self) -> str:
        answer = await self._client.post("/v1/knowledge", json={"text": self._text(80)})
        if answer.status_code == 200:
            await self._client.delete(f"/v1/knowledge/{answer.json()['handle']}")
        return self._said(answer)

    async def _pinned(self) -> str:
        key = f"agent {self._rng.randrange(4)}"
        options = {"prompt_cache_key": key, "prompt_cache_options": {"ttl": "30s"}}
        return await self._chat(self._text(30), **options)

    async def _wrong(self) -> str:
        return await self._chat("x", temperature=self._rng.choice((-1, "warm", 1e9)))

    # How they are sent --------------------------------------------------------------------------------------

    async def _chat(self, text: str, system: str = "You are brief.", **options: Any) -> str:
        said = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        return self._said(await self._ask("chat/completions", messages=said, **options))

    async def _ask(self, path: str, **body: Any) -> httpx.Response:
        return await self._client.post(f"/v1/{path}", json={"model": self._model, "max_tokens": 12} | body)

    def _streamed(self) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        body = {"prompt": self._text(40), "max_tokens": 24, "stream": True, "keep": self._rng.random() < 0.5}
        return self._client.stream("POST", "/v1/completions", json=body)

    def _said(self, answer: httpx.Response) -> str:
        return str(answer.status_code)

    def _text(self, words: int) -> str:
        return " ".join(self._rng.choice(WORDS) for _ in range(words)).capitalize() + "."


# The server -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(model: str, options: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """A server of this model: its address and process."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("sparsex")), "serve", model, "--port", str(port), *options]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"the server ended with {process.returncode}:\n{log.read_text()[-2000:]}")


def metrics(url: str) -> dict[str, float]:
    """The numbers of `/metrics`, by series."""
    lines = httpx.get(f"{url}/metrics", timeout=TIMEOUT_S).text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def in_use(url: str) -> float:
    """Pages that are neither free nor of what could be evicted."""
    found = metrics(url)
    others = {f'sparsex_pages{{state="{state}"}}' for state in ("free", "spare", "cached")}
    return sum(value for name, value in found.items() if name.startswith("sparsex_pages{") and name not in others)


def drain(url: str, seconds: float = 300.0) -> float:
    """Wait until nothing runs, waits or is pinned, and delete all knowledge: senders that went away left some. Returns
    the pages that are in use then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = metrics(url)
        if not found["sparsex_running_requests"] and not found["sparsex_queue_requests"]:
            for text in httpx.get(f"{url}/v1/knowledge").json()["data"]:
                httpx.delete(f"{url}/v1/knowledge/{text['handle']}")
            if not in_use(url):
                return 0.0
        time.sleep(1)
    return in_use(url)


# The load ---------------------------------------------------------------------------------------------------


async def sustained_rate(traffic: Traffic, seconds: float) -> float:
    """Answers a second that a few clients get who ask again when they have theirs."""
    end, answers = time.monotonic() + seconds, 0

    async def client() -> None:
        nonlocal answers
        while time.monotonic() < end:
            await traffic.one()
            answers += 1

    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    return answers / seconds


async def overload(
    traffic: Traffic, rate: float, seconds: float, watch: Callable[[], None]
) -> dict[str, collections.Counter[str]]:
    """Requests at random, at this rate. Returns what became of them, by kind."""
    came: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    rng, tasks, end = random.Random(1), set(), time.monotonic() + seconds
    due = last = time.monotonic()

    async def one() -> None:
        name, became = await traffic.one()
        came[name][became] += 1

    while time.monotonic() < end:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(due - time.monotonic(), 0))
        task = asyncio.create_task(one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if time.monotonic() - last >= 5:
            watch()
            last = time.monotonic()
    await asyncio.gather(*tasks)
    return came


async def run(url: str, pid: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """The rows of the result, and whether nothing wore out."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        traffic, seconds = Traffic(client, model), 60 * options.minutes
        await sustained_rate(traffic, options.measure / 4)  # fills the store
        rate = options.overload * await sustained_rate(traffic, options.measure)
        print(f"sustained {rate / options.overload:.2f} requests/s, now {rate:.2f} for {seconds:.0f} s", flush=True)
        memory: list[float] = []
        receive, send = multiprocessing.Pipe(duplex=False)
        address = httpx.URL(url)
        arguments = (address.host, address.port, seconds, send)
        prober = multiprocessing.get_context("spawn").Process(target=probe, args=arguments)
        prober.start()
        came = await overload(traffic, rate, seconds, lambda: memory.append(memory_mb(pid)["RSS"]))
        health, failures = await asyncio.to_thread(receive.recv)
    return judged(url, rate, came, memory, health, failures)


def judged(
    url: str,
    rate: float,
    came: dict[str, collections.Counter[str]],
    memory: list[float],
    health: list[float],
    failures: int,
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of the result, and whether nothing wore out."""
    for name, ends in came.items():
        print(f"{name:>32}: {', '.join(f'{end} ({number})' for end, number in ends.most_common())}")
    ends = sum(came.values(), collections.Counter())
    broken = sum(number for end, number in ends.items() if "500" in end or "Error" in end or "cut" in end)
    left, found = drain(url), metrics(url)
    compiled = found['sparsex_compilations_total{when="listening"}']
    quarter = len(memory) // 4
    early, late = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    p99 = percentile(health, 0.99)
    figures = {
        "requests a second": (rate, "1/s"),
        "requests": (ends.total(), ""),
        "answered": (ends["200"], ""),
        "refused, because too many wait (503)": (ends["503"], ""),
        "wrong ones, told so (400)": (ends["400"], ""),
        "no answer in time": (ends["no answer in time"], ""),
        "failed": (broken, ""),
        "resident memory in the second quarter": (early, "MB"),
        "resident memory in the last quarter": (late, "MB"),
        "/health, median": (1e3 * percentile(health, 0.5), "ms"),
        "/health, 99 of 100": (1e3 * p99, "ms"),
        "/health, longest": (1e3 * max(health), "ms"),
        "/health without 200": (failures, ""),
        "programs compiled while listening": (compiled, ""),
        "preemptions": (found["sparsex_preemptions_total"], ""),
        "evicted pages": (found['sparsex_evictions_total{what="page"}'], ""),
        "pages in use at the end": (left, ""),
    }
    rows = [{"work": name, "figure": round(figure, 2), "unit": unit} for name, (figure, unit) in figures.items()]
    passed = not (broken or failures or left or compiled) and late <= GROWTH * early and p99 < HEALTH_P99_S
    return rows, passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--measure", type=float, default=60, help="seconds for the sustained rate")
    parser.add_argument("--overload", type=float, default=2, help="times the sustained rate")
    parser.add_argument("--serve-options", default="", help="more of `sparsex serve`")
    parser.add_argument("--note", help="what a reader of the table must know")
    options = parser.parse_args()
    log = Path(tempfile.gettempdir()) / "soak_server.log"
    with serving(options.model, shlex.split(options.serve_options), log) as (url, pid):
        rows, passed = asyncio.run(run(url, pid, options))
    for row in rows:
        print(f"{row['work']:>40}: {row['figure']:g} {row['unit']}")
    print("nothing wore out" if passed else f"FAILED; the server's log is {log}")
    settings = {name: value for name, value in vars(options).items() if name not in ("model", "note")}
    about = {"bench": "soak", "model": Path(options.model).name} | provenance()
    print(write_json(about | {"note": options.note, "settings": settings, "rows": rows}, RESULTS))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    run_script(main)
