r"""The engine: a model, its KV store, and the serving loop that takes every call and every request through the same
steps.

The way of `token_ids`, function by function:

    Engine.generate                          HTTP: serving.app.completions
      generate_batch                           Stream.submit, Job.submit
        Requests.generation                      Loop.submit, Requests.generation
        Loop.complete                          Worker._run, on the worker's thread
                      \                         /
                       Loop.step, round by round
                         _take_in                    from the inbox to the sequences that wait
                         Policy.prefill_batch
                           Admission.admit           PageCache.lookup, Choice.plan, Method.phases -> RequestPlan, pages;
                                                     Loading.load: what lower tiers have of it
                           chunks.stages             the plan in chunks
                         Execution.prefill
                           Runner.begin              plan_prefill; align: `align_and_copy` of what is reused
                           Runner.advance            prefill: `write_kv`, `paged_attention`, `key_mass`
                           Runner.first_tokens       sample_step
                         Policy.decode_batch         pages for the tokens to come
                         Execution.start_decode
                           Runner.start_decode       decode: `write_kv`, `paged_attention`, sample_step
                         Policy.steps_ahead          whether the next dispatch needs what this one brings; if not,
                         Execution.start_ahead       it is sent first, and so is a prefill (`Execution.send_prefill`)
                         Loop._take                  Output.take: text; Admission.commit: others can find it
                         Loop._report                Event to the listener
      Generation                               Stream -> serving.openai

`prefill` and `remember` are sequences without new tokens, and go the same way as far as `Runner.first_tokens`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, cast

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from sparsex_jax.cache import Entry, Forgotten, Match, PageCache, PinState
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.checkpoints.adapters import read_adapter
from sparsex_jax.checkpoints.names import model_title
from sparsex_jax.config import (
    EngineConfig,
    ModelConfig,
    Pin,
    ReuseConfig,
    Round,
    SamplingParams,
    find_defaults,
    named_config,
)
from sparsex_jax.config.checks import is_int, is_number, require
from sparsex_jax.config.generation import GENERATION_CONFIGS
from sparsex_jax.device.adapters import check_room
from sparsex_jax.device.link import Link
from sparsex_jax.device.restorer import Restorer
from sparsex_jax.device.runner import Runner
from sparsex_jax.device.speeds import speeds_for
from sparsex_jax.errors import InvalidRequestError, UnknownHandleError
from sparsex_jax.model.adapters import AdapterWeights
from sparsex_jax.model.matrices import random_quantised
from sparsex_jax.model.sharding import TENSOR_AXIS, check_mesh, make_mesh, on_mesh
from sparsex_jax.model.store import check_range
from sparsex_jax.model.weights import Params, random_params
from sparsex_jax.reuse.cost import Speeds
from sparsex_jax.reuse.methods import method_of
from sparsex_jax.reuse.pace import Pace
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_jax.scheduler import sequence
from sparsex_jax.scheduler.adapters import Adapter, Adapters
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.loading import Loading
from sparsex_jax.scheduler.loop import Loop
from sparsex_jax.scheduler.mirroring import Mirroring
from sparsex_jax.scheduler.output import Generation, Prefill
from sparsex_jax.scheduler.pinning import Pinning
from sparsex_jax.scheduler.restoring import Restoring
from sparsex_jax.scheduler.rounds import Member
from sparsex_jax.scheduler.sequence import DEFAULT_NAMESPACE
from sparsex_jax.scheduler.tiers import make_tiers
from sparsex_jax.text.encoding import Prompt

log = logging.getLogger(__name__)

AdapterSource = str | Path | AdapterWeights

LINK_BYTES_PER_S = 20e9  # between a device and host memory, until it is known


class Engine:
    """A model, a KV store and an index of what is in it.

    A call steps the engine's loop on the caller's thread until its own sequences are done; sequences that were
    submitted to the loop go on meanwhile. An engine serves one thread: where a server's worker steps the loop, that is
    the worker's.

    Attributes:
      model: as given, for contexts of `EngineConfig.max_context`.
      config, mesh: as given.
      loop: takes sequences through admission, prefill and decode.
      admission: what sequences hold, and what can be found (host).
      runner: parameters and store (device).
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        tokenizer: Any | None = None,
        *,
        config: EngineConfig | None = None,
        mesh: Mesh | None = None,
        reuse: ReuseConfig | None = None,
        sampling: Mapping[str, Any] | None = None,
        adapters: Mapping[str, AdapterSource] | None = None,
    ) -> None:
        """
        Args:
          params: as `weights.describe(model)`, placed on the mesh.
          tokenizer: a transformers tokenizer, or None for an engine that takes and gives token ids only.
          mesh: with an axis `tensor`; one device by default.
          reuse: what a call does that names no `reuse` of its own.
          sampling: fields of `SamplingParams` that are this model's own defaults, for `default_sampling`.
          adapters: by name, as `load_adapter` takes them. Where `EngineConfig.max_adapters` is 0, there are as many
            slots as these.

        Raises:
          InvalidRequestError: the model does not fit the mesh or the store, or an adapter does not fit the model.
        """
        self.sampling, adapters = dict(sampling or {}), _adapters_by_name(adapters)
        self.mesh = check_mesh(mesh or make_mesh(), model)
        config = config or EngineConfig()
        _check_processes(config, self.mesh)
        config = dataclasses.replace(config, max_adapters=config.max_adapters or len(adapters))
        require(
            config.max_adapters > 0 or not config.share_adapters,
            "share_adapters needs max_adapters above 0, or adapters",
        )
        self.config = _with_dtype_of(params, config, self.mesh)
        check_range(params, self.config)
        if self.config.kv_dtype == "fp8" and _platform(self.mesh) == "cpu":
            log.warning("kv_dtype='fp8' is slow on a CPU, which converts the whole store for each row that is written")
        self.model = model = model.for_context(self.config.max_context)
        check_room(model, self.config, self.mesh)
        self.runner = Runner(model, self.config, params, self.mesh)
        as_computed = on_mesh(model, self.mesh)
        self.admission = Admission(as_computed, self.config, self._speeds if self.config.choose == "measured" else None)
        if self.config.mirrors:
            self.admission.mirroring = Mirroring(self.runner)
        if self.config.host_store_bytes:
            self._add_tiers()
        self.loop = Loop(self.runner, self.admission, tokenizer, reuse or ReuseConfig())
        try:
            for name, source in adapters.items():
                self.load_adapter(name, source)
        except BaseException:
            self.close()  # others may have the disk
            raise

    def _add_tiers(self) -> None:
        link = Link(self.model, self.config, self.mesh)
        tiers = self.admission.tiers = make_tiers(self.runner, link, self.admission.mirroring)
        loading = self.admission.loading = Loading(tiers, self.runner, link)
        self.admission.restoring = Restoring(tiers, loading, lambda: self._restorer(link), self.config.page_size)

    def _restorer(self, link: Link) -> Restorer:
        each_has_its_own = LINK_BYTES_PER_S * self.mesh.shape[TENSOR_AXIS]
        pace = Pace(self.admission.choice.speeds, each_has_its_own, known=False)
        return Restorer(self.runner, link, pace)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        mesh: Mesh | None = None,
        reuse: ReuseConfig | str | Path | None = None,
        reuse_options: Mapping[str, Any] | None = None,
        generation_config: str = "auto",
        adapters: Mapping[str, AdapterSource] | None = None,
        **options: Any,
    ) -> Engine:
        """Load a model: `smollm2-135m-instruct`, a GGUF file (any part of one in parts), a Hugging Face directory, a
        converted one, or a model on the Hugging Face hub: `Qwen/Qwen3-8B`, `OWNER/NAME@REVISION`,
        `OWNER/NAME-GGUF:q4_k_m`. A path that exists wins over a name. See `checkpoints.open_checkpoint`.

        Args:
          reuse: what a call does that names no `reuse` of its own; a path is that of a file which `sparsex calibrate`
            wrote. None: `sparsex.json` in the model's directory, or else the calibration of the same architecture that
            comes with this package, or else the built-in default. The log says which (level INFO).
          reuse_options: a method, or options, that win over that.
          generation_config: `auto`: what the model's `generation_config.json` says of sampling, or its GGUF file, is
            what `default_sampling` gives. `none`: it is not, and the defaults of `SamplingParams` hold.
          adapters: LoRA adapters by name: directories as PEFT writes them, or names on the hub. They are read before
            the model's weights. Otherwise as in the constructor.
          options: fields of `EngineConfig`, such as dtype and store_tokens.

        Raises:
          UnknownModelError, UnsupportedModelError: there is no such model, or not of a family that runs here.
          HubError: the model is a name on the hub, and cannot be fetched.
          InvalidRequestError: an option or the file is wrong, or the model does not divide over the mesh.
        """
        config = EngineConfig(**options)
        require(
            generation_config in GENERATION_CONFIGS,
            f"generation_config={generation_config!r} must be one of {', '.join(GENERATION_CONFIGS)}",
        )
        checkpoint = open_checkpoint(source)
        tokenizer = checkpoint.tokenizer  # before the weights, which take longer
        sampling = dict(checkpoint.sampling) if generation_config == "auto" else {}
        log.info("Sampling by default: %s", sampling or "as SamplingParams says")
        company = config.company_tokens > 0
        defaults = find_defaults(source, checkpoint.config, reuse, company=company, options=reuse_options)
        _check_layers(defaults.reuse, checkpoint.config)
        log.info("%s", defaults)
        mesh = check_mesh(mesh or make_mesh(), checkpoint.config)
        _check_processes(config, mesh)
        config = config.resolved(_platform(mesh), checkpoint.dtype, checkpoint.in_numbers)
        named = {
            name: _read_adapter(each, checkpoint.config, model_title(source))
            for name, each in _adapters_by_name(adapters).items()
        }
        _check_adapters(named, checkpoint.config, config, mesh)
        params = checkpoint.load_params(config.dtype, mesh, config.quantization)
        about: dict[str, Any] = {"reuse": defaults.reuse, "sampling": sampling, "adapters": named}
        return cls(checkpoint.config, params, tokenizer, config=config, mesh=mesh, **about)

    @classmethod
    def from_config(
        cls, model: str | ModelConfig, *, seed: int = 0, mesh: Mesh | None = None, **options: Any
    ) -> Engine:
        """Random weights of a named configuration (`configs/models`) or of one given: for performance work."""
        config = EngineConfig(**options)
        model = named_config(model) if isinstance(model, str) else model
        mesh = check_mesh(mesh or make_mesh(), model)
        config = config.resolved(_platform(mesh))
        about = model, config.dtype, mesh
        if config.quantization in ("none", "stored"):
            params = random_params(*about, seed)
        else:
            params = random_quantised(*about, config.quantization, seed)
        return cls(model, params, config=config, mesh=mesh)

    def _speeds(self) -> Speeds:
        return speeds_for(self.runner, self.admission.lend)

    # What callers do ----------------------------------------------------------------------------------------

    def default_sampling(self, **fields: Any) -> SamplingParams:
        """These fields, and for the others the model's own defaults, then those of `SamplingParams`."""
        return SamplingParams(**{**self.sampling, **fields})

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        keep: bool = True,
        pin: Pin | None = None,
        round: Round | None = None,
        adapter: str | None = None,
        sharing: str = "isolated",
    ) -> Generation:
        """Generate from text, token ids or chat messages, reusing what the namespace has stored.

        Args:
          sampling: None: `default_sampling()`. A `SamplingParams` holds as it is: its defaults are not the model's.
          prompt: a `Chat` has tools, documents and more beside its messages. Texts such as `<|im_end|>` are control
            tokens in a prompt that is text, and texts in messages.
          reuse: how; None: as the engine was told when it was made.
          keep: prompt and answer become donors, so that later prompts of the namespace can reuse them.
          pin: prompt and answer stay in the store for a time. `Generation.pin` says whether they do: all pins together
            have at most `EngineConfig.max_pinned` of it.
          round: hold the prompt until all members of its round are there, or one has waited enough. Where no other
            thread submits others to the loop, nobody comes, and `generate_batch` is what is wanted.
          adapter: the name of a loaded one, which acts on prompt and answer. Its KV is found by prompts with the same
            adapter only. An activated one acts from its invocation sequence on, where that is in the prompt: what
            stands before it is the base model's, for all to find. `Report.adapter` says on how many tokens it acted.
            None: the base model alone.
          sharing: what it finds of others' work, where `EngineConfig.share_adapters` is on. `isolated`: nothing, and
            its answers are exact. `pre_lr`: what all wrote that ask for `pre_lr` or `refresh`, with its own part of
            values in place of the writer's. `refresh`: the same, but as segments, which the method of `reuse` repairs:
            sparsex, which it has where `reuse` is None and the engine's own repairs nothing, computes again what the
            new tokens look at most. `rebase`: what the model computed without adapters
            of prompts and answers of those that ask for `rebase`; that is done while nothing is in line, by `heal` or a
            server. `base_shared`: prefixes that all wrote that ask for `base_shared`, of which the adapter runs through
            what it has not seen, for its own part of values; it needs the method prefix, which it has where `reuse` is
            None. `Report.sharing` says what was read. See `reuse/README.md`.

        Raises:
          UnknownAdapterError: no adapter of that name is loaded; the message lists those that are.
          InvalidRequestError: an argument is wrong, or the round has another size or all its members; the message
            names it and its limit.
          ContextLengthError: prompt and answer are longer than the model takes, or than an empty store can hold.
          StoreFullError: what callers hold (`prefilled`) or frozen texts leave no room for them.
          NonFiniteLogitsError: the logits have NaN or infinities. Prompts of the same call that are not done then are
            cancelled and not kept.
        """
        options: dict[str, Any] = {"reuse": reuse, "namespace": namespace, "keep": keep, "pin": pin, "round": round}
        return self.generate_batch([prompt], sampling, adapter=adapter, sharing=sharing, **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str | Sequence[str] = DEFAULT_NAMESPACE,
        keep: bool = True,
        pin: Pin | None = None,
        round: Round | None = None,
        adapter: str | Sequence[str | None] | None = None,
        sharing: str | Sequence[str] = "isolated",
        return_logits: bool = False,
    ) -> list[Generation]:
        """Generate for several prompts, prefilled in few plans and decoded together as far as they fit. As `generate`.

        Args:
          sampling, namespace, adapter, sharing: one for all prompts, or one for each.
          pin: of all prompts and answers together, in each namespace.
          round: each prompt is a member, in its namespace.
          return_logits: give the logits of each first token too.
        """
        is_list = isinstance(prompts, Sequence | np.ndarray) and not isinstance(prompts, str | bytes)
        require(is_list, f"prompts={prompts!r:.60} must be a list of prompts")
        sampling = self.default_sampling() if sampling is None else sampling
        samplings = _of_each("sampling", SamplingParams, sampling, len(prompts))
        namespaces = _of_each("namespace", str, namespace, len(prompts))
        adapters = _of_each("adapter", str | None, adapter, len(prompts))
        sharings = _of_each("sharing", str, sharing, len(prompts))
        options: dict[str, Any] = {"reuse": reuse, "keep": keep, "wants_logits": return_logits}
        options |= {"pinning": _pinning(pin)}
        sequences = [
            self.loop.requests.generation(
                prompt, params, namespace=name, adapter=its_adapter, sharing=shared, member=_member(round), **options
            )
            for prompt, params, name, its_adapter, shared in zip(
                prompts, samplings, namespaces, adapters, sharings, strict=True
            )
        ]
        self.loop.complete(sequences)
        return [_generation(each) for each in sequences]

    def prefill(
        self,
        prompt: Prompt,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        keep: bool = True,
        adapter: str | None = None,
        sharing: str = "isolated",
    ) -> Prefill:
        """The logits of the token that would follow. Arguments and errors as `generate`."""
        options: dict[str, Any] = {"reuse": reuse, "namespace": namespace, "keep": keep, "adapter": adapter}
        options |= {"sharing": sharing}
        asked = self.loop.requests.prefill(prompt, wants_logits=True, **options)
        self.loop.complete([asked])
        assert asked.logits is not None
        assert asked.report is not None
        return Prefill(asked.logits, asked.report)

    @contextlib.contextmanager
    def prefilled(
        self,
        prompt: Prompt,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        adapter: str | None = None,
        sharing: str = "isolated",
    ) -> Iterator[sequence.Sequence]:
        """Prefill a prompt and hold its pages while the context is open, for code that reads its KV.

        `pages` of the sequence says where the KV is, `plan` how it came there. Other prompts cannot find it. Arguments
        and errors as `generate`. Calls within the context have what is left of the store.
        """
        options: dict[str, Any] = {"reuse": reuse, "namespace": namespace, "keep": False, "adapter": adapter}
        options |= {"sharing": sharing}
        held = self.loop.requests.prefill(prompt, hold=True, **options)
        self.loop.complete([held])
        try:
            yield held
        finally:
            self.loop.release(held)

    def remember(
        self,
        prompt: Prompt,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        frozen: bool = False,
        preamble: Prompt | None = None,
        company: bool | None = None,
        allow_control_tokens: bool = False,
        adapter: str | None = None,
        sharing: str = "isolated",
    ) -> int:
        """Prefill a text and keep it as a donor.

        Args:
          frozen: it stays until `forget`. All frozen texts together may fill `EngineConfig.frozen_limit` of the store.
          preamble: prefill the text behind this one, and keep the text only. Its first tokens then saw something
            before them and are no attention sinks, which makes a better segment. But its positions do not begin at 0,
            so a prompt that starts with the text finds a segment, not an exact prefix.
          company: prefill the text behind what the namespace has now, and keep the text only: the beginning that most
            of its prompts share, and other remembered texts, `EngineConfig.company_tokens` together at most. `heal`
            makes it again when there is twice as much. None: where these are not 0 and there is no preamble. False:
            alone, so that prompts which begin with the text find an exact prefix.
          allow_control_tokens: whether texts such as `<|im_end|>` become control tokens. Otherwise a text has the
            tokens that it has as the content of a message.
          adapter: prefill the text under it, without company, for prompts with the same adapter. An entry of an adapter
            that is unloaded goes. A text that does not invoke an activated one is the base model's.
          sharing: for prompts under any adapter that ask for the same, as in `generate`; `pre_lr` and `refresh` are the
            same here. For `rebase` the text is prefilled without the adapter. Loading or unloading an adapter ends
            such entries, frozen ones too: what was computed before has no part of the new one.

        Returns:
          A handle for `forget`. The same text behind the same preamble, or in company whatever that is, is remembered
          once, under one handle. `entries` says what it was prefilled behind and what that took.

        Raises:
          InvalidRequestError: an argument is wrong, preamble and text together exceed the model's limit, or company is
            asked for beside a preamble or an adapter, or where `company_tokens` is 0; or sharing without an adapter or
            `share_adapters`, or `base_shared` beside a preamble.
          UnknownAdapterError: no adapter of that name is loaded.
          ContextLengthError: an empty store could not hold the text; with a preamble it has to hold it twice for a
            moment.
          FrozenLimitError: frozen texts would fill more of the store than they may.
          NonFiniteLogitsError: the logits behind the text have NaN or infinities. It is not kept.
        """
        asked = self.loop.requests.remember(
            prompt,
            namespace=namespace,
            frozen=frozen,
            preamble=preamble,
            company=company,
            allow_control_tokens=allow_control_tokens,
            adapter=adapter,
            sharing=sharing,
        )
        self.loop.complete([asked])
        assert asked.handle is not None
        return asked.handle

    def forget(self, handle: int) -> Forgotten:
        """Stop serving what `remember` stored. Raises UnknownHandleError if it is not there (any more).

        Copies of the text go too, of 15 tokens or more, which prompts of the namespace brought into the store; what
        other entries have of it stays, and the result says how much that is. Sequences that use it at that moment
        finish, and what they commit later is not kept. Texts that were made in its company have seen it: the result
        says how many, they are `stale` until `heal` has made them again without it, and until then they are served.
        """
        if not is_int(handle):
            raise UnknownHandleError(f"handle {handle!r:.60} is not known: it must be an integer")
        forgotten = self.admission.forget(handle)
        self.loop.publish()
        return forgotten

    def load_adapter(self, name: str, source: AdapterSource) -> Adapter:
        """Load a LoRA adapter, for `generate(adapter=name)`. It compiles nothing, and what runs goes on.

        Args:
          source: a directory as PEFT writes it, with `adapter_config.json`, or a name on the Hugging Face hub; or what
            was read of one.

        Raises:
          UnknownModelError, UnsupportedModelError, HubError: as `checkpoints.adapters.read_adapter`.
          InvalidRequestError: the name is none, or is taken; the adapter does not fit the model, its rank is above
            `EngineConfig.max_adapter_rank`, or `max_adapters` are loaded. The message says which.
        """
        return self.loop.load_adapter(name, _read_adapter(source, self.model))

    def unload_adapter(self, name: str, *, timeout_s: float = 30.0) -> Adapter:
        """Unload an adapter, and let go of all KV that was computed under it, with texts that were remembered under it,
        frozen ones too, and pins. Returns what it was.

        From now on no request can ask for it. Those that wait or run with it are answered first.

        Args:
          timeout_s: for how many seconds at most. 0: it is unloaded at once or not at all.

        Raises:
          UnknownAdapterError: no adapter of that name is loaded, or it is being unloaded.
          AdapterInUseError: some sequences did not end in time, or are held by callers of `prefilled`; the message says
            how many. The adapter stays, and requests can ask for it again.
          InvalidRequestError: timeout_s is no number, or negative.
        """
        require(is_number(timeout_s) and timeout_s >= 0, f"timeout_s={timeout_s!r:.60} must be a number >= 0")
        return self.loop.unload_adapter(name, timeout_s)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """What is loaded, by name, and how many sequences use it. From any thread."""
        return {adapter.name: self.loop.adapter_state(adapter) for adapter in self.admission.adapters}

    def pins(self, namespace: str | None = None) -> list[PinState]:
        """What is pinned now, of one namespace or all."""
        self.admission.expire_pins()
        return self.cache.pin_states(namespace)

    def unpin(self, key: str, *, namespace: str = DEFAULT_NAMESPACE) -> PinState:
        """Release a pin: its pages are evicted as all others from now on. Returns what it was.

        Raises UnknownPinError if the namespace has none of this key.
        """
        released = self.admission.unpin(namespace, key)
        self.loop.publish()
        return released

    def heal(self, seconds: float | None = None) -> int:
        """Make approximate KV exact that prompts left in the store, most used first: a server does it while it is idle.

        Before that, remembered texts are made again whose company was forgotten in part, and after it those for which
        there is twice the company that they had.

        Args:
          seconds: stop at the end of the chunk in which this time is over. None: when all is done.

        Returns:
          How many tokens were prefilled. None are while requests are in line, or if there is no room.

        Raises:
          InvalidRequestError: seconds is no number, or negative.
        """
        ok = seconds is None or (is_number(seconds) and seconds >= 0)
        require(ok, f"seconds={seconds!r} must be a number >= 0 or None")
        before, started = self._prefilled_while_idle(), time.perf_counter()
        while seconds is None or time.perf_counter() - started < seconds:
            if self.loop.heal(asked=True) is None:
                break
        return self._prefilled_while_idle() - before

    def _prefilled_while_idle(self) -> int:
        stats = self.loop.stats
        return stats.healed_tokens + stats.remade_tokens

    def close(self) -> None:
        """Bring to the lower tiers what is on its way there, and let go of the disk. Without tiers it does nothing."""
        if self.admission.tiers is not None:
            self.loop.settle()
            self.admission.tiers.close()

    def entries(self, namespace: str | None = None) -> list[Entry]:
        """What was remembered and is still there, of one namespace or all."""
        return self.cache.entries(namespace) + self.cache.evicted_entries(namespace)

    def stats(self) -> dict[str, int]:
        """Pages by state, hits and evictions: the fields of `CacheStats`."""
        return dataclasses.asdict(self.cache.stats())

    # For those who look closer ------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any | None:
        """As given."""
        return self.loop.requests.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any | None) -> None:
        self.loop.requests.tokenizer = tokenizer

    @property
    def reuse(self) -> ReuseConfig:
        """What a call does that names no `reuse` of its own."""
        return self.loop.requests.reuse

    @reuse.setter
    def reuse(self, reuse: ReuseConfig) -> None:
        self.loop.requests.reuse = reuse

    @property
    def max_context(self) -> int:
        """Tokens that a prompt and its answer can have together: what the model takes, and frozen texts and pins leave
        of the store. From any thread."""
        return min(self.model.max_position, self.cache.num_beside_kept * self.config.page_size)

    @property
    def cache(self) -> PageCache:
        """What is in the store."""
        return self.admission.cache

    def encode(
        self, prompt: Prompt, new_tokens: int = 0, *, add_special_tokens: bool = True
    ) -> Int32[np.ndarray, "tokens"]:
        """A prompt as token ids. Raises InvalidRequestError if it is none, or too long with `new_tokens`."""
        return self.loop.requests.encode(prompt, new_tokens, add_special_tokens=add_special_tokens)

    def recover(self) -> bool:
        """After a failure: whether the KV is lost, and with it all that the cache says of it. Then both are new, and
        what runs in the loop is computed again."""
        return self.loop.recover()


