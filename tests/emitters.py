"""XLA's older emitters of fusions for CPUs, by which most programs of the tests compile in half the time.

The newer ones go through MLIR, whose contexts and passes take 40 ms for the smallest program. The older ones copy a
whole array to write one slice of it, so programs that do that to a large array keep the newer ones. So do those that
do it to an array of 16 or 8 bits, which is copied through float32: signalling NaNs and denormals lose bits there. A
flag of XLA would hold for all programs of a process, hence an option of single programs.
"""

import math

from jax._src import compiler
from jax._src.lib import xla_client
from jax._src.lib.mlir import ir

LARGE = 1 << 17  # elements, which take some tenths of a millisecond to copy


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + _varint(value // 128)


def _field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer: text, or a message."""
    return _varint(number * 8 + 2) + _varint(len(content)) + content


# What is written behind a message is merged into it. This is executable_build_options.debug_options, and in its map
# xla_backend_extra_options a key and its value.
_OLDER = _field(3, _field(3, _field(500, _field(1, b"xla_cpu_disable_new_fusion_emitters") + _field(2, b"true"))))


def with_older_emitters(options: xla_client.CompileOptions) -> xla_client.CompileOptions:
    return xla_client.CompileOptions.ParseFromString(options.SerializeAsString() + _OLDER)


def writes_one_slice(op: ir.Operation) -> bool:
    """Whether an operation writes a single slice of an array."""
    if op.name == "stablehlo.scatter":
        return math.prod(op.operands[1].type.shape[:-1]) == 1  # rows of indices
    return op.name == "stablehlo.dynamic_update_slice"


def must_not_be_copied(array: ir.RankedTensorType) -> bool:
    narrow = isinstance(array.element_type, ir.FloatType) and array.element_type.width < 32
    return narrow or math.prod(array.shape) >= LARGE


def needs_newer_emitters(module: ir.Module) -> bool:
    """Whether the older ones would copy arrays that must not be copied."""
    found = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if writes_one_slice(op) and must_not_be_copied(op.operands[0].type):
            found.append(op.name)
        return ir.WalkResult.INTERRUPT if found else ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return bool(found)


def choose_emitters() -> None:
    """From now on, JAX compiles each program for CPUs with the emitters that suit it.

    Programs that were kept are found whatever is chosen here, so `.pytest_cache` goes where the choice changes.
    """
    compile_and_load = compiler.backend_compile_and_load

    def choosing(backend, module, devices, options, *more):
        if backend.platform == "cpu" and not needs_newer_emitters(module):
            options = with_older_emitters(options)
        return compile_and_load(backend, module, devices, options, *more)

    compiler.backend_compile_and_load = choosing
