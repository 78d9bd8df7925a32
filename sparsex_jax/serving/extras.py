"""Fields of a request that its schema does not have: taken, refused, or ignored and named in a header.

    it changes nothing about the answer                taken: `TAKEN`, or a value in `Refusal.neutral`
    it would change the answer                         refused: `REFUSED`
    it is not known here                               ignored, and named in the response's headers

The names are those of OpenAI, vLLM, llama.cpp, SGLang and Text Generation Inference.
"""

from __future__ import annotations

import itertools
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from sparsex_jax.serving.faults import RequestError

_MOST_NAMES = 16  # in a header
_LONGEST_NAME = 64


class Refusal(NamedTuple):
    """Why a field is refused.

    Attributes:
      why: completes the sentence "FIELD is not supported: ...".
      neutral: values, besides null, that ask for what every answer is.
    """

    why: str
    neutral: tuple[Any, ...] = ()


_STRUCTURE = Refusal("use structured_outputs")
_TAG = Refusal("a structure is the whole answer's")
_SPACE = Refusal("JSON has one space behind colons and commas, and none elsewhere")
_BEAM = Refusal("answers are sampled, without beam search", (False, 1, 1.0))
_SAMPLER = Refusal("this way of sampling is not implemented", (False, 0, 0.0))
_TYPICAL = Refusal("this way of sampling is not implemented", (1, 1.0))
_EFFORT = Refusal("a model's effort cannot be set")
_ADAPTER = Refusal("an adapter is named as the model", ([], {}))

REFUSED: Mapping[str, Refusal] = {
    # What forces the answer.
    **dict.fromkeys(("json_schema", "grammar", "regex", "ebnf"), _STRUCTURE),
    **dict.fromkeys(("structural_tag", "structured_outputs.structural_tag"), _TAG),
    **dict.fromkeys(("guided_whitespace_pattern", "structured_outputs.whitespace_pattern"), _SPACE),
    "structured_outputs.disable_additional_properties": Refusal("say so in the schema", (False,)),
    "bad_words": Refusal("words can be written in many tokens; use logit_bias against single ones", ([],)),
    "logits_processors": Refusal("there are no processors of logits", ([],)),
    "vllm_xargs": Refusal("there are no arguments of plugins", ({},)),
    # Other ways to choose tokens.
    **dict.fromkeys(("use_beam_search", "length_penalty", "early_stopping", "num_beams"), _BEAM),
    **dict.fromkeys(("mirostat", "top_a", "xtc_probability", "dry_multiplier", "dynatemp_range"), _SAMPLER),
    **dict.fromkeys(("no_repeat_ngram_size", "smoothing_factor", "epsilon_cutoff", "eta_cutoff"), _SAMPLER),
    **dict.fromkeys(("typical_p", "tfs_z", "tfs"), _TYPICAL),
    "repetition_detection": Refusal("repetitions end no answer"),
    "n_predict": Refusal("use max_tokens"),
    "max_new_tokens": Refusal("use max_tokens"),
    "stop_regex": Refusal("answers are not searched for regular expressions", ([], "")),
    # What is told of the prompt and the answer.
    "suffix": Refusal("no text is filled in before another", ("",)),
    "logprob_token_ids": Refusal("log-probabilities are of the most probable tokens only", ([],)),
    "n_probs": Refusal("use logprobs", (0,)),
    "kv_transfer_params": Refusal("KV is not sent to other servers", ({},)),
    # What is spoken, shown or looked up.
    "audio": Refusal("answers are text only"),
    "modalities": Refusal("answers are text only", (["text"], [])),
    "web_search_options": Refusal("nothing is searched on the web"),
    "plugins": Refusal("there are no plugins", ([],)),
    "models": Refusal("one model is served", ([],)),
    "lora_path": _ADAPTER,
    "lora_request": _ADAPTER,
    # How the model thinks.
    "reasoning": _EFFORT._replace(neutral=({},)),
    "thinking_token_budget": _EFFORT,
    "verbosity": Refusal("a model's verbosity cannot be set", ("medium",)),
    # The older form of tools.
    "functions": Refusal("use tools", ([],)),
    "function_call": Refusal("use tool_choice", ("none",)),
}

# For the operator's books, for speed, or about what is not there: the answer is the same.
TAKEN = frozenset(
    {
        *("user", "safety_identifier", "metadata", "store", "service_tier"),
        *("prediction", "request_id", "guided_decoding_backend"),
        *("spaces_between_special_tokens", "detokenize", "cache_prompt"),
        *("structured_outputs.disable_any_whitespace", "structured_outputs.disable_fallback"),
        *("structured_outputs.backend", "structured_outputs.disable_any_whitespace"),
        "stream_options.include_obfuscation",  # which would pad chunks
    }
)


def forbid(body: BaseModel, at: str = "") -> None:
    """Raises RequestError if the body has any field that its schema has not."""
    known = ", ".join(type(body).model_fields)
    for name, _ in itertools.islice(_extras(body, at), 1):
        raise RequestError(f"{_short(name)} is not permitted; there are: {known}", param=_short(name))


def headers_of(body: BaseModel) -> dict[str, str]:
    """The headers of a response that name the fields which nothing reads: one for programs, one in words (RFC 7234).

    Raises:
      RequestError: a field would change the answer in a way that is not implemented.
    """
    names = _ignored(body)
    if not names:
        return {}
    shown = ", ".join(map(_in_header, names[:_MOST_NAMES]))
    shown += f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return {
        "X-Sparsex-Ignored-Fields": shown,
        "Warning": f'299 sparsex "fields that are not known here were ignored: {shown}"',
    }


def _ignored(body: BaseModel) -> list[str]:
    return [name for name, value in _extras(body, "") if name not in TAKEN and not _refuse(name, value)]


def _extras(body: BaseModel, at: str) -> Iterator[tuple[str, Any]]:
    """Names and values of the extras of a body and of its objects. What messages have goes to the chat template."""
    for name, value in (body.model_extra or {}).items():
        yield at + name, value
    for name in body.model_fields_set & type(body).model_fields.keys() - {"reuse"}:
        if isinstance(value := getattr(body, name), BaseModel):
            yield from _extras(value, f"{at}{name}.")


def _refuse(name: str, value: Any) -> bool:
    """Whether the field is in `REFUSED` with a value that changes nothing. Raises RequestError if it does."""
    refusal = REFUSED.get(name)
    if refusal is None:
        return False
    if value is not None and not any(type(value) is type(each) and value == each for each in refusal.neutral):
        raise RequestError(f"{name} is not supported: {refusal.why}", param=name, code="unsupported_parameter")
    return True


def _in_header(name: str) -> str:
    """Only characters that any header may have."""
    return urllib.parse.quote(_short(name), safe=".[]", errors="replace") or "''"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[:_LONGEST_NAME] + "..."
