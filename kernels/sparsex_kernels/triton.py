"""What the Triton kernels share: the portable path for GPUs, through jax-triton.

Each operation's `triton.py` is JAX; the kernels are in `triton_kernels.py` beside it, which imports Triton and so is
imported only when one of them is launched. A kernel takes pointers, ints and constants only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from sparsex_kernels.layout import PageTables, Queries, Store
from sparsex_kernels.mosaic import padded_pages

BACKEND_OPTIONS = {
    "enable_fp_fusion": True,  # a product and a sum may be one instruction: Triton is about to change its default
    "ptx_version": 87,  # CUDA 12.8's: Triton would write for the assembler that it brings, but XLA's assembles it
}
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


def check_available() -> None:
    """Raise `NotImplementedError` where kernels cannot be launched."""
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        raise NotImplementedError("jax_triton is not installed; the extra `cuda` has it") from error
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"Triton kernels on a {jax.default_backend()}")


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


def little_shared_memory() -> bool:
    """Whether a program must do with 99 KiB of shared memory, as on Ada GPUs."""
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith(SMALL_SHARED_MEMORY)


def check_attention(q: Queries, store: Store, block: int) -> None:
    """Raise `NotImplementedError` where the attention kernels cannot do this shape or type."""
    check_available()
    page_size, head_dim = store.shape[4:]
    if q.dtype != store.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries of {q.dtype} on a store of {store.dtype}; both bfloat16 or float16 can be")
    if head_dim not in (64, 128):
        raise NotImplementedError(f"head_dim {head_dim}; 64 and 128 can be")
    if max(page_size, block) % min(page_size, block):
        raise NotImplementedError(f"page_size {page_size}; multiples and divisors of {block} can be")


def power_of_two(n: int) -> int:
    """The smallest that is no smaller than n: Triton's tiles have no other sizes."""
    return 1 << (n - 1).bit_length()


def check_copies(store: Store) -> None:
    """Raise `NotImplementedError` where tokens of this store cannot be copied."""
    check_available()
    if store.shape[5] < 16 or store.shape[5] != power_of_two(store.shape[5]):
        raise NotImplementedError(f"head_dim {store.shape[5]}; powers of two from 16 on can be")


def tables_ahead(store: Store, layer: Int[Array, ""], page_tables: PageTables, block: int) -> Int[Array, "requests n"]:
    """Page tables as lines of the flat store, with one more block of pages: kernels look a block ahead."""
    pages = max(block // store.shape[4], 1)
    ahead = padded_pages(store, jnp.pad(page_tables, ((0, 0), (0, pages))), pages)
    return (ahead + layer * store.shape[1]).astype(jnp.int32)
