"""Answers end at every token that ends a turn of the model, and show none of them."""

import pytest
from conftest import tiny_engine
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sparsex_jax import SamplingParams
from sparsex_jax.checkpoints.gguf_config import _eos_token_ids
from sparsex_jax.text.detokenizer import Detokenizer
from sparsex_jax.text.end_tokens import end_token_ids

WORDS = ("[UNK]", "a", "b", "c")


def make_tokenizer(special=(), others=(), **names):
    """Words, then special tokens, then tokens that were added and are not special."""
    raw = Tokenizer(WordLevel({word: id_ for id_, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.decoder = decoders.Fuse()
    raw.add_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in others])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **names)


@pytest.mark.parametrize(
    ("configured", "tokenizer", "expected"),
    [
        ((1,), None, (1,)),
        ((3, 1), make_tokenizer(), (3, 1)),
        ((), make_tokenizer(["<end>"], eos_token="<end>"), (4,)),  # in no configuration
        ((1,), make_tokenizer(["<|x|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]), (1, 5, 6, 7)),
        ((4,), make_tokenizer(["<|im_end|>", "<|endoftext|>"], eos_token="<|im_end|>"), (4, 5)),
        ((), make_tokenizer(others=["<|im_end|>", "<end_of_turn>"]), (4, 5)),
        ((), make_tokenizer(["</s>"]), (4,)),
        ((), make_tokenizer(others=["</s>"]), ()),  # a page's markup, as in Gemma's vocabulary
        ((), make_tokenizer(["<|end|>"]), (4,)),
        ((), make_tokenizer(["<|end|>", "<|return|>", "<|call|>"]), (5, 6)),  # gpt-oss goes on behind a message
        ((90, -1, 4), make_tokenizer(["<end>"]), (4,)),  # the model has 90 tokens
    ],
)
def test_end_tokens_are_gathered_from_everywhere(configured, tokenizer, expected):
    assert end_token_ids(configured, tokenizer, 90) == expected


def test_a_gguf_files_ends_of_turns_and_messages_count():
    fields = {f"tokenizer.ggml.{name}_token_id": id_ for id_, name in enumerate(("bos", "eos", "eot", "eom"))}
    assert _eos_token_ids(fields) == (1, 2, 3)


TOKENIZER = make_tokenizer(["<|eot_id|>"], ["<|im_end|>"])
EOT, IM_END = 4, 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("ab<|im_end|>c", False)),
        ({"end_tokens": (IM_END,)}, ("abc", False)),
        ({"stop": ("<|eot_id|>",)}, ("a", True)),
        ({"stop": ("<|eot_id|>", "ax")}, ("a", True)),  # which held the text back
        ({"stop": ("<|eot_id|>",), "include_stop": True}, ("a<|eot_id|>", True)),
        ({"stop": ("<|im_end|>",), "end_tokens": (IM_END,)}, ("ab", True)),
        ({"skip_special_tokens": False}, ("a<|eot_id|>b<|im_end|>c", False)),
        ({"shown_tokens": (EOT,), "end_tokens": (IM_END,)}, ("a<|eot_id|>bc", False)),
    ],
)
def test_end_tokens_are_no_text_and_stop_strings_may_be_control_tokens(options, expected):
    detokenizer = Detokenizer(TOKENIZER, options.pop("stop", ()), **options)
    text = ""
    for token in (1, EOT, 2, IM_END, 3):
        text += "" if detokenizer.stopped else detokenizer.push(token)
    assert (text + detokenizer.finish(), detokenizer.stopped) == expected


def test_an_engine_ends_at_the_tokens_that_its_tokenizer_names():
    engine = tiny_engine()
    engine.tokenizer = make_tokenizer(others=["<|im_end|>"])
    answer = engine.generate([1, 2, 3], SamplingParams(max_new_tokens=3, logit_bias={4: 100}))
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([4], "", "stop")
    going_on = SamplingParams(max_new_tokens=3, logit_bias={4: 100}, ignore_eos=True)
    assert engine.generate([1, 2, 3], going_on).text == ""
