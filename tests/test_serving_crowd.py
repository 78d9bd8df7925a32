"""Four times as many clients as the server can serve, of several kinds. Each is answered or refused; no page leaks.

The rate that the server sustains is measured first, so that the overload is the same on any machine.
"""

import asyncio
import collections
import time

import httpx
import numpy as np
import pytest
from live import live_server, make_engine, wait_for

from sparsex_jax.scheduler import warmup

OVERLOAD = 4
NUMBER = 500
# What clients do, and how many of them. The first two wait for their answers, and alone come at the rate above.
MANNERS = {"patient": 0.35, "streams": 0.25, "leaves": 0.2, "nonsense": 0.15, "keeps": 0.05}
NONSENSE = (b"{}", b'{"prompt": ""}', b'{"prompt": 5}', b"{nope", b'{"prompt": "x", "max_tokens": 0}', b"\xff" * 100)
LEFT = 0  # the client did not wait for a status


class Crowd:
    """Clients by number. A client with the same number always does the same."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def sustained(self, number: int, at_once: int) -> float:
        """Answers a second if all clients are patient and `at_once` of them ask at the same time."""
        gate = asyncio.Semaphore(at_once)

        async def ask(client: int) -> None:
            async with gate:
                assert await self.patient(self._rng(client)) == 200

        started = time.perf_counter()
        await asyncio.gather(*[ask(client) for client in range(number)])
        return number / (time.perf_counter() - started)

    async def come(self, number: int, rate: float) -> list[int]:
        """The statuses of `number` clients that arrive at random times, whether or not earlier ones have finished."""
        tasks = []
        for gap in self._rng(-1).exponential(1 / rate, number):
            await asyncio.sleep(gap)
            tasks.append(asyncio.create_task(self._client(len(tasks))))
        return await asyncio.gather(*tasks)

    async def _client(self, client: int) -> int:
        rng = self._rng(client)
        manner = rng.choice(list(MANNERS), p=list(MANNERS.values()))
        return await getattr(self, manner)(rng)

    def _rng(self, client: int) -> np.random.Generator:
        return np.random.default_rng([7, client + 1])

    async def patient(self, rng: np.random.Generator) -> int:
        return self._checked(await self._http.post("/v1/completions", json=self._body(rng)))

    async def streams(self, rng: np.random.Generator) -> int:
        async with self._http.stream("POST", "/v1/completions", json=self._body(rng) | {"stream": True}) as answer:
            text = (await answer.aread()).decode()
        if answer.status_code == 200:
            assert text.endswith("data: [DONE]\n\n")
            assert '"error"' not in text
        return self._checked(answer)

    async def leaves(self, rng: np.random.Generator) -> int:
        """A client that disconnects after its first tokens, or while it waits for them."""
        body = self._body(rng) | {"stream": True, "max_tokens": 400, "ignore_eos": True}
        try:
            async with asyncio.timeout(None if rng.random() < 0.5 else rng.random()):
                async with self._http.stream("POST", "/v1/completions", json=body) as answer:
                    if answer.status_code != 200:
                        await answer.aread()
                        return self._checked(answer)
                    await anext(answer.aiter_lines())
        except TimeoutError:
            pass
        return LEFT

    async def nonsense(self, rng: np.random.Generator) -> int:
        content = NONSENSE[rng.integers(len(NONSENSE))]
        headers = {"Content-Type": "application/json"}
        return self._checked(await self._http.post("/v1/completions", content=content, headers=headers))

    async def keeps(self, rng: np.random.Generator) -> int:
        """A client that inserts knowledge and deletes it, which fails with 404 if it was evicted meanwhile."""
        answer = await self._http.post("/v1/knowledge", json={"text": self._body(rng)["prompt"]})
        if answer.status_code == 200:
            deleted = await self._http.delete(f"/v1/knowledge/{answer.json()['handle']}")
            assert deleted.status_code in (200, 404)
        return self._checked(answer)

    def _checked(self, answer: httpx.Response) -> int:
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
        assert (answer.status_code in (429, 503)) == ("Retry-After" in answer.headers)
        return answer.status_code

    def _body(self, rng: np.random.Generator) -> dict:
        """A request whose prompt is a new token and then a few of six passages, in any order."""
        prompt = [rng.integers(10, 40_000, 1)]
        for passage in rng.permutation(6)[: rng.integers(1, 6)]:
            prompt.append(np.random.default_rng(passage).integers(10, 40_000, 90))
        return {
            "prompt": np.concatenate(prompt).tolist(),
            "max_tokens": int(rng.integers(1, 40)),
            "reuse": {"method": str(rng.choice(["full", "prefix", "naive", "sparsex"]))},
            "keep": bool(rng.random() < 0.7),
        }


async def overload(url: str) -> collections.Counter[int]:
    """How many clients of the crowd got each status."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        crowd = Crowd(http)
        sustained = await crowd.sustained(60, at_once=8)
        rate = OVERLOAD * sustained / (MANNERS["patient"] + MANNERS["streams"])
        statuses = collections.Counter(await crowd.come(NUMBER, rate))
        print(f"sustained {sustained:.1f}/s, the crowd came at {rate:.1f}/s: {dict(statuses)}")
    return statuses


@pytest.mark.slow
def test_an_overload_is_answered_or_refused_and_leaks_no_page():
    engine = make_engine(max_waiting=12)
    for step in warmup.steps(engine.loop):
        step()
    with live_server(engine) as live:
        statuses = asyncio.run(overload(live.url))
        with live.http() as http:
            wait_for(lambda: http.get("/v1/store").json()["active"] == 0)
            assert http.get("/health").json() == {"status": "ok"}
            assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
            figures = http.get("/metrics").text
        stats = live.worker.loop.stats
    assert statuses.total() == NUMBER
    assert set(statuses) <= {LEFT, 200, 400, 429, 503}
    assert all(statuses[status] for status in (LEFT, 200, 400, 503))
    assert (stats.waiting, stats.running, stats.failed) == (0, 0, 0)
    assert "sparsex_running_requests 0.0" in figures
    assert "sparsex_queue_requests 0.0" in figures
    assert 'sparsex_compilations_total{when="listening"} 0.0' in figures
    engine.cache.check(held=[])
    engine.cache.clear()
    assert engine.stats()["free"] == engine.stats()["pages"]
