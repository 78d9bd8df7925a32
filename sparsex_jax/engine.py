"""The engine: one prompt's path from text to text.

    text -> tokens -> lookup -> plan -> align -> prefill -> sample -> decode -> text

`Admission` (host) knows which tokens are where and who holds them; the runner (device) computes. The engine admits
requests, has them computed, and commits what was computed so that later prompts find it. It serves one call at a time;
`serving.loop` takes many requests through the same steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Int32

from sparsex_jax.cache import Entry, PageCache, Segment
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.config import EngineConfig, ModelConfig, ReuseConfig, SamplingParams, default_reuse, named_config
from sparsex_jax.device.generation import Generation, Output, Prefill, decode_state, sampling_arrays, stop_finished
from sparsex_jax.device.runner import Runner
from sparsex_jax.device.sampling import Sampled
from sparsex_jax.errors import InvalidRequestError, StoreFullError
from sparsex_jax.model.sharding import check_mesh, make_mesh
from sparsex_jax.model.weights import Params, random_params
from sparsex_jax.reuse.cost import speeds_of
from sparsex_jax.reuse.planner import slots_of
from sparsex_jax.scheduler.admission import Admission, Request
from sparsex_jax.text.encoding import Prompt, encode

DEFAULT_NAMESPACE = "default"


class Engine:
    """A model, a KV store and an index of what is in it.

    Attributes:
      model, config, tokenizer, mesh: as given.
      reuse: what a call does that names no `reuse` of its own.
      admission: what requests hold, and what can be found (host).
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
    ) -> None:
        """
        Args:
          params: as `weights.describe(model)`, placed on the mesh.
          tokenizer: a transformers tokenizer, or None for an engine that takes and gives token ids only.
          mesh: with an axis `tensor`; one device by default.
          reuse: what a call does that names no `reuse` of its own.
        """
        self.model, self.tokenizer, self.reuse = model, tokenizer, reuse or ReuseConfig()
        self.mesh = check_mesh(mesh or make_mesh(), model)
        self.config = _with_dtype_of(params, config or EngineConfig(), self.mesh)
        self.runner = Runner(model, self.config, params, self.mesh)
        self.admission = Admission(model, self.config, speeds_of(self.mesh.devices.flat[0]))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        mesh: Mesh | None = None,
        reuse: ReuseConfig | str | Path | None = None,
        **options: Any,
    ) -> Engine:
        """Load a model: `smollm2-135m-instruct`, a GGUF file, a Hugging Face directory or a converted one.

        Args:
          reuse: what a call does that names no `reuse` of its own; a path is that of a file which `sparsex calibrate`
            wrote. None: `sparsex.json` in the model's directory, if it is there.
          options: fields of `EngineConfig`, such as dtype and store_tokens.

        Raises:
          UnknownModelError, UnsupportedModelError: there is no such model, or not of a family that runs here.
          InvalidRequestError: an option or the file is wrong, or the model does not divide over the mesh.
        """
        config = EngineConfig(**options)
        checkpoint = open_checkpoint(source)
        reuse = default_reuse(source, checkpoint.config, reuse)
        mesh = check_mesh(mesh or make_mesh(), checkpoint.config)
        config = config.resolved(_platform(mesh), checkpoint.dtype)
        params = checkpoint.load_params(config.dtype, mesh)
        return cls(checkpoint.config, params, checkpoint.tokenizer, config=config, mesh=mesh, reuse=reuse)

    @classmethod
    def from_config(
        cls, model: str | ModelConfig, *, seed: int = 0, mesh: Mesh | None = None, **options: Any
    ) -> Engine:
        """Random weights of a named configuration (`configs/models`) or of one given: for performance work."""
        config = EngineConfig(**options)
        model = named_config(model) if isinstance(model, str) else model
        mesh = check_mesh(mesh or make_mesh(), model)
        config = config.resolved(_platform(mesh))
        return cls(model, random_params(model, config.dtype, mesh, seed), config=config, mesh=mesh)

    # What callers do ----------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        keep: bool = True,
    ) -> Generation:
        """Generate from text, token ids or chat messages, reusing what the namespace has stored.

        Args:
          reuse: how; None: as the engine was told when it was made.
          keep: prompt and answer become donors, so that later prompts of the namespace can reuse them.

        Raises:
          InvalidRequestError: an argument is wrong; the message names it and its limit.
          StoreFullError: the store cannot hold prompt and answer.
          NonFiniteLogitsError: the logits have NaN or infinities; prompts of the same batch are not kept either.
        """
        return self.generate_batch([prompt], sampling, reuse=reuse, namespace=namespace, keep=keep)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str | Sequence[str] = DEFAULT_NAMESPACE,
        keep: bool = True,
        return_logits: bool = False,
    ) -> list[Generation]:
        """Generate for several prompts, decoded together as far as they fit, and prefilled in few plans. As `generate`.

        Args:
          sampling, namespace: one for all prompts, or one for each.
          return_logits: give the logits of each first token too.
        """
        started = time.perf_counter()
        each = _of_each("sampling", SamplingParams, sampling or SamplingParams(), len(prompts))
        for params in each:
            params.check_vocabulary(self.model.vocab_size)
        namespaces = _of_each("namespace", str, namespace, len(prompts))
        outputs = [Output(params, self.model.eos_token_ids, self.tokenizer) for params in each]
        encoded = [self.encode(p, o.sampling.max_new_tokens) for p, o in zip(prompts, outputs, strict=True)]
        done: list[Generation] = []
        while len(done) < len(prompts):
            rest = slice(len(done), None)
            with self.admitted(encoded[rest], outputs[rest], reuse or self.reuse, namespaces[rest]) as requests:
                done += self._generate(requests, outputs[rest], keep, return_logits, started)
        return done

    def prefill(
        self,
        prompt: Prompt,
        *,
        reuse: ReuseConfig | None = None,
        namespace: str = DEFAULT_NAMESPACE,
        keep: bool = True,
    ) -> Prefill:
        """The logits of the token that would follow. Arguments and errors as `generate`."""
        started = time.perf_counter()
        tokens = self.encode(prompt)
        with self.admitted([tokens], [], reuse or self.reuse, [namespace]) as requests:
            scores, active = self.prefill_admitted(requests)
            logits = np.asarray(scores[0])
            report = requests[0].report(self.model.num_layers, active[0], started)
            if keep:
                self.admission.commit(requests[0], tokens)
        return Prefill(logits, report)

    def remember(
        self,
        prompt: Prompt,
        *,
        namespace: str = DEFAULT_NAMESPACE,
        frozen: bool = False,
        preamble: Prompt | None = None,
    ) -> int:
        """Prefill a text alone and keep it as a donor.

        Args:
          frozen: eviction leaves it alone until `forget`, or until more than 90 % of the store is taken by
            frozen and running content.
          preamble: prefill the text behind this one, and keep the text only. Its first tokens then saw something
            before them and are no attention sinks, which makes a better segment (DESIGN.md, section 5). But its
            positions do not begin at 0, so a prompt that starts with the text finds a segment, not an exact prefix.

        Returns:
          A handle for `forget`.

        Raises:
          InvalidRequestError: an argument is wrong, or preamble and text together exceed the model's limit.
          StoreFullError: the store cannot hold the text; with a preamble it has to hold it twice for a moment.
        """
        tokens = self.encode(prompt, add_special_tokens=False)
        if preamble is not None:
            return self._remember_behind(self.encode(preamble), tokens, namespace, frozen)
        with self.admitted([tokens], [], ReuseConfig(method="prefix"), [namespace]) as requests:
            self.prefill_admitted(requests)
            self.admission.commit(requests[0], tokens)
            return self.cache.register(requests[0].plan.pages, len(tokens), namespace, frozen=frozen)

    def forget(self, handle: int) -> None:
        """Stop serving what `remember` stored. Raises UnknownHandleError if it is not there (any more).

        Requests of a loop that use it at that moment finish, and are not kept.
        """
        self.admission.forget(handle)

    def entries(self, namespace: str | None = None) -> list[Entry]:
        """What was remembered and is still there, of one namespace or all."""
        return self.cache.entries(namespace)

    def stats(self) -> dict[str, int]:
        """Pages by state, hits and evictions: the fields of `CacheStats`."""
        return dataclasses.asdict(self.cache.stats())

    # For those who take requests through their steps themselves -------------------------------------------------

    @property
    def cache(self) -> PageCache:
        """What is in the store."""
        return self.admission.cache

    def encode(
        self, prompt: Prompt, new_tokens: int = 0, *, add_special_tokens: bool = True
    ) -> Int32[np.ndarray, "tokens"]:
        """A prompt as token ids. Raises InvalidRequestError if it is none, or too long with so many new tokens."""
        tokens = encode(prompt, self.tokenizer, self.model, add_special_tokens=add_special_tokens)
        limit, length = self.model.max_position, len(tokens) + new_tokens
        if length > limit:
            raise InvalidRequestError(
                f"prompt has {len(tokens)} tokens and max_new_tokens={new_tokens}: together {length}, "
                f"and the model's limit is {limit}"
            )
        return tokens

    @contextlib.contextmanager
    def admitted(
        self, prompts: Sequence[np.ndarray], outputs: Sequence[Output], reuse: ReuseConfig, namespaces: Sequence[str]
    ) -> Iterator[list[Request]]:
        """As many of the prompts as fit now, at least one; whatever happens, they give back what they hold.

        Args:
          outputs: what each prompt will generate; none for those that generate nothing.
        """
        requests: list[Request] = []
        try:
            self._admit_some(requests, prompts, outputs, reuse, namespaces)
            yield requests
        except BaseException:
            if self.recover():
                requests.clear()
            raise
        finally:
            for request in requests:
                self.admission.leave(request)

    def prefill_admitted(self, requests: Sequence[Request]) -> tuple[Array, list[np.ndarray]]:
        """Prefill requests of one schedule in one plan, as `Runner.prefill`. What they copy from may go then."""
        logits, active = self.runner.prefill([request.plan for request in requests])
        for request in requests:
            self.admission.unpin(request)
        return logits, active

    def first_tokens(self, logits: Array, prompts: Sequence[np.ndarray], outputs: Sequence[Output]) -> Sampled:
        """Sample from the logits behind each prompt and what its answer has so far: one step, a line each."""
        sampling = sampling_arrays(outputs, prompts, len(logits), self.model.vocab_size)
        position = np.zeros(len(logits), np.int32)
        lengths = [len(prompt) + len(output.token_ids) for prompt, output in zip(prompts, outputs, strict=True)]
        position[: len(lengths)] = lengths
        return self.runner.first_tokens(logits, sampling, position)

    def recover(self) -> bool:
        """After a failure: whether the KV is gone, and with it all that the cache says of it. Then both are new."""
        lost = self.runner.recover()
        if lost:
            self.admission.start_over()
        return lost

    # How it is done -----------------------------------------------------------------------------------------

    def _admit_some(
        self,
        requests: list[Request],
        prompts: Sequence[np.ndarray],
        outputs: Sequence[Output],
        reuse: ReuseConfig,
        namespaces: Sequence[str],
    ) -> None:
        """Add to the requests as they are admitted, so that the caller can let go of them whatever fails here."""
        first = slice(self.config.max_batch)
        for tokens, output, namespace in itertools.zip_longest(prompts[first], outputs[first], namespaces[first]):
            try:
                request = self.admission.admit(
                    tokens, output.sampling.max_new_tokens if output else 0, reuse, namespace
                )
            except StoreFullError:
                if requests:
                    break  # the others go first
                raise
            requests.append(request)

    def _generate(
        self, requests: Sequence[Request], outputs: Sequence[Output], keep: bool, return_logits: bool, started: float
    ) -> list[Generation]:
        """Generate for the admitted requests, which are the first of the outputs."""
        outputs, reports, scores = outputs[: len(requests)], [], []
        for group in self.runner.shapes.plans([request.plan for request in requests]):
            logits, active = self.prefill_admitted(requests[group])
            sampled = self.first_tokens(logits, [request.tokens for request in requests[group]], outputs[group])
            for line, output in enumerate(outputs[group]):
                output.take(sampled, line)
            each = zip(requests[group], active, strict=True)
            reports += [request.report(self.model.num_layers, mask, started) for request, mask in each]
            scores += [*np.asarray(logits)[: len(active)]] if return_logits else [None] * len(active)
        self._decode(requests, outputs)
        if keep:  # the last token's KV is not in the store: it was never an input
            for request, output in zip(requests, outputs, strict=True):
                self.admission.commit(request, np.append(request.tokens, output.token_ids[:-1]).astype(np.int32))
        return [
            Generation(output.text, output.token_ids, str(output.finish_reason), report, line, tuple(output.logprobs))
            for output, report, line in zip(outputs, reports, scores, strict=True)
        ]

    def _decode(self, requests: Sequence[Request], outputs: Sequence[Output]) -> None:
        prompts, pages = [request.tokens for request in requests], [request.plan.pages for request in requests]
        state = decode_state(outputs, prompts, pages, self.runner.shapes.max_pages, self.model.vocab_size)
        while not all(output.finish_reason for output in outputs):
            state, sampled = self.runner.decode(state, self.config.decode_steps)
            for line, output in enumerate(outputs):
                output.take(sampled, line)
            state = stop_finished(state, outputs)

    def _remember_behind(self, preamble: np.ndarray, tokens: np.ndarray, namespace: str, frozen: bool) -> int:
        """Prefill both, move the text's KV to pages of its own as it is, and keep those."""
        start, page_size = len(preamble), self.config.page_size
        together = np.concatenate([preamble, tokens])
        if len(together) > self.model.max_position:
            raise InvalidRequestError(
                f"preamble has {start} tokens and prompt {len(tokens)}: together {len(together)}, "
                f"and the model's limit is {self.model.max_position}"
            )
        with self.admitted([together], [], ReuseConfig(method="prefix"), [namespace]) as [request]:
            self.prefill_admitted([request])
            slots = slots_of(request.plan.pages, np.arange(start, len(together)), page_size)
            pages = self.cache.allocate(-(-len(tokens) // page_size))
            try:
                self.runner.copy([(Segment(0, len(tokens), 0, slots, exact=True), pages)])
                self.cache.commit(pages, tokens, namespace, exact_tokens=len(tokens), start=start)
                return self.cache.register(pages, len(tokens), namespace, frozen=frozen)
            finally:
                self.cache.release(pages)


def _of_each[T](name: str, kind: type[T], value: T | Sequence[T], number: int) -> Sequence[T]:
    """An argument that is one for all prompts or one for each, as the latter."""
    if isinstance(value, kind):
        return [value] * number
    if not isinstance(value, Sequence) or not all(isinstance(each, kind) for each in value):
        raise InvalidRequestError(f"{name}={value!r} must be {kind.__name__}, or a list of them")
    if len(value) != number:
        raise InvalidRequestError(f"{name} has {len(value)} entries for {number} prompts")
    return value


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _with_dtype_of(params: Params, config: EngineConfig, mesh: Mesh) -> EngineConfig:
    """With a concrete dtype in place of `auto`: on an accelerator that of the given parameters, whichever it is."""
    if config.dtype != "auto" or _platform(mesh) == "cpu":
        return config.resolved(_platform(mesh))
    return dataclasses.replace(config, dtype=jax.tree.leaves(params)[0].dtype.name)
