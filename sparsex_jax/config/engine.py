"""Memory and shapes of an engine: `EngineConfig`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from sparsex_jax.config.checks import (
    FLOATS,
    Count,
    Flag,
    Limit,
    Positive,
    Share,
    at_least,
    checked,
    is_int,
    is_number,
    one_of,
    require,
)

_DTYPES = ("auto", *FLOATS)
_QUANTIZED = ("fp8", "int8")
_STORE_TOKENS = 16384
MAX_ADAPTER_RANK = 128

_PAGES = Limit(lambda value: is_int(value) and value >= 8 and value % 8 == 0, "a multiple of 8")
_WEIGHTS = Limit(lambda value: value in _DTYPES, f"one of {', '.join((*_DTYPES, *_QUANTIZED))}")
_PART = Limit(lambda value: is_number(value) and 0 < value <= 1, "in (0, 1]")
_RANKS = Limit(
    lambda value: is_int(value) and value % 8 == 0 and 8 <= value <= MAX_ADAPTER_RANK,
    f"a multiple of 8, from 8 to {MAX_ADAPTER_RANK}",
)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Memory and shapes of an engine.

    Attributes:
      store_tokens: token slots of the KV store; a multiple of page_size, rounded up. None: 16384, or twice as many in
        fp8, which take the bytes of 16384 in 16 bits.
      page_size: tokens a page; a multiple of 8 (the index hashes windows of 8 tokens).
      dtype: of weights and activations. `auto` is resolved when the engine is made: float32 on a CPU;
        elsewhere the checkpoint's own if that is bfloat16 or float16, else bfloat16, as kernels take no float32.
        `fp8` and `int8` are short for a `quantization` of that name, with the dtype `auto`.
      quantization: of the weights that multiply rows; activations keep `dtype`. `stored`: as the checkpoint has them:
        fp8 and int8 of Hugging Face directories, Q4_0 to Q8_0, Q4_K, Q5_K and Q6_K of GGUF files. Products dequantise
        them. `none`: in `dtype`. `fp8` (e4m3), `int8`: rounded so when they are loaded, with a scale for each output;
        embeddings, the head and routers are not. `auto`: `stored` for fp8 and int8 on a GPU; else `none`, since others
        take less memory and more time.
      max_context: tokens of prompt and answer together, at most what the model takes; None: that. Models whose rotary
        frequencies depend on a length have them for this one (`ModelConfig.for_context`). A model with dynamic
        scaling takes more than it was trained with.
      kv_dtype: of the KV store. `auto`: as `dtype`. `fp8`: float8 e4m3 without scales, a quarter or half of the bytes.
        Keys and values are rounded to 4 significant bits, and what exceeds 448 becomes 448. All attention reads what
        was rounded, so prefixes stay exact, and what was found gives the answers of full recompute in fp8.
      max_num_seqs: sequences that are prefilled or decoded at once; the others wait. None: see `num_seqs_on`.
      max_prefill_seqs: sequences whose prompts share one prefill plan.
      prefill_tokens: token budget of a prefill plan: rows of a chunk of a long prompt, and of prompts that share a
        plan. None: what the second smallest plan holds, 4 times the rows that go through a layer at a time.
      chunk_rows: rows that go through a layer at a time; None takes what suits the platform.
      decode_steps: tokens generated per dispatch before the host looks, at most. Where some wait for its end, and where
        few take longer than the host's work for them, there are fewer.
      frozen_limit: share of the store that frozen texts may fill; more are refused. Requests have the rest of it, and
        what frozen texts do not take.
      max_pinned: share of what frozen texts leave of the store that pins may have; 0: nothing is pinned. Requests have
        the rest of it, and what pins do not take.
      max_waiting: requests of a server that may wait; more are refused.
      max_overtakes: how many younger sequences may pass one that waits for pages.
      healing: share of a server's idle time in which approximate KV is made exact, and remembered texts are made again
        in better company; 0 leaves both as they are.
      company_tokens: a text to remember is prefilled behind so many tokens at most of what its namespace has: the
        beginning of its prompts and other remembered texts. 0: alone.
      choose: how admission chooses between reusing what was found and computing it, where a request leaves that open
        (`ReuseConfig.only_if_faster`). `measured`: what takes less time, by a cost model that is fitted to the devices.
        It is measured when a request first finds something to reuse, for about a second on a small model, and kept in
        `~/.cache/sparsex-jax`. `always`: what was found is reused, and nothing is measured, so that results do not
        depend on a machine's speed.
      mirrors: store sequences that share segments as what sets them apart from each other. What was copied from a donor
        is let go of when pages are needed, and copied once more when it is found: between the turns of agents that read
        the same texts, the store holds several times as many. KV so stored is not healed. Off by default: where no
        texts are shared it saves nothing, and what is found again has to be copied again.
      max_adapters: LoRA adapters that can be loaded at once. The devices have that many slots for the weights of all
        layers, of which each product computes all, whether they are used or not: 8 slots of rank 16 add 5 % to the
        products of an 8B model, and take 0.7 GB in bfloat16. 0: none, and the compiled programs know of none.
      max_adapter_rank: the largest rank of an adapter, a multiple of 8, at most 128. Smaller ones take as much room.
        On GPUs, max_adapters * max_adapter_rank is filled up with zeros to a multiple of 64.
      share_adapters: let requests under different adapters share KV, where they ask for it (`sharing` of
        `Engine.generate`). Values are stored without what adapters add to them, and that beside them for all adapters
        at once, in max_adapters * max_adapter_rank numbers a token and layer: for three adapters of rank 8,
        SmolLM2-135M takes 6 % more bytes than for none, where three caches take 200 % more. Adapters on keys are
        refused then, and so are activated ones on values. Excludes mirrors and host_store_bytes, and with that the
        disk. With kv_dtype='fp8' keys and values are stored so, and what adapters add is not; on GPUs all attention is
        XLA's then, which is slower than the kernels.
      host_store_bytes: host memory for KV that sequences leave; what the store evicts is loaded from there. 0: none.
      disk_store: a directory for the same, beside host memory; an engine of the same model finds it after a restart.
      disk_store_bytes: how large it may become.
    """

    store_tokens: Positive = None  # type: ignore[assignment]  # an int once it is made
    page_size: Annotated[int, _PAGES] = 64
    dtype: Annotated[str, _WEIGHTS] = "auto"
    quantization: Annotated[str, one_of("auto", "none", "stored", *_QUANTIZED)] = "auto"
    max_context: Positive | None = None
    kv_dtype: Annotated[str, one_of("auto", "fp8")] = "auto"
    max_num_seqs: Positive | None = None
    max_prefill_seqs: Positive = 8
    prefill_tokens: Annotated[int, Limit(is_int, "an integer")] | None = None  # its limits depend on the model
    chunk_rows: Annotated[int, at_least(8)] | None = None
    decode_steps: Positive = 16
    frozen_limit: Annotated[float, _PART] = 0.5
    max_pinned: Share = 0.5
    max_waiting: Positive = 256
    max_overtakes: Count = 16
    healing: Share = 0.5
    company_tokens: Count = 0
    choose: Annotated[str, one_of("measured", "always")] = "measured"
    mirrors: Flag = False
    max_adapters: Count = 0
    max_adapter_rank: Annotated[int, _RANKS] = 16
    share_adapters: Flag = False
    host_store_bytes: Count = 0
    disk_store: str | None = None
    disk_store_bytes: Count = 0

    def __post_init__(self) -> None:
        if self.dtype in _QUANTIZED:
            self._take_quantization_from_dtype()
        if self.store_tokens is None:
            object.__setattr__(self, "store_tokens", _STORE_TOKENS * (2 if self.kv_dtype == "fp8" else 1))
        for name, value in checked(type(self), vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_disk()
        self._check_sharing()

    def _check_disk(self) -> None:
        has_disk = self.disk_store is not None
        require(has_disk == (self.disk_store_bytes > 0), "disk_store and disk_store_bytes go together")
        require(
            not has_disk or self.host_store_bytes > 0,
            "disk_store needs host_store_bytes: what is read from the disk passes through host memory",
        )

    def _check_sharing(self) -> None:
        """Raise InvalidRequestError where adapters are to share KV beside what cannot keep their part of it yet."""
        if not self.share_adapters:
            return
        excluded = {"mirrors=True": self.mirrors, f"host_store_bytes={self.host_store_bytes}": self.host_store_bytes}
        for said, is_on in excluded.items():
            require(not is_on, f"share_adapters=True excludes {said}, which does not keep what adapters add to values")

    def _take_quantization_from_dtype(self) -> None:
        agree = self.quantization in ("auto", self.dtype)
        require(agree, f"dtype={self.dtype!r} and quantization={self.quantization!r} are two kinds of weights")
        object.__setattr__(self, "quantization", self.dtype)
        object.__setattr__(self, "dtype", "auto")

    def resolved(self, platform: str, stored: str | None = None, in_numbers: bool = False) -> EngineConfig:
        """With a concrete dtype and quantization in place of `auto`.

        Args:
          platform: of the devices: cpu, gpu or tpu.
          stored: the dtype of the checkpoint's weights; None where it has none or they are quantised.
          in_numbers: whether the checkpoint has them as numbers of 8 bits.
        """
        half = stored if stored in ("bfloat16", "float16") else "bfloat16"
        dtype = "float32" if platform == "cpu" else half
        quantization = "stored" if in_numbers and platform == "gpu" else "none"
        return dataclasses.replace(
            self,
            dtype=dtype if self.dtype == "auto" else self.dtype,
            quantization=quantization if self.quantization == "auto" else self.quantization,
        )

    @property
    def store_dtype(self) -> str:
        """What the KV store is made of; `dtype` must be resolved."""
        return "float8_e4m3fn" if self.kv_dtype == "fp8" else self.dtype

    @property
    def num_pages(self) -> int:
        return -(-self.store_tokens // self.page_size)

    def num_seqs_on(self, platform: str) -> int:
        """How many sequences run at once on a platform: cpu, gpu or tpu.

        Decode reads all weights for each step, however many sequences share them, so an accelerator should decode as
        many as its store holds: one for every 1024 tokens of the store, 8 at least and 256 at most. A CPU computes
        where an accelerator reads, and gains little beyond 8.
        """
        if self.max_num_seqs is not None:
            return self.max_num_seqs
        return 8 if platform == "cpu" else min(max(self.store_tokens // 1024, 8), 256)
