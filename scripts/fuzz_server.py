"""Does to a running server what no schema describes, while its health is asked every 50 ms and normal requests go on.

    uv run sparsex serve --port 8000 & uv run python scripts/fuzz_server.py --url http://127.0.0.1:8000 --pid $!

Bodies that are deep, huge, half, slow, binary or of wrong encodings and types, heads without end, chunks of a byte,
requests in one write, sockets that never read, and clients that go away. Only for servers that may be overloaded.

Ends with 1 if any answer is a 500, or the server does not answer at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gzip
import json
import multiprocessing
import random
import re
import socket
import sys
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

PROBE_EVERY_S = 0.05
PROBE_LIMIT_S = 10.0
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/knowledge")
TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", ";;", "image/png")
SAID = re.compile(rb"HTTP/1\.1 (\d{3})")
BROKEN = b"internal_error"  # also in a stream that began with 200

Kind = Callable[["Fuzzer"], Awaitable[str]]


class Fuzzer:
    """Makes one client after the other. Each returns what became of it: statuses, or how it ended."""

    def __init__(
        self, url: str, key: str | None = None, *, seed: int = 0, limit_bytes: int = 4 << 20, kinds: Sequence[str] = ()
    ) -> None:
        address = urllib.parse.urlsplit(url)
        self.host, self.port = address.hostname or "127.0.0.1", address.port or 80
        self.rng, self.limit_bytes = random.Random(seed), limit_bytes
        self.kinds = {name: KINDS[name] for name in kinds or KINDS}
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""

    def head(
        self, length: int | None, path: str | None = None, *, more: str = "", kind: str = "application/json"
    ) -> bytes:
        """A request's head. A length of None is for a body in chunks."""
        size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        first = f"POST {path or self.rng.choice(PATHS)} HTTP/1.1\r\nHost: {self.host}\r\n"
        return f"{first}{self._key}Content-Type: {kind}\r\n{size}\r\n{more}\r\n".encode()

    def request(self, body: bytes, path: str | None = None, **options: str) -> bytes:
        return self.head(len(body), path, **options) + body

    @contextlib.asynccontextmanager
    async def connection(self):
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def ask(self, *parts: bytes, pause_s: float = 0.0, seconds: float = 30.0) -> str:
        """Send, with pauses between the parts, and read until the server closes or an answer is complete."""
        async with self.connection() as (reader, writer):
            sending = asyncio.ensure_future(_send(writer, parts, pause_s))
            try:
                async with asyncio.timeout(seconds):
                    return said(await _answer(reader))
            except TimeoutError:
                return "no answer yet"
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    # Kinds of clients ---------------------------------------------------------------------------------------

    async def deep(self) -> str:
        depth = self.rng.choice((50, 150, 250, 3000, 100_000))
        opens, closes = self.rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        nested = opens * depth + b"1" + closes * self.rng.choice((depth, 0))
        field = self.rng.choice((b"prompt", b"messages", b"tools", b"stop", b"reuse", b"logit_bias", b"unknown"))
        return await self.ask(self.request(b'{"prompt":"x","max_tokens":1,"' + field + b'":' + nested + b"}"))

    async def huge(self) -> str:
        item, field = self.rng.choice(HUGE)
        number = self.rng.choice((100_000, self.limit_bytes)) // (len(item) + 1) - 50
        return await self.ask(self.request(b'{"%s":[' % field + (item + b",") * number + b"null]}"))

    async def many_keys(self) -> str:
        keys = b",".join(b'"%d":1' % number for number in range(self.limit_bytes // 12))
        body = self.rng.choice((b'{"prompt":"x","logit_bias":{%s}}', b"{%s}", b'{"messages":[{"role":"user",%s}]}'))
        return await self.ask(self.request(body % keys))

    async def long_text(self) -> str:
        text = self.rng.choice(("a", "word ", "é", "\\u0000", "<|im_end|>", " \\n", "🙂")) * (self.limit_bytes // 12)
        body = self.rng.choice(('{"prompt":"%s"}', '{"messages":[{"role":"user","content":"%s"}]}', '{"text":"%s"}'))
        return await self.ask(self.request((body % text).encode()))

    async def too_large(self) -> str:
        if self.rng.random() < 0.5:
            return await self.ask(self.head(10**12), b"x" * 100_000)
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        return await self.ask(self.head(None), *[chunk] * (2 + self.limit_bytes // 0x10000))

    async def half(self) -> str:
        return await self.ask(self.head(1000) + b'{"prompt": "', seconds=self.rng.uniform(0, 5))

    async def slow_body(self) -> str:
        body = b'{"prompt": "slow", "max_tokens": 1}'
        return await self.ask(self.head(len(body)), *_bytes_of(body), pause_s=self.rng.choice((0.01, 0.5)), seconds=5)

    async def slow_head(self) -> str:
        return await self.ask(*_bytes_of(self.head(5)), pause_s=self.rng.choice((0.01, 0.5)), seconds=5)

    async def idle(self) -> str:
        return await self.ask(b"", seconds=5)

    async def wrong_encoding(self) -> str:
        text = '{"prompt": "Größe 🙂", "max_tokens": 1}'
        bodies = [text.encode(name) for name in ("utf-16", "utf-32", "utf-7", "utf-8-sig")]
        bodies += [text.encode("latin-1", "replace"), b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud800"}']
        more = self.rng.choice(("", "Content-Encoding: gzip\r\n", "Content-Encoding: br\r\n"))
        bodies.append(gzip.compress(text.encode()))
        return await self.ask(self.request(self.rng.choice(bodies), more=more))

    async def wrong_type(self) -> str:
        return await self.ask(self.request(b'{"prompt": "x", "max_tokens": 1}', kind=self.rng.choice(TYPES)))

    async def wrong_json(self) -> str:
        values = (
            b"",
            b"null",
            b"5",
            b"[]",
            b'""',
            b"{nope",
            b"NaN",
            b'{"prompt":1e400}',
            b'{"prompt":' + b"1" * 9999 + b"}",
        )
        return await self.ask(self.request(self.rng.choice(values)))

    async def wrong_values(self) -> str:
        """A valid request in which some fields have a value that fits no field."""
        body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "stream": False}
        for name in self.rng.sample(FIELDS, 3):
            body[name] = self.rng.choice(VALUES)
        return await self.ask(self.request(json.dumps(body).encode()))

    async def binary_body(self) -> str:
        return await self.ask(self.request(self.rng.randbytes(self.rng.choice((10, 100_000)))))

    async def binary_head(self) -> str:
        return await self.ask(self.rng.randbytes(self.rng.choice((10, 100_000))) + b"\r\n\r\n", seconds=5)

    async def huge_head(self) -> str:
        more = self.rng.choice((f"X: {'x' * 10**6}\r\n", "X: x\r\n" * 100_000, f"{'x' * 10**6}: x\r\n"))
        return await self.ask(self.head(2, more=more), b"{}", seconds=5)

    async def odd_head(self) -> str:
        return await self.ask(self.rng.choice(ODD_HEADS).encode(), seconds=5)

    async def tiny_chunks(self) -> str:
        chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"prompt":"' + b"x" * 100_000 + b'"}')
        return await self.ask(self.head(None), chunks + b"0\r\n\r\n")

    async def pipelined(self) -> str:
        one = self.request(b'{"prompt": "x", "max_tokens": 0.5}') + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        return await self.ask(one * 50, seconds=2)

    async def never_reads(self) -> str:
        """Asks for all it can get, and keeps the socket open without a look at it."""
        body = {"prompt": "x", "stream": True, "max_tokens": 1000, "ignore_eos": True, "logprobs": 5, "keep": False}
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, (self.host, self.port))
            await asyncio.get_running_loop().sock_sendall(client, self.request(json.dumps(body).encode(), PATHS[0]))
            await asyncio.sleep(self.rng.uniform(1, 10))
        return "closed"

    async def disconnects(self) -> str:
        body = json.dumps({"prompt": "word " * 200, "max_tokens": 100, "stream": self.rng.random() < 0.5}).encode()
        async with self.connection() as (_, writer):
            writer.write(self.request(body, PATHS[0])[: self.rng.choice((30, 200, 10**6))])
            await writer.drain()
            await asyncio.sleep(self.rng.choice((0, 0.05, 0.5)))
        return "closed"

    async def normal(self) -> str:
        body = json.dumps({"prompt": f"Say {self.rng.random()}:", "max_tokens": 2}).encode()
        return await self.ask(self.request(body, PATHS[0]), seconds=60)


HUGE = (
    (b"123", b"prompt"),
    (b"[1]", b"prompt"),
    (b"[]", b"tools"),
    (b"{}", b"messages"),
    (b'"a"', b"prompt"),
    (b'"a"', b"stop"),
    (b"123", b"text"),
    (b'{"role":"user","content":"x"}', b"messages"),
    (b"-1", b"prompt"),
    (b"1.5", b"stop"),
)
FIELDS = ("prompt", "messages", "max_tokens", "stop", "seed", "n", "temperature", "tools", "reuse", "logit_bias",
          "model", "stream_options", "top_k", "tool_choice", "response_format", "cache_salt", "user")  # fmt: skip
VALUES = (None, True, -1, 0, 2**31, 2**70, 1e308, "", "x", "\0", [], [None], {}, {"": {}}, [[[]]], [{}], ["x"] * 5000)
ODD_HEADS = (
    "GET /health HTTP/9.9\r\n\r\n",
    "GET / HTTP/1.0\r\n\r\n",
    "BREW /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5, 6\r\n\r\nhello",
    "GET /v1/models/%ff%00%2e%2e HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /page/../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "DELETE /v1/knowledge/99999999999999999999 HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /v1/knowledge?cache_salt=%ff HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n",
    "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "GET http://x/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
)
KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        Fuzzer.deep, Fuzzer.huge, Fuzzer.many_keys, Fuzzer.long_text, Fuzzer.too_large, Fuzzer.half, Fuzzer.slow_body,
        Fuzzer.slow_head, Fuzzer.idle, Fuzzer.wrong_encoding, Fuzzer.wrong_type, Fuzzer.wrong_json, Fuzzer.wrong_values,
        Fuzzer.binary_body, Fuzzer.binary_head, Fuzzer.huge_head, Fuzzer.odd_head, Fuzzer.tiny_chunks, Fuzzer.pipelined,
        Fuzzer.never_reads, Fuzzer.disconnects,
    )
}  # fmt: skip


async def _send(writer: asyncio.StreamWriter, parts: tuple[bytes, ...], pause_s: float) -> None:
    for part in parts:
        writer.write(part)
        await writer.drain()
        await asyncio.sleep(pause_s)


async def _answer(reader: asyncio.StreamReader) -> bytes:
    """Until the server closes, or the first answer's length has come."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while more := await reader.read(1 << 16):
            answer += more
            if is_complete(answer):
                break
    return answer


def is_complete(answer: bytes) -> bool:
    head, found, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    if not found or length is None:
        return body.endswith(b"0\r\n\r\n")
    return len(body) >= int(length[1])


def said(answer: bytes) -> str:
    """The statuses of all answers in it, in a word that has 500 where anything broke."""
    statuses = sorted({int(status) for status in SAID.findall(answer)})
    return " ".join(map(str, statuses)) + (" 500 in the stream" if BROKEN in answer else "") or "closed"


def _bytes_of(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


# What the server is like meanwhile --------------------------------------------------------------------------


def probe(host: str, port: int, seconds: float, result: Connection) -> None:
    """Ask for `/health` on a new connection each time. In a process of its own, so that fuzzing does not delay it."""
    times, failures, end = [], 0, time.monotonic() + seconds
    while time.monotonic() < end:
        started = time.perf_counter()
        failures += not _is_healthy(host, port)
        times.append(time.perf_counter() - started)
        time.sleep(max(PROBE_EVERY_S - times[-1], 0))
    result.send((times, failures))


def _is_healthy(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), PROBE_LIMIT_S) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return client.recv(100).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def memory_mb(pid: int | None) -> dict[str, float]:
    """Resident memory of a process, now and at its most. Empty where that is not known."""
    if pid is None:
        return {}
    fields = re.findall(r"Vm(RSS|HWM):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return {name: int(kilobytes) / 1024 for name, kilobytes in fields}


# The run ----------------------------------------------------------------------------------------------------


async def fuzz(fuzzer: Fuzzer, seconds: float, clients: int) -> tuple[dict[str, collections.Counter[str]], list[float]]:
    """What became of clients by kind, and how long normal requests took."""
    came: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    took: list[float] = []
    end = time.monotonic() + seconds

    async def one(name: str, kind: Kind) -> None:
        try:
            async with asyncio.timeout(max(end - time.monotonic(), 0) + 2):
                came[name][await kind(fuzzer)] += 1
        except TimeoutError:
            came[name]["no answer at the end"] += 1
        except OSError as error:
            came[name][type(error).__name__] += 1

    async def rude() -> None:
        while time.monotonic() < end:
            await one(*fuzzer.rng.choice(list(fuzzer.kinds.items())))

    async def polite() -> None:
        while time.monotonic() < end:
            started = time.perf_counter()
            await one("normal", Fuzzer.normal)
            took.append(time.perf_counter() - started)
            await asyncio.sleep(0.2)

    await asyncio.gather(polite(), *[rude() for _ in range(clients)])
    return came, took


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else float("nan")


def line_of(name: str, seconds: list[float]) -> str:
    p50, p99 = (1e3 * percentile(seconds, share) for share in (0.5, 0.99))
    return (
        f"{name}: {len(seconds)} asked, p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {1e3 * max(seconds, default=0):.1f} ms"
    )


def run(fuzzer: Fuzzer, seconds: float, clients: int, pid: int | None = None) -> bool:
    """Fuzz, print what was seen, and return whether nothing broke."""
    before, (receive, send) = memory_mb(pid), multiprocessing.Pipe(duplex=False)
    prober = multiprocessing.get_context("spawn").Process(target=probe, args=(fuzzer.host, fuzzer.port, seconds, send))
    prober.start()
    came, took = asyncio.run(fuzz(fuzzer, seconds, clients))
    asked, failures = receive.recv()
    prober.join()
    for name, ends in sorted(came.items()):
        print(f"{name:>15}: {', '.join(f'{end} ({number})' for end, number in ends.most_common())}")
    print(f"{line_of('/health', asked)}, {failures} without 200")
    print(line_of("normal requests", took))
    for name, megabytes in memory_mb(pid).items():
        print(f"{'resident' if name == 'RSS' else 'at most'}: {before[name]:.0f} MB before, {megabytes:.0f} MB after")
    broken = {name: ends for name, ends in came.items() if any("500" in end for end in ends)}
    alive = _is_healthy(fuzzer.host, fuzzer.port)
    print(f"broken: {', '.join(broken) or 'nothing'}; the server is {'' if alive else 'not '}healthy")
    return alive and not broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", help="an API key")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[], help="of clients; all by default")
    parser.add_argument("--clients", type=int, default=12, help="at once, beside a normal one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="of the server, for its resident memory")
    parser.add_argument("--limit-bytes", type=int, default=4 << 20, help="the server's --max-body-bytes")
    options = parser.parse_args()
    asked = {"seed": options.seed, "limit_bytes": options.limit_bytes, "kinds": options.kinds}
    fuzzer = Fuzzer(options.url, options.key, **asked)
    sys.exit(0 if run(fuzzer, options.seconds, options.clients, options.pid) else 1)


if __name__ == "__main__":
    main()
