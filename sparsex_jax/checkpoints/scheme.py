"""How a Hugging Face directory says that its weights are quantised, and which of that can be read.

Read are `fp8` (Qwen3-FP8, DeepSeek: squares of 128 x 128 with a scale in `weight_scale_inv`), `fbgemm_fp8`, and
`compressed-tensors` with weights of 8 bits, float or integer, that have a scale for each output, square or tensor.
Activations are not rounded, whatever the scheme says of them: a product is nearer to that of the original model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from sparsex_jax.checkpoints.held import Stored
from sparsex_jax.config.checks import is_int
from sparsex_jax.config.fields import Fields
from sparsex_jax.errors import UnsupportedModelError
from sparsex_kernels.quantised import blocks_within

# Files of quantisations whose packing nothing here reads.
QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_FIELDS = ("quantization_config", "compression_config")
_CODES = {"fp8": "F8_E4M3", "int8": "I8"}  # what safetensors calls them
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_READ = "fp8, fbgemm_fp8 and compressed-tensors of 8 bits are"
_WEIGHTS: dict[str, tuple[Any, ...]] = {  # what a group of compressed-tensors may say of its weights
    "num_bits": (8,),
    "type": ("float", "int"),
    "symmetric": (True,),
    "strategy": ("channel", "tensor", "block"),
}
_SUFFIXES = ("_scale_inv", "_scale")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What is quantised.

    Attributes:
      kind: `fp8` or `int8`.
      block: outputs and inputs of a square with one scale; None: scales are those of outputs or of whole tensors.
    """

    kind: str
    block: tuple[int, int] | None = None

    @property
    def dtype(self) -> str:
        """What safetensors calls the codes."""
        return _CODES[self.kind]

    def scale_of(self, tensor: str, stored: Mapping[str, Any]) -> str | None:
        """The name of a tensor's scales; None where there are none."""
        return next((tensor + suffix for suffix in _SUFFIXES if tensor + suffix in stored), None)

    def accepts(self, scale: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether scales of this shape belong to a matrix `[outputs, inputs]`."""
        outputs, inputs = shape
        if self.block is not None:
            return scale == (-(-outputs // self.block[0]), -(-inputs // self.block[1]))
        return scale in ((), (1,), (1, 1), (outputs,), (outputs, 1))

    def stored(self, codes: np.ndarray, scale: np.ndarray) -> Stored:
        """A matrix `[outputs, inputs]` and its scales, the last square of which may be smaller than the others."""
        scale = scale.astype(np.float32)
        if self.block is None:
            return Stored(self.kind, {"codes": codes, "scales": _of_outputs(scale, len(codes))})
        for axis, (size, block) in enumerate(zip(codes.shape, self.block, strict=True)):
            if size > block and size % block:
                blocks = blocks_within(size, block, 1)
                scale = scale.repeat(block * blocks // size, axis=axis).take(range(blocks), axis=axis)
        return Stored(self.kind, {"codes": codes, "scales": scale})


def _of_outputs(scale: np.ndarray, outputs: int) -> np.ndarray:
    return np.broadcast_to(scale.reshape(-1, 1), (outputs, 1))


def floats_of(stored: Stored) -> np.ndarray:
    """The matrix in float32."""
    codes, scales = stored.parts["codes"].astype(np.float32), stored.parts["scales"]
    (outputs, inputs), (rows, columns) = codes.shape, scales.shape
    squares = codes.reshape(rows, outputs // rows, columns, inputs // columns) * scales[:, None, :, None]
    return squares.reshape(outputs, inputs)


def read_scheme(directory: Path, raw: Mapping[str, Any]) -> Scheme | None:
    """How the weights are quantised; None: they are floats.

    Raises:
      UnsupportedModelError: in a way that is not read; the message names it.
    """
    signs = [name for name in QUANTISED_FILES if (directory / name).is_file()]
    said = [name for name in _FIELDS if raw.get(name) is not None]
    if signs:
        raise UnsupportedModelError(f"{directory} holds quantised weights ({signs[0]}); they are not read")
    if not said:
        return None
    fields = Fields(f"{directory / 'config.json'}: {said[0]}", raw[said[0]] if isinstance(raw[said[0]], dict) else {})
    method = fields.get("quant_method") or ("compressed-tensors" if said[0] == _FIELDS[1] else None)
    if method in ("fp8", "fbgemm_fp8"):
        return _fp8(fields)
    if method == "compressed-tensors":
        return _compressed(fields)
    about = f"{said[0]}.quant_method={method!r}"
    raise UnsupportedModelError(f"{directory} holds quantised weights ({about}), which are not read; {_READ}")


def _fp8(fields: Fields) -> Scheme:
    if fields.get("activation_scheme") not in (None, "dynamic"):
        fields.refuse("activation_scheme", "is not supported: activations are not rounded; supported: dynamic")
    if fields.get("fmt") not in (None, "e4m3"):
        fields.refuse("fmt", "is not supported; supported: e4m3")
    block = fields.get("weight_block_size")
    if block is None:
        return Scheme("fp8")
    if not _are_two_sizes(block):
        fields.refuse("weight_block_size", "must be two integers > 0")
    return Scheme("fp8", (block[0], block[1]))


def _compressed(fields: Fields) -> Scheme:
    if fields.get("format") not in _FORMATS:
        fields.refuse("format", f"is not supported; supported: {', '.join(_FORMATS)}")
    for name in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if fields.get(name):
            fields.refuse(name, "is not supported")
    groups = fields.get("config_groups")
    found = {_group(fields, group) for group in groups.values()} if isinstance(groups, dict) else set()
    if len(found) != 1:
        fields.refuse("config_groups", "must be of one scheme")
    return found.pop()


def _group(fields: Fields, group: Any) -> Scheme:
    weights, inputs, outputs = (
        _said(fields, group, of) for of in ("weights", "input_activations", "output_activations")
    )
    for name, supported in _WEIGHTS.items():
        value = weights.get(name, True if name == "symmetric" else None)
        if value not in supported:
            among = ", ".join(map(str, supported))
            fields.refuse(
                "config_groups", f"has weights.{name}={value!r:.60}, which is not supported; supported: {among}"
            )
    if any(activations and not activations.get("dynamic") for activations in (inputs, outputs)):
        fields.refuse("config_groups", "has fixed scales of activations, which are not supported")
    kind = "fp8" if weights["type"] == "float" else "int8"
    return Scheme(kind, _block(fields, weights) if weights["strategy"] == "block" else None)


def _said(fields: Fields, group: Any, of: str) -> dict[str, Any]:
    """What a group says of its weights or activations; nothing where it is null or left out."""
    said = group.get(of) or {} if isinstance(group, dict) else None
    if not isinstance(said, dict):
        fields.refuse("config_groups", f"must be objects whose {of} is an object or null")
    return said


def _block(fields: Fields, weights: dict[str, Any]) -> tuple[int, int]:
    """Outputs and inputs of a square, which old files write as a text, 128x128."""
    block = weights.get("block_structure")
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() and len(size) < 10 else 0 for size in block.split("x")]
    if not _are_two_sizes(block):
        fields.refuse("config_groups", f"has block_structure={block!r:.60}, which must be two integers > 0")
    return block[0], block[1]


def _are_two_sizes(block: Any) -> TypeGuard[list[int]]:
    return isinstance(block, list) and len(block) == 2 and all(is_int(n) and n > 0 for n in block)
