"""Measures the host's work for a decode step: the serving loop, with devices that are done at once.

    JAX_PLATFORMS=cpu python scripts/bench_host.py [--sequences 64] [--context 8192] [--steps 4 16] [--profile]

Loop, admission, sampling arrays, detokenizers and the way of a batch to the device are the real ones; decode and
prefill return random tokens and compute nothing. So what is left is the time in which a device would wait for the host,
unless it has work meanwhile. Told are milliseconds a step: of a round of the loop, by the tokens that its dispatch
brings each sequence (--steps: few while somebody waits for a prefill, else 16). They are means over rounds in which no
sequence comes or goes. Prompts differ in length, so that in most rounds some sequence gets a page.

    round              all of it
    before decode      its part ahead of the dispatch
    behind decode      its part behind the dispatch: news, counts, and who is next
    idle               what a device waits from the end of a dispatch to the start of the next, where it takes
                       --step-ms for a token: a clock stands in for it. Each dispatch is sent once the host has done
                       all that came of the one before it
    idle, sent ahead   the same where the next dispatch is sent before the tokens of this one are there, in which case
                       it has 4 tokens, or 2 where these take 8 ms

The idle times are means over dispatches of a token's share. The clock counts what the thread of the loop computes, and
what it waits for the device: other work on the machine does not count.

With text, by SmolLM2's tokenizer, or for callers who take token ids. --profile prints where the time goes. Writes
`host-<device>.json` to `scripts/results`.
"""

import argparse
import contextlib
import cProfile
import gc
import itertools
import math
import pstats
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from sparsex_jax import Engine, ModelConfig, ReuseConfig, SamplingParams
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.device.decode import DecodeState
from sparsex_jax.device.runner import PrefillRun, Runner
from sparsex_jax.device.sampling import Sampled, Sampling
from sparsex_jax.eval.arguments import count, positive
from sparsex_jax.eval.results import provenance, write_rows
from sparsex_jax.scheduler import policy
from sparsex_jax.scheduler.sequence import State, ignore

RESULTS = Path(__file__).resolve().parent / "results"
TOKENIZER = "smollm2-135m-instruct"
MODEL = ModelConfig(
    vocab_size=49152,  # the tokenizer's
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_q_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position=16384,
)
SETTLING, MEASURED = 4, 40  # rounds


@jax.jit
def _pass_on(params: Any, state: DecodeState, steps: jax.Array) -> DecodeState:
    """What it costs to call a program with all that decode takes."""
    return state


class Instant(Runner):
    """A runner that computes nothing, and says of each decode when it was dispatched."""

    dispatched = 0.0

    def start_decode(self, state: DecodeState, steps: int, *first: Any) -> tuple[DecodeState, Sampled]:
        state = _pass_on(self.params, self.place(state, *first), self._numbers[steps])
        self.dispatched = time.thread_time()
        tokens = np.full((len(state.token), self.engine.decode_steps), -1, np.int32)
        tokens[:, :steps] = _TOKENS.integers(3, self.model.vocab_size, (len(tokens), steps))
        return state, Sampled(tokens, None)

    def advance(self, run: PrefillRun, layers: int | None = None) -> jax.Array:
        run.next_layer = self.model.num_layers
        run.logits = jnp.zeros((len(run.plan.page_tables), 1))
        return run.logits

    def are_finite(self, logits: jax.Array) -> np.ndarray:
        return np.ones(len(logits), bool)

    def first_tokens(self, logits: jax.Array, sampling: Sampling, position: np.ndarray) -> Sampled:
        return Sampled(np.full((len(logits), 1), 3, np.int32), None)


_TOKENS = np.random.default_rng(0)


class Clock:
    """The time that this thread would see if it had the machine for itself: what it computes, and what it waits for a
    device. Nothing really waits."""

    def __init__(self) -> None:
        self._waited = 0.0

    def perf_counter(self) -> float:
        return time.thread_time() + self._waited

    def wait_until(self, at: float) -> None:
        self._waited += max(at - self.perf_counter(), 0)


class Late:
    """An array that a device computes until some time. A thread that reads it earlier waits until then."""

    def __init__(self, array: np.ndarray, at: float, clock: Clock) -> None:
        self._array, self._at, self._clock = array, at, clock

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self._clock.wait_until(self._at)
        return self._array


class Paced(Instant):
    """A runner whose device takes some time for each token, and notes how long it waits for each dispatch.

    Attributes:
      clock: by which it does.
      step_seconds: for one token of all sequences.
      idle: of each dispatch, seconds a token.
    """

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.clock, self.step_seconds, self.idle = Clock(), 0.0, list[float]()
        self._done_at = 0.0

    def start_decode(self, state: DecodeState, steps: int, *first: Any) -> tuple[DecodeState, Sampled]:
        state, sampled = super().start_decode(state, steps, *first)
        now = self.clock.perf_counter()
        self.idle.append(max(now - self._done_at, 0) / steps)
        self._done_at = max(now, self._done_at) + steps * self.step_seconds
        late: Any = Late(np.asarray(sampled.token), self._done_at, self.clock)
        return state, Sampled(late, None)


