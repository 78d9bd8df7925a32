"""The engine that a command's options ask for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.checkpoints.adapters import stated_rank
from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig, find_defaults
from sparsex_jax.config.checks import require
from sparsex_jax.config.defaults import Defaults
from sparsex_jax.config.engine import MAX_ADAPTER_RANK
from sparsex_jax.config.membership import Membership
from sparsex_jax.device.compilation import keep_on_disk
from sparsex_jax.engine import Engine
from sparsex_jax.model.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class EngineChoice:
    """The model to load, and how.

    Attributes:
      model, reuse, reuse_options, generation_config: as `Engine.from_pretrained` takes them.
      config: as it takes its fields, but for the slots of adapters, which those below decide.
      tensor_parallel: how many devices the mesh has.
      adapters: what they are loaded from, by name.
      max_adapters: None: as many as are named.
      max_adapter_rank: None: as large as theirs, and 16 at least.
      membership: None: there is one process.
    """

    model: str
    config: EngineConfig
    tensor_parallel: int = 1
    reuse: ReuseConfig | Path | None = None
    reuse_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: str = "auto"
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_adapters: int | None = None
    max_adapter_rank: int | None = None
    membership: Membership | None = None

    def defaults(self, model: ModelConfig) -> Defaults:
        """How the engine reuses KV where a request does not say, and why."""
        company = self.config.company_tokens > 0
        return find_defaults(self.model, model, self.reuse, company=company, options=self.reuse_options)

    def load(self) -> Engine:
        keep_on_disk()
        mesh, (slots, rank) = make_mesh(self.tensor_parallel), self.adapter_slots
        config = dataclasses.replace(self.config, max_adapters=slots, max_adapter_rank=rank)
        return Engine.from_pretrained(  # which shows what it loads
            self.model,
            mesh=mesh,
            reuse=self.reuse,
            reuse_options=self.reuse_options,
            generation_config=self.generation_config,
            adapters=self.adapters,
            **dataclasses.asdict(config),
        )

    def in_words(self) -> dict[str, str]:
        """Every option but the membership, by name: what all processes of a group must have alike."""
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        said |= dataclasses.asdict(said.pop("config"))
        return {name: str(value) for name, value in said.items() if name != "membership"}

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
