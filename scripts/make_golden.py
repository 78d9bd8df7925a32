"""Make the small random models of `tests/golden`, and the logits that transformers computes with them.

The tests compare this package's decoder with these files, so they need neither torch nor a network. Run this script
only to add a model. The project does not depend on torch:

    uv run --no-project --with torch --with transformers --with numpy python scripts/make_golden.py [NAME ...]

Every `tests/golden/<name>/` is a Hugging Face directory plus `expected.npz`, which holds `tokens` int32 `[48]`
and `logits` float32 `[48, 128]`, at all positions. Where frequencies depend on a text's length, `short_logits` are
those of the first tokens alone.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

ROOT = Path(__file__).parents[1] / "tests" / "golden"
NUM_TOKENS = 48
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that attention is peaked and a wrong weight changes the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# The weights of a token's experts sum to 1 in Qwen3 and Mixtral, and not in OLMoE.
EXPERTS = SMALL | {"num_hidden_layers": 2, "intermediate_size": 16, "tie_word_embeddings": False}
QWEN3_EXPERTS = EXPERTS | {"intermediate_size": 96, "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 24}
# With heads of 16, some wavelengths are below both limits of this rule, some above, and some between.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY = SMALL | {"hidden_size": 32, "intermediate_size": 48}
GEMMA = TINY | {
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 10,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "final_logit_softcapping": 5.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# Of heads of 16, 12 dimensions are rotated: six pairs.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
}


@dataclasses.dataclass(frozen=True)
class Golden:
    """One model: its configuration, and how its weights are stored.

    `short` is how many tokens `short_logits` are for.
    """

    config: PreTrainedConfig
    dtype: torch.dtype = torch.float32
    shard_size: str = "5GB"
    short: int = 0


def models() -> dict[str, Golden]:
    return {
        "llama": Golden(LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
        "qwen2": Golden(Qwen2Config(**SMALL, tie_word_embeddings=False), shard_size="200KB"),
        "qwen3": Golden(Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=False), dtype=torch.bfloat16),
        "mistral": Golden(MistralConfig(**SMALL, sliding_window=None, tie_word_embeddings=False), dtype=torch.bfloat16),
        "mistral_window": Golden(MistralConfig(**TINY, head_dim=8, sliding_window=12), dtype=torch.bfloat16),
        "qwen2_yarn": Golden(
            Qwen2Config(**TINY, rope_parameters=YARN, use_sliding_window=True, sliding_window=10, max_window_layers=1),
            dtype=torch.bfloat16,
        ),
        "qwen3_dynamic": Golden(
            Qwen3Config(**TINY | {"max_position_embeddings": 32}, head_dim=16, rope_parameters=DYNAMIC),
            dtype=torch.bfloat16,
            short=32,
        ),
        "phi3": Golden(
            Phi3Config(
                **TINY | {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0},
                rope_parameters=LONGROPE,
                original_max_position_embeddings=32,
                sliding_window=20,
            ),
            dtype=torch.bfloat16,
            short=32,
        ),
        "gemma3_text": Golden(Gemma3TextConfig(**GEMMA), dtype=torch.bfloat16),
        "qwen3_moe": Golden(
            Qwen3MoeConfig(**QWEN3_EXPERTS, num_experts=8, num_experts_per_tok=3), torch.bfloat16, shard_size="60KB"
        ),
        "mixtral": Golden(MixtralConfig(**EXPERTS, num_local_experts=4, num_experts_per_tok=2), torch.bfloat16),
        "olmoe": Golden(OlmoeConfig(**EXPERTS, num_experts=6, num_experts_per_tok=2), torch.bfloat16),
    }


@torch.no_grad()
def randomise(model: Any) -> None:
    """Randomise norms and biases. They start at 1 and 0, where a test would not notice that they are mixed up."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(-0.5, 0.5) if "Gemma" in type(model).__name__ else weight.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            weight.normal_(std=0.5)


@torch.no_grad()
def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits `[tokens, vocab]` of the weights as they are stored.

    The model is loaded again, because the one in memory was cast to bfloat16, which rounded its rotary frequencies.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(torch.from_numpy(tokens).long()[None], use_cache=False).logits[0].numpy()


def write(name: str, golden: Golden, seed: int) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(golden.config)
    randomise(model)
    model.to(golden.dtype)
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=golden.shard_size)
    tokens = np.random.default_rng(seed).integers(3, golden.config.vocab_size, NUM_TOKENS, dtype=np.int32)
    short = {"short_logits": logits(folder, tokens[: golden.short])} if golden.short else {}
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=logits(folder, tokens), **short)


if __name__ == "__main__":
    for seed, (name, golden) in enumerate(models().items()):
        if name in sys.argv[1:] or not sys.argv[1:]:
            write(name, golden, seed)
