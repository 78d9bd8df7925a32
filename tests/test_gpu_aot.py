"""Compiled for GPUs by their own compiler, on a machine that has none. Nothing runs here."""

import dataclasses
import importlib.util
import re

import jax
import pytest
from launches import Launches, Program

from sparsex_jax.config import EngineConfig, named_config
from sparsex_jax.device import aot
from sparsex_jax.device.described import backend_of, compile_options, described_mesh
from sparsex_jax.device.signals import BUILT_IN
from sparsex_jax.model.sharding import check_mesh
from sparsex_jax.model.turns import TOGETHER

LLAMA = named_config("llama-3.1-8b")
ENGINE = EngineConfig(store_tokens=1 << 15, dtype="bfloat16")
FULL = dataclasses.replace(ENGINE, store_tokens=800_000)  # of the memory that weights leave of two, most
LAYERS = LLAMA.num_layers
ONE_SIGNAL = {"key_mass": BUILT_IN["key_mass"]}

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax-cuda13-plugin is not installed; `uv run --group gpu-aot pytest -m gpu_aot` compiles for GPUs",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_anew():
    """A kept program of a device that is not there cannot be read."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", kept)


def mesh_of(num_devices):
    return check_mesh(described_mesh("h100", num_devices), LLAMA)


def program(lowered, mesh, **options):
    return Program(lowered.compile(compile_options(mesh) | options).as_text())


@needs_compiler
@pytest.mark.gpu_aot
@pytest.mark.parametrize("requests", [1, 32])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_decode_step_is_a_few_kernels_a_layer_and_asks_nothing(num_devices, requests):
    mesh = mesh_of(num_devices)
    decode = program(aot.lower_decode(LLAMA, ENGINE, mesh, requests), mesh)
    assert decode.whole().questions == 0
    step = decode.turn()
    assert step.kernels == 9 * LAYERS
    assert step.questions == 0
    # XLA's are the padding of queries, with two devices the gate too, and what is in no layer, as what cuts keys into
    # shares. Sums over devices are made by the kernels that add what is summed, but for those behind the last layer.
    assert step.others <= num_devices * LAYERS + 48
    assert step.collectives <= (0 if num_devices == 1 else 4)


@needs_compiler
@pytest.mark.gpu_aot
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_prefill_runs_by_the_kernels_made_for_the_gpu(num_devices):
    mesh = mesh_of(num_devices)
    assert backend_of(mesh).kernels == ("hopper", "triton")
    # One chunk, whose keys may be cut, with kernels between the products as in a decode step, which sum over a mesh;
    # and several, in turns without questions to the host between them.
    for num_tokens, turns, kernels, others in ((512, 1, 9, 6), (8192, TOGETHER, 8, 15)):
        chunks = program(aot.lower_prefill(LLAMA, ENGINE, mesh, num_tokens, ONE_SIGNAL), mesh).turn()
        assert chunks.kernels == turns * kernels
        assert chunks.others <= turns * others
        assert chunks.questions == 0
        assert chunks.collectives == (0 if num_devices == 1 or turns == 1 else 2 * turns)


@needs_compiler
@pytest.mark.gpu_aot
def test_sums_over_a_mesh_run_beside_kernels():
    """Of a prefill of several chunks: one beside the four kernels of attention, and one beside the three of the MLP."""
    mesh = mesh_of(2)
    lowered = aot.lower_prefill(LLAMA, ENGINE, mesh, 8192, ONE_SIGNAL)
    text = lowered.compile(compile_options(mesh)).as_text()
    events = re.findall(r" all-reduce-(start|done)\(|custom_call_target=\"(mosaic_gpu)", text)
    order = " ".join(event or "kernel" for event, _ in events)
    assert "start kernel kernel kernel kernel done start kernel kernel kernel done" in order


@needs_compiler
@pytest.mark.gpu_aot
@pytest.mark.parametrize(("num_devices", "rows"), [(1, 1024), (1, 1536), (1, 2048), (2, 1024), (2, 1536)])
def test_a_prefill_at_once_asks_nothing(num_devices, rows):
    """On a mesh kernels sum over few rows."""
    mesh = mesh_of(num_devices)
    found = program(aot.lower_prefill_at_once(LLAMA, ENGINE, mesh, rows), mesh).whole()
    assert found.questions == 0
    assert found.kernels == (9 if rows == 1024 else 8) * LAYERS
    assert found.others <= 2 * LAYERS + 60
    assert found.collectives == 0


@needs_compiler
@pytest.mark.gpu_aot
@pytest.mark.parametrize("num_devices", [1, 2])
def test_the_last_choice_of_rows_asks_nothing(num_devices):
    """So that what goes on with them is dispatched meanwhile."""
    mesh = mesh_of(num_devices)
    found = program(aot.lower_choice(LLAMA, ENGINE, mesh, 8192), mesh).whole()
    assert found.questions == 0
    assert found.kernels + found.others <= 200
    assert found.collectives <= num_devices - 1


@needs_compiler
@pytest.mark.gpu_aot
@pytest.mark.parametrize("engine", [ENGINE, FULL])
def test_the_sums_of_a_half_run_beside_the_kernels_of_the_other(engine):
    """Of a prefill on a mesh: beside attention, or beside the MLP. The last one is waited for."""
    mesh = mesh_of(2)
    text = aot.lower_prefill_at_once(LLAMA, engine, mesh, 4096).compile(compile_options(mesh)).as_text()
    events = re.findall(r" all-reduce-(start|done)\(|custom_call_target=\"(mosaic_gpu)", text)
    order = " ".join(event or "kernel" for event, _ in events)
    beside = [between.split() for between in re.findall("start (.*?) ?done", order)]
    assert len(beside) == 4 * LAYERS
    assert all(between.count("kernel") >= 2 for between in beside[:-1])
    assert "remat" not in text
    assert Program(text).whole().others <= 2 * LAYERS + 60


@needs_compiler
@pytest.mark.gpu_aot
def test_a_store_that_fills_the_memory_makes_no_step_save_memory():
    """XLA would make small arrays anew in each layer: it counts a store that kernels write into twice."""
    mesh = mesh_of(2)
    for lowered in (aot.lower_decode(LLAMA, FULL, mesh, 32), aot.lower_prefill(LLAMA, FULL, mesh, 8192, ONE_SIGNAL)):
        assert "remat" not in lowered.compile(compile_options(mesh)).as_text()


@needs_compiler
@pytest.mark.gpu_aot
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_no_kernel_spills_registers(kv_dtype, tmp_path, monkeypatch):
    """The assembler says so of each kernel, where Mosaic GPU is told to write that down."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    mesh, engine = mesh_of(1), dataclasses.replace(ENGINE, kv_dtype=kv_dtype)
    aot.lower_decode(LLAMA, engine, mesh, 32).compile(compile_options(mesh))
    aot.lower_prefill(LLAMA, engine, mesh, 512, ONE_SIGNAL).compile(compile_options(mesh))
    said = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(said) >= 7 + 7  # kinds of kernels
    assert all("sm_90a" in each and "0 bytes spill stores, 0 bytes spill loads" in each for each in said)


