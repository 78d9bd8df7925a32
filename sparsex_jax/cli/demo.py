"""`sparsex demo`: remembers documents one by one, then asks about them in one prompt that has them in another order.

Every method answers the same prompt from the same store. No method's KV is kept, so none finds another's.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sparsex_jax.cli.documents import DOCUMENTS, INSTRUCTION, QUESTION, user_message
from sparsex_jax.cli.generate import EngineChoice
from sparsex_jax.cli.terminal import output, print_json, progress
from sparsex_jax.cli.tokenmap import legend, token_map
from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.eval.scores import kl_divergence
from sparsex_jax.reuse.methods import Full, Naive, Prefix, SparseX
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.output import Prefill

NAMESPACE = "demo"
REPEATS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """One method's answer and figures.

    Attributes:
      text: the greedy answer.
      kl: KL divergence of its next-token distribution from that of full recompute, in nats.
      report: of its last prefill, with the median `ttft_s` of all its prefills.
    """

    text: str
    kl: float
    report: Report


def run(choice: EngineChoice, max_new_tokens: int, *, as_json: bool) -> None:
    engine = choice.load()
    prompt = encode_prompt(engine.tokenizer)
    methods = reuse_methods(engine.model.num_layers)
    with progress() as bar:
        sizes = remember_documents(engine, bar)
        outcomes = run_methods(engine, prompt, methods, max_new_tokens, bar)
    if as_json:
        print_json(as_dict(choice.model, sizes, outcomes))
    else:
        show(engine, prompt, sizes, outcomes, output())


def reuse_methods(num_layers: int) -> dict[str, ReuseConfig]:
    """The methods to compare, by name; they reuse what they find even if that is slower. `full` must be among them,
    because the others are compared with it."""
    methods = {
        "full": Full(),
        "prefix": Prefix(),
        "naive": Naive(),
        "sparsex": SparseX(),
        "sparsex-2": _two_boundaries(num_layers),
    }
    return {name: reuse.updated(only_if_faster=False) for name, reuse in methods.items()}


def _two_boundaries(num_layers: int) -> SparseX:
    return SparseX(recompute_ratio=0.3, second_boundary=2 * num_layers // 3)


# Answering -----------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any) -> list[int]:
    """The token ids of the documents and the question, in the model's chat template."""
    return _encode(tokenizer, render(tokenizer, f"{INSTRUCTION}\n\n{user_message()}"))


def render(tokenizer: Any, message: str) -> str:
    """A user's message in the chat template. Without a template, the message itself."""
    if not tokenizer.chat_template:
        return message
    messages = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def remember_documents(engine: Engine, bar: Progress) -> dict[str, int]:
    """Remember the beginning of the prompt and the documents, each alone. Returns the number of tokens of each."""
    opening = render(engine.tokenizer, INSTRUCTION).partition(INSTRUCTION)[0] + INSTRUCTION
    texts = {"instruction": opening} | DOCUMENTS
    for text in bar.track(texts.values(), description="Remembering documents"):
        engine.remember(text, namespace=NAMESPACE)
    return {name: len(_encode(engine.tokenizer, text)) for name, text in texts.items()}


def run_methods(
    engine: Engine, prompt: Sequence[int], methods: dict[str, ReuseConfig], max_new_tokens: int, bar: Progress
) -> dict[str, Outcome]:
    """Let every method answer, which also compiles. Then time the methods in turns, so that load slows all alike."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    texts = {
        name: engine.generate(prompt, sampling, reuse=reuse, namespace=NAMESPACE, keep=False).text
        for name, reuse in bar.track(methods.items(), description="Compiling and answering")
    }
    rounds = [
        {name: engine.prefill(prompt, reuse=r, namespace=NAMESPACE, keep=False) for name, r in methods.items()}
        for _ in bar.track(range(REPEATS), description="Timing prefills")
    ]
    return {name: _outcome(text, rounds[0]["full"], [each[name] for each in rounds]) for name, text in texts.items()}


def _outcome(text: str, full: Prefill, prefills: Sequence[Prefill]) -> Outcome:
    ttft_s = statistics.median(prefill.report.ttft_s for prefill in prefills)
    last = prefills[-1]
    return Outcome(text, kl_divergence(full.logits, last.logits), dataclasses.replace(last.report, ttft_s=ttft_s))


# Showing ----------------------------------------------------------------------------------------------------


def as_dict(model: str, sizes: dict[str, int], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    return {
        "model": model,
        "question": QUESTION,
        "documents": [{"name": name, "tokens": tokens} for name, tokens in sizes.items()],
        "methods": {
            name: {"text": outcome.text, "kl": outcome.kl} | outcome.report.to_dict()
            for name, outcome in outcomes.items()
        },
    }


def show(
    engine: Engine, prompt: Sequence[int], sizes: dict[str, int], outcomes: dict[str, Outcome], console: Console
) -> None:
    report = outcomes["sparsex"].report
    names = ", ".join(f"{name} ({tokens})" for name, tokens in sizes.items())
    console.print(Text.assemble(("Remembered, each alone (tokens): ", "bold"), names))
    console.print(Text.assemble(("Asked, with the notes in another order: ", "bold"), QUESTION))
    console.print(_table(outcomes))
    console.print(Text(_footnote(engine.model.num_layers), style="dim"))
    console.print(Text("\nThe prompt as sparsex saw it", style="bold"))
    console.print(token_map(engine.tokenizer, prompt, report))
    console.print(legend(report))


def _table(outcomes: dict[str, Outcome]) -> Table:
    table = Table("method", title="", expand=True)
    for heading in ("active", "work", "TTFT", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("answer", ratio=1)
    for name, outcome in outcomes.items():
        report = outcome.report
        numbers = f"{report.active_tokens}", f"{report.computed_fraction:.0%}", f"{report.ttft_s:.2f} s"
        table.add_row(name, *numbers, f"{outcome.kl:.3f}", Text(outcome.text))
    return table


def _footnote(num_layers: int) -> str:
    second = _two_boundaries(num_layers)
    return (
        "active: tokens computed from the boundary layer on. work: token-layers computed, of all. TTFT: time to the "
        f"first token, compiled, median of {REPEATS}. KL: of the next token's distribution to full, in nats. "
        f"sparsex-2: {second.recompute_ratio:.0%} recomputed, and from layer {second.second_boundary} of {num_layers} "
        "on fresh tokens only."
    )