class Round(NamedTuple):
    """One round of the loop, in seconds."""

    whole: float
    before: float


def engine_with(
    sequences: int, context: int, steps: int, tokenizer: Any | None, runner: type[Runner] = Instant
) -> Engine:
    """An engine in which this number of sequences decode, each behind a prompt of its own."""
    new = (3 * sequences + SETTLING + MEASURED) * steps  # the first decode while the others are prefilled
    with mock.patch("sparsex_jax.engine.Runner", runner):
        engine = Engine.from_config(
            MODEL,
            dtype="float32",
            store_tokens=(sequences + 1) * (context + sequences + new + 128),
            max_num_seqs=sequences,
            decode_steps=steps,
            prefill_tokens=MODEL.max_position,  # whole prompts
            choose="always",
        )
    engine.tokenizer = tokenizer
    rng = np.random.default_rng(1)
    sampling = SamplingParams(new, temperature=0.7, top_p=0.9, ignore_eos=True)
    for more in range(sequences):
        prompt = rng.integers(3, MODEL.vocab_size, context + more)
        engine.loop.submit(prompt, sampling, reuse=ReuseConfig("prefix"), listener=ignore)
    for _ in range(2 * sequences):
        engine.loop.step()
    return engine


def rounds(engine: Engine, number: int) -> Iterator[Round]:
    runner = engine.runner
    assert isinstance(runner, Instant)
    for _ in range(number):
        began = time.thread_time()
        engine.loop.step()
        yield Round(time.thread_time() - began, runner.dispatched - began)


def idle_seconds(options: argparse.Namespace, steps: int, tokenizer: Any | None) -> Iterator[float]:
    """What a device waits for each token, one dispatch after the other and with dispatches that are sent ahead."""
    for least in (math.inf, policy.ROUND_SECONDS):
        with mock.patch.object(policy, "ROUND_SECONDS", least):
            engine = engine_with(options.sequences, options.context, steps, tokenizer, Paced)
            runner = engine.runner
            assert isinstance(runner, Paced)
            runner.step_seconds = options.step_ms / 1e3
            # Sent at once: the clock stands still while the loop would wait for the right moment.
            at_once = mock.patch("sparsex_jax.scheduler.loop.LEAD_SECONDS", math.inf)
            with mock.patch("sparsex_jax.scheduler.execution.time", runner.clock), at_once:
                gc.collect()  # before any device is at work
                gc.freeze()
                list(rounds(engine, SETTLING))
                runner.idle.clear()
                list(rounds(engine, MEASURED))
            yield statistics.mean(runner.idle)


def rows(options: argparse.Namespace, steps: int, text: bool) -> list[dict[str, Any]]:
    """The rows of one case."""
    tokenizer = open_checkpoint(TOKENIZER).tokenizer if text else None
    with mock.patch.object(policy, "ROUND_SECONDS", math.inf):  # one dispatch after the other
        engine = engine_with(options.sequences, options.context, steps, tokenizer)
        list(rounds(engine, SETTLING))
        gc.collect()
        gc.freeze()  # as `sparsex serve` does
        with profiled(options.profile):
            measured = list(rounds(engine, MEASURED))
    decoding = len(engine.loop.policy.of_state(State.DECODING))
    if decoding < options.sequences:
        raise RuntimeError(f"only {decoding} of {options.sequences} sequences decoded in all rounds")
    work = f"{options.sequences} x {options.context}, {steps} tokens a dispatch, {'text' if text else 'token ids'}"
    whole, before = (1e3 * statistics.mean(each) / steps for each in zip(*measured, strict=True))
    idle, ahead = (1e3 * seconds for seconds in idle_seconds(options, steps, tokenizer))
    parts = {"round": whole, "before decode": before, "behind decode": whole - before}
    parts |= {"idle": idle, "idle, sent ahead": ahead}
    return [
        {"work": work, "implementation": name, "figure": float(f"{figure:.4g}"), "unit": "ms a step"}
        for name, figure in parts.items()
    ]


@contextlib.contextmanager
def profiled(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with cProfile.Profile() as profile:
        yield
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sequences", type=count, default=64, help="that decode together")
    add("--context", type=count, default=8192, help="tokens of the shortest prompt")
    add("--steps", type=count, nargs="+", default=[4, 16], help="tokens of each sequence in a dispatch")
    add("--step-ms", type=positive, default=5.0, help="what the device takes for a token, where its idle time is told")
    add("--profile", action="store_true", help="print the functions that take most; it slows all down")
    options = parser.parse_args(arguments)
    write_rows({"bench": "host"} | provenance(), all_rows(options), folder)


def all_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for steps, text in itertools.product(options.steps, (False, True)):
        found = rows(options, steps, text)
        told = ", ".join(f"{row['implementation']} {row['figure']:.3f}" for row in found)
        print(f"{found[-1]['work']}: {told} ms a step", flush=True)
        yield from found


if __name__ == "__main__":
    run_script(main)
