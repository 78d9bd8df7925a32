"""`sparsex demo`: remembers documents one by one, then asks about them in one prompt that has them in another order.

Every method answers the same prompt from the same store. No method's KV is kept, so none finds another's.

Then the chat goes on with a second question, about another document. Some methods answer it, each in a namespace of its
own, where it has answered the first one and that is kept. All get the same prompt, which has full recompute's first
answer.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.documents import DOCUMENTS, FOLLOW_UP, INSTRUCTION, QUESTION, user_message
from sparsex_jax.cli.terminal import output, print_json, progress
from sparsex_jax.cli.tokenmap import legend, token_map
from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.eval.scores import kl_divergence
from sparsex_jax.reuse.methods import Excerpts, Full, Naive, Prefix, SparseX
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.output import Prefill

NAMESPACE = "demo"
FOLLOWED_UP = ("full", "prefix", "sparsex", "excerpt")
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


@dataclasses.dataclass(frozen=True, eq=False)
class Demo:
    """All that is shown.

    Attributes:
      sizes: the tokens of each text that was remembered.
      prompt: token ids of the first prompt.
      first, second: the methods' outcomes for the first question, and for the one that follows it.
    """

    sizes: dict[str, int]
    prompt: list[int]
    first: dict[str, Outcome]
    second: dict[str, Outcome]


def run(choice: EngineChoice, max_new_tokens: int, *, as_json: bool) -> None:
    engine = choice.load()
    with progress() as bar:
        demo = perform(engine, max_new_tokens, bar)
    if as_json:
        print_json(as_dict(choice.model, demo))
    else:
        show(engine, demo, output())


def perform(engine: Engine, max_new_tokens: int, bar: Progress) -> Demo:
    prompt = encode_chat(engine.tokenizer, first_message())
    methods = reuse_methods(engine.reuse)
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    sizes = remember_documents(engine, NAMESPACE, bar)
    first = run_methods(engine, prompt, methods, dict.fromkeys(methods, NAMESPACE), sampling, bar)
    followed = {name: methods[name] for name in FOLLOWED_UP}
    namespaces = ask_first(engine, prompt, followed, sampling, bar)
    next_prompt = encode_chat(engine.tokenizer, first_message(), first["full"].text, FOLLOW_UP)
    return Demo(sizes, prompt, first, run_methods(engine, next_prompt, followed, namespaces, sampling, bar))


def reuse_methods(default: ReuseConfig) -> dict[str, ReuseConfig]:
    """The methods to compare, by name. `full` must be among them, because the others are compared with it.

    Each does what its name says even where another way is faster, since the demo is to show what it does. The engine's
    default has the options that it has there.
    """
    methods: dict[str, ReuseConfig] = {
        method.method: method for method in (Full(), Prefix(), Naive(), SparseX(), Excerpts())
    }
    methods[default.method] = default
    return {name: method.updated(only_if_faster=False) for name, method in methods.items()}


FOOTNOTE = (
    "work: what was computed, as a share of all tokens in all layers; the rest came from the store or was left out. "
    "omitted: tokens of notes that were left out, since the question's tokens did not look at them. TTFT: time to the "
    f"first token, compiled, median of {REPEATS}. KL: of the next token's distribution to full's, in nats; an excerpt "
    "is another prompt, so its distribution differs even where its answer is the same."
)

# Answering -----------------------------------------------------------------------------------------------------


def first_message() -> str:
    """The documents and the question."""
    return f"{INSTRUCTION}\n\n{user_message()}"


def encode_chat(tokenizer: Any, *messages: str) -> list[int]:
    """The token ids of a chat in the model's template: messages of the user and answers, by turns."""
    return _encode(tokenizer, render(tokenizer, *messages))


def render(tokenizer: Any, *messages: str) -> str:
    """A chat in the template. Without a template, the messages."""
    if not tokenizer.chat_template:
        return "\n\n".join(messages)
    roles = itertools.cycle(("user", "assistant"))
    chat = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def remember_documents(engine: Engine, namespace: str, bar: Progress) -> dict[str, int]:
    """Remember the beginning of the prompt and the documents, as a server does: each behind some of those
    before it. Returns the number of tokens of each."""
    opening = render(engine.tokenizer, INSTRUCTION).partition(INSTRUCTION)[0] + INSTRUCTION
    texts = {"instruction": opening} | DOCUMENTS
    for text in bar.track(texts.values(), description="Remembering documents"):
        # Control tokens are what the beginning of a chat has.
        engine.remember(text, namespace=namespace, company=False, allow_control_tokens=True)
    return {name: len(_encode(engine.tokenizer, text)) for name, text in texts.items()}


