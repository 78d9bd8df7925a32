"""Which implementation of an operation runs: it follows the mesh's device, is chosen once, and is told."""

import dataclasses
import importlib
import inspect
import logging
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from kernel_cases import scattered

import sparsex_kernels.paged_attention
from sparsex_jax import Engine, SamplingParams
from sparsex_jax.config import EngineConfig
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.reuse.planner import CHUNKS, Shapes
from sparsex_kernels import api, backend, triton
from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import Backend, FallbackWarning, prefer
from sparsex_kernels.key_mass.triton import config_for
from sparsex_kernels.paged_attention import xla

HOPPER, TPU = Backend("gpu", "9.0"), Backend("tpu")


@pytest.fixture(autouse=True)
def nothing_told():
    backend.report_choice.cache_clear()


def device(platform, **attributes):
    return Mock(spec=jax.Device, platform=platform, **attributes)


WITHIN = (
    "apply_rope",
    "gated_linear",
    "gated_grouped_linear",
    "linear_parts",
    "pack_low_rank",
    "pack_rows",
)  # operations in a module of another name


@pytest.mark.parametrize("name", [name for name in api.__all__ if name.islower() and name not in WITHIN])
def test_an_operation_is_in_a_module_of_its_name(name):
    import sparsex_kernels.paged_attention as imported

    assert inspect.ismodule(imported)
    assert imported is sparsex_kernels.paged_attention
    module = importlib.import_module(f"sparsex_kernels.{name}")
    assert inspect.ismodule(module)
    assert getattr(module, name) is getattr(api, name)


@pytest.mark.parametrize(
    ("made_for", "operation", "order"),
    [
        (device("cpu"), "paged_attention", ("xla",)),
        (device("gpu", compute_capability="9.0"), "paged_attention", ("hopper", "triton", "xla")),
        (device("gpu", compute_capability="9.0"), "linear", ("hopper", "xla")),
        (device("gpu", compute_capability="8.0"), "key_mass", ("triton", "xla")),
        (device("gpu", compute_capability="8.0"), "linear", ("xla",)),
        (device("gpu", compute_capability="7.5"), "write_kv", ("xla",)),
        (device("tpu"), "paged_attention", ("xla",)),  # no TPU has run the kernel yet
        (device("tpu"), "linear", ("tpu", "xla")),
    ],
)
def test_the_order_follows_the_device(made_for, operation, order):
    assert Backend.of(made_for).order(operation) == order


def test_the_environment_and_the_context_come_before_the_device(monkeypatch):
    gpu = device("gpu", compute_capability="9.0")
    monkeypatch.setenv("SPARSEX_KERNELS", "triton,xla")
    made = Backend.of(gpu)
    assert made.order("linear") == ("triton", "xla")
    with prefer("reference"):
        assert Backend.of(gpu).order("linear") == ("reference",)
        assert made.order("linear") == ("triton", "xla")  # a backend that was made does not look again


def test_sizes_follow_the_backend():
    case = scattered((20,), 2000)
    rows = {
        name: xla.row_tile(AttentionArgs(*case, scale=1.0, backend=Backend(name))) for name in ("cpu", "gpu", "tpu")
    }
    assert rows == {"cpu": xla.CPU_TILE[0], "gpu": xla.ACCELERATOR_TILE[0], "tpu": xla.ACCELERATOR_TILE[0]}
    stages = [config_for(Backend("gpu", capability)).stages for capability in ("8.0", "8.9", "9.0", "12.0")]
    assert stages == [3, 2, 3, 2]
    assert [Ops(make_mesh(), made).row_multiple for made in (Backend("cpu"), HOPPER, TPU)] == [1, 8, 1]
    for platform, chunk in CHUNKS.items():
        assert Shapes.of_engine(TINY, EngineConfig(), platform=platform).buckets[-1][1] == chunk


def recorded(ran, name, implementation):
    def run(args, **options):
        ran.append(name)
        return implementation(args, **options)

    return run


@pytest.mark.slow
def test_engines_keep_the_implementations_that_they_were_made_with(monkeypatch):
    ran = []
    implementations = sparsex_kernels.paged_attention.IMPLEMENTATIONS
    for name in ("reference", "xla"):
        monkeypatch.setitem(implementations, name, recorded(ran, name, implementations[name]))
    model = dataclasses.replace(TINY, vocab_size=89)  # a model that no other test has compiled
    sizes = {"store_tokens": 512, "page_size": 16, "max_num_seqs": 2, "chunk_rows": 32}
    with prefer("reference", "xla"):
        first = Engine.from_config(model, **sizes)
    second = Engine.from_config(model, **sizes)
    prompt, answers = list(range(40)), []
    for engine, expected in ((first, {"reference"}), (second, {"xla"})):
        ran.clear()
        with prefer("xla") if engine is first else prefer("reference", "xla"):  # too late to change anything
            answers.append(engine.prefill(prompt, keep=False).logits)
            engine.generate(prompt, SamplingParams(max_new_tokens=3), keep=False)
        assert set(ran) == expected
    np.testing.assert_allclose(*answers, atol=1e-5)
    ops = [engine.runner.decoder.ops for engine in (first, second)]
    assert ops[0] != ops[1]
    assert ops[1] == Ops.on(make_mesh())
    assert hash(ops[1]) == hash(Ops.on(make_mesh()))


