"""Compares greedy answers to ten prompts with those of transformers or llama.cpp, which read the same GGUF file.

    uv run --with torch --with accelerate --with gguf scripts/compare_answers.py --model FILE.gguf
    uv run --with llama-cpp-python scripts/compare_answers.py --model FILE.gguf --reference llama.cpp llama.cpp-float32

All get the same token ids. An answer is equal if all its tokens are, the end token included. Where they part, the two
margins say by how much each side preferred its own token to the other's, in logits. Sides that round differently part
where two tokens are about as probable: if neither margin is above --tie, it is a near tie.

* transformers dequantises the weights and computes in float32, as this package does here: all should be equal.
* llama.cpp rounds activations to 8 bits for products with quantised weights, and keeps keys and values in float16.
* llama.cpp-float32 reads a temporary copy of the file whose weights are float32, so that nothing is rounded to 8 bits.

Prints a line for each prompt, and writes `answers-<model>-<device>.json` to --output, after each prompt.
"""

import argparse
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import gguf
import numpy as np

from sparsex_jax import Engine, Generation, ReuseConfig, SamplingParams
from sparsex_jax.cli.terminal import run_script
from sparsex_jax.eval.arguments import count
from sparsex_jax.eval.engines import add_tensor_parallel
from sparsex_jax.eval.results import provenance, write_json
from sparsex_jax.model.sharding import make_mesh

RESULTS = Path(__file__).resolve().parent / "results"
FULL = ReuseConfig("full")
COMPARED = 10  # the most probable tokens whose log-probabilities are compared

Messages = list[dict[str, str]]
Row = dict[str, Any]

_TOWNS = ("Ashford", "Brill", "Corby", "Dunmow", "Ely", "Frome", "Goole", "Hexham", "Ilkley", "Jarrow")
_GOODS = ("barley", "copper", "linen", "salt", "timber", "wool", "honey")
LEDGER = "".join(
    f"On day {day} the carrier took {7 * day % 23 + 2} bales of {_GOODS[day % 7]} from {_TOWNS[day % 10]} to "
    f"{_TOWNS[3 * day % 10]} and was paid {11 * day % 37 + 5} shillings.\n"
    for day in range(1, 29)
)
PROMPTS: dict[str, str | Messages] = {
    "fact": "The capital of France is",
    "numbers": "1, 1, 2, 3, 5, 8, 13,",
    "python": 'def is_prime(n: int) -> bool:\n    """Whether n is a prime number."""\n',
    "sql": "-- Customers who ordered nothing in 2024, by name\nSELECT",
    "json": '{"name": "Ada Lovelace", "born": 1815, "known_for": [',
    "story": "Once upon a time, in a village by the sea, there lived an old",
    "unicode": "日本の首都は東京です。La capitale de la Suède est Stockholm 🇸🇪. Столица Франции —",
    "question": [{"role": "user", "content": "Why is the sky blue? Answer in one sentence."}],
    "chat": [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": "Name a fruit that is yellow."},
        {"role": "assistant", "content": "A banana."},
        {"role": "user", "content": "Write a Python expression for the number of letters in that word."},
    ],
    "long": f"From the ledger of a carrier.\n\n{LEDGER}On day 29 the carrier",
}


class Reference(Protocol):
    """Another implementation with a model loaded. `name` is its package, `computes` how it rounds."""

    name: str
    computes: str

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with what the file says that every text begins with."""

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Float32 logits `[vocab]` of the next token. Goes on from the tokens of the call before if these begin so."""


class Transformers:
    """transformers with torch on the CPU."""

    name, computes = "transformers", "weights dequantised, all in float32"

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        about = {"gguf_file": path.name, "local_files_only": True}
        self._tokenizer = AutoTokenizer.from_pretrained(path.parent, **about)
        self._model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **about).eval()
        self._seen: list[int] = []
        self._cache: Any = None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def logits(self, tokens: list[int]) -> np.ndarray:
        import torch

        known = len(self._seen) if tokens[: len(self._seen)] == self._seen else 0
        new = torch.tensor([tokens[known:]])
        with torch.no_grad():
            out = self._model(new, past_key_values=self._cache if known else None, use_cache=True, logits_to_keep=1)
        self._seen, self._cache = list(tokens), out.past_key_values
        return np.asarray(out.logits[0, -1].numpy())


class LlamaCpp:
    """llama.cpp by its Python bindings on the CPU."""

    name, computes = "llama-cpp-python", "activations rounded to 8 bits, KV in float16"

    def __init__(self, path: Path, **options: Any) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._model = llama_cpp.Llama(str(path), n_ctx=2048, n_gpu_layers=0, verbose=False, **options)

    def encode(self, text: str) -> list[int]:
        return list(self._model.tokenize(text.encode(), add_bos=True, special=True))

    def logits(self, tokens: list[int]) -> np.ndarray:
        known = self._model.n_tokens
        if not known or list(self._model.input_ids[:known]) != tokens[:known]:
            self._model.reset()
            known = 0
        self._model.eval(tokens[known:])
        last = self._api.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(last, (self._model.n_vocab(),)).copy()


class LlamaCppFloats(LlamaCpp):
    """llama.cpp with a copy of the file in which all weights are float32, and with KV in float32."""

    computes = "a copy of the file with weights dequantised, all in float32"

    def __init__(self, path: Path) -> None:
        from llama_cpp import GGML_TYPE_F32

        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            write_floats(path, copy)
            super().__init__(copy, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32)  # keeps the file open


