"""What the Triton kernels share: the portable path for GPUs, through jax-triton.

Each operation's `triton.py` is JAX; its kernels are in `triton_kernels.py` beside it, which imports Triton and is
therefore imported only when one of them is launched. A kernel takes pointers, ints and constants only.
"""

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels import gpu
from sparsex_kernels.arguments import AttentionArgs, CopyArgs, WriteArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.gpu import LOG2_E, heads_a_tile, padded_pages, power_of_two
from sparsex_kernels.layout import FLOAT8, Store

BACKEND_OPTIONS = {
    "enable_fp_fusion": True,  # a product and a sum may be one instruction; Triton is about to change its default
    "ptx_version": 87,  # CUDA 12.8's. Triton would write for its own assembler, but XLA's assembles it
}
WITHOUT_FLOAT8 = ("8.0", "8.6", "8.7")  # compute capabilities
SMALL_SHARED_MEMORY = ("8.6", "8.9", "12.")  # compute capabilities with less than 160 KiB a multiprocessor


class Config(NamedTuple):
    """What may be tuned of a kernel.

    Attributes:
      packed: query rows [row, head] in a tile.
      block: keys a step; a multiple or a divisor of the page size.
      warps: of a program.
      stages: steps whose loads are in flight.
    """

    packed: int
    block: int
    warps: int
    stages: int


def check_available(backend: Backend) -> None:
    """Raise `NotImplementedError` where kernels cannot be launched."""
    try:
        library = importlib.import_module("jax_triton.triton_lib")
    except ImportError as error:
        raise NotImplementedError("jax_triton is not installed; the extra `cuda` has it") from error
    if backend.platform != "gpu":
        raise NotImplementedError(f"Triton kernels on a {backend.platform}")
    _check_compiler(library)


def _check_compiler(library: Any) -> None:
    """Raise `NotImplementedError` where `jax_triton` has stubs in place of Triton's compiler or of XLA's launcher.

    It imports all the same then, for instance beside a Triton that is older than it needs, and fails where a program is
    lowered, which is too late to try another implementation.
    """
    if not isinstance(getattr(library, "cb", library), ModuleType):
        found = importlib.import_module("triton").__version__
        raise NotImplementedError(f"jax_triton finds no compiler that it knows in Triton {found}; it may be too old")
    if getattr(library, "triton_kernel_call_lib", library) is None:
        raise NotImplementedError("jax_triton finds no JAX with GPU support")


def call(kernel: Any, *inputs: Any, grid: tuple[int, ...], out_type: Any = (), **options: Any) -> Any:
    """Launch a kernel: inputs, which may be references, then a pointer for each output.

    Args:
      options: `num_warps`, `num_stages`, and the kernel's ints and constants by name.
    """
    import jax_triton

    return jax_triton.triton_call(
        *inputs, kernel=kernel, grid=grid, out_type=out_type, backend_options=BACKEND_OPTIONS, **options
    )


def in_place(kernel: Any, *inputs: Any, store: Store, grid: tuple[int, ...], **options: Any) -> Store:
    """Launch a kernel whose last pointer is the store that it writes to."""
    ref = jax.new_ref(store)
    call(kernel, *inputs, ref, grid=grid, **options)
    return jax.freeze(ref)


def little_shared_memory(backend: Backend) -> bool:
    """Whether a program must do with 99 KiB of shared memory, as on Ada GPUs."""
    return backend.capability.startswith(SMALL_SHARED_MEMORY)


def check_attention(args: AttentionArgs, block: int) -> None:
    """Raise `NotImplementedError` where the attention kernels cannot do this shape or dtype, or be launched."""
    check_available(args.backend)
    _check_stored(args)
    gpu.check_attention(args, block)


def check_copies(args: WriteArgs | CopyArgs) -> None:
    """Raise `NotImplementedError` where tokens of this store cannot be copied, or kernels not be launched."""
    check_available(args.backend)
    _check_stored(args)
    head_dim = args.store.shape[5]
    if head_dim < 16 or head_dim != power_of_two(head_dim):
        raise NotImplementedError(f"head_dim {head_dim}; kernels take powers of two from 16 on")


def _check_stored(args: AttentionArgs | WriteArgs | CopyArgs) -> None:
    if args.store.dtype == FLOAT8 and args.backend.capability.startswith(WITHOUT_FLOAT8):
        raise NotImplementedError(f"a store of {FLOAT8} on {args.backend}; GPUs have it from 8.9 on")


def tables_ahead(args: AttentionArgs, block: int) -> Int[Array, "requests n"]:
    """Page tables as lines of the flat store, with one more block of pages: kernels look a block ahead."""
    store = args.store
    pages = max(block // store.shape[4], 1)
    ahead = padded_pages(store, jnp.pad(args.page_tables, ((0, 0), (0, pages))), pages)
    return (ahead + args.layer * store.shape[1]).astype(jnp.int32)


def attention_constants(args: AttentionArgs, block: int) -> dict[str, Any]:
    """The constants that all kernels have which read keys: how heads share tiles, and the layout of the store."""
    q_heads, (kv_heads, page_size, head_dim) = args.query.shape[1], args.store.shape[3:]
    share = heads_a_tile(q_heads, kv_heads)
    return {
        "SCALE": float(args.scale) * LOG2_E,
        "SHARE": share,
        "HEADS": q_heads // share,
        "KV_HEADS": kv_heads,
        "BLOCK": block,
        "PAGE": page_size,
        "DIM": head_dim,
    }
