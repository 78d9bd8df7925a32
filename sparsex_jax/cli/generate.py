"""`sparsex generate`: remembers files, then generates text from one prompt, or from several that are a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from sparsex_jax.cli.choice import EngineChoice
from sparsex_jax.cli.inputs import as_prompt, read_prompt, read_text
from sparsex_jax.cli.options import Donors
from sparsex_jax.cli.processes import follow, follows, opened
from sparsex_jax.cli.terminal import output, print_json, progress, waiting
from sparsex_jax.config import Round, SamplingParams
from sparsex_jax.config.checks import require
from sparsex_jax.engine import Engine
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.output import Generation

ROUND = "prompts"  # the id of the round of all prompts


def run(
    prompts: Sequence[str],
    choice: EngineChoice,
    donors: Donors,
    sampling: Mapping[str, Any],
    *,
    as_json: bool,
) -> None:
    """Remember the files, generate, and print the answers. What `sampling` lacks is as the model's files say.

    With an adapter, all prompts have it; with several, each prompt has its own.
    """
    SamplingParams(**sampling)  # an error comes before the model is loaded
    if follows(choice):
        return follow(choice)
    adapters = _adapters(choice, len(prompts))
    texts, remembered = [read_prompt(prompt) for prompt in prompts], [read_text(path) for path in donors.files]
    with opened(choice) as (engine, _):
        for adapter in dict.fromkeys(adapters):
            remember_all(engine, remembered, donors.namespace, adapter)
        with waiting("Generating"):
            given = [as_prompt(text, engine.tokenizer, donors.chat) for text in texts]
            together = Round(ROUND, len(given)) if len(given) > 1 else None
            options: dict[str, Any] = {"namespace": donors.namespace, "round": together, "adapter": adapters}
            results = engine.generate_batch(given, engine.default_sampling(**sampling), **options)
        _print(results, as_json)


def _adapters(choice: EngineChoice, number: int) -> list[str | None]:
    """The adapter of each prompt. Raises InvalidRequestError if it cannot be told."""
    names = list(choice.adapters)
    if len(names) <= 1:
        return [next(iter(names), None)] * number
    said = f"{len(names)} are named for {number} prompts; there must be one for all of them, or one for each"
    require(len(names) == number, f"adapter: {said}")
    return [*names]


def remember_all(engine: Engine, texts: Sequence[str], namespace: str, adapter: str | None = None) -> None:
    with progress() as bar:
        for text in bar.track(texts, description="Remembering"):
            engine.remember(text, namespace=namespace, adapter=adapter)


def _print(results: Sequence[Generation], as_json: bool) -> None:
    """As JSON, one answer is the object, and several are its `answers`."""
    if as_json:
        answers = [_as_dict(result) for result in results]
        print_json({"answers": answers} if len(answers) > 1 else answers[0])
        return
    for result in results:
        output().print(result.text, soft_wrap=True)
        output().print(Text(report_line(result.report), style="dim"), soft_wrap=True)


def _as_dict(result: Generation) -> dict[str, Any]:
    answer = {"text": result.text, "token_ids": result.token_ids, "finish_reason": result.finish_reason}
    return answer | result.report.to_dict()


def report_line(report: Report) -> str:
    """What was found and computed of a prompt, and the time to the first token."""
    return f"{prefill_line(report)}; first token after {report.ttft_s:.2f} s"


def prefill_line(report: Report) -> str:
    """How many tokens of a prompt were found, and how many are computed."""
    tiers = f" ({report.tiers_in_words()})" if report.tiers_in_words() else ""
    return (
        f"{report.in_words()}; {len(report.segments)} segments{tiers}; {report.active_tokens} active from layer "
        f"{report.boundary_layer} on, {report.computed_fraction:.0%} computed"
    )
