"""`sparsex cache`: shows what a prompt would reuse. It needs a tokenizer but no weights, so it takes a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsex_jax.cache import Entry, Match, PageCache, Segment
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.cli.generate import prefill_line
from sparsex_jax.cli.inputs import as_prompt, read_prompt, read_text
from sparsex_jax.cli.options import Donors
from sparsex_jax.cli.terminal import output, print_json, waiting
from sparsex_jax.cli.tokenmap import legend, token_map
from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig, find_defaults
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.excerpt import Excerpt, Probe
from sparsex_jax.reuse.methods import method_of
from sparsex_jax.reuse.planner import RequestPlan
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_jax.reuse.report import Report, make_report, report_of_excerpt
from sparsex_jax.reuse.schedule import Phase
from sparsex_jax.scheduler import choice
from sparsex_jax.text.chat import document
from sparsex_jax.text.encoding import encode, turns_of
from sparsex_jax.text.messages import said_digest


@dataclasses.dataclass(frozen=True, eq=False)
class DryRun:
    """What a prefill would reuse and compute.

    Attributes:
      cache: holds the files as donors.
      names: the file of each handle.
      match: what the lookup found.
      prompt: the prompt, with those of the segments that the method pastes.
      report: as of a prefill, without the tokens of `chosen` and without times. Where a probe comes first, all that it
        may leave out counts as omitted, and the least that it keeps of that as computed.
      chosen: how many reused tokens the method will recompute by their scores. Which ones, only the model can tell.
      probe: what a probe decides about, which only the model can tell either. None: there is none.
    """

    cache: PageCache
    names: dict[int, str]
    match: Match
    prompt: PromptMap
    report: Report
    chosen: str
    probe: Probe | None


def run(
    prompt: str,
    model: str,
    donors: Donors,
    reuse: Mapping[str, Any],
    reuse_config: Path | None,
    *,
    store_tokens: int | None,
    as_json: bool,
) -> None:
    """Look the prompt up, and print what was found.

    Args:
      donors: texts to remember first, each alone.
      reuse: options that override those of the file.
      reuse_config: a file of options. None: as `find_defaults`.
    """
    config = EngineConfig(store_tokens=store_tokens)  # type: ignore[arg-type]
    namespace, files = donors.namespace, donors.files
    if not namespace:
        raise InvalidRequestError("namespace='' must be a non-empty string")
    text, texts = read_prompt(prompt), [read_text(path) for path in files]
    with waiting(f"Reading the tokenizer of {model}"):
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer
        settings = find_defaults(model, checkpoint.config, reuse_config, options=reuse).reuse
    cache = PageCache(config.num_pages, config.page_size, config.frozen_limit)
    names = {}
    for path, donor in zip(files, texts, strict=True):
        tokens = encode(document(donor, tokenizer), tokenizer, checkpoint.config, add_special_tokens=False)
        names[remember(cache, tokens, namespace, said_digest(donor))] = path.name
    asked = as_prompt(text, tokenizer, donors.chat)
    tokens, turns = encode(asked, tokenizer, checkpoint.config, add_special_tokens=True), turns_of(asked)
    dry = look_up(cache, names, tokens, namespace, settings, checkpoint.config, turns)
    if as_json:
        print_json(as_dict(dry))
    else:
        show(dry, tokenizer, output())


def remember(cache: PageCache, tokens: np.ndarray, namespace: str, said: bytes | None = None) -> int:
    """Remember a text as `Engine.remember` does, but without computing its KV. Returns the handle."""
    match = cache.lookup(tokens, namespace, segments=False)
    own = cache.allocate(-(-len(tokens) // cache.page_size) - len(match.prefix_pages))
    cache.share(match.prefix_pages)
    cache.let_go(match)
    pages = [*match.prefix_pages, *own]
    cache.commit(pages, tokens, namespace, exact_tokens=len(tokens))
    handle = cache.register(pages, len(tokens), namespace, frozen=False, said=said)
    cache.release(pages)
    return handle


def look_up(
    cache: PageCache,
    names: dict[int, str],
    tokens: np.ndarray,
    namespace: str,
    reuse: ReuseConfig,
    model: ModelConfig,
    turns: frozenset[bytes],
) -> DryRun:
    """Find what the prompt can reuse, and plan the prefill or the probe as an engine does that knows no speeds."""
    method = method_of(reuse).fitted(model.windows)
    match = choice.look_up(cache, tokens, namespace, method, model.num_layers, counted=True)
    plan = choice.Choice(model, cache.page_size, None).plan(
        tokens, match, method, lambda: cache.remembered(tokens, namespace, turns)
    )
    cache.let_go(match)
    report, after_boundary = _report(plan, model.num_layers), plan.phases[min(1, len(plan.phases) - 1)]
    return DryRun(cache, names, match, plan.prompt, report, _chosen(after_boundary), plan.probe)


def _report(plan: RequestPlan, num_layers: int) -> Report:
    prompt, probe = plan.prompt, plan.probe
    if probe is None:
        return make_report(prompt, plan.phases, num_layers, 0.0)
    kept = probe.piece < 0
    kind = np.where(prompt.kind == TokenKind.PREFIX, TokenKind.PREFIX, TokenKind.FRESH)[kept].astype(np.uint8)
    answer = PromptMap(prompt.tokens[kept], kind)
    answered = make_report(answer, (Phase(0, answer.computed),), num_layers, 0.0)
    report = report_of_excerpt(prompt, Excerpt(kept, 0.0, probe.end_layer), answered, num_layers)
    least = probe.least_tokens
    return dataclasses.replace(
        report,
        active_tokens=report.active_tokens + least,
        computed_fraction=report.computed_fraction + least / len(prompt),
        confidence=None,
    )


def _chosen(phase: Phase) -> str:
    """How many tokens a phase's signal chooses: a number, or two where that depends on the scores; empty for none."""
    least, most = phase.budget, phase.most_chosen
    return f"{least} to {most}" if most > least else str(least or "")