def ask_first(
    engine: Engine, prompt: Sequence[int], methods: Mapping[str, ReuseConfig], sampling: SamplingParams, bar: Progress
) -> dict[str, str]:
    """Let each method that reuses KV answer in a namespace of its own, which keeps it. Returns the namespaces."""
    namespaces = {name: f"{NAMESPACE}, {name}" for name in methods}
    for name, reuse in methods.items():
        if not reuse.uses_prefix:
            continue
        remember_documents(engine, namespaces[name], bar)
        engine.generate(prompt, sampling, reuse=reuse, namespace=namespaces[name])
    return namespaces


def run_methods(
    engine: Engine,
    prompt: Sequence[int],
    methods: Mapping[str, ReuseConfig],
    namespaces: Mapping[str, str],
    sampling: SamplingParams,
    bar: Progress,
) -> dict[str, Outcome]:
    """Let every method answer, which also compiles. Then time the methods in turns, so that load slows all alike."""
    options: dict[str, Any] = {
        name: {"reuse": reuse, "namespace": namespaces[name], "keep": False} for name, reuse in methods.items()
    }
    texts = {
        name: engine.generate(prompt, sampling, **options[name]).text
        for name in bar.track(methods, description="Compiling and answering")
    }
    rounds = [
        {name: engine.prefill(prompt, **options[name]) for name in methods}
        for _ in bar.track(range(REPEATS), description="Timing prefills")
    ]
    return {name: _outcome(text, rounds[0]["full"], [each[name] for each in rounds]) for name, text in texts.items()}


def _outcome(text: str, full: Prefill, prefills: Sequence[Prefill]) -> Outcome:
    ttft_s = statistics.median(prefill.report.ttft_s for prefill in prefills)
    last = prefills[-1]
    return Outcome(text, kl_divergence(full.logits, last.logits), dataclasses.replace(last.report, ttft_s=ttft_s))


# Showing ----------------------------------------------------------------------------------------------------


def as_dict(model: str, demo: Demo) -> dict[str, Any]:
    return {
        "model": model,
        "question": QUESTION,
        "documents": [{"name": name, "tokens": tokens} for name, tokens in demo.sizes.items()],
        "methods": _as_dicts(demo.first),
        "follow_up": {"question": FOLLOW_UP, "methods": _as_dicts(demo.second)},
    }


def _as_dicts(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        name: {"text": outcome.text, "kl": outcome.kl} | outcome.report.to_dict() for name, outcome in outcomes.items()
    }


def show(engine: Engine, demo: Demo, console: Console) -> None:
    report = demo.first["excerpt"].report
    names = ", ".join(f"{name} ({tokens})" for name, tokens in demo.sizes.items())
    console.print(Text.assemble(("Remembered, each in the company of those before (tokens): ", "bold"), names))
    console.print(Text.assemble(("Asked, with the notes in another order: ", "bold"), QUESTION))
    console.print(_table(demo.first))
    console.print(Text(FOOTNOTE, style="dim"))
    console.print(Text.assemble(("\nAsked next, in the same chat: ", "bold"), FOLLOW_UP))
    console.print(_table(demo.second))
    console.print(Text("\nThe first prompt as excerpt saw it", style="bold"))
    console.print(token_map(engine.tokenizer, demo.prompt, report))
    console.print(legend(report))


def _table(outcomes: Mapping[str, Outcome]) -> Table:
    table = Table("method", title="", expand=True)
    for heading in ("work", "omitted", "TTFT", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("answer", ratio=1)
    for name, outcome in outcomes.items():
        report = outcome.report
        numbers = f"{report.computed_fraction:.0%}", f"{report.omitted_tokens}", f"{report.ttft_s:.2f} s"
        table.add_row(name, *numbers, f"{outcome.kl:.3f}", Text(outcome.text))
    return table
