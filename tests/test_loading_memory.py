"""How much memory a process takes while it loads a model, measured by the operating system."""

import subprocess
import sys

import gguf
import numpy as np
import pytest

LAYERS, HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS = 8, 1024, 4096, 16384, 8, 2
SLACK = 100 << 20  # what compiling takes
LARGEST = VOCABULARY * HIDDEN  # elements of a tensor

# Prints the bytes by which the process grew at most, and those of the parameters.
LOAD = """
import resource, sys
import jax
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.model.sharding import make_mesh

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

checkpoint, mesh = open_checkpoint(sys.argv[1]), make_mesh()
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
before = peak()
params = jax.block_until_ready(checkpoint.load_params("float32", mesh, sys.argv[2]))
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of Q8_0 blocks, in which all layers have the same weights."""
    target, rng = tmp_path_factory.mktemp("loading") / "large.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    width = HIDDEN // HEADS * KV_HEADS
    matrices = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (width, HIDDEN), "attn_v": (width, HIDDEN)}
    matrices |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
    matrices |= {"ffn_down": (HIDDEN, INNER), "token_embd": (VOCABULARY, HIDDEN)}
    for name, shape in matrices.items():
        blocks = gguf.quantize(rng.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        for full in [name] if name == "token_embd" else [f"blk.{layer}.{name}" for layer in range(LAYERS)]:
            writer.add_tensor(f"{full}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    norms = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "stored"])
def test_loading_takes_the_parameters_the_file_and_two_tensors(path, quantization):
    """On a CPU, the devices' memory is the host's, so the parameters are in it; pages of the mapped file count too."""
    done = subprocess.run([sys.executable, "-c", LOAD, path, quantization], capture_output=True, text=True, check=True)
    grown, parameters = map(int, done.stdout.split())
    assert grown < parameters + path.stat().st_size + 2 * 4 * LARGEST + SLACK
    assert grown > parameters / 2, "nothing was measured"