@needs_compiler
@pytest.mark.gpu_aot
def test_nothing_gathers_the_store():
    mesh = mesh_of(2)
    for lowered in (aot.lower_align(LLAMA, ENGINE, mesh, 8192), aot.lower_probe(LLAMA, ENGINE, mesh, 8192)):
        assert "all-gather" not in lowered.compile(compile_options(mesh)).as_text()


TEXT = """HloModule jit_f

%body (param: (s32[])) -> (s32[]) {
  %param = (s32[]) parameter(0)
  %fusion.1 = f32[8]{0} fusion(%param), kind=kLoop, calls=%fused
  %kernel = f32[8]{0} custom-call(%fusion.1), custom_call_target="mosaic_gpu_v2"
  %all-reduce-start = f32[8]{0} all-reduce-start(%kernel), to_apply=%add
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
  ROOT %tuple = (s32[]) tuple(%param)
}

%asked (param.1: (s32[])) -> (s32[]) {
  %param.1 = (s32[]) parameter(0)
  ROOT %while.2 = (s32[]) while(%param.1), condition=%goes_on, body=%body
}

ENTRY %main (param.2: (s32[])) -> (s32[]) {
  %param.2 = (s32[]) parameter(0)
  %while = (s32[]) while(%param.2), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %conditional = (s32[]) conditional(%while), branch_computations={%asked, %body}
  ROOT %copy = (s32[]) copy(%conditional)
}
"""


def test_launches_are_counted_with_the_turns_of_loops():
    found = Program(TEXT)
    assert found.turn() == Launches(kernels=1, others=1, collectives=1)
    # Four turns, a branch whose longest has a loop of unknown turns, and a copy.
    assert found.whole() == Launches(kernels=5, others=6, collectives=5, questions=2)