def _check_adapters(named: Mapping[str, AdapterWeights], model: ModelConfig, config: EngineConfig, mesh: Mesh) -> None:
    """Raise InvalidRequestError if an engine would not take all of these: that is known before it has weights."""
    config = dataclasses.replace(config, max_adapters=config.max_adapters or len(named))
    check_room(model, config, mesh)
    adapters = Adapters(model, config)
    for name, weights in named.items():
        adapters.add(adapters.new(name, weights))


def _generation(done: sequence.Sequence) -> Generation:
    output = done.output
    assert done.finish_reason is not None
    assert done.report is not None
    return Generation(
        output.text,
        output.token_ids,
        done.finish_reason,
        done.report,
        done.logits,
        tuple(output.logprobs),
        () if done.prompt_logprobs is None else done.prompt_logprobs.entries(),
        done.pin,
    )


def _pinning(pin: Pin | None) -> Pinning | None:
    if pin is not None and not isinstance(pin, Pin):
        raise InvalidRequestError(f"pin={pin!r:.60} must be a Pin, or None")
    return None if pin is None else Pinning(pin)


def _member(round: Round | None) -> Member | None:
    if round is not None and not isinstance(round, Round):
        raise InvalidRequestError(f"round={round!r:.60} must be a Round, or None")
    return None if round is None else Member(round)


