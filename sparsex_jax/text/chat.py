"""Chats: messages with tools and documents become the text of a model's chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sparsex_jax.config.checks import require
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.text import generic_tools, thoughts
from sparsex_jax.text.control_tokens import MarkedText, Marks
from sparsex_jax.text.end_tokens import control_token_ids, end_token_ids
from sparsex_jax.text.messages import Message, checked_message, in_form, objects, text_of
from sparsex_jax.text.templates import CallForm, Template, stored_templates, template_for

# What the application and the model wrote. There `<think>` may be the token that the model knows.
_TRUSTED_ROLES = ("system", "developer", "assistant")
# Variables of templates that are fields of a chat.
_FIELDS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat as a prompt.

    Attributes:
      messages: each with a `role`, and a `content` that is text, a list of text parts or None. Tool calls and their
        results are as OpenAI has them; the arguments of a call may be JSON or an object. What an assistant thought
        (`reasoning_content`, or `reasoning`) goes where the template looks for it. All other fields go to the template
        as they are.
      tools: offered to the model, as OpenAI describes them. Empty is none. Where the template has no tools, they are
        described in the system message.
      documents: for the template to show, each a mapping as the template expects it, often of `title` and `text`.
      chat_template: the name of one of the model's templates. None: `tool_use` where tools are offered and there is
        such a template, else the default.
      chat_template_kwargs: further variables of the template, such as `enable_thinking`.
      add_generation_prompt: whether the text ends with the beginning of an answer. None: unless a message is continued.
      continue_final_message: the answer goes on where the last message ends.
      allow_control_tokens: whether texts such as `<|im_end|>` in messages, tools and documents become control tokens.
        Otherwise they are encoded as the texts that they are.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    allow_control_tokens: bool = False


def render(chat: Chat, tokenizer: Any | None) -> MarkedText:
    """A chat in the model's template. Control tokens are meant where the template writes them.

    Raises:
      InvalidRequestError: the chat is wrong in a field, which the message begins with, or the template refuses it.
    """
    template = template_for(tokenizer, chat.chat_template, tools=bool(chat.tools))
    if isinstance(chat.messages, (str, bytes)) or not isinstance(chat.messages, Sequence):
        raise InvalidRequestError(f"messages has type {type(chat.messages).__name__}; it must be a list")
    try:
        messages, variables = _prepared(chat, template)
        rendering = _Rendering(template, messages, variables, cut_last=chat.continue_final_message)
        if chat.allow_control_tokens:
            return MarkedText([(rendering.text, True)])
        return rendering.marked(_control_tokens(tokenizer), _added_tokens(tokenizer, template))
    except RecursionError as error:
        raise InvalidRequestError("messages: they, the tools or the documents are nested too deeply") from error


def document(text: str, tokenizer: Any | None) -> MarkedText:
    """A text as the content of a user's message: no control token in it is meant."""
    if tokenizer is None:
        return MarkedText([(text, True)])
    tokens = _control_tokens(tokenizer)
    if stored_templates(tokenizer):
        tokens |= _added_tokens(tokenizer, template_for(tokenizer))
    marks = Marks(text)
    return marks.read(marks.mark(text, tokens))


def shows_tools(tokenizer: Any, name: str | None = None) -> bool:
    """Whether the template that is taken where tools are offered shows them itself."""
    return "tools" in template_for(tokenizer, name, tools=True).variables


def _control_tokens(tokenizer: Any) -> frozenset[str]:
    return frozenset(control_token_ids(tokenizer, end_token_ids((), tokenizer, len(tokenizer))).values())


