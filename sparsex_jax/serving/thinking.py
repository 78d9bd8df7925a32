"""What a request says about thinking: whether the model is to think, how much, and whether its thoughts are told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.serving.faults import RequestError
from sparsex_jax.serving.schemas import ChatRequest, CompletionRequest, Message
from sparsex_jax.serving.thoughts import Thinking
from sparsex_jax.text.messages import text_of
from sparsex_jax.text.templates import Template, template_for
from sparsex_jax.text.thoughts import ThoughtForm, form_for, switched

_USUAL_EFFORT = "medium"  # OpenAI's default, so it asks for nothing
_END = 32  # tokens of a prompt that show whether it opens a thought or closes one


class Thoughts:
    """How one model thinks, as its chat templates and a reasoning parser say."""

    def __init__(self, tokenizer: Any | None, parser: str) -> None:
        """
        Args:
          parser: as `text.thoughts.form_for` takes it.
        """
        self._tokenizer, self._parser = tokenizer, parser

    def thinking(self, request: ChatRequest, prompt: Int32[np.ndarray, "tokens"]) -> Thinking | None:
        """How the answer to a chat thinks. None: its thoughts are not taken apart.

        Raises:
          RequestError: thoughts are to be left out, and cannot be found.
        """
        form = self._form(request)
        if form is None or self._tokenizer is None:
            return None
        end = self._tokenizer.decode(prompt[-_END:].tolist(), skip_special_tokens=False)
        continued = _continued(request)
        return Thinking(form, form.is_open(end, continued), form.behind(end, continued))

    def marks(self, request: ChatRequest) -> tuple[str, ...]:
        """What an answer marks its thoughts with. Raises as `thinking`."""
        form = self._form(request)
        return () if form is None else (form.begin, form.end)

    def variables(self, request: ChatRequest) -> Mapping[str, Any]:
        """The template's variables, among them those by which the model thinks much, little or not at all.

        Raises:
          RequestError: the template has no such variable, and without it the answer would be another.
        """
        given = request.chat_template_kwargs or {}
        if request.thinking is None and request.reasoning_effort is None:
            return given
        template = self._template(request)
        thinks = self._form_in(template)
        return _effort(request, template) | _switch(request, template, thinks) | given

    def _form(self, request: ChatRequest) -> ThoughtForm | None:
        try:
            form = self._form_in(self._template(request))
        except InvalidRequestError:  # which the request is refused with when it is rendered
            return None
        if request.include_reasoning is False and form is None:
            raise _unsupported("include_reasoning", "what this model thinks, if it does, is part of its text")
        return None if request.separate_reasoning is False else form

    def _form_in(self, template: Template) -> ThoughtForm | None:
        return form_for(self._parser, self._tokenizer, template)

    def _template(self, request: ChatRequest) -> Template:
        return template_for(self._tokenizer, request.chat_template, tools=bool(request.offered_tools))


def refuse_thinking(request: CompletionRequest) -> None:
    """Raises RequestError if a completion asks for what only chats have."""
    asked = {
        "reasoning_effort": request.reasoning_effort not in (None, _USUAL_EFFORT),
        "thinking": request.thinking is not None,
        "include_reasoning": request.include_reasoning is False,
    }
    for name in (name for name, wanted in asked.items() if wanted):
        raise _unsupported(name, "only chats have thoughts that are taken apart")


def _effort(request: ChatRequest, template: Template) -> dict[str, Any]:
    effort = request.reasoning_effort
    if effort is not None and "reasoning_effort" in template.variables:
        return {"reasoning_effort": effort}
    if effort not in (None, "none", _USUAL_EFFORT):
        raise _unsupported("reasoning_effort", "the model's chat template has no such variable")
    return {}


def _switch(request: ChatRequest, template: Template, form: ThoughtForm | None) -> dict[str, Any]:
    """The variable that turns thinking on or off. A template without one has the model think as it does."""
    asked = request.thinking.type if request.thinking else None
    off = asked == "disabled" or (asked is None and request.reasoning_effort == "none")
    variable = None if asked is None and not off else switched(template, not off)
    thinks = form is not None and form.end in template.text
    if off and variable is None and thinks and (asked or "reasoning_effort" not in template.variables):
        name = "thinking" if asked else "reasoning_effort"
        raise _unsupported(name, "the model's chat template cannot turn thinking off")
    return variable or {}


def _continued(request: ChatRequest) -> str | None:
    """The content of the message that the answer goes on with."""
    return _content(request.messages[-1]) if request.continue_final_message else None


def _content(message: Message) -> str:
    parts = message.content
    return text_of(0, {"content": [part.model_dump() for part in parts] if isinstance(parts, list) else parts})


def _unsupported(name: str, why: str) -> RequestError:
    return RequestError(f"{name} is not supported: {why}", param=name, code="unsupported_parameter")
