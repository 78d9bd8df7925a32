"""`sparsex generate`: remembers files, then generates text from one prompt, or from several that are a round."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from sparsex_jax.checkpoints.adapters import stated_rank
from sparsex_jax.cli.inputs import as_prompt, read_prompt, read_text
from sparsex_jax.cli.processes import follow, follows, opened
from sparsex_jax.cli.terminal import output, print_json, progress, waiting
from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig, Round, SamplingParams, find_defaults
from sparsex_jax.config.checks import require
from sparsex_jax.config.defaults import Defaults
from sparsex_jax.config.engine import MAX_ADAPTER_RANK
from sparsex_jax.config.membership import Membership
from sparsex_jax.device.compilation import keep_on_disk
from sparsex_jax.engine import Engine
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.reuse.report import Report
from sparsex_jax.scheduler.output import Generation

ROUND = "prompts"  # the id of the round of all prompts


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """The model to load, and the engine's options."""

    model: str
    dtype: str
    store_tokens: int | None
    reuse: ReuseConfig | Path | None = None  # as for `Engine.from_pretrained`, and so are the next two
    reuse_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kv_dtype: str = EngineConfig.kv_dtype
    generation_config: str = "auto"
    tensor_parallel: int = 1
    max_num_seqs: int | None = EngineConfig.max_num_seqs
    max_prefill_seqs: int = EngineConfig.max_prefill_seqs
    quantization: str = EngineConfig.quantization
    max_waiting: int = EngineConfig.max_waiting
    healing: float = EngineConfig.healing
    company_tokens: int = EngineConfig.company_tokens
    max_context: int | None = EngineConfig.max_context
    frozen_limit: float = EngineConfig.frozen_limit
    max_pinned: float = EngineConfig.max_pinned
    mirrors: bool = EngineConfig.mirrors
    host_store_bytes: int = EngineConfig.host_store_bytes
    disk_store: str | None = EngineConfig.disk_store
    disk_store_bytes: int = EngineConfig.disk_store_bytes
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what they are loaded from, by name
    max_adapters: int | None = None  # None: as many as are named
    max_adapter_rank: int | None = None  # None: as large as theirs, and 16 at least
    share_adapters: bool = EngineConfig.share_adapters
    membership: Membership | None = None  # None: there is one process

    def defaults(self, model: ModelConfig) -> Defaults:
        """How the engine reuses KV where a request does not say, and why."""
        company = self.company_tokens > 0
        return find_defaults(self.model, model, self.reuse, company=company, options=self.reuse_options)

    def load(self) -> Engine:
        keep_on_disk()
        mesh, (slots, rank) = make_mesh(self.tensor_parallel), self.adapter_slots
        return Engine.from_pretrained(  # which shows what it loads
            self.model,
            mesh=mesh,
            reuse=self.reuse,
            reuse_options=self.reuse_options,
            generation_config=self.generation_config,
            dtype=self.dtype,
            quantization=self.quantization,
            kv_dtype=self.kv_dtype,
            store_tokens=self.store_tokens,
            max_num_seqs=self.max_num_seqs,
            max_prefill_seqs=self.max_prefill_seqs,
            max_waiting=self.max_waiting,
            healing=self.healing,
            company_tokens=self.company_tokens,
            max_context=self.max_context,
            frozen_limit=self.frozen_limit,
            max_pinned=self.max_pinned,
            mirrors=self.mirrors,
            host_store_bytes=self.host_store_bytes,
            disk_store=self.disk_store,
            disk_store_bytes=self.disk_store_bytes,
            adapters=self.adapters,
            max_adapters=slots,
            max_adapter_rank=rank,
            share_adapters=self.share_adapters,
        )

    @property
    def adapter_slots(self) -> tuple[int, int]:
        """How many adapters can be loaded, and their largest rank, a multiple of 8. Reads those that are named.

        Raises InvalidRequestError if they are too many, or one's rank is too large.
        """
        named = len(self.adapters)
        slots = named if self.max_adapters is None else self.max_adapters
        require(named <= slots, f"max_adapters={slots} must be {named} at least, since so many adapters are named")
        return slots, self._adapter_rank()

    def _adapter_rank(self) -> int:
        """The largest rank that adapters may have: as asked, or what those that are named need."""
        ranks = {name: stated_rank(source) for name, source in self.adapters.items()}
        most = self.max_adapter_rank or MAX_ADAPTER_RANK
        for name, rank in ranks.items():
            require(rank <= most, f"adapter {name!r} has rank {rank}, and max_adapter_rank={most} is the limit")
        needed = [-(-rank // 8) * 8 for rank in ranks.values()]
        return self.max_adapter_rank or max([EngineConfig.max_adapter_rank, *needed])


def run(
    prompts: Sequence[str],
    choice: EngineChoice,
    files: Sequence[Path],
    sampling: Mapping[str, Any],
    *,
    namespace: str,
    chat: bool | None,
    as_json: bool,
) -> None:
    """Remember the files, generate, and print the answers. What `sampling` lacks is as the model's files say.

    With an adapter, all prompts have it; with several, each prompt has its own.
    """
    SamplingParams(**sampling)  # an error comes before the model is loaded
    if follows(choice):
        return follow(choice)
    adapters = _adapters(choice, len(prompts))
    texts, donors = [read_prompt(prompt) for prompt in prompts], [read_text(path) for path in files]
    with opened(choice) as (engine, _):
        for adapter in dict.fromkeys(adapters):
            remember_all(engine, donors, namespace, adapter)
        with waiting("Generating"):
            given = [as_prompt(text, engine.tokenizer, chat) for text in texts]
            together = Round(ROUND, len(given)) if len(given) > 1 else None
            options: dict[str, Any] = {"namespace": namespace, "round": together, "adapter": adapters}
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
