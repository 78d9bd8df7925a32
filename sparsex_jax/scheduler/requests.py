"""From what a caller asks to a sequence that waits. All checks of arguments are here, and each is made once."""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any, cast

import numpy as np
from jaxtyping import Int32

from sparsex_jax.cache import Entry
from sparsex_jax.config import ModelConfig, ReuseConfig, SamplingParams, Structure
from sparsex_jax.errors import ContextLengthError, InvalidRequestError, StructureError
from sparsex_jax.reuse.adapters import Acting
from sparsex_jax.reuse.methods import method_of
from sparsex_jax.scheduler.adapters import group_of
from sparsex_jax.scheduler.admission import Admission
from sparsex_jax.scheduler.output import Output
from sparsex_jax.scheduler.prompt_logprobs import PromptLogprobs, reuse_when_scored
from sparsex_jax.scheduler.sequence import Remember, Sequence
from sparsex_jax.text.chat import document
from sparsex_jax.text.control_tokens import MarkedText
from sparsex_jax.text.encoding import Prompt, encode, turns_of
from sparsex_jax.text.end_tokens import end_token_ids
from sparsex_jax.text.grammars import Grammars
from sparsex_jax.text.matcher import Matcher
from sparsex_jax.text.messages import said_digest


class Requests:
    """Makes sequences. From any thread.

    Attributes:
      end_tokens: what ends an answer, by the model's configuration and the tokenizer.
      reuse: of a request that names none.
    """

    def __init__(self, model: ModelConfig, tokenizer: Any | None, admission: Admission, reuse: ReuseConfig) -> None:
        self._model, self._admission, self.reuse = model, admission, reuse
        self.tokenizer = tokenizer
        self._tokenizing = threading.Lock()  # fast tokenizers are not made for several threads

    @property
    def tokenizer(self) -> Any | None:
        """A transformers tokenizer, or None for token ids only."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        size = self._model.vocab_size
        self.end_tokens = end_token_ids(self._model.eos_token_ids, tokenizer, size)
        self._grammars = Grammars(tokenizer, size, self.end_tokens) if tokenizer is not None else None

    def generation(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        reuse: ReuseConfig | None,
        namespace: str,
        keep: bool,
        turns: frozenset[bytes] | None = None,
        adapter: str | None = None,
        sharing: str = "isolated",
        **options: Any,
    ) -> Sequence:
        """A sequence that is prefilled and decoded.

        Args:
          adapter: the name of one that is loaded. None: the base model alone.
          sharing: what it finds of other adapters' work, as `Engine.generate`.
          turns: `turns_of` the prompt, if it is given as the tokens of a chat.
          options: fields of `Sequence`.

        Raises:
          InvalidRequestError: an argument is wrong; the message names it and its limit.
          UnknownAdapterError: no adapter of that name is loaded.
          ContextLengthError: prompt and answer are longer than the model takes, or than an empty store can hold.
        """
        started = time.perf_counter()
        _require_type("sampling", sampling, SamplingParams)
        sampling.check_vocabulary(self._model.vocab_size)
        output = self._output(sampling)
        tokens = self.encode(prompt, sampling.max_new_tokens)
        output.follow(tokens)
        options |= {"turns": turns_of(prompt) if turns is None else turns}
        options |= {"adapter": self._admission.adapters.on(adapter, tokens, sharing)}
        options |= {"prompt_logprobs": PromptLogprobs.asked(tokens, sampling)}
        if options.get("pinning") is not None and not keep:
            raise InvalidRequestError("keep=False and a pin exclude each other: what is not kept cannot stay")
        if options.get("pinning") is not None and sharing == "rebase":
            raise InvalidRequestError("sharing='rebase' and a pin exclude each other: what it computes is not kept")
        reuse = reuse_when_scored(sampling) if reuse is None else reuse
        method = self._method(reuse, sharing)
        return self._checked(Sequence(tokens, output, method, namespace, keep, started, **options))

    def prefill(
        self,
        prompt: Prompt,
        *,
        reuse: ReuseConfig | None,
        namespace: str,
        keep: bool,
        adapter: str | None = None,
        sharing: str = "isolated",
        **options: Any,
    ) -> Sequence:
        """A sequence that is prefilled only. Arguments and errors as `generation`."""
        started = time.perf_counter()
        tokens, output = self.encode(prompt), self._output(None)
        options |= {"turns": turns_of(prompt), "adapter": self._admission.adapters.on(adapter, tokens, sharing)}
        method = self._method(reuse, sharing)
        return self._checked(Sequence(tokens, output, method, namespace, keep, started, **options))

    def again(
        self,
        tokens: Int32[np.ndarray, "tokens"],
        adapter: Acting | None,
        *,
        reuse: ReuseConfig,
        namespace: str,
        keep: bool,
        **options: Any,
    ) -> Sequence:
        """A sequence that prefills what is stored already, with the adapter that acted on it."""
        about = self._output(None), self._method(reuse), namespace, keep, time.perf_counter()
        return self._checked(Sequence(tokens, *about, adapter=adapter, **options))

    def remember(
        self,
        prompt: Prompt,
        *,
        namespace: str,
        frozen: bool,
        preamble: Prompt | None,
        company: bool | None = None,
        allow_control_tokens: bool = False,
        adapter: str | None = None,
        sharing: str = "isolated",
        **options: Any,
    ) -> Sequence:
        """A sequence whose prompt is registered once it is prefilled. Arguments and errors as `Engine.remember`."""
        started = time.perf_counter()
        _require_type("frozen", frozen, bool)
        _require_type("allow_control_tokens", allow_control_tokens, bool)
        in_company = self._in_company(company, preamble, adapter)
        is_document = isinstance(prompt, str) and not allow_control_tokens
        said = document(cast(str, prompt), self.tokenizer) if is_document else prompt
        text = self.encode(said, add_special_tokens=False)
        before = text[:0] if preamble is None else self.encode(preamble, name="preamble")
        length, limit = len(before) + len(text), self._model.max_position
        if length > limit:
            raise ContextLengthError(
                f"preamble has {len(before)} tokens and prompt {len(text)}: together {length}, "
                f"and the model's limit is {limit}"
            )
        tokens = np.concatenate([before, text])
        acting = self._acting_on_text(adapter, tokens, sharing, preamble)
        content = _content(tokens, len(before), in_company, acting, sharing)
        kept = Remember(text, namespace, frozen, content, in_company, self._said(text), sharing)
        # Behind a preamble the text alone is kept, not both.
        return self._remember(tokens, kept, len(before) == 0, started, adapter=acting, **options)

    def _acting_on_text(
        self, adapter: str | None, tokens: np.ndarray, sharing: str, preamble: Prompt | None
    ) -> Acting | None:
        """The adapter under whose keys a text is kept. For `rebase` that is none, on keys of its own: what those read
        that ask for it is what the model computes without adapters."""
        adapters = self._admission.adapters
        acting = adapters.on(adapter, tokens, "pre_lr" if sharing == "refresh" else sharing)  # nothing is repaired here
        if sharing == "base_shared" and preamble is not None:
            raise InvalidRequestError(
                "sharing='base_shared' and a preamble exclude each other: what stands behind it is no prefix"
            )
        return adapters.neutral if sharing == "rebase" else acting

    def remake(self, entry: Entry, text: Int32[np.ndarray, "text"]) -> Sequence:
        """A sequence that makes an entry's text again, in the company that it has when it is admitted."""
        assert entry.content is not None
        kept = Remember(text, entry.namespace, False, entry.content, in_company=True)
        return self._remember(text, kept, True, time.perf_counter(), asked=False, remakes=entry.handle)

    def _remember(self, tokens: np.ndarray, kept: Remember, keep: bool, started: float, **options: Any) -> Sequence:
        exact, output = self._method(ReuseConfig(method="prefix"), kept.sharing), self._output(None)
        return self._checked(Sequence(tokens, output, exact, kept.namespace, keep, started, remember=kept, **options))

    def _in_company(self, company: bool | None, preamble: Prompt | None, adapter: str | None) -> bool:
        """Whether the engine chooses what a text is prefilled behind."""
        if company is None:
            return preamble is None and adapter is None and self._admission.company_tokens > 0
        _require_type("company", company, bool)
        if company and preamble is not None:
            raise InvalidRequestError(
                "company=True and a preamble exclude each other: one of them stands before the text"
            )
        if company and adapter is not None:
            raise InvalidRequestError("company=True and an adapter exclude each other: a company is the base model's")
        if company and not self._admission.company_tokens:
            raise InvalidRequestError("company=True needs an engine with company_tokens above 0")
        return company

    def encode(
        self,
        prompt: Prompt | MarkedText,
        new_tokens: int = 0,
        *,
        add_special_tokens: bool = True,
        name: str = "prompt",
    ) -> Int32[np.ndarray, "tokens"]:
        """A prompt as token ids. Raises InvalidRequestError if it is none, or too long with `new_tokens`.

        `name` is what errors call it."""
        with self._tokenizing:
            special = add_special_tokens
            tokens = encode(prompt, self.tokenizer, self._model, add_special_tokens=special, name=name)
        limit, length = self._model.max_position, len(tokens) + new_tokens
        if length > limit:
            raise ContextLengthError(
                f"{name} has {len(tokens)} tokens and max_new_tokens={new_tokens}: together {length}, "
                f"and the model's limit is {limit}"
            )
        return tokens

    def _said(self, text: np.ndarray) -> bytes | None:
        """By which a message that is this text is known again, whether it came as text or as tokens."""
        if self.tokenizer is None:
            return None
        with self._tokenizing:
            return said_digest(self.tokenizer.decode(text.tolist(), clean_up_tokenization_spaces=False))

    def matcher(self, structure: Structure, *, may_end: bool = True) -> Matcher:
        """A matcher for one answer. Arguments as `Grammars.matcher`.

        A structure is compiled when it is first asked for, which takes up to a second, and kept.

        Raises:
          StructureError: the structure is wrong, not supported, or this model has no tokenizer.
        """
        if self._grammars is None:
            raise StructureError("structure is about text, but this model has no tokenizer")
        return self._grammars.matcher(structure, may_end=may_end)

    def _output(self, sampling: SamplingParams | None) -> Output:
        structure = sampling.structure if sampling is not None else None
        matcher = self.matcher(structure, may_end=not sampling.ignore_eos) if sampling and structure else None
        return Output(sampling, self.end_tokens, self.tokenizer, matcher)

    def default_reuse(self, sharing: str) -> ReuseConfig:
        """What a request does that says nothing of reuse, by how it shares: some ways take no segments, or repair
        them."""
        if sharing == "base_shared":
            return ReuseConfig("prefix")
        repairs = method_of(self.reuse).repairs
        return self.reuse if repairs or sharing != "refresh" else ReuseConfig("sparsex")

    def _method(self, reuse: ReuseConfig | None, sharing: str = "isolated") -> ReuseConfig:
        reuse = self.default_reuse(sharing) if reuse is None else reuse
        if sharing == "base_shared":
            reuse = _for_base_shared(reuse)
        return method_of(reuse).fitted(self._model.windows)

    def _checked(self, sequence: Sequence) -> Sequence:
        _require_type("keep", sequence.keep, bool)
        _require_type("return_logits", sequence.wants_logits, bool)
        if not callable(sequence.listener):
            raise InvalidRequestError(f"listener={sequence.listener!r} must be callable")
        self._admission.check(sequence)
        _require_repair(sequence)
        return sequence


