"""Thoughts: what a model writes between marks before it answers, and how its chat template shows it in later turns.

Qwen3          <think>...</think>, or the prompt ends with <think> and the answer begins within the thought
DeepSeek-R1    the same, and an answer begins within a thought even where nothing opened one
Magistral      [THINK]...[/THINK]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from sparsex_jax.config.checks import require
from sparsex_jax.config.structure import Behind
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.text.end_tokens import token_id
from sparsex_jax.text.templates import Template

Message = dict[str, Any]

AUTO, NONE = "auto", "none"
# What clients call the thought of an assistant's message. The first is DeepSeek's name, the second vLLM's.
FIELDS = ("reasoning_content", "reasoning")
_FIELDS_OF_TEMPLATES = (*FIELDS, "thinking")
_SWITCHES = ("enable_thinking", "thinking")  # variables of templates by which a model thinks or does not
_DEEPSEEK = "<\uff5cAssistant\uff5c>"
_PROBE = "probe_thought"


@dataclasses.dataclass(frozen=True)
class ThoughtForm:
    """How a model marks its thoughts.

    Attributes:
      begin, end: the marks.
      begins_open: an answer begins within a thought, unless the prompt closed it.
    """

    begin: str
    end: str
    begins_open: bool = False

    def is_open(self, prompt: str, continued: str | None = None) -> bool:
        """Whether an answer begins within a thought.

        Args:
          prompt: the text before it.
          continued: the content of the assistant's message that the answer goes on with, if it does.
        """
        if continued is not None:
            return continued.rfind(self.begin) > continued.rfind(self.end)
        prompt = prompt.rstrip()
        return prompt.endswith(self.begin) or (self.begins_open and not prompt.endswith(self.end))

    def behind(self, prompt: str, continued: str | None = None) -> Behind | None:
        """The thought that may stand before what an answer must be. None: there is none, since the prompt closed it.

        Arguments as of `is_open`.
        """
        if self.is_open(prompt, continued):
            return Behind(self.end)
        closed = continued is not None or prompt.rstrip().endswith(self.end)
        return None if closed else Behind(self.end, self.begin)

    def wrapped(self, thought: str, content: str) -> str:
        """Thought and content as the model writes them."""
        return f"{self.begin}\n{thought}\n{self.end}\n\n{content}"


_TAGS = ThoughtForm("<think>", "</think>")
PARSERS: Mapping[str, ThoughtForm] = {
    "qwen3": _TAGS,
    "deepseek_r1": dataclasses.replace(_TAGS, begins_open=True),
    "mistral": ThoughtForm("[THINK]", "[/THINK]"),
}


def check_parser(name: str) -> None:
    """Raises InvalidRequestError if there is no reasoning parser of this name."""
    known = (AUTO, NONE, *PARSERS)
    require(name in known, f"reasoning_parser={name!r} must be one of {', '.join(known)}")


def form_for(parser: str, tokenizer: Any, template: Template) -> ThoughtForm | None:
    """The form of a model's thoughts; None if they are not taken apart.

    Args:
      parser: `auto` looks for the marks in the template, and then in the vocabulary.
    """
    if parser != AUTO:
        return PARSERS.get(parser)
    if _DEEPSEEK in template.text and _TAGS.end in template.text:
        return PARSERS["deepseek_r1"]
    forms = (PARSERS["qwen3"], PARSERS["mistral"])
    return next((form for form in forms if form.end in template.text or _has_marks(tokenizer, form)), None)


def _has_marks(tokenizer: Any, form: ThoughtForm) -> bool:
    """Whether the vocabulary has the marks as tokens."""
    return all(token_id(tokenizer, mark) is not None for mark in (form.begin, form.end))


def switched(template: Template, on: bool) -> dict[str, Any] | None:
    """The template's variable that turns thinking on or off, with this value; None if it has none."""
    name = next((each for each in _SWITCHES if each in template.variables), None)
    return None if name is None else {name: on}


def as_shown(messages: Sequence[Message], template: Template) -> list[Message]:
    """The messages with the assistant's thoughts where the template looks for them.

    Raises:
      InvalidRequestError: a thought is no text.
    """
    return [_as_shown(number, message, template) for number, message in enumerate(messages)]


def _as_shown(number: int, message: Message, template: Template) -> Message:
    named = [name for name in FIELDS if name in message]
    if message["role"] != "assistant" or not named:
        return message
    wrong = next((name for name in named if not isinstance(message[name], str)), None)
    if wrong is not None:
        raise InvalidRequestError(f"messages[{number}].{wrong} must be text: what the assistant thought")
    thought = next((message[name] for name in named if message[name]), "")
    rest = {name: value for name, value in message.items() if name not in FIELDS}
    field, form = thought_field(template), _marks_of(template)
    if not thought or (field is None and form is None):
        return rest  # the template shows no thoughts
    if field is not None:
        return rest | {field: thought}
    assert form is not None
    return rest | {"content": form.wrapped(thought, message["content"])}


@functools.lru_cache(maxsize=32)
def thought_field(template: Template) -> str | None:
    """The field of an assistant's message whose text the template shows as a thought; None if it has no such field."""
    return next((name for name in _FIELDS_OF_TEMPLATES if _shows(template, name)), None)


def _shows(template: Template, field: str) -> bool:
    messages = [{"role": "user", "content": "probe"}, {"role": "assistant", "content": "probe", field: _PROBE}]
    try:
        return field in template.text and _PROBE in template.render(messages)
    except InvalidRequestError:
        return False


def _marks_of(template: Template) -> ThoughtForm | None:
    """The marks that the template looks for in contents: it shows or drops what is between them."""
    return next((form for form in PARSERS.values() if form.end in template.text), None)
