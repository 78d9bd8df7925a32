"""The tokens that end an answer: those that the model's files name, and those whose name says so.

Files often name one end token only, and a fine-tune keeps the files of its base model, whose texts end otherwise than
the turns of a chat. So the well-known names count wherever a vocabulary has them, as they do in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# No text has these by accident, so they count whatever the vocabulary calls them.
_NAMES = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM, Yi
    "<|endoftext|>",
    "<|eot_id|>",  # Llama 3: the end of a turn, of a message that calls a tool, of a text
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|eot|>",  # Llama 4
    "<|eom|>",
    "<end_of_turn>",  # Gemma
    "<|end_of_turn|>",
    "<|END_OF_TURN_TOKEN|>",  # Command R
    "<end_of_utterance>",
    "[|endofturn|]",  # EXAONE
    "<|return|>",  # gpt-oss: the end of a turn, of a call
    "<|call|>",
    "<|EOT|>",  # DeepSeek
    "<\uff5cend▁of▁sentence\uff5c>",
    "<EOT>",  # Code Llama writes "▁<EOT>"
    "▁<EOT>",
)
_PART_OF_A_TURN = "<|end|>"  # Phi: the end of a turn; gpt-oss, which has `<|return|>`: of one message of a turn
# These may be a page's markup too, so they count where the vocabulary calls them special.
_SPECIAL_NAMES = ("</s>", "<eos>", "[EOS]", "[EOT]")


def end_token_ids(configured: Iterable[int], tokenizer: Any | None, vocab_size: int) -> tuple[int, ...]:
    """The ids that end an answer, without repetition.

    Args:
      configured: the ids that the model's configurations name; they come first.
      tokenizer: of transformers; its `eos_token` and the names it knows follow. None: there is nothing to add.
      vocab_size: ids that the model cannot generate are left out.
    """
    found = [*configured, *(_of_tokenizer(tokenizer) if tokenizer is not None else ())]
    return tuple(dict.fromkeys(id_ for id_ in found if id_ is not None and 0 <= id_ < vocab_size))


def control_token_ids(tokenizer: Any, ends: Iterable[int]) -> dict[int, str]:
    """The tokens that stand for no text, by id: those that the vocabulary calls special, and the ends of answers."""
    special = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | {id_: name for id_ in ends if (name := tokenizer.convert_ids_to_tokens(id_)) is not None}


def special_ids(tokenizer: Any | None, names: Iterable[str]) -> tuple[int, ...]:
    """The ids of the tokens of these names that the vocabulary calls special."""
    wanted = frozenset(names)
    added = tokenizer.added_tokens_decoder if wanted and tokenizer is not None else {}
    return tuple(id_ for id_, token in added.items() if token.special and token.content in wanted)


def _of_tokenizer(tokenizer: Any) -> list[int | None]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = [*_NAMES, *(name for name in _SPECIAL_NAMES if name in special)]
    if token_id(tokenizer, "<|return|>") is None:
        names.append(_PART_OF_A_TURN)
    return [tokenizer.eos_token_id, *(token_id(tokenizer, name) for name in names)]


def token_id(tokenizer: Any, name: str) -> int | None:
    """The id of a token of this name. A tokenizer gives the unknown token's where there is none."""
    id_ = tokenizer.convert_tokens_to_ids(name)
    return id_ if id_ is not None and tokenizer.convert_ids_to_tokens(id_) == name else None
