"""The detokenizer streams whole characters, holds stop strings back, and gives in the end what a full decode gives."""

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from sparsex_jax import NonFiniteLogitsError, SamplingParams
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.device.sampling import NON_FINITE
from sparsex_jax.scheduler.output import Output
from sparsex_jax.text.detokenizer import Detokenizer, _Characters
from sparsex_jax.text.token_text import TokenText

TEXTS = [
    "Plain words, and  two spaces.\n\ttab",
    "naïve café — “quotes” … 5 µm",
    "漢字かな交じり文、한국어, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🦜 letter",
    "e\u0301 combining, \u200b zero width, \ufffd itself",
    "",
]


@pytest.fixture(scope="module")
def byte_level():
    """SmolLM2's tokenizer: GPT-2's kind of BPE, with special tokens."""
    return open_checkpoint("smollm2-135m-instruct").tokenizer


@pytest.fixture(scope="module")
def sentencepiece():
    """Llama 2's kind of BPE: `▁` for spaces, the first of which is dropped, and bytes for unknown characters."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "▁a", "漢"]
    tokenizer = Tokenizer(
        BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def stream(tokenizer, tokens, stop=()):
    """The text that each token returns, and then the text that `finish` returns."""
    detokenizer = Detokenizer(tokenizer, stop)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


def test_special_tokens_are_part_of_the_text_if_asked_for(tokenizer):
    token = tokenizer.eos_token_id
    words = tokenizer.encode("a", add_special_tokens=False)
    for skip, expected in ((True, "aa"), (False, f"a{tokenizer.eos_token}a")):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
        pushed = [detokenizer.push(each) for each in (*words, token, *words)]
        assert "".join([*pushed, detokenizer.finish()]).replace(" ", "") == expected


@pytest.mark.parametrize(
    ("include", "stops", "text"),
    [(False, ["cd"], "ab"), (True, ["cd"], "abcd"), (True, ["cde", "cd"], "abcd"), (True, ["bcx", "cde"], "abcde")],
)
def test_the_stop_string_is_part_of_the_text_if_asked_for(byte_level, include, stops, text):
    detokenizer = Detokenizer(byte_level, stops, include_stop=include)
    tokens = [byte_level.encode(letter)[0] for letter in "abcdefg"]
    assert "".join([*map(detokenizer.push, tokens), detokenizer.finish()]) == text


def test_stop_strings_that_are_not_looked_for_yet(byte_level):
    detokenizer = Detokenizer(byte_level, ["b"])
    tokens = [byte_level.encode(letter)[0] for letter in "abcabc"]
    text = "".join(detokenizer.push(token, may_stop=number >= 3) for number, token in enumerate(tokens))
    assert (text, detokenizer.stopped) == ("abca", True)


@functools.cache
def partial_characters(tokenizer):
    return [token for token in range(300) if "\ufffd" in tokenizer.decode([token])]


def whole(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_in_whole_characters(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, tokens)
    assert "".join(pieces) == whole(tokenizer, tokens) == text
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_a_character_of_several_tokens_waits_for_the_last_one(byte_level):
    tokens = byte_level.encode("🦜!", add_special_tokens=False)
    assert len(tokens) > 2
    assert stream(byte_level, tokens) == [*[""] * (len(tokens) - 2), "🦜", "!", ""]


# Behind a prompt


def behind(tokenizer, prompt, tokens):
    detokenizer = Detokenizer(tokenizer)
    detokenizer.follow(prompt)
    return "".join([*(detokenizer.push(token) for token in tokens), detokenizer.finish()])


PROMPTS = ["a", "a ", "", "漢", "é", "</s>", "a</s>", "b" * 40, "é" * 30, "a a 漢 a"]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("answer", ["a b", " a", "漢", "éa", "b"])
def test_prompt_and_answer_are_the_text_of_all_tokens(tokenizer, prompt, answer):
    """Of the prompt's last tokens, that is: the first of 40 do not matter for what follows."""
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, answer))
    assert whole(tokenizer, before) + behind(tokenizer, before, after) == whole(tokenizer, before + after)


def test_an_answer_keeps_its_first_space(sentencepiece):
    word, end = sentencepiece.convert_tokens_to_ids(["▁a", "</s>"])
    assert behind(sentencepiece, [word], [word, word]) == " a a"
    assert behind(sentencepiece, [word, end], [word]) == " a"
    assert behind(sentencepiece, [end], [word]) == "a"  # it is the beginning of the text
    assert behind(sentencepiece, [], [word]) == "a"


def test_a_character_that_the_prompt_ends_within_belongs_to_the_answer(byte_level):
    tokens = byte_level.encode("a🦜", add_special_tokens=False)
    assert behind(byte_level, tokens[:-1], tokens[-1:]) == "🦜"


def test_stop_strings_are_not_looked_for_in_the_prompt(sentencepiece):
    detokenizer = Detokenizer(sentencepiece, ["ab"])
    a, b = sentencepiece.convert_tokens_to_ids(["a", "b"])
    detokenizer.follow([a])
    assert (detokenizer.push(b) + detokenizer.finish(), detokenizer.stopped) == ("b", False)


# The texts of single tokens


def test_texts_of_single_tokens_are_those_within_a_text(sentencepiece):
    texts, ids = TokenText(sentencepiece), sentencepiece.convert_tokens_to_ids
    assert [texts.bytes_of(ids(name)) for name in ("▁a", "▁", "a", "<0xE2>", "</s>")] == [
        *(b" a", b" ", b"a", b"\xe2", b"</s>")
    ]
    assert texts.name_of(ids("<0xE2>")) == "bytes:\\xe2"
    assert texts.bytes_of(10**6) == b""  # the vocabulary is padded