def _added_tokens(tokenizer: Any, template: Template) -> frozenset[str]:
    """Tokens that the template may write and the vocabulary does not call special, such as `<tool_response>`."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    return frozenset(name for name in added if name in template.text and not name.isspace())


class _Rendering:
    """What a template makes of messages and variables.

    Attributes:
      text: of the chat.
    """

    def __init__(
        self, template: Template, messages: list[Message], variables: dict[str, Any], *, cut_last: bool
    ) -> None:
        """
        Args:
          cut_last: end the text where the last message's content ends.
        """
        self._template, self._messages, self._variables, self._cut_last = template, messages, variables, cut_last
        self._marks = Marks([messages, variables])
        self.text = self._render(messages, variables)

    def marked(self, control: frozenset[str], added: frozenset[str]) -> MarkedText:
        """The text, in which control tokens are meant where the template wrote them.

        Args:
          control: tokens that nobody but the template may write.
          added: tokens that an application or the model may write too, and others may not.

        Raises:
          InvalidRequestError: the template changes contents so that its own tokens cannot be told from theirs.
        """
        for tokens in (control | added, control):
            messages, variables = self._marked(tokens, control)
            if (messages, variables) == (self._messages, self._variables):
                return MarkedText([(self.text, True)])
            text = self._render(messages, variables)
            if self._marks.removed(text) == self.text:
                return self._marks.read(text)
        if not self._marks.finds_any(control):  # beginnings of tokens alone, which hardly ever become tokens
            return MarkedText([(self.text, True)])
        raise InvalidRequestError(
            "messages: they have the text of a control token, and the model's chat template changes the text around "
            "it, so that it cannot be told from the template's own; leave it out, or set allow_control_tokens"
        )

    def _marked(self, tokens: frozenset[str], control: frozenset[str]) -> tuple[list[Message], dict[str, Any]]:
        mark = self._marks.mark
        messages = [
            mark(message, control if message["role"] in _TRUSTED_ROLES else tokens) | {"role": message["role"]}
            for message in self._messages
        ]
        tools, documents = mark(self._variables["tools"], control), mark(self._variables["documents"], tokens)
        return messages, self._variables | {"tools": tools, "documents": documents}

    def _render(self, messages: list[Message], variables: dict[str, Any]) -> str:
        if not self._cut_last:
            return self._template.render(messages, **variables)
        cut, last = self._marks.cut, messages[-1]
        messages = [*messages[:-1], last | {"content": f"{last['content']}{cut} "}]
        before, found, behind = self._template.render(messages, **variables).rpartition(cut)
        require(bool(found), "continue_final_message=True: the model's chat template does not show the last message")
        return before if behind.startswith(" ") else before.rstrip()  # without the space, contents are trimmed


def _prepared(chat: Chat, template: Template) -> tuple[list[Message], dict[str, Any]]:
    """The messages in the forms that the template shows, and its variables. Raises InvalidRequestError."""
    messages = [checked_message(number, message, template) for number, message in enumerate(chat.messages)]
    require(bool(messages), "messages has no entries; it must have 1 at least")
    variables = _checked_variables(chat, template)
    form = template.call_form if any("tool_calls" in message for message in messages) else CallForm()
    messages = in_form(thoughts.as_shown(messages, template), form or CallForm())
    if form is None:
        messages = generic_tools.calls_as_text(messages)
    if variables["tools"] and "tools" not in template.variables:
        messages = generic_tools.offer(messages, variables["tools"])
        variables["tools"] = None
    return messages, variables


def _checked_variables(chat: Chat, template: Template) -> dict[str, Any]:
    require(
        not chat.documents or "documents" in template.variables,
        "documents has entries, but the model's chat template shows no documents; put them into a message",
    )
    _check_kwargs(chat.chat_template_kwargs, template)
    return dict(chat.chat_template_kwargs) | {
        "tools": _checked_tools(chat.tools),
        "documents": objects("documents", chat.documents) or None,
        "add_generation_prompt": _adds_generation_prompt(chat),
    }


def _check_kwargs(kwargs: Mapping[str, Any], template: Template) -> None:
    used = template.variables - set(_FIELDS) - set(dict(template.special))
    for name in kwargs:
        require(name not in _FIELDS, f"chat_template_kwargs has {name!r}, which is a field of its own")
        require(
            name in template.variables,
            f"chat_template_kwargs has {name!r}, which the model's chat template does not use; "
            f"it uses: {', '.join(sorted(used)) or 'none'}",
        )


def _checked_tools(tools: Any) -> list[Message] | None:
    checked = objects("tools", tools)
    for number, tool in enumerate(checked):
        function = tool.get("function")
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str) and bool(function["name"])
        require(named, f"tools[{number}] has no function.name")
    return checked or None


def _adds_generation_prompt(chat: Chat) -> bool:
    if not chat.continue_final_message:
        return chat.add_generation_prompt is not False
    last = chat.messages[-1]
    require(
        not chat.add_generation_prompt,
        "continue_final_message=True needs add_generation_prompt=False: an answer goes on, or a new one begins",
    )
    require(
        bool(text_of(len(chat.messages) - 1, last)), "continue_final_message=True, but the last message has no text"
    )
    require(not last.get("tool_calls"), "continue_final_message=True, but the last message ends with a tool call")
    return False