def _content(tokens: np.ndarray, num_before: int, in_company: bool, acting: Acting | None, sharing: str) -> bytes:
    """A digest of the preamble and the text to remember, where one ends and the other begins, and of who finds it.

    Which company the engine chooses is no part of it, but that it chooses: who asks for a text alone gets no other.
    Adapters that share have the name of their group in it: their mark may be another one once the text is prefilled.
    """
    kind = b"company" if in_company else num_before.to_bytes(8)
    group = group_of(sharing)
    keys = tokens if acting is None or group else acting.keys(tokens)
    return hashlib.sha256(kind + group.encode() + keys.tobytes()).digest()


def _require_repair(sequence: Sequence) -> None:
    if sequence.adapter and sequence.adapter.sharing == "refresh" and not sequence.reuse.uses_segments:
        raise InvalidRequestError(
            f"sharing='refresh' needs a method that repairs segments, as sparsex does, not {sequence.reuse.method!r}"
        )


def _for_base_shared(reuse: ReuseConfig) -> ReuseConfig:
    """A prefix, and no segments. It is used whatever the cost model says: its tokens are computed either way, and what
    they save is memory."""
    reuse = method_of(reuse)
    if reuse.uses_segments:
        raise InvalidRequestError(
            f"sharing='base_shared' finds prefixes and no segments: it needs the method prefix, not {reuse.method!r}"
        )
    return reuse.updated(only_if_faster=False)


def _require_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise InvalidRequestError(f"{name}={value!r} must be a {kind.__name__}")