def _adapters_by_name(adapters: Mapping[str, AdapterSource] | None) -> dict[str, AdapterSource]:
    known = adapters is None or isinstance(adapters, Mapping)
    require(
        known, f"adapters={adapters!r:.60} must be a mapping from names to directories, names on the hub or weights"
    )
    return dict(adapters or {})


def _read_adapter(source: AdapterSource, model: ModelConfig, base: str | None = None) -> AdapterWeights:
    known = isinstance(source, str | Path | AdapterWeights)
    require(known, f"source={source!r:.60} of an adapter must be a directory, a name on the hub or AdapterWeights")
    return source if isinstance(source, AdapterWeights) else read_adapter(source, model, base=base)


def _of_each[T](name: str, kind: type[T] | UnionType, value: T | Sequence[T], number: int) -> Sequence[T]:
    """An argument that is one for all prompts or one for each, as the latter."""
    if isinstance(value, kind):
        return [cast(T, value)] * number
    if not isinstance(value, Sequence) or not all(isinstance(each, kind) for each in value):
        called = kind.__name__ if isinstance(kind, type) else kind
        raise InvalidRequestError(f"{name}={value!r} must be {called}, or a list of them")
    if len(value) != number:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {number} prompts")
    return value


def _check_processes(config: EngineConfig, mesh: Mesh) -> None:
    """Raise InvalidRequestError if the engine would need all devices of the mesh in this process, and has not."""
    tiers, together = config.host_store_bytes, not mesh.is_multi_process
    require(
        not tiers or together,
        f"host_store_bytes={tiers} must be 0 where several processes have the devices: only a process that has all of "
        "them can move KV to host memory and disk",
    )


def _check_layers(reuse: ReuseConfig, model: ModelConfig) -> None:
    """Raise InvalidRequestError if an option names a layer that the model does not have."""
    method_of(reuse).phases(PromptMap.of(np.zeros(1, np.int32), Match.nothing()), model.num_layers)


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _with_dtype_of(params: Params, config: EngineConfig, mesh: Mesh) -> EngineConfig:
    """With a concrete dtype in place of `auto`: on an accelerator that of the given parameters, whichever it is."""
    if config.dtype != "auto" or _platform(mesh) == "cpu":
        return config.resolved(_platform(mesh))
    return dataclasses.replace(config, dtype=np.dtype(params.embed.dtype).name).resolved(_platform(mesh))
