"""Malformed models: whatever is changed in their files, they are read or refused, and nothing else is raised."""

import copy
import json
import random
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.errors import InvalidRequestError, UnknownModelError, UnsupportedModelError
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.text.encoding import encode

GOLDEN = Path(__file__).parent / "golden"
REFUSALS = (InvalidRequestError, UnknownModelError, UnsupportedModelError)
WRONG = [None, True, "", "x", -1, 0, 1, 3, 0.5, 2**31, 2**40, 10**400, float("nan"), float("inf"), [], {}, [2, 2], [[]]]
SEEDS = [pytest.param(range(20), id="few"), pytest.param(range(20, 1000), id="many", marks=pytest.mark.slow)]


def nodes(tree):
    """Every container in a tree of JSON, with each key or index in it."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from nodes(value)


def mutated(tree, rng):
    """A copy with one to three values replaced or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        places = list(nodes(tree))
        if not places:
            return tree
        container, key = rng.choice(places)
        if rng.random() < 0.3:
            del container[key]
        else:
            container[key] = copy.deepcopy(rng.choice(WRONG))
    return tree


def read_or_refused(path):
    """Open, tokenize and load. Returns the refusal, or None."""
    try:
        checkpoint = open_checkpoint(path)
        tokenizer = checkpoint.tokenizer
        if tokenizer is not None:
            tokens = encode("a <s>b 12é", tokenizer, checkpoint.config, add_special_tokens=True)
            tokenizer.decode(tokens.tolist())
        checkpoint.load_params("float32", make_mesh())
    except REFUSALS as error:
        return str(error)
    return None


def small_tokenizer():
    """The bytes of the text above, one merge and two special tokens."""
    names = ["a", "b", "Ġ", "1", "2", "Ã", "©", "ab", "<s>", "</s>"]
    tokenizer = Tokenizer(BPE({name: id_ for id_, name in enumerate(names)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[-2:]])
    return tokenizer


@pytest.fixture
def directory(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "model"))
    small_tokenizer().save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}", "model_max_length": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


JSON_FILES = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"]
JSON_FILES.append("tokenizer_config.json")


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("name", JSON_FILES)
def test_mutated_json_is_read_or_refused(name, seeds, directory):
    original = (directory / name).read_text()
    assert read_or_refused(directory) is None
    for seed in seeds:
        changed = json.dumps(mutated(json.loads(original), random.Random(seed)))
        (directory / name).write_text(changed)
        read_or_refused(directory)


@pytest.mark.parametrize("name", [*JSON_FILES, "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        (b'{"a": ', ""),
        (b"[" * 100_000, ""),
        (b"[]", ""),
        (b"\xff\xfe", ""),
    ],
)
def test_a_file_without_its_content_is_refused_by_name(name, content, said, directory):
    (directory / name).write_bytes(content)
    refusal = read_or_refused(directory)
    assert name in refusal
    assert said in refusal


FIELDS = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 8,
    "feed_forward_length": 12,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e4,
}
VOCABULARY = {
    "model": "gpt2",
    "pre": "qwen2",
    "tokens": [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>"],
    "token_type": [1] * 257 + [3],
    "merges": ["a b"],
    "bos_token_id": 257,
    "eos_token_id": 257,
    "add_bos_token": True,
}
PIECES = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)} | {"▁a": 1, "▁": 1, "a": 1}
SENTENCEPIECE = {
    "model": "llama",
    "tokens": list(PIECES),
    "token_type": list(PIECES.values()),
    "scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
}


def metadata(vocabulary):
    named = {f"llama.{key}": value for key, value in FIELDS.items()}
    return {"general.alignment": 32} | named | {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}


def add(writer, key, value):
    """Any value that a GGUF file can hold; what it cannot hold is left out."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int) and abs(value) < 2**63:
        writer.add_int64(key, value) if value < 0 else writer.add_uint64(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list) and len({type(each) for each in value}) == 1 and fits(value):
        writer.add_array(key, value)


def fits(values):
    return isinstance(values[0], (float, str)) or (type(values[0]) is int and max(map(abs, values)) < 2**31)


def write_gguf(path, stored):
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in stored.items():
        add(writer, key, value)
    shapes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
    shapes |= {"ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12), "attn_norm": (8,), "ffn_norm": (8,)}
    layers = {f"blk.{layer}.{name}.weight": shape for layer in range(2) for name, shape in shapes.items()}
    for name, shape in ({"token_embd.weight": (262, 8), "output_norm.weight": (8,)} | layers).items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("vocabulary", [VOCABULARY, SENTENCEPIECE], ids=["gpt2", "llama"])
@pytest.mark.parametrize("seeds", SEEDS)
def test_mutated_metadata_is_read_or_refused(vocabulary, seeds, tmp_path):
    path = tmp_path / "m.gguf"
    assert read_or_refused(write_gguf(path, metadata(vocabulary))) is None
    for seed in seeds:
        path.unlink()
        read_or_refused(write_gguf(path, mutated(metadata(vocabulary), random.Random(seed))))


@pytest.mark.parametrize("seeds", SEEDS)
def test_mutated_bytes_of_a_header_are_read_or_refused(seeds, tmp_path):
    path = tmp_path / "m.gguf"
    whole = write_gguf(path, metadata(VOCABULARY)).read_bytes()
    header = whole.index(b"output_norm.weight") + 1000
    for seed in seeds:
        rng = random.Random(seed)
        changed = bytearray(whole[: rng.choice([len(whole), len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randint(1, 4)):
            if changed:
                changed[rng.randrange(min(header, len(changed)))] = rng.randrange(256)
        path.write_bytes(changed)
        read_or_refused(path)