def test_a_choice_is_logged_once(caplog):
    case = scattered((20,), 4)
    with caplog.at_level(logging.INFO, logger="sparsex_kernels"):
        for _ in range(2):
            api.paged_attention(*case)
            api.key_mass(*case)
    assert [record.getMessage() for record in caplog.records] == [
        "paged_attention runs its implementation 'xla' on cpu",
        "key_mass runs its implementation 'xla' on cpu",
    ]


def test_a_fall_back_to_xla_on_an_accelerator_is_a_warning_that_says_why(recwarn):
    case = scattered((20,), 4, dtype="float32")
    reason = (
        r"paged_attention runs in plain XLA on gpu 9\.0.*hopper: queries of float32 on a store of float32; kernels take"
    )
    with pytest.warns(FallbackWarning, match=reason):
        out = api.paged_attention(*case, backend=HOPPER)
    np.testing.assert_allclose(out, api.paged_attention(*case, implementation="reference"), atol=1e-5)
    recwarn.clear()
    api.paged_attention(*case, backend=HOPPER)
    assert not recwarn  # it was told
    with pytest.warns(FallbackWarning, match=r"key_mass runs .* on tpu.*tpu: no version of it has been validated"):
        api.key_mass(*case, backend=TPU)
    with pytest.warns(FallbackWarning, match=r"linear runs .*: no kernels are made for gpu 7\.5"):
        api.linear(jnp.ones((2, 3)), [jnp.ones((1, 3, 4))], 0, backend=Backend("gpu", "7.5"))


def test_what_was_asked_for_is_no_fall_back(recwarn):
    case = scattered((20,), 4)
    api.paged_attention(*case)  # a CPU has no kernels to miss
    api.paged_attention(*case, implementation="xla", backend=HOPPER)
    with prefer("xla"):
        api.paged_attention(*case, backend=Backend.of(device("gpu", compute_capability="9.0")))
    assert not recwarn


def pretend_jax_triton(monkeypatch, **has):
    """A `jax_triton` that imports, with a compiler and a launcher, or with what stands in for them."""
    library = SimpleNamespace(**{"cb": ModuleType("compiler"), "triton_kernel_call_lib": ModuleType("launcher")} | has)
    modules = {"jax_triton.triton_lib": library, "triton": SimpleNamespace(__version__="3.6.0")}
    monkeypatch.setattr(triton, "importlib", SimpleNamespace(import_module=modules.__getitem__))


def test_triton_runs_where_jax_triton_has_a_compiler(monkeypatch):
    pretend_jax_triton(monkeypatch)
    triton.check_available(HOPPER)
    with pytest.raises(NotImplementedError, match="Triton kernels on a tpu"):
        triton.check_available(TPU)


@pytest.mark.parametrize(
    ("has", "reason"),
    [({"cb": SimpleNamespace()}, r"in Triton 3\.6\.0"), ({"triton_kernel_call_lib": None}, "JAX with GPU support")],
)
def test_a_jax_triton_with_stubs_is_passed_over(monkeypatch, has, reason):
    """It would fail where the program is lowered, when no other implementation can be tried any more."""
    pretend_jax_triton(monkeypatch, **has)
    with pytest.raises(NotImplementedError, match=reason):
        triton.check_available(HOPPER)
    able = {"triton": lambda args: triton.check_available(args.backend), "xla": lambda _: "plain XLA"}
    with pytest.warns(FallbackWarning, match=reason):
        assert backend.run("key_mass", able, None, SimpleNamespace(backend=Backend("gpu", "8.0"))) == "plain XLA"


def test_an_implementation_that_works_hides_why_others_do_not():
    def refuses(args):
        raise NotImplementedError("too large")

    implementations = {"hopper": refuses, "triton": lambda args: "done"}
    args = SimpleNamespace(backend=HOPPER)
    assert backend.run("write_kv", implementations, None, args) == "done"
    with pytest.raises(NotImplementedError, match="write_kv cannot be done: hopper: too large"):
        backend.run("write_kv", {"hopper": refuses}, None, args)