def test_names_that_look_like_bytes_are_text_where_there_are_no_byte_tokens():
    names = ["<0xE2>", "<0xZZ>"]
    tokenizer = Tokenizer(BPE({name: id_ for id_, name in enumerate(names)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    texts = TokenText(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [texts.text_of(id_) for id_ in range(2)] == names


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tokens_stream_as_the_full_decode(byte_level, sentencepiece, data):
    """Random tokens, as no model would give them, with broken characters and special tokens among them."""
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    token = st.integers(0, len(tokenizer) - 1) | st.sampled_from(partial_characters(tokenizer)) | st.integers(0, 20)
    tokens = data.draw(st.lists(token, max_size=60))
    assert "".join(stream(tokenizer, tokens)) == whole(tokenizer, tokens)


@pytest.mark.parametrize("seed", range(3))
def test_500_broken_bytes_stream_as_the_full_decode(tokenizer, seed):
    rng = random.Random(seed)
    tokens = rng.choices(partial_characters(tokenizer), k=500)
    assert "".join(stream(tokenizer, tokens)) == whole(tokenizer, tokens)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_tokens_that_come_together_have_the_text_that_each_has(byte_level, sentencepiece, data):
    """An answer takes a dispatch at once, up to the token that ends it, as if its tokens had come one by one."""
    tokenizer = data.draw(st.sampled_from([byte_level, sentencepiece]))
    token = st.integers(0, len(tokenizer) - 1) | st.sampled_from(partial_characters(tokenizer)) | st.just(7)
    dispatches = data.draw(st.lists(st.lists(token, max_size=17), max_size=5))
    sampling = SamplingParams(data.draw(st.integers(1, 60)), include_stop=data.draw(st.booleans()))
    together, apart = (Output(sampling, [7], tokenizer) for _ in range(2))
    for tokens in dispatches:
        together.extend([*tokens, -1])
        for each in tokens:
            apart.extend([each])
    assert together.token_ids == apart.token_ids
    assert together.finish_reason == apart.finish_reason
    for output in (together, apart):
        output.cut()
    assert together.text == apart.text


def test_a_logit_that_is_not_finite_is_told_behind_tokens_that_came_with_it(byte_level):
    output = Output(SamplingParams(9), [7], byte_level)
    with pytest.raises(NonFiniteLogitsError, match="new token 3"):
        output.extend([20, 21, 22, NON_FINITE, 23])
    assert output.token_ids == [20, 21, 22]


def test_decoded_window_stays_short(byte_level, monkeypatch):
    """For ordinary text, and for bytes that never become text."""
    longest, decode = [], _Characters._decode
    monkeypatch.setattr(_Characters, "_decode", lambda self, ids: longest.append(len(ids)) or decode(self, ids))
    broken = byte_level.encode("🦜", add_special_tokens=False)[:1] * 400
    stream(byte_level, byte_level.encode("word " * 400, add_special_tokens=False) + broken)
    assert max(longest) < 24


STOPS = {
    "never": ("one two three", ["four"], "one two three", False),
    "within a token": ("one two three", ["wo"], "one t", True),
    "over several tokens": ("one two three", ["e two th"], "on", True),
    "at the beginning": ("one two three", ["one"], "", True),
    "at the end": ("one two three", ["three"], "one two ", True),
    "the earlier of two": ("one two three", ["three", "two"], "one ", True),
    "one within the other": ("one two three", ["wo", "two t"], "one t", True),
    "begins and does not come": ("one two three", ["three!", "two t!"], "one two three", False),
    "overlaps itself": ("aabaabaaab", ["aabaaa"], "aab", True),
    "of broken characters": ("ab漢cd", ["漢c"], "ab", True),
}


@pytest.mark.parametrize(("text", "stop", "expected", "stopped"), STOPS.values(), ids=STOPS)
def test_stop_strings(byte_level, text, stop, expected, stopped):
    detokenizer = Detokenizer(byte_level, stop)
    pieces = []
    for token in byte_level.encode(text, add_special_tokens=False):
        pieces.append(detokenizer.push(token))
        assert expected.startswith("".join(pieces))  # no text is returned that a stop string would take back
        if detokenizer.stopped:
            break
    assert detokenizer.stopped == stopped
    assert (detokenizer.stopped_by in stop) == stopped
    assert "".join([*pieces, detokenizer.finish()]) == expected


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=40), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3))
def test_stop_strings_are_found_where_a_search_of_the_whole_text_finds_them(sentencepiece, text, stops):
    """After each token, compared with `str.find`. Each letter is a token."""
    tokens = sentencepiece.convert_tokens_to_ids(list(text))
    detokenizer = Detokenizer(sentencepiece, stops)
    pieces, expected = [], text
    for end, token in enumerate(tokens, start=1):
        pieces.append(detokenizer.push(token))
        starts = [at for stop in stops if (at := text[:end].find(stop)) >= 0]
        assert detokenizer.stopped == bool(starts)
        if starts:
            expected = text[: min(starts)]
            break
        held = end - len("".join(pieces))
        assert held == max(n for n in range(end + 1) if not n or any(s.startswith(text[end - n : end]) for s in stops))
    assert "".join([*pieces, detokenizer.finish()]) == expected