def write_floats(path: Path, copy: Path) -> None:
    """A GGUF file with the same metadata, and with all tensors in float32. One tensor at a time is in memory."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(tensor.n_elements))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
    writer.close()


REFERENCES: dict[str, Callable[[Path], Reference]] = {
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
    "llama.cpp-float32": LlamaCppFloats,
}


def as_text(engine: Engine, prompt: str | Messages) -> str:
    """A chat by the model's template, or as plain text for a model that has none."""
    if isinstance(prompt, str):
        return prompt
    if engine.tokenizer.chat_template:
        return engine.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in prompt) + "Assistant:"


def greedy(reference: Reference, prompt: Sequence[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """The most probable tokens one after the other, and the logits that each came from."""
    tokens, logits = list(prompt), []
    for _ in range(count):
        logits.append(reference.logits(tokens))
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], logits


class Answer(NamedTuple):
    """This package's answer: the prompt's text and tokens, and the generation."""

    text: str
    prompt: list[int]
    out: Generation


def answer(engine: Engine, prompt: str | Messages, new_tokens: int) -> Answer:
    text = as_text(engine, prompt)
    tokens, sampling = engine.encode(text).tolist(), SamplingParams(new_tokens, temperature=0)
    return Answer(text, tokens, *engine.generate_batch([tokens], sampling, reuse=FULL, keep=False, return_logits=True))


def compare(engine: Engine, reference: Reference, answer: Answer, tie: float) -> Row:
    """One prompt's figures."""
    ours, prompt = answer.out.token_ids, answer.prompt
    theirs, logits = greedy(reference, prompt, len(ours))
    at = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    row: Row = {
        "prompt_tokens": len(prompt),
        "same_prompt_tokens": reference.encode(answer.text) == prompt,
        "new_tokens": len(ours),
        "answer": answer.out.text,
        "equal": at is None,
        "first_token_difference": first_difference(np.asarray(answer.out.logits), logits[0]),
    }
    if at is not None:
        row |= parting(engine, [*prompt, *ours[:at]], (ours[at], theirs[at]), logits[at], tie) | {"at": at}
    return row


def first_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of log-probabilities, of those tokens that are most probable."""
    ours, theirs = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64)) for x in (ours, theirs))
    top = np.argsort(ours)[-COMPARED:]
    return float(np.abs(ours - theirs)[top].max())


def parting(engine: Engine, before: list[int], chosen: tuple[int, int], theirs: np.ndarray, tie: float) -> Row:
    """What the sides chose behind the same tokens, and by how many logits each preferred it."""
    ours = np.asarray(engine.prefill(before, reuse=FULL, keep=False).logits)
    mine, other = chosen
    margins = [float(ours[mine] - ours[other]), float(theirs[other] - theirs[mine])]
    texts = [engine.tokenizer.decode([token]) for token in chosen]
    return {"tokens": list(chosen), "texts": texts, "margins": margins, "near_tie": max(margins) <= tie}


def all_rows(options: argparse.Namespace) -> Iterator[Row]:
    asked = {"dtype": "float32", "quantization": "none", "store_tokens": 4096}
    engine = Engine.from_pretrained(options.model, mesh=make_mesh(options.tensor_parallel), **asked)
    answers = {name: answer(engine, PROMPTS[name], options.tokens) for name in options.prompts}
    for name in options.reference:
        reference = REFERENCES[name](options.model)
        version = importlib.metadata.version(reference.name)
        about = {"reference": name, "version": version, "computes": reference.computes}
        for prompt, answered in answers.items():
            yield about | {"prompt": prompt} | compare(engine, reference, answered, options.tie)
        del reference


def show(row: Row) -> str:
    says = "equal"
    if not row["equal"]:
        margins = " and ".join(f"{margin:.4f}" for margin in row["margins"])
        kind = "a near tie" if row["near_tie"] else "DIFFERENT"
        says = f"{kind} at token {row['at']}: {row['texts'][0]!r} and {row['texts'][1]!r}, margins {margins}"
    tokens = "" if row["same_prompt_tokens"] else "; THE PROMPT HAS OTHER TOKENS"
    counts = (
        f"{row['prompt_tokens']:5} + {row['new_tokens']:2} tokens, first differ by {row['first_token_difference']:.1e}"
    )
    return f"{row['reference']:20}{row['prompt']:10}{counts}: {says}{tokens}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--reference", nargs="+", choices=[*REFERENCES], default=["transformers"])
    parser.add_argument("--prompts", nargs="+", choices=[*PROMPTS], default=[*PROMPTS])
    parser.add_argument("--tokens", type=count, default=32, help="of each answer")
    parser.add_argument("--tie", type=float, default=0.2, help="logits: up to this margin, two tokens are a near tie")
    parser.add_argument("--output", type=Path, default=RESULTS)
    add_tensor_parallel(parser)
    options = parser.parse_args()
    about = {"bench": "answers", "model": options.model.name} | provenance(options.tensor_parallel)
    about |= {"settings": {"tokens": options.tokens, "tie": options.tie}}
    rows: list[Row] = []
    for row in all_rows(options):
        print(show(row), flush=True)
        rows.append(row)
        write_json(about | {"rows": rows}, options.output)


if __name__ == "__main__":
    run_script(main)
