"""Turns a request's body into jobs for the loop, with checked token ids, sampling, reuse and namespace."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsex_jax.config import ReuseConfig, Round, SamplingParams, Structure
from sparsex_jax.config.rounds import WAIT_MS
from sparsex_jax.engine import Engine
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.scheduler.lending import Lent
from sparsex_jax.scheduler.pinning import Pinning
from sparsex_jax.scheduler.prompt_logprobs import check_prompt_logprobs, reuse_when_scored
from sparsex_jax.scheduler.rounds import Member
from sparsex_jax.serving import extras
from sparsex_jax.serving.access import Limits, Tenant
from sparsex_jax.serving.evaluation import Echo, answer_logprobs_of, check_best_of, each_answer, prompt_logprobs_of
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.lengths import Lengths
from sparsex_jax.serving.pins import pinning_of
from sparsex_jax.serving.schemas import ChatRequest, CompletionRequest, Generate, KnowledgeRequest, Message
from sparsex_jax.serving.structure import structure_of
from sparsex_jax.serving.thinking import Thoughts, refuse_thinking
from sparsex_jax.serving.thoughts import Thinking
from sparsex_jax.serving.tools import marker_ids
from sparsex_jax.serving.worker import Job
from sparsex_jax.text.chat import Chat, document, render
from sparsex_jax.text.control_tokens import MarkedText
from sparsex_jax.text.encoding import Prompt, encode
from sparsex_jax.text.end_tokens import special_ids
from sparsex_jax.text.messages import turn_digests
from sparsex_jax.text.thoughts import AUTO
from sparsex_jax.text.tokenizer import token_pieces

_GREEDY = 1e-4  # temperatures below this are 0
_COMPLETION_TOKENS = 16  # OpenAI's default
# Fields that `SamplingParams` has under the same name, with the same meaning and default.
_SAME = (
    *("top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos"),
    *("stop_token_ids", "allowed_token_ids", "skip_special_tokens"),
)


class Intake:
    """Makes jobs of requests. Tokenizing a long prompt takes long, so this must not run on the event loop.

    Attributes:
      lengths: of prompts and answers.
    """

    def __init__(self, engine: Engine, limits: Limits, reasoning_parser: str = AUTO) -> None:
        """
        Args:
          reasoning_parser: how thoughts are found in chats; see `text.thoughts.form_for`.
        """
        self._engine, self._limits, self.lengths = engine, limits, Lengths(engine, limits)
        self._thoughts = Thoughts(engine.tokenizer, reasoning_parser)

    def chat(self, request: ChatRequest, tenant: Tenant, *, shortens: bool = False) -> list[Job]:
        """A job for each answer.

        Args:
          shortens: if as many tokens as the request names do not fit, the answer has what fits.

        Raises:
          RequestError, InvalidRequestError: a field is wrong.
        """
        self._check_number(request, 1)
        named = _first_given(
            max_completion_tokens=request.max_completion_tokens,
            max_tokens=request.max_tokens,
        )
        tokens = self._prompt(request, self._render(request), "messages", named, special=False)
        exact, default = (None, named and named[1]) if shortens else (named, None)
        most = self.lengths.new_tokens(len(tokens), exact, default, "messages")
        thinking = self._thoughts.thinking(request, tokens)
        sampling = self._sampling(request, most, exact is not None, _chat_logprobs(request), thinking)
        sampling = dataclasses.replace(sampling, shown_token_ids=self._shown_ids(request))
        turns = turn_digests([plain_message(message) for message in request.messages])
        return self._jobs(request, tenant, tokens, sampling, pinning_of(request, tenant.pins), turns)

    def thinking(self, request: ChatRequest, job: Job) -> Thinking | None:
        """How the answer to a chat thinks. None: its thoughts are not taken apart, or it has none."""
        thinking, structure = self._thoughts.thinking(request, job.prompt), job.sampling.structure
        is_structure = structure is not None and structure.lazy is None and structure.behind is None
        return None if is_structure else thinking  # from its first token on

    def chat_tokens(self, request: ChatRequest) -> np.ndarray:
        """The ids of a chat's prompt, however long it is. Raises RequestError if a field is wrong."""
        return self._encode(self._render(request), "messages", special=bool(request.add_special_tokens))

    def text_tokens(self, text: str, *, special: bool) -> np.ndarray:
        """The ids of a text, which may be empty. Raises RequestError if it is far too long for the model."""
        if not text and self._engine.tokenizer is not None:
            return np.asarray(self._engine.tokenizer("", add_special_tokens=special)["input_ids"], np.int32)
        return self._encode(text, "prompt", special=special)

    def token_names(self, ids: Sequence[int]) -> list[str]:
        """What the vocabulary calls these tokens."""
        return self._engine.tokenizer.convert_ids_to_tokens(ids) if self._engine.tokenizer else []

    def text_of_tokens(self, ids: list[Any]) -> str:
        """The text of token ids, special tokens included. Raises RequestError if the model has not all of them."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            raise RequestError("tokens: this model has no tokenizer", param="tokens")
        known = self._encode(ids, "tokens", special=False).tolist() if ids else []
        return tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def completion(self, request: CompletionRequest, tenant: Tenant) -> list[Job]:
        """A job for each answer to each prompt. Raises RequestError or InvalidRequestError if a field is wrong."""
        refuse_thinking(request)
        prompts = split_prompts(request.prompt)
        self._check_number(request, len(prompts))
        named = _first_given(max_tokens=request.max_tokens)
        encoded = [self._prompt(request, prompt, "prompt", named, special=True) for prompt in prompts]
        pinning, jobs = pinning_of(request, tenant.pins), list[Job]()
        for tokens in encoded:
            most = self.lengths.new_tokens(len(tokens), named, _COMPLETION_TOKENS, "prompt")
            sampling = self._sampling(request, most, named is not None, request.logprobs)
            jobs += self._jobs(request, tenant, tokens, sampling, pinning)
        return jobs

    def echoes(self, request: CompletionRequest, jobs: Sequence[Job]) -> list[Echo]:
        """Each prompt, to stand before its answers, if the request asks for that."""
        if not request.echo:
            return []
        prompts, firsts = split_prompts(request.prompt), jobs[:: request.num_answers]
        tokenizer = self._engine.tokenizer
        return [Echo.of(prompt, job.prompt, tokenizer) for prompt, job in zip(prompts, firsts, strict=True)]

    def pieces(self, jobs: Sequence[Job]) -> list[list[str]]:
        """The texts of each prompt's tokens. Without a tokenizer, their ids."""
        tokenizer = self._engine.tokenizer
        prompts = [np.asarray(job.prompt).tolist() for job in jobs]
        return [list(token_pieces(tokenizer, ids)) if tokenizer else [f"{id_} " for id_ in ids] for ids in prompts]

    def knowledge(self, request: KnowledgeRequest) -> tuple[np.ndarray, np.ndarray | None]:
        """The ids of text and preamble. Raises RequestError if one is wrong, or both together can never fit."""
        extras.forbid(request)
        self._check_company(request)
        text = self._encode(self._document(request), "text", special=False)
        preamble = None if request.preamble is None else self._encode(request.preamble, "preamble", special=True)
        behind, page = 0 if preamble is None else len(preamble), self._engine.config.page_size
        copied = len(text) if behind else 0  # the text moves to pages of its own, away from its preamble
        pages, held = -(-(behind + len(text)) // page) + -(-copied // page), self._engine.config.num_pages
        if behind + len(text) > self._engine.model.max_position or pages > held:
            twice = f", and the text is held twice for a moment: {pages} of {held} pages" if copied else ""
            said = f"text and preamble have {behind + len(text)} tokens together{twice}"
            raise self.lengths.error(said, "text", "text")
        return text, preamble

    def _check_company(self, request: KnowledgeRequest) -> None:
        """Raises RequestError if company is asked for and cannot be."""
        if not request.company:
            return
        if request.preamble is not None:
            said = "company and preamble exclude each other: one of them stands before the text"
            raise RequestError(said, param="company", code="invalid_value")
        if not self._engine.config.company_tokens:
            said = "company: true needs a server that was started with --company-tokens above 0"
            raise RequestError(said, param="company", code="invalid_value")

    def _document(self, request: KnowledgeRequest) -> Any:
        """The text as it is in a message, so that messages find it."""
        if not isinstance(request.text, str) or request.allow_control_tokens:
            return request.text
        return document(request.text, self._engine.tokenizer)

    def _shown_ids(self, request: ChatRequest) -> tuple[int, ...]:
        """The special tokens that answers have, so that thoughts and calls are found in them."""
        tokenizer = self._engine.tokenizer
        of_calls = marker_ids(tokenizer) if request.offered_tools else ()
        return of_calls + special_ids(tokenizer, self._thoughts.marks(request))

    def _render(self, request: ChatRequest) -> MarkedText:
        """The chat in the model's template. Raises RequestError if a field is wrong, or the template refuses it."""
        return rendered(request, self._engine.tokenizer, self._thoughts)

    def _prompt(
        self, request: Generate, prompt: Any, param: str, named: tuple[str, int] | None, *, special: bool
    ) -> np.ndarray:
        """The ids of a prompt, cut to its end if the request says so.

        Args:
          named: the field and the value of the tokens that the answer may have; a cut leaves room for them.
          special: whether text gets special tokens, if the request does not say.
        """
        special = special if request.add_special_tokens is None else request.add_special_tokens
        if request.truncate_prompt_tokens is None:
            return self._encode(prompt, param, special=special)
        room = self.lengths.context - (1 if named is None else named[1])
        length = _length_to_keep(request.truncate_prompt_tokens, room)
        if isinstance(prompt, str):
            prompt = self.lengths.end_of(prompt, length)
        tokens = self._encode(prompt, param, special=special, whole=False)
        begin = self._begin_tokens(special) if isinstance(prompt, (str, MarkedText)) else 0
        kept = min(begin, length - 1)
        return (
            tokens if len(tokens) <= length else np.concatenate([tokens[:kept], tokens[len(tokens) - length + kept :]])
        )

    def _begin_tokens(self, special: bool) -> int:
        """How many tokens the tokenizer puts before a text. A cut keeps them, as a tokenizer's own truncation does."""
        tokenizer = self._engine.tokenizer
        return len(tokenizer("", add_special_tokens=True)["input_ids"]) if tokenizer and special else 0

    def _encode(self, prompt: Prompt | MarkedText, param: str, *, special: bool, whole: bool = True) -> np.ndarray:
        """Args: whole: all of it is to be used, so that one which is too long need not be tokenized."""
        text = prompt.text if isinstance(prompt, MarkedText) else prompt
        if isinstance(text, str) and self._engine.tokenizer and whole:
            self.lengths.require_text_fits(text, param)
        try:
            engine = self._engine
            return encode(prompt, engine.tokenizer, engine.model, add_special_tokens=special, name=param)
        except InvalidRequestError as error:
            raise RequestError(str(error), param=param, code="invalid_value") from error

    def _check_number(self, request: Generate, prompts: int) -> None:
        check_best_of(request)
        answers, most = prompts * request.num_answers, self._limits.max_prompts
        if answers > most:
            name = "best_of" if request.num_answers > (request.n or 1) else "n"
            param = "prompt" if prompts > most else name
            raise RequestError(
                f"{param}: {prompts} prompts with {name}={request.num_answers} make {answers} answers; "
                f"the limit is {most}",
                param=param,
            )

    def _sampling(
        self, request: Generate, most: int, named: bool, logprobs: int | None, thinking: Thinking | None = None
    ) -> SamplingParams:
        """
        Args:
          most: tokens that the answer may have.
          named: the request asks for a number of them. Otherwise the answer is what fits.
        """
        least, defaults = request.min_tokens or 0, self._engine.sampling
        if least > most:
            raise RequestError(
                f"min_tokens={least} must be at most the {most} tokens that the answer may have", param="min_tokens"
            )
        sampling = SamplingParams(
            max_new_tokens=most,
            min_new_tokens=least,
            temperature=_temperature(request, defaults),
            top_k=max(defaults.get("top_k", 0) if request.top_k is None else request.top_k, 0),
            seed=secrets.randbelow(2**32) if request.seed is None else request.seed % 2**32,
            stop=_stop(request.stop),
            include_stop=bool(request.include_stop_str_in_output),
            logit_bias=_logit_bias(request.logit_bias),
            logprobs=answer_logprobs_of(request, logprobs),
            prompt_logprobs=prompt_logprobs_of(request),
            prompt_logprobs_start=request.prompt_logprobs_start or 0,
            structure=self._structure(request, thinking),
            ends_where_full=not named,
            **{name: defaults[name] for name in _SAME if name in defaults and getattr(request, name) is None},
            **{name: value for name in _SAME if (value := getattr(request, name)) is not None},
        )
        sampling.check_vocabulary(self._engine.model.vocab_size)
        return sampling

    def _structure(self, request: Generate, thinking: Thinking | None) -> Structure | None:
        behind = None if thinking is None else thinking.behind
        return structure_of(request, self._engine.tokenizer, behind, self._engine.loop.requests.matcher)

    def _jobs(
        self,
        request: Generate,
        tenant: Tenant,
        tokens: np.ndarray,
        sampling: SamplingParams,
        pinning: Pinning | None,
        turns: frozenset[bytes] = frozenset(),
    ) -> list[Job]:
        """One for each answer."""
        check_prompt_logprobs(tokens, sampling)
        namespace, keep = tenant.store_namespace(request.cache_salt), request.keep is not False
        answers = each_answer(request, sampling, self._reuse(request, sampling))
        lent = Lent(len(answers)) if len(answers) > 1 and not keep else None
        shared: dict[str, Any] = {"member": _member(request), "sharing": request.sharing or "isolated"}
        return [Job(tokens, one, reuse, namespace, keep, turns, lent, pinning, **shared) for one, reuse in answers]

    def _reuse(self, request: Generate, sampling: SamplingParams) -> ReuseConfig:
        """What the request says about reuse on top of what the server was started with."""
        if request.reuse is None:
            by_default = self._engine.loop.requests.default_reuse(request.sharing or "isolated")
            return reuse_when_scored(sampling) or by_default
        extras.forbid(request.reuse, "reuse.")
        return self._engine.reuse.updated(**request.reuse.model_dump(exclude_unset=True))


def rendered(request: ChatRequest, tokenizer: Any | None, thoughts: Thoughts) -> MarkedText:
    """A chat in the model's template. Raises RequestError if a field is wrong, or the template refuses it."""
    chat = Chat(
        [plain_message(message) for message in request.messages],
        tools=request.offered_tools,
        documents=request.documents,
        chat_template=request.chat_template,
        chat_template_kwargs=thoughts.variables(request),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        allow_control_tokens=bool(request.allow_control_tokens),
    )
    try:
        return render(chat, tokenizer)
    except InvalidRequestError as error:
        named = re.match(r"[\w.\[\]]+", str(error))  # the messages begin with the field
        raise RequestError(str(error), param=named[0] if named else "messages", code="invalid_value") from error


def _member(request: Generate) -> Member | None:
    """A prompt's place in the round that its request names."""
    asked = request.round
    if asked is None:
        return None
    return Member(Round(asked.id, asked.size, WAIT_MS if asked.wait_ms is None else asked.wait_ms))


def plain_message(message: Message) -> dict[str, Any]:
    """A message with the fields that were sent. Their values are not copied: they may be nested deeply."""
    sent = {name: value for name, value in message if name in message.model_fields_set}
    if isinstance(message.content, list):
        sent["content"] = [{"type": "text", "text": part.text} for part in message.content]
    return sent


def split_prompts(prompt: Any) -> list[Any]:
    """The prompts of a request, which may have a text, token ids, or a list of either.

    Raises:
      RequestError: the list has something else. Ids are not looked at.
    """
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    kinds = (str, list)
    for number, each in enumerate(prompt):
        if not isinstance(each, kinds) or not each:
            said = "is empty" if isinstance(each, kinds) else f"is {each!r:.60}"
            raise RequestError(
                f"prompt[{number}] {said}; it must be text or token ids, as all other prompts are", param="prompt"
            )
        kinds = (type(each),)  # type: ignore[assignment]
    return prompt


def _length_to_keep(asked: int, room: int) -> int:
    """The tokens that `truncate_prompt_tokens` keeps of a prompt; -1 is as many as there is room for."""
    if not (asked == -1 or 1 <= asked <= max(room, 1)):
        raise RequestError(
            f"truncate_prompt_tokens={asked} must be -1, or from 1 to the {room} tokens that fit beside the answer",
            param="truncate_prompt_tokens",
        )
    return max(room, 1) if asked == -1 else asked


def _first_given(**values: int | None) -> tuple[str, int] | None:
    return next(((name, value) for name, value in values.items() if value is not None), None)


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    """Empty strings stop nothing, as with OpenAI."""
    return tuple(each for each in ([stop] if isinstance(stop, str) else stop or ()) if each)


def _temperature(request: Generate, defaults: Mapping[str, Any]) -> float:
    """The default is the model's own, or OpenAI's, which is 1. A tiny temperature becomes 0 (greedy), since dividing
    logits by it would overflow. So does any where top_p is 0, which keeps the most probable token."""
    temperature = defaults.get("temperature", 1.0) if request.temperature is None else request.temperature
    top_p = defaults.get("top_p") if request.top_p is None else request.top_p
    return 0.0 if temperature < _GREEDY or top_p == 0 else temperature


def _logit_bias(bias: dict[str, Any] | None) -> dict[int, float]:
    for token in bias or ():
        if not (token.isascii() and token.isdigit() and len(token) < 20):
            raise RequestError(f"logit_bias has the key {token!r:.60}; keys must be token ids", param="logit_bias")
    return {int(token): value for token, value in (bias or {}).items()}


def _chat_logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        return None
    return request.top_logprobs or 0
