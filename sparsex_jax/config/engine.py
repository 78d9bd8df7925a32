"""Memory and shapes of an engine: `EngineConfig`."""

from __future__ import annotations

import dataclasses

from sparsex_jax.config.checks import is_int, require

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Memory and shapes of an engine.

    Attributes:
      store_tokens: token slots of the KV store; a multiple of page_size, rounded up.
      page_size: tokens a page; a multiple of 8 (the index hashes windows of 8 tokens).
      dtype: of weights, activations and the KV store. `auto` is resolved when the engine is made: float32 on a CPU;
        elsewhere the checkpoint's own if that is bfloat16 or float16, else bfloat16, as kernels take no float32.
      max_batch: requests in one plan.
      chunk_rows: rows that go through a layer at a time; None takes what suits the platform.
      decode_steps: tokens generated per dispatch before the host looks.
      frozen_limit: share of the store that pinned and frozen pages may fill before frozen entries go.
    """

    store_tokens: int = 16384
    page_size: int = 64
    dtype: str = "auto"
    max_batch: int = 8
    chunk_rows: int | None = None
    decode_steps: int = 16
    frozen_limit: float = 0.9

    def __post_init__(self) -> None:
        require(self.dtype in _DTYPES, f"dtype={self.dtype!r} must be one of {', '.join(_DTYPES)}")
        for name in ("store_tokens", "page_size", "max_batch", "decode_steps"):
            value = getattr(self, name)
            require(is_int(value) and value >= 1, f"{name}={value!r} must be an integer >= 1")
        require(self.page_size % 8 == 0, f"page_size={self.page_size} must be a multiple of 8")
        require(
            self.chunk_rows is None or (is_int(self.chunk_rows) and self.chunk_rows >= 8),
            f"chunk_rows={self.chunk_rows!r} must be an integer >= 8 or None",
        )
        require(0 < self.frozen_limit <= 1, f"frozen_limit={self.frozen_limit!r} must be in (0, 1]")

    def resolved(self, platform: str, stored: str | None = None) -> EngineConfig:
        """With a concrete dtype in place of `auto`.

        Args:
          platform: of the devices: cpu, gpu or tpu.
          stored: the dtype of the checkpoint's weights; None where it has none or they are quantised.
        """
        half = stored if stored in ("bfloat16", "float16") else "bfloat16"
        dtype = "float32" if platform == "cpu" else half
        return dataclasses.replace(self, dtype=dtype) if self.dtype == "auto" else self

    @property
    def num_pages(self) -> int:
        return -(-self.store_tokens // self.page_size)
