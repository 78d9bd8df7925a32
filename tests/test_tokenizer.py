"""Tokenizers: tokenizer.json says how text is cut, and a GGUF vocabulary is cut as the model was trained."""

import json
import random

import pytest
from texts import TEXTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from sparsex_jax.errors import UnsupportedModelError
from sparsex_jax.text.detokenizer import _Characters
from sparsex_jax.text.pre_tokenizers import GPT2, RULES, pre_tokenizer, rule_named
from sparsex_jax.text.tokenizer import read_tokenizer, token_pieces, tokenizer_from_gguf

# Vocabularies of GGUF files -------------------------------------------------------------------------------------


def byte_tokenizer(**fields):
    """A vocabulary of the 256 bytes, one merge, a control token and a user-defined token."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "<think>"]
    kinds = [1] * (len(tokens) - 2) + [3, 4]
    stored = {"model": "gpt2", "tokens": tokens, "merges": ["a b"], "token_type": kinds, "bos_token_id": 257} | fields
    return tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in stored.items()})


@pytest.mark.parametrize("pre", ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"])
def test_every_pre_tokenizer_round_trips(pre):
    tokenizer = byte_tokenizer(pre=pre)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["it", "'s", "Ġ12345"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "45"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "5"]),
    ],
)
def test_pre_tokenizers_cut_numbers_differently(pre, words):
    cut = byte_tokenizer(pre=pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's 12345")
    assert [word for word, _ in cut] == words


def test_control_and_user_defined_tokens():
    tokenizer = byte_tokenizer(pre="qwen2")
    assert tokenizer.encode("ab<s><think>") == [256, 257, 258]
    assert tokenizer.decode([256, 257, 258], skip_special_tokens=True) == "ab<think>"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"pre": "llama-bpe"}, [257, 256]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [256]),
        ({"pre": "qwen2"}, [256]),
        ({"pre": "qwen2", "add_bos_token": True}, [257, 256]),
    ],
)
def test_first_token_of_a_prompt(fields, expected):
    assert byte_tokenizer(**fields).encode("ab") == expected


def sentencepiece_tokenizer(**fields):
    """A vocabulary of `a`, `b`, spaces and bytes, in which `▁a` has a better score than `ab`."""
    pieces = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    words = ["▁a", "ab", "▁ab", "▁", "a", "b"]
    stored = {
        "model": "llama",
        "tokens": [*pieces, *words],
        "token_type": [*pieces.values(), *[1] * len(words)],
        "scores": [0.0] * len(pieces) + [-float(rank) for rank in range(len(words))],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return tokenizer_from_gguf({f"tokenizer.ggml.{name}": value for name, value in (stored | fields).items()})


def test_sentencepiece_vocabulary_joins_by_score():
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.tokenize("ab abb") == ["▁ab", "▁ab", "b"]
    assert tokenizer.tokenize("bab é") == ["▁", "b", "ab", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("a")[0] == 1  # its prompts begin with <s> where the file says nothing else
    assert sentencepiece_tokenizer(add_bos_token=False, add_space_prefix=False).tokenize("ab") == ["ab"]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_vocabulary_round_trips(text):
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("fields", [{"model": "bert"}, {"pre": "deepseek-coder"}])
def test_other_vocabularies_are_refused(fields):
    with pytest.raises(UnsupportedModelError, match="is not supported"):
        byte_tokenizer(**fields)


def test_without_a_vocabulary_there_is_no_tokenizer():
    assert tokenizer_from_gguf({"general.architecture": "llama"}) is None


# The rules by which GGUF files cut text --------------------------------------------------------------------------

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST


def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


GPT2_RULE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_RULE])


@pytest.mark.parametrize(
    ("names", "published"),
    [
        (["gpt-2", "phi-2", "olmo", "mpt", "exaone4"], GPT2_RULE),
        (["smollm", "starcoder", "refact", "command-r", "minerva-7b"], DIGITS),
        (["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe", "glm4"], split(LLAMA3)),
        (["qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2"], split(QWEN2)),
    ],
)
def test_rules_cut_text_as_the_published_tokenizers_do(names, published):
    assert len({rule_named(name).cuts for name in names}) == 1
    ours, rng = pre_tokenizer(rule_named(names[0])), random.Random(0)
    letters = "ab1 \n\t'st.,é漢🙂²½\r  \u00a0llDRE"
    for text in [*TEXTS, *("".join(rng.choices(letters, k=rng.randint(0, 15))) for _ in range(300))]:
        assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)


def test_llama_3_takes_whole_words_and_begins_with_a_token():
    names = [name for name, rule in RULES.items() if rule.ignore_merges]
    assert {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"} <= set(names)
    assert all(RULES[name].add_bos for name in names)
    words = {"tokens": [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"], "token_type": [1] * 258}
    assert byte_tokenizer(pre="llama3", **words, bos_token_id=None).tokenize("abc") == ["abc"]
    assert byte_tokenizer(pre="qwen2", **words, bos_token_id=None).tokenize("abc") == ["ab", "c"]


def test_files_without_a_rule_are_cut_as_llama_cpp_cuts_them():
    cut = pre_tokenizer(rule_named("default")).pre_tokenize_str("it's 12345 <=>x.")
    assert [word for word, _ in cut] == ["it", "'", "s", "Ġ", "123", "45", "Ġ", "<=>", "x", "."]
    assert byte_tokenizer(pre=None).tokenize("1") == byte_tokenizer(pre="default").tokenize("1")
    assert GPT2 in rule_named("default").cuts


@pytest.mark.parametrize(
    "name", ["deepseek-coder", "deepseek-llm", "gpt-4o", "falcon", "qwen35", "bloom", "roberta-bpe"]
)
def test_rules_that_are_not_implemented_are_refused(name):
    with pytest.raises(UnsupportedModelError, match=rf"tokenizer\.ggml\.pre='{name}'"):
        rule_named(name)


def test_tekken_cuts_words_where_capitals_follow():
    cut = pre_tokenizer(rule_named("tekken")).pre_tokenize_str("fooBar HTTPServer")
    assert [word for word, _ in cut] == ["foo", "Bar", "ĠHTTPServer"]


# What is wrong with a vocabulary ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"merges": None}, "merges=None must be a list"),
        ({"merges": ["ab"]}, "'ab', which is no pair"),
        ({"merges": ["a z z"]}, "are or make no token"),
        ({"tokens": [1, 2]}, "tokens=.* must be a list of texts"),
        ({"tokens": ["a", "a"]}, "the token 'a' twice"),
        ({"eos_token_id": 999}, "eos_token_id=999 must be an id from 0 to 258"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>' must be an id"),
        ({"add_bos_token": "yes"}, "add_bos_token='yes' must be true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, "add_bos_token=True needs bos_token_id"),
        ({"token_type": [1]}, "token_type=.* one for each token"),
        ({"pre": 3}, "pre=3 must be text"),
    ],
)
def test_wrong_fields_of_a_vocabulary_are_named(changes, said):
    with pytest.raises(UnsupportedModelError, match=said):
        byte_tokenizer(**changes)


@pytest.mark.parametrize("missing", ["scores", "token_type"])
def test_missing_columns_of_a_sentencepiece_vocabulary_are_named(missing):
    with pytest.raises(UnsupportedModelError, match=rf"{missing}=None must be a list of \d+ numbers"):
        sentencepiece_tokenizer(**{missing: None})


def test_merges_may_be_pairs_and_no_end_token_is_no_error():
    tokenizer = byte_tokenizer(pre="qwen2", merges=[["a", "b"]], eos_token_id=2**32 - 1)
    assert (tokenizer.tokenize("ab"), tokenizer.eos_token) == (["ab"], None)


def test_a_sentencepiece_vocabulary_has_llama_cpps_special_tokens():
    tokenizer = sentencepiece_tokenizer(bos_token_id=None, eos_token_id=None)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.encode("a")[0]) == ("<s>", "</s>", 1)
    assert sentencepiece_tokenizer(add_eos_token=True).encode("a")[-1] == 2


# Directories: tokenizer.json is the tokenizer --------------------------------------------------------------------

PIECES = ["▁h", "▁hi", "▁he", "llo", "ll", "▁a", "▁▁", "▁", *"hello ia[]INST/"]
PIECES = list(dict.fromkeys(piece for piece in PIECES if piece != " "))


def llama2():
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    merges = [("▁", "h"), ("▁h", "i"), ("▁h", "e"), ("l", "l"), ("ll", "o"), ("▁", "a"), ("▁", "▁")]
    model = BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def llama3():
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "12", "123"]
    tokenizer = Tokenizer(BPE({n: i for i, n in enumerate(names)}, [("h", "e"), ("l", "l"), ("1", "2"), ("12", "3")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = split(LLAMA3), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<s>", "</s>")])
    return tokenizer


def saved(folder, tokenizer, model_type="llama", **config):
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | config))
    return read_tokenizer(folder)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("made", [llama2, llama3])
def test_no_class_or_model_type_changes_what_tokenizer_json_says(made, name, model_type, tmp_path):
    raw = made()
    bos = {
        "__type": "AddedToken",
        "content": "<s>",
        "normalized": True,
        "lstrip": True,
        "rstrip": True,
        "single_word": False,
    }
    ours = saved(tmp_path, raw, model_type, tokenizer_class=name, legacy=False, add_bos_token=True, bos_token=bos)
    for text in ["hi", " hi", "hello  hi", "<s>hi", "hi</s>hello </s> hi", " <s> hi", "<s>[INST] a [/INST]", *TEXTS]:
        assert ours(text)["input_ids"] == raw.encode(text).ids
        ids = raw.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids, clean_up_tokenization_spaces=False) == raw.decode(ids, skip_special_tokens=False)
    assert (ours.bos_token, ours.eos_token_id) == ("<s>", raw.token_to_id("</s>"))


def test_a_directory_tokenizes_as_the_gguf_file_of_the_same_vocabulary(tmp_path):
    words = {"tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]}
    words["token_type"] = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    words["scores"] = [0.0] * 259 + [-float(rank) for rank in range(len(PIECES))]
    file, directory = sentencepiece_tokenizer(**words), saved(tmp_path, llama2())
    for text in ["hi", " hi", "hello  hi", "<s>[INST] hi [/INST]", "hi</s>hello </s> hi", *TEXTS]:
        assert file(text)["input_ids"] == directory(text)["input_ids"]


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"]
)
def test_half_a_tokenizer_is_refused_in_clear_words(name, tmp_path):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UnsupportedModelError, match=rf"has {name}, but no tokenizer\.json"):
        read_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="chat_template=3 must be text"):
        saved(tmp_path, llama3(), chat_template=3)
    with pytest.raises(UnsupportedModelError, match="empty vocabulary"):
        saved(tmp_path, Tokenizer(BPE()), bos_token=None, eos_token=None, unk_token=None)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "Unheard"}}))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)


# The pieces of a text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [byte_tokenizer, sentencepiece_tokenizer])
def test_pieces_make_the_text(made):
    tokenizer = made()
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(token_pieces(tokenizer, tokens)) == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def test_bytes_that_never_become_text_do_not_make_pieces_slow(monkeypatch):
    tokenizer, longest = byte_tokenizer(), []
    half = tokenizer.encode("é", add_special_tokens=False)[:1]
    decode = _Characters._decode

    def measured(self, tokens):
        longest.append(len(tokens))
        return decode(self, tokens)

    monkeypatch.setattr(_Characters, "_decode", measured)
    assert "".join(token_pieces(tokenizer, half * 300)) == "\ufffd" * 300
    assert max(longest) <= 32
