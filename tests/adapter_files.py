"""Writes adapters as PEFT saves them, with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sparsex_jax import ModelConfig

# What `LoraConfig(r=4, lora_alpha=8, ...).save_pretrained` of PEFT 0.21 writes.
SAVED: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "someone/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each module that adapters may act on."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.qkv_proj": (queries + 2 * keys, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_up_proj": (2 * inner, hidden),
    }


def random_tensors(
    config: ModelConfig,
    kinds: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 4,
    seed: int = 0,
    model: str = "model.",
) -> dict[str, np.ndarray]:
    """A and B of these modules in every layer, by their names.

    Args:
      model: what stands before the layers in the names of modules.
    """
    rng, tensors = np.random.default_rng(seed), {}
    for kind, (outputs, inputs) in sizes(config).items():
        if kind.rpartition(".")[2] in kinds:
            for layer in range(config.num_layers):
                name = f"base_model.model.{model}layers.{layer}.{kind}"
                tensors[f"{name}.lora_A.weight"] = rng.normal(0, inputs**-0.5, (rank, inputs)).astype(np.float32)
                tensors[f"{name}.lora_B.weight"] = rng.normal(0, rank**-0.5, (outputs, rank)).astype(np.float32)
    return tensors


def write(folder: Path, tensors: Mapping[str, np.ndarray], **said: Any) -> Path:
    """An adapter of these tensors, whose configuration says what is said."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(SAVED | said))
    return folder


def write_adapter(folder: Path, config: ModelConfig, seed: int = 0, **said: Any) -> Path:
    """An adapter on queries and values of all layers."""
    return write(folder, random_tensors(config, seed=seed), **said)
