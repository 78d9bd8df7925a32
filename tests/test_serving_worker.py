"""The worker: events from the loop's thread to asyncio, calls between steps, and ends of all kinds."""

import asyncio
import threading
import types

import pytest
from live import ScriptedLoop

from sparsex_jax import SamplingParams
from sparsex_jax.scheduler.loop import Event
from sparsex_jax.serving.worker import DrainingError, Job, TimeLimitError, Worker, WorkerError

HELLO = [Event("Hel", (1,)), Event("lo", (2, 3), finish_reason="stop")]
FOREVER = [Event("...", (1,)), None]


def job(*tokens):
    return Job(list(tokens or (1, 2)), SamplingParams())


def run(scenario, script=lambda prompt: HELLO):
    """Run an asynchronous scenario with a worker that steps a scripted loop."""
    loop = ScriptedLoop(script)
    worker = Worker(types.SimpleNamespace(loop=loop), loop).start()
    try:
        return asyncio.run(asyncio.wait_for(scenario(worker, loop), 30))
    finally:
        worker.stop()


async def collect(stream):
    async with stream:
        return [item async for item in stream]


def test_events_come_in_order_and_end_with_the_last():
    async def scenario(worker, loop):
        return await collect(worker.stream([job()]))

    assert run(scenario) == [(0, HELLO[0]), (0, HELLO[1])]


def test_events_of_several_jobs_carry_their_number():
    async def scenario(worker, loop):
        return await collect(worker.stream([job(1), job(2), job(3)]))

    items = run(scenario, lambda prompt: [Event(str(prompt), (1,), finish_reason="stop")])
    assert sorted((number, event.text) for number, event in items) == [(0, "[1]"), (1, "[2]"), (2, "[3]")]


def test_leaving_a_stream_cancels_what_is_not_done():
    async def scenario(worker, loop):
        async with worker.stream([job()]) as stream:
            await anext(stream)
        return loop.tickets[0].cancelled

    assert run(scenario, lambda prompt: FOREVER)


def test_a_cancelled_task_cancels_its_request():
    async def scenario(worker, loop):
        task = asyncio.create_task(collect(worker.stream([job()])))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled(), loop.tickets[0].cancelled

    assert run(scenario, lambda prompt: FOREVER) == (True, True)


def test_a_finished_request_is_not_cancelled():
    async def scenario(worker, loop):
        await collect(worker.stream([job()]))
        return loop.tickets[0].cancelled

    assert not run(scenario)


def test_if_one_job_is_refused_none_is_run():
    class Choosy(ScriptedLoop):
        def submit(self, prompt, *args, **kwargs):
            if prompt == [13]:
                raise ValueError("not this one")
            return super().submit(prompt, *args, **kwargs)

    async def scenario(worker):
        with pytest.raises(ValueError, match="not this one"):
            worker.stream([job(1), job(13)])
        await worker.drain(5)  # nothing is left open

    loop = Choosy(lambda prompt: FOREVER)
    worker = Worker(types.SimpleNamespace(loop=loop), loop).start()
    asyncio.run(scenario(worker))
    worker.stop()
    assert [ticket.cancelled for ticket in loop.tickets] == [True]


def test_a_time_limit_ends_a_stream():
    async def scenario(worker, loop):
        with pytest.raises(TimeLimitError, match=r"limit of 0\.05 s"):
            await collect(worker.stream([job()], limit_s=0.05))
        return loop.tickets[0].cancelled

    assert run(scenario, lambda prompt: FOREVER)


def test_calls_run_on_the_thread_that_steps():
    async def scenario(worker, loop):
        return await worker.call(threading.current_thread), await worker.call(lambda x, y: x + y, 1, y=2)

    thread, total = run(scenario)
    assert thread is not threading.current_thread()
    assert thread.name == "sparsex-loop"
    assert total == 3


def test_a_call_that_fails_fails_alone():
    async def scenario(worker, loop):
        with pytest.raises(KeyError):
            await worker.call(lambda: {}["absent"])
        return await collect(worker.stream([job()]))

    assert len(run(scenario)) == 2


def test_calls_run_while_requests_do():
    async def scenario(worker, loop):
        async with worker.stream([job()]) as stream:
            await anext(stream)
            return await worker.call(lambda: loop.stats.running)

    assert run(scenario, lambda prompt: FOREVER) == 1


def test_draining_refuses_what_is_new_and_waits_for_what_runs():
    release = threading.Event()

    def script(prompt):
        yield Event("a", (1,))
        release.wait(10)
        yield Event("b", (2,), finish_reason="stop")

    async def scenario(worker, loop):
        running = asyncio.create_task(collect(worker.stream([job()])))
        await asyncio.sleep(0.05)
        drained = asyncio.create_task(worker.drain(10))
        await asyncio.sleep(0.05)
        with pytest.raises(DrainingError):
            worker.stream([job()])
        assert not drained.done()
        assert not loop.holds
        release.set()
        await drained
        return await running

    assert [event.text for _, event in run(scenario, script)] == ["a", "b"]


def test_at_the_deadline_of_draining_the_rest_is_cancelled():
    async def scenario(worker, loop):
        running = asyncio.create_task(collect(worker.stream([job()])))
        await asyncio.sleep(0.05)
        await worker.drain(0.05)
        return await running

    assert run(scenario, lambda prompt: FOREVER)[-1][1].finish_reason == "cancelled"


def test_if_the_loop_breaks_all_requests_get_the_error():
    async def scenario(worker, loop):
        async with worker.stream([job()]) as stream:
            await anext(stream)
            loop.broken = RuntimeError("no more")
            worker.wake()
            with pytest.raises(WorkerError):
                await anext(stream)
        with pytest.raises(WorkerError):
            worker.stream([job()])
        with pytest.raises(WorkerError):
            await worker.call(int)
        return worker.failure

    assert str(run(scenario, lambda prompt: FOREVER)) == "no more"


def test_stopping_ends_the_thread_and_open_streams():
    async def scenario(worker, loop):
        async with worker.stream([job()]) as stream:
            await anext(stream)
            await asyncio.to_thread(worker.stop)
            with pytest.raises(WorkerError):
                await anext(stream)

    before = set(threading.enumerate())
    run(scenario, lambda prompt: FOREVER)
    assert "sparsex-loop" not in {thread.name for thread in set(threading.enumerate()) - before}
