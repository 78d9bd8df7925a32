"""`sparsex cache`: shows what a prompt would reuse. It needs a tokenizer but no weights, so it takes a second."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsex_jax.cache import Match, PageCache, Segment
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.cli.generate import prefill_line
from sparsex_jax.cli.inputs import as_prompt, read_prompt, read_text
from sparsex_jax.cli.terminal import output, print_json, waiting
from sparsex_jax.cli.tokenmap import legend, token_map
from sparsex_jax.config import EngineConfig, ReuseConfig, find_defaults
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.reuse.methods import method_of
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.reuse.report import Report, make_report
from sparsex_jax.reuse.schedule import Phase
from sparsex_jax.text.chat import document
from sparsex_jax.text.encoding import encode


@dataclasses.dataclass(frozen=True, eq=False)
class DryRun:
    """What a prefill would reuse and compute.

    Attributes:
      cache: holds the files as donors.
      names: the file of each handle.
      match: what the lookup found.
      prompt: the prompt, with those of the segments that the method pastes.
      report: as of a prefill, without the tokens of `chosen` and without times.
      chosen: how many reused tokens the method will recompute by their scores. Which ones, only the model can tell.
    """

    cache: PageCache
    names: dict[int, str]
    match: Match
    prompt: PromptMap
    report: Report
    chosen: str


def run(
    prompt: str,
    model: str,
    files: Sequence[Path],
    reuse: Mapping[str, Any],
    reuse_config: Path | None,
    *,
    store_tokens: int,
    namespace: str,
    chat: bool | None,
    as_json: bool,
) -> None:
    """Look the prompt up, and print what was found.

    Args:
      files: texts to remember first, each alone.
      reuse: options that override those of the file.
      reuse_config: a file of options. None: as `find_defaults`.
    """
    config = EngineConfig(store_tokens=store_tokens)
    if not namespace:
        raise InvalidRequestError("namespace='' must be a non-empty string")
    text, donors = read_prompt(prompt), [read_text(path) for path in files]
    with waiting(f"Reading the tokenizer of {model}"):
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer
        settings = find_defaults(model, checkpoint.config, reuse_config).reuse.updated(**reuse)
    cache = PageCache(config.num_pages, config.page_size, config.frozen_limit)
    names = {}
    for path, donor in zip(files, donors, strict=True):
        tokens = encode(document(donor, tokenizer), tokenizer, checkpoint.config, add_special_tokens=False)
        names[remember(cache, tokens, namespace)] = path.name
    tokens = encode(as_prompt(text, tokenizer, chat), tokenizer, checkpoint.config, add_special_tokens=True)
    dry = look_up(cache, names, tokens, namespace, settings, checkpoint.config.num_layers)
    if as_json:
        print_json(as_dict(dry))
    else:
        show(dry, tokenizer, output())


def remember(cache: PageCache, tokens: np.ndarray, namespace: str) -> int:
    """Remember a text as `Engine.remember` does, but without computing its KV. Returns the handle."""
    match = cache.lookup(tokens, namespace, segments=False)
    own = cache.allocate(-(-len(tokens) // cache.page_size) - len(match.prefix_pages))
    cache.share(match.prefix_pages)
    cache.unpin(match)
    pages = [*match.prefix_pages, *own]
    cache.commit(pages, tokens, namespace, exact_tokens=len(tokens))
    handle = cache.register(pages, len(tokens), namespace, frozen=False)
    cache.release(pages)
    return handle


def look_up(
    cache: PageCache, names: dict[int, str], tokens: np.ndarray, namespace: str, reuse: ReuseConfig, num_layers: int
) -> DryRun:
    """Find what the prompt can reuse, and plan the prefill as the method does."""
    method = method_of(reuse)
    match = cache.lookup(
        tokens,
        namespace,
        prefix=method.uses_prefix,
        segments=method.uses_segments,
        min_segment=method.min_segment_tokens,
        accepts=functools.partial(method.accepts, num_layers=num_layers),
    )
    prompt, phases = method.lay_out(PromptMap.of(tokens, match), num_layers)
    after_boundary = phases[min(1, len(phases) - 1)]
    report = make_report(prompt, phases, num_layers, 0.0)
    cache.unpin(match)
    return DryRun(cache, names, match, prompt, report, _chosen(after_boundary))


def _chosen(phase: Phase) -> str:
    """How many tokens a phase's signal chooses: a number, or two where that depends on the scores; empty for none."""
    least, most = phase.budget, phase.most_chosen
    return f"{least} to {most}" if most > least else str(least or "")


def as_dict(dry: DryRun) -> dict[str, Any]:
    """The report's fields, the entries and the cache's stats. No prefill ran, so `ttft_s` is None."""
    return dry.report.to_dict() | {
        "ttft_s": None,
        "entries": [dataclasses.asdict(entry) | {"name": dry.names[entry.handle]} for entry in dry.cache.entries()],
        "stats": dataclasses.asdict(dry.cache.stats()),
    }


def show(dry: DryRun, tokenizer: Any, console: Console) -> None:
    """Print tables of the donors and segments, and the prompt in colours."""
    console.print(_entry_table(dry))
    console.print(_segment_table(dry))
    console.print(token_map(tokenizer, dry.prompt.tokens.tolist(), dry.report))
    console.print()
    console.print(legend(dry.report))
    console.print(Text(prefill_line(dry.report), style="dim"))
    if dry.chosen:
        note = f"The model's scores will choose {dry.chosen} of the active tokens; the colours do not show which."
        console.print(Text(note, style="dim"))


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
        part = "segment" if segment in dry.prompt.segments else "not pasted"
        table.add_row(part, str(segment.start), str(segment.length), _donor(dry, page), _positions(segment))
    return table


def _positions(segment: Segment) -> str:
    return f"{segment.donor_start}-{segment.donor_start + segment.length - 1}"


def _donor(dry: DryRun, page: int) -> str:
    """The first entry that has the page (files that begin alike share pages), if no later file evicted it."""
    handles = [entry.handle for entry in dry.cache.entries() if page in entry.pages]
    return f"{handles[0]} ({dry.names[handles[0]]})" if handles else "evicted in part"