def as_dict(dry: DryRun) -> dict[str, Any]:
    """The report's fields, the entries and the cache's stats. No prefill ran, so `ttft_s` is None."""
    return dry.report.to_dict() | {
        "ttft_s": None,
        "probe": _probe_as_dict(dry.probe),
        "entries": [_entry_as_dict(entry) | {"name": dry.names[entry.handle]} for entry in dry.cache.entries()],
        "stats": dataclasses.asdict(dry.cache.stats()),
    }


def _entry_as_dict(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(entry).items() if name != "said"}


def _probe_as_dict(probe: Probe | None) -> dict[str, int] | None:
    if probe is None:
        return None
    layers = {"first_layer": probe.first_layer, "end_layer": probe.end_layer}
    return {"pieces": probe.num_pieces, "tokens": probe.num_tokens, "least_tokens": probe.least_tokens} | layers


def show(dry: DryRun, tokenizer: Any, console: Console) -> None:
    """Print tables of the donors and segments, and the prompt in colours."""
    console.print(_entry_table(dry))
    console.print(_segment_table(dry))
    console.print(token_map(tokenizer, dry.prompt.tokens.tolist(), dry.report))
    console.print()
    console.print(legend(dry.report))
    console.print(Text(prefill_line(dry.report), style="dim"))
    if note := _note(dry):
        console.print(Text(note, style="dim"))


def _note(dry: DryRun) -> str:
    """What only the model can tell."""
    probe = dry.probe
    if probe is not None:
        return (
            f"A probe of {probe.end_layer} layers will keep some of the {probe.num_tokens} omitted tokens, in "
            f"{probe.num_pieces} pieces, {probe.least_tokens} at least. The colours do not show which."
        )
    if dry.chosen:
        return f"The model's scores will choose {dry.chosen} of the active tokens; the colours do not show which."
    return ""


def _entry_table(dry: DryRun) -> Table:
    table = Table("handle", "file", "tokens", "pages", title="Remembered", title_justify="left")
    for entry in dry.cache.entries():
        pages = ", ".join(map(str, entry.pages))
        table.add_row(str(entry.handle), dry.names[entry.handle], str(entry.num_tokens), pages)
    return table


def _segment_table(dry: DryRun) -> Table:
    table = Table("part", "start", "length", "donor", "donor positions", title="Found", title_justify="left")
    prefix = dry.match.num_prefix_tokens
    if prefix:
        table.add_row("prefix", "0", str(prefix), _donor(dry, dry.match.pages[0]), f"0-{prefix - 1}")
    for segment in dry.match.segments:
        page = int(segment.slots[0]) // dry.cache.page_size
        pasted = any(segment.start == each.start for each in dry.prompt.segments)
        part = "segment" if pasted else "not pasted"
        table.add_row(part, str(segment.start), str(segment.length), _donor(dry, page), _positions(segment))
    return table


def _positions(segment: Segment) -> str:
    return f"{segment.donor_start}-{segment.donor_start + segment.length - 1}"


def _donor(dry: DryRun, page: int) -> str:
    """The first entry that has the page (files that begin alike share pages), if no later file evicted it."""
    handles = [entry.handle for entry in dry.cache.entries() if page in entry.pages]
    return f"{handles[0]} ({dry.names[handles[0]]})" if handles else "evicted in part"
