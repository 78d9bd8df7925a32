"""The bench of vLLM asks it what `bench_e2e.py` asks the engine, of a module that stands in for vLLM."""

import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

from sparsex_jax.config import ModelConfig, named_config

ARGUMENTS = ["--lengths", "64", "--runs", "2", "--decode", "3", "--context", "40"]


class Answer:
    """As `vllm.RequestOutput`."""

    def __init__(self, tokens, cached):
        self.outputs, self.num_cached_tokens = [types.SimpleNamespace(token_ids=tokens)], cached


class LLM:
    """It finds whole blocks of 16 tokens at a prompt's beginning, and takes no argument that vLLM 0.26 has not."""

    made: ClassVar = []

    def __init__(
        self, model, *, load_format, skip_tokenizer_init, dtype, max_model_len, tensor_parallel_size=1
    ):  # so that `max_num_seqs` is left alone
        assert (load_format, skip_tokenizer_init, dtype) == ("dummy", True, "bfloat16")
        self.config = json.loads((Path(model) / "config.json").read_text())
        self.longest, self.gpus, self.asked, self._blocks = max_model_len, tensor_parallel_size, [], set()
        self.made.append(self)

    def reset_prefix_cache(self):
        self._blocks.clear()
        return True

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert use_tqdm is False
        self.asked.append(([each["prompt_token_ids"] for each in prompts], sampling_params))
        return [self._answer(each["prompt_token_ids"], sampling_params["max_tokens"]) for each in prompts]

    def _answer(self, tokens, new):
        assert len(tokens) + new <= self.longest
        assert all(isinstance(token, int) and 0 < token < self.config["vocab_size"] for token in tokens)
        whole = (tuple(tokens[at : at + 16]) for at in range(0, len(tokens) - 15, 16))
        blocks = list(itertools.accumulate(whole, lambda before, block: hash((before, block)), initial=0))[1:]
        cached = 16 * sum(block in self._blocks for block in blocks)
        self._blocks |= set(blocks)
        return Answer([1] * new, min(cached, (len(tokens) - 1) // 16 * 16))


def sampling_params(*, max_tokens, temperature, ignore_eos, detokenize):
    assert (temperature, ignore_eos, detokenize) == (0.0, True, False)
    return {"max_tokens": max_tokens}


@pytest.fixture
def bench(monkeypatch):
    platform = types.SimpleNamespace(get_device_name=lambda: "NVIDIA Some GPU")
    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams, LLM.made = LLM, sampling_params, []
    platforms, torch = types.ModuleType("vllm.platforms"), types.ModuleType("torch")
    platforms.current_platform, torch.__version__ = platform, "2.11.0"
    for name, module in {"vllm": vllm, "vllm.platforms": platforms, "torch": torch}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # which the script would set for good
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    import bench_vllm

    monkeypatch.setattr(bench_vllm, "version", lambda package: {"vllm": "0.26.0"}[package])
    return bench_vllm


def test_it_measures_the_works_of_the_engines_bench(bench, tmp_path):
    bench.main([*ARGUMENTS, "--no-agents"], tmp_path)
    content = json.loads((tmp_path / "vllm-llama-3.1-8b-nvidia-some-gpu.json").read_text())
    assert {"vllm": "0.26.0", "torch": "2.11.0"}.items() <= content["versions"].items()
    rows = {row["work"]: row for row in content["rows"]}
    assert list(rows) == [
        "start",
        "TTFT, 64 tokens",
        "TTFT, 64 tokens, 95% reused in 16",
        "TTFT, 64 tokens, 95% a prefix",
        "decode, 3 x 40",
    ]
    assert {row["implementation"] for row in content["rows"]} == {"vLLM, 1 GPU"}
    assert [rows[f"TTFT, 64 tokens{what}"]["cached"] for what in ("", ", 95% reused in 16", ", 95% a prefix")] == [
        0,
        0,  # segments in another order are no prefix
        48,  # of 60 stored
    ]


def test_what_vllm_is_asked(bench, tmp_path):
    bench.main([*ARGUMENTS, "--tensor-parallel", "2"], tmp_path)
    (llm,) = LLM.made
    assert llm.gpus == 2
    assert ModelConfig.from_hf(llm.config) == named_config("llama-3.1-8b")
    sizes = [(len(prompts), len(prompts[0]), sampling["max_tokens"]) for prompts, sampling in llm.asked]
    full, reordered = [(1, 64, 1)] * 3, [*[(1, 3, 1)] * 16, (1, 64, 1)] * 3  # a run that does not count, and two
    prefix, stored = [(1, 60, 1), (1, 64, 1)] * 3, [(1, 40, 1)] * 3
    decode = [(3, 40, 16), (3, 40, 144)] * 2
    agents = [*[(1, 3072, 1)] * 8, *[(8, 24 * 1024 + 128, 32)] * 2]
    assert sizes == [*full, *reordered, *prefix, *stored, *decode, *agents]
    first, second = llm.asked[-2][0], llm.asked[-1][0]
    assert first != second, "a round asks for other orders than the one before"


def test_rows_of_another_number_of_gpus_are_kept_if_asked(bench, tmp_path):
    arguments = ["--lengths", "--decode", "2", "--context", "20", "--no-agents"]
    bench.main(arguments, tmp_path)
    bench.main([*arguments, "--tensor-parallel", "2", "--add"], tmp_path)
    (path,) = tmp_path.iterdir()
    implementations = [row["implementation"] for row in json.loads(path.read_text())["rows"]]
    assert implementations == ["vLLM, 1 GPU"] * 2 + ["vLLM, 2 GPUs"] * 2
    bench.main(arguments, tmp_path)
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_a_cache_that_is_not_emptied_is_an_error(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(LLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(RuntimeError, match="did not empty"):
        bench.main(["--lengths", "64", "--decode", "--no-agents"], tmp_path)


def test_importing_it_takes_no_device():
    """JAX would take most of the GPU's memory, which vLLM needs."""
    code = "import bench_vllm, jax; from jax._src import xla_bridge; assert not xla_bridge._backends"
    scripts = Path(__file__).parents[1] / "scripts"
    subprocess.run([sys.executable, "-c", code], cwd=scripts, check=True)
