"""The serving loop in the open: requests go in, text streams out, and each says what it reused.

    uv run python scripts/serve.py                    # a few questions about the same documents, all at once
    uv run python scripts/serve.py - < prompts.txt    # one prompt a line

`sparsex serve` is the same loop behind OpenAI's HTTP endpoints.
"""

from __future__ import annotations

import argparse
import sys
import time

from sparsex_jax import Engine, InvalidRequestError, OverloadedError, SamplingParams
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.engines import add_tensor_parallel
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.loop import Event, Loop

DOCUMENTS = (
    "The observatory on the hill was built in 1894. Its dome opens with the code 3615, which the keeper writes on a "
    "slate behind the stove every evening. The telescope was made in Leipzig, and it still follows the stars by a "
    "clockwork that has to be wound at nine.",
    "The ferry leaves the old harbour at seven, at noon and at six. In winter there is no boat at noon, since the "
    "captain repairs nets then. A ticket is four crowns, and bicycles travel for one. Dogs go free if they are quiet.",
    "The bakery on Mill Street closes on Tuesdays. Rye bread comes out of the oven at half past five, and the first "
    "loaf is for the night watchman, who has paid for it every morning since the flood, in coins of the old mint.",
)
QUESTIONS = (
    ((0, 1), "What is the code of the dome?"),
    ((2, 0), "When does the bakery close?"),
    ((1, 2, 0), "What does a ticket for the ferry cost?"),
    ((2, 1), "Who gets the first loaf?"),
)


class Printer:
    """Prints what becomes of one request."""

    def __init__(self, name: str) -> None:
        self.name, self.text, self.started = name, "", time.perf_counter()

    def __call__(self, event: Event) -> None:
        self.text += event.text
        if event.report is not None:
            self.say(reuse_of(event.report))
        if event.text:
            self.say(f"...{event.text!r}")
        if event.finish_reason is not None:
            elapsed = time.perf_counter() - self.started
            self.say(f"{event.finish_reason} after {elapsed:.2f} s: {event.error or self.text.strip()!r}")

    def say(self, line: str) -> None:
        print(f"[{self.name}] {line}", flush=True)


def reuse_of(report: Report) -> str:
    return f"{report.in_words()}; {report.computed_fraction:.0%} computed, first token after {report.ttft_s:.2f} s"


def built_in_prompts() -> list[str]:
    """Questions behind documents, in another order each time."""
    return ["\n\n".join(DOCUMENTS[number] for number in numbers) + f"\n\n{ask}" for numbers, ask in QUESTIONS]


def submit(loop: Loop, prompts: list[str], sampling: SamplingParams) -> None:
    """All of them. What cannot be taken is said, and the others go on."""
    for number, text in enumerate(prompts, start=1):
        messages = [{"role": "user", "content": text}]
        try:
            loop.submit(messages, sampling, namespace="serve", listener=Printer(str(number)))
        except (InvalidRequestError, OverloadedError) as error:
            print(f"[{number}] refused: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="- reads prompts from stdin, one a line")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--store-tokens", type=int, default=16384)
    add_tensor_parallel(parser)
    options = parser.parse_args()

    prompts = [line.strip() for line in sys.stdin if line.strip()] if options.source == "-" else built_in_prompts()
    mesh = make_mesh(options.tensor_parallel)
    engine = Engine.from_pretrained(options.model, mesh=mesh, store_tokens=options.store_tokens)
    loop = engine.loop
    submit(loop, prompts, SamplingParams(max_new_tokens=options.max_new_tokens))
    while loop.step():  # one round: decode, admit, prefill; a server would go on for ever, with loop.wait between
        pass
    stats = loop.stats
    print(
        f"{stats.finished} finished, {stats.generated_tokens} new tokens. Of {stats.prompt_tokens} prompt tokens "
        f"{stats.prefix_tokens} prefix, {stats.approximate_prefix_tokens} approximate prefix, {stats.reused_tokens} "
        f"reused, {stats.recomputed_tokens} recomputed: {stats.computed_fraction:.0%} computed."
    )


if __name__ == "__main__":
    run_script(main)
