"""Chat templates: which of a model's templates shows a chat, what the template can show, and how it is rendered.

A template is a Jinja program that comes with the model. Templates differ in what they expect of messages, and the
differences are nowhere written down. So how a template takes tool calls is found by rendering a small chat.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsex_jax.config.fields import Fields
from sparsex_jax.config.files import read_json
from sparsex_jax.errors import InvalidRequestError

Messages = Sequence[Mapping[str, Any]]

_FUNCTIONS = {"raise_exception", "strftime_now"}  # which transformers gives to templates
_PROBE = {"probe_key": "probe_value"}
_PROBE_TEXT = '{"probe_key": "probe_value"}'
_PROBE_ID = "a1b2c3d4e"  # Mistral's templates refuse ids that are not nine letters and digits


@dataclasses.dataclass(frozen=True)
class CallForm:
    """How a template takes a message that calls tools.

    Attributes:
      content: what a message without text has: a text, None, or no such field (`Ellipsis`).
      as_text: whether the arguments of a call are text, and not an object.
      beside_text: whether calls are shown of a message that has text too.
    """

    content: Any = ""
    as_text: bool = False
    beside_text: bool = True


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template and the texts of the special tokens that it may write, such as `bos_token`."""

    text: str
    special: tuple[tuple[str, str], ...] = ()

    def render(self, messages: Messages, **variables: Any) -> str:
        """The chat as text.

        Args:
          messages: their contents are text or None. A template that wants parts gets parts.
          variables: such as `tools` and `add_generation_prompt`.

        Raises:
          InvalidRequestError: the template refuses the messages, or fails with them.
        """
        try:
            given = [_in_parts(message) for message in messages] if self._wants_parts else messages
            return self._render(given, variables)
        except Exception as error:  # a template is a program, which a client's messages can make fail
            raise InvalidRequestError(f"messages: the model's chat template refuses them: {error}") from error

    def _render(self, messages: Messages, variables: Mapping[str, Any]) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        # `apply_chat_template` would drop fields that are None, which some templates look for.
        given: dict[str, Any] = {**dict(self.special), **variables}
        return render_jinja_template([list(messages)], chat_template=self.text, **given)[0][0]

    def names(self, word: str) -> bool:
        """Whether the template has the word as a text, such as a role that it knows."""
        return re.search(rf"(['\"]){re.escape(word)}\1", self.text) is not None

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not define."""
        from jinja2 import Environment, TemplateSyntaxError, meta

        # `generation` marks what an assistant wrote, for training; transformers' extension knows the tag.
        plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.text)
        try:
            found = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain))
        except TemplateSyntaxError as error:
            raise InvalidRequestError(f"messages: the model's chat template is no valid Jinja: {error}") from error
        return frozenset(found) - _FUNCTIONS

    @functools.cached_property
    def _wants_parts(self) -> bool:
        """Whether the template shows a content that is a list of parts, as those for images do, and not one of text."""
        message = {"role": "user", "content": "probe_text"}
        return not self._shows_text(message) and self._shows_text(_in_parts(message))

    def _shows_text(self, message: Mapping[str, Any]) -> bool:
        try:
            return "probe_text" in self._render([message], {})
        except Exception:  # it may want other messages before this one
            return False

    @functools.cached_property
    def call_form(self) -> CallForm | None:
        """The form in which the template shows the most of a call. None: it shows no calls in any form."""
        forms = [CallForm(content, as_text) for content in ("", None, ...) for as_text in (False, True)]
        shown = {form: self._shown(form) for form in forms}
        best = max(forms, key=shown.__getitem__)  # the first of those that are equal
        how_much, _ = shown[best]
        if not how_much:
            return None
        beside_text = self._shown(dataclasses.replace(best, content="probe_text"))[0] >= how_much
        return dataclasses.replace(best, beside_text=beside_text)

    def _shown(self, form: CallForm) -> tuple[int, int]:
        """How much is shown of a call in this form: nothing (0), its name (1), or its arguments too (2). Of those that
        are equal, the one is better that shows less besides: some templates show an empty text as a turn of its own."""
        arguments = _PROBE_TEXT if form.as_text else _PROBE
        call = {"id": _PROBE_ID, "type": "function", "function": {"name": "probe_name", "arguments": arguments}}
        message = {"role": "assistant", "tool_calls": [call]}
        message |= {} if form.content is ... else {"content": form.content}
        try:
            shown = self.render([{"role": "user", "content": "probe"}, message])
        except InvalidRequestError:
            return 0, 0
        if "probe_name" not in shown or re.search(r"\bNone\b", shown):
            return 0, 0
        as_json = _PROBE_TEXT in shown if form.as_text else "{'probe_key'" not in shown  # as Python prints an object
        whole = as_json and all(word in shown for word in (*_PROBE, *_PROBE.values()))
        return 2 if whole else 1, -len(shown)


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    text = message.get("content")
    return {**message, **({"content": [{"type": "text", "text": text}]} if isinstance(text, str) else {})}


def template_for(tokenizer: Any, name: str | None = None, *, tools: bool = False) -> Template:
    """The template that shows a chat: the one of this name, else `tool_use` where tools are offered, else `default`.

    Raises:
      InvalidRequestError: there is no template, none of this name, or several and none of them is the default.
    """
    stored = stored_templates(tokenizer)
    wanted = [name] if name is not None else ["tool_use", "default"] if tools else ["default"]
    found = next((stored[each] for each in wanted if each in stored), None)
    if found is None and name is None and len(stored) == 1:
        found = next(iter(stored.values()))
    if found is None:
        raise InvalidRequestError(_no_template(name, stored))
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return _template(found, tuple(sorted(special.items())))


def stored_templates(tokenizer: Any | None) -> dict[str, str]:
    """A model's chat templates by name. A single one is the `default`."""
    stored = getattr(tokenizer, "chat_template", None) or {}
    return {"default": stored} if isinstance(stored, str) else dict(stored)


def gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str] | str | None:
    """The chat templates in a GGUF file's metadata, as a tokenizer has them: by name if there are several.

    Raises:
      UnsupportedModelError: one of them is no text.
    """
    prefix, fields = "tokenizer.chat_template", Fields("GGUF file", metadata)
    names = [key.removeprefix(f"{prefix}.") for key in metadata if key.startswith(f"{prefix}.")]
    named = {name: text for name in names if (text := fields.text(f"{prefix}.{name}"))}
    default = fields.text(prefix)
    return {**({"default": default} if default else {}), **named} if named else default


def legacy_template(directory: Path) -> str | None:
    """The chat template in `chat_template.json`, as transformers saved it once. It reads all other places itself."""
    path = directory / "chat_template.json"
    return Fields(str(path), read_json(path)).text("chat_template") if path.is_file() else None


_template = functools.lru_cache(maxsize=32)(Template)


def _no_template(name: str | None, stored: Mapping[str, str]) -> str:
    if not stored:
        return "messages: this model has no chat template; pass the prompt as text"
    known = ", ".join(sorted(stored))
    if name is None:
        return f"chat_template=None must name one of the model's templates, of which none is the default: {known}"
    return f"chat_template={name!r} is none of the model's templates: {known}. Templates of requests are not rendered"
