"""Turns a request's body into jobs for the loop, with checked token ids, sampling, reuse and namespace."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsex_jax.config import ReuseConfig, SamplingParams
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving.access import Limits, Tenant
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.schemas import ChatRequest, CompletionRequest, Generate, KnowledgeRequest, Message
from sparsex_jax.serving.worker import Job
from sparsex_jax.text.encoding import Prompt, encode
from sparsex_jax.text.tokenizer import token_pieces

_GREEDY = 1e-4  # temperatures below this are 0
_COMPLETION_TOKENS = 16  # OpenAI's default


class Intake:
    """Makes jobs of requests. Tokenizing a long prompt takes long, so this must not run on the event loop."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits

    def chat(self, request: ChatRequest, tenant: Tenant) -> list[Job]:
        """One job. Raises RequestError or InvalidRequestError if a field is wrong."""
        text = self._render(request.messages, request.offered_tools)
        tokens = self._encode(text, "messages", special=False)
        named = _first_given(
            max_completion_tokens=request.max_completion_tokens,
            max_tokens=request.max_tokens,
        )
        sampling = self._sampling(request, tokens, named, self._limits.default_tokens, _chat_logprobs(request))
        return [self._job(request, tenant, tokens, sampling)]

    def completion(self, request: CompletionRequest, tenant: Tenant) -> list[Job]:
        """A job for each prompt. Raises RequestError or InvalidRequestError if a field is wrong."""
        prompts = _prompts(request.prompt)
        if len(prompts) > self._limits.max_prompts:
            raise RequestError(
                f"prompt has {len(prompts)} prompts; the limit is {self._limits.max_prompts}", param="prompt"
            )
        named = _first_given(max_tokens=request.max_tokens)
        encoded = [self._encode(prompt, "prompt", special=True) for prompt in prompts]
        jobs = []
        for tokens in encoded:
            sampling = self._sampling(request, tokens, named, _COMPLETION_TOKENS, request.logprobs)
            jobs.append(self._job(request, tenant, tokens, sampling))
        return jobs

    def pieces(self, jobs: Sequence[Job]) -> list[list[str]]:
        """The texts of each prompt's tokens. Without a tokenizer, their ids."""
        tokenizer = self._engine.tokenizer
        prompts = [np.asarray(job.prompt).tolist() for job in jobs]
        return [list(token_pieces(tokenizer, ids)) if tokenizer else [f"{id_} " for id_ in ids] for ids in prompts]

    def knowledge(self, request: KnowledgeRequest) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids of text and preamble. Raises RequestError if one is wrong, or both together do not fit."""
        text = self._encode(request.text, "text", special=False)
        preamble = None if request.preamble is None else self._encode(request.preamble, "preamble", special=True)
        behind, capacity = 0 if preamble is None else len(preamble), self._engine.max_context
        copied = len(text) if behind else 0  # the text moves to pages of its own, away from its preamble
        if behind + len(text) + copied > capacity:
            raise RequestError(
                f"text and preamble have {behind + len(text)} tokens together"
                f"{', and the text is held twice for a moment' if copied else ''}; the limit is {capacity}",
                param="text",
                code="context_length_exceeded",
            )
        return text, preamble

    def _render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
        """The messages in the model's chat template, as text."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise RequestError("messages: this model has no chat template; use /v1/completions", param="messages")
        plain = [plain_message(message) for message in messages]
        try:
            return tokenizer.apply_chat_template(plain, tools=tools, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program, which the client's messages can make fail
            raise RequestError(
                f"messages: the model's chat template refuses them: {error}", param="messages"
            ) from error

    def _encode(self, prompt: Prompt, param: str, *, special: bool) -> np.ndarray:
        try:
            return encode(prompt, self._engine.tokenizer, self._engine.model, add_special_tokens=special)
        except InvalidRequestError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error

    def _sampling(
        self,
        request: Generate,
        tokens: np.ndarray,
        named: tuple[str, int] | None,
        default: int,
        logprobs: int | None,
    ) -> SamplingParams:
        given = {
            name: value
            for name in ("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
            if (value := getattr(request, name)) is not None
        }
        sampling = SamplingParams(
            max_new_tokens=self._new_tokens(len(tokens), named, default),
            temperature=_temperature(request.temperature),
            top_k=max(request.top_k or 0, 0),
            seed=secrets.randbelow(2**32) if request.seed is None else request.seed % 2**32,
            stop=_stop(request.stop),
            ignore_eos=request.ignore_eos,
            logit_bias=_logit_bias(request.logit_bias),
            logprobs=logprobs,
            **given,
        )
        sampling.check_vocabulary(self._engine.model.vocab_size)
        return sampling

    def _new_tokens(self, length: int, named: tuple[str, int] | None, default: int) -> int:
        """The most tokens that the answer may have.

        Args:
          length: tokens of the prompt.
          named: the request's field and its value. None: the request has no such field.
          default: used if the request names no number, as far as it fits.
        """
        context, room = self._engine.max_context, self._engine.max_context - length
        param, wanted = named or ("max_tokens", min(default, max(room, 1), self._limits.max_tokens))
        if wanted > self._limits.max_tokens:
            raise RequestError(
                f"{param}={wanted} is more than this server's limit of {self._limits.max_tokens}", param=param
            )
        if wanted > room:
            raise RequestError(
                f"the prompt has {length} tokens and {param}={wanted}: together {length + wanted}, "
                f"and the limit is {context}, of the model's positions and the store's slots",
                param=param if length < context else "prompt",
                code="context_length_exceeded",
            )
        return wanted

    def _job(self, request: Generate, tenant: Tenant, tokens: np.ndarray, sampling: SamplingParams) -> Job:
        namespace = tenant.store_namespace(request.cache_salt)
        return Job(tokens, sampling, self._reuse(request), namespace, request.keep)

    def _reuse(self, request: Generate) -> ReuseConfig:
        """What the request says about reuse on top of what the server was started with."""
        given: dict[str, Any] = request.reuse.model_dump(exclude_unset=True) if request.reuse else {}
        return self._engine.reuse.updated(**given)


def plain_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: content as one text, arguments of tool calls as objects."""
    plain = message.model_dump(exclude_unset=True)
    if not isinstance(message.content, str):
        plain["content"] = "".join(part.text for part in message.content or ())
    if message.tool_calls is None:
        plain.pop("tool_calls", None)
    else:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    return plain


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """Parse a call's arguments, which OpenAI's clients send as a string of JSON. Other strings stay as they are."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return call | {"function": function | {"arguments": arguments}}


def _prompts(prompt: Any) -> list[Any]:
    """The prompts of a request, which may have a text, token ids, or a list of either."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _first_given(**values: int | None) -> tuple[str, int] | None:
    return next(((name, value) for name, value in values.items() if value is not None), None)


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def _temperature(temperature: float | None) -> float:
    """OpenAI's default is 1. A tiny temperature becomes 0 (greedy), since dividing logits by it would overflow."""
    temperature = 1.0 if temperature is None else temperature
    return 0.0 if temperature < _GREEDY else temperature


def _logit_bias(bias: dict[str, float] | None) -> dict[int, float]:
    try:
        return {int(token): value for token, value in (bias or {}).items()}
    except ValueError as error:
        raise RequestError(f"logit_bias: keys must be token ids: {error}", param="logit_bias") from error


def _chat_logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        return None
    return request.top_logprobs or 0
