"""What the kernels for Hopper GPUs share (Pallas, Mosaic GPU).

On a CPU they run in Mosaic GPU's interpret mode, which knows TMA copies, barriers, warpgroups and `wgmma` on
operands in shared memory, but not `wgmma` on registers: there `add_weighted` uses a plain product.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from sparsex_kernels.backend import Backend
from sparsex_kernels.gpu import LOG2_E
from sparsex_kernels.layout import Store

WGMMA_ROWS = 64  # rows of one warpgroup's product
ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row of it
MASKED = -1e30  # finite, so that a row which has seen no key yet does not make NaN of inf - inf
SWIZZLE = 128  # bytes; tiles of 8 rows x 128 bytes, or of what a row has
MULTIPROCESSORS = 132  # of an H100 or H200, for which work is cut; devices with another number run the same programs

Ref = Any  # a reference to global or shared memory inside a kernel


@dataclasses.dataclass(frozen=True)
class Launch:
    """What is static in a launch. Equal launches on operands of the same types are one function of a program, so they
    are lowered and compiled once, wherever they stand."""

    function: Callable[..., None]
    static: tuple[Any, ...]  # the function's first arguments
    backend: Backend
    scratch: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]

    def kernel(self) -> Callable[..., Any]:
        """`plgpu.kernel`, interpreted on a CPU."""
        body = functools.partial(self.function, *self.static)
        interpret = plgpu.InterpretGPUParams() if self.backend.interpreted else None
        options = dict(self.options) | {"scratch_types": dict(self.scratch), "interpret": interpret}
        params = plgpu.CompilerParams(approx_math=True)
        return plgpu.kernel(body, compiler_params=params, thread_name="wg", **options)


def kernel(
    body: Callable[..., None], backend: Backend, *, scratch_types: Mapping[str, Any] | None = None, **options: Any
) -> Callable[..., Any]:
    """`plgpu.kernel`, interpreted on a CPU. One warpgroup is one thread named `wg`.

    Args:
      body: a function, or a partial one, whose arguments are hashable and have no names.
    """
    part = functools.partial(body)  # of a partial one, this is that one
    assert not part.keywords
    scratch = tuple((scratch_types or {}).items())
    return functools.partial(_launch, Launch(part.func, part.args, backend, scratch, tuple(options.items())))


@functools.partial(jax.jit, static_argnums=0)
def _launch(launch: Launch, *operands: Any) -> Any:
    return launch.kernel()(*operands)


def tiled_smem(shape: tuple[int, ...], dtype: Any, line: int = SWIZZLE) -> Any:
    """Shared memory whose last two axes are laid out as TMA and `wgmma` need them: 8-row tiles, swizzled.

    A line of a tile has `line` bytes (32, 64 or 128), or those of a row if a row has fewer. A right operand that has
    fewer rows than a line has numbers needs a shorter line.
    """
    size = jnp.dtype(dtype).itemsize
    bytes_a_row = min(line, shape[-1] * size)
    tiling: Any = plgpu.TilingTransform  # its stub declares it abstract
    swizzle: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, bytes_a_row // size)), swizzle(bytes_a_row)))


def flat_store(store: Store) -> Array:
    """The store as `[layers * pages, 2 * kv_heads, page_size, head_dim]`: TMA takes five axes at most. No copy."""
    layers, pages, kv, heads, page_size, head_dim = store.shape
    return store.reshape(layers * pages, kv * heads, page_size, head_dim)


def as_scalar(layer: Int[Array, ""] | int) -> Int[Array, "1"]:
    """The layer as a kernel's operand."""
    return jnp.asarray(layer, jnp.int32).reshape(1)


def check_copies(store: Store) -> None:
    """Raise `NotImplementedError` where TMA cannot copy single tokens of this store."""
    if store.shape[5] * store.dtype.itemsize % 16 or store.shape[5] > 256 or store.shape[3] > 256:
        raise NotImplementedError(f"copies of {store.shape[3]} heads of {store.shape[5]} {store.dtype}")


# Inside kernels -----------------------------------------------------------------------------------------------------


def products(left: Ref, right: Ref, meanwhile: Callable[[], None] | None = None) -> Array:
    """`left @ right.T` of two blocks in shared memory, in float32.

    Args:
      left: `[64, head_dim]`.
      right: `[n, head_dim]`.
      meanwhile: called after the product was started and before the program waits for it.
    """

    def product(acc: Any) -> Array:
        plgpu.wgmma(acc, left, right.transpose((1, 0)))
        if meanwhile is not None:
            meanwhile()
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((left.shape[0], right.shape[0]), jnp.float32))


class Softmax(NamedTuple):
    """An online softmax (FlashAttention-2, algorithm 1) of a warpgroup's 64 rows, in registers."""

    acc: Array  # float32 [64, head_dim], weighted sum of values
    top: Array  # float32 [64], largest score so far, in base 2
    total: Array  # float32 [64], sum of `exp2(score - top)`
    low: Array | None = None  # float32 [64, rank], weighted sum of Y, where there are adapters


def empty_softmax(width: int, rank: int = 0) -> Softmax:
    """The softmax of rows that have seen no key, over values of this width and, if there is a rank, Y of that one."""
    return Softmax(
        _zeros(width),
        plgpu.layout_cast(jnp.full((WGMMA_ROWS,), MASKED, jnp.float32), ROWS),
        plgpu.layout_cast(jnp.zeros((WGMMA_ROWS,), jnp.float32), ROWS),
        _zeros(rank) if rank else None,
    )


def _zeros(width: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, width), jnp.float32), plgpu.Layout.WGMMA)


def softmax_weights(scores: Array, top: Array, scale: float) -> tuple[Array, Array, Array]:
    """One block's part of an online softmax.

    Args:
      scores: float32 `[64, keys]`, without their scale; -inf where a row may not see a key.
      top: the largest score before, in base 2.

    Returns:
      The new largest score, the weights `exp2(score - new_top)`, and the factor `exp2(top - new_top)` by which all
      that was summed before is to be multiplied.
    """
    new_top = jnp.maximum(top, scores.max(axis=1) * (scale * LOG2_E))
    weights = jnp.exp2(scores * (scale * LOG2_E) - lax.broadcast_in_dim(new_top, scores.shape, [0]))
    return new_top, weights, jnp.exp2(top - new_top)


def add_weighted(acc: Array, weights: Array, values: Ref, interpreted: bool) -> Array:
    """`acc + weights @ values`, of weights in registers and values in shared memory."""
    return add_all_weighted((acc,), weights, (values,), interpreted)[0]


def add_all_weighted(
    accs: Sequence[Array], weights: Array, values: Sequence[Ref], interpreted: bool
) -> tuple[Array, ...]:
    """The same of several accumulators, each with its own values: their products are waited for together."""
    if interpreted:
        wide, pairs = weights.astype(jnp.float32), zip(accs, values, strict=True)
        return tuple(acc + jnp.dot(wide, own[...].astype(jnp.float32)) for acc, own in pairs)

    def product(accs: Any) -> None:
        for acc, own in zip(accs, values, strict=True):
            plgpu.wgmma(acc, weights, own)

    return pl.run_state(product)(tuple(plgpu.ACC.init(acc) for acc in accs))


def drain(barriers: Sequence[Ref], begin: Array | int, end: Array, stages: int) -> None:
    """Wait for the last uses of a ring of buffers that steps `begin .. end` went through.

    A barrier's phase must be seen by the thread that waits on it before the program ends, so the thread that fills the
    buffers waits once more for each.
    """

    def wait(step: Array, _: None) -> None:
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[lax.rem(step - begin, stages)])

    lax.fori_loop(jnp.maximum(end - stages, begin), end, wait, None)


def load_parts(parts: Sequence[Ref], number: Ref | None, layout: Any) -> list[Array]:
    """Parts of a product in registers. All loads are under way before one is waited for.

    Args:
      number: how many of the parts are used, at least 1: each but the first has a branch of its own, which makes zeros
        of what is not used. None: all.
    """
    load = functools.partial(plgpu.load, layout=layout, optimized=False)
    if number is None:
        return [load(part) for part in parts]

    def load_if(used: Array, part: Ref) -> Array:
        def zeros() -> Array:
            return plgpu.layout_cast(jnp.zeros(part.shape, part.dtype), layout)

        return lax.cond(used, functools.partial(load, part), zeros)

    used = number[0]
    return [load_if(n < used, part) if n else load(part) for n, part in enumerate(parts)]


def copy_wide(narrow: Ref, wide: Ref) -> None:
    """Copy rows of float8 into rows of float16, both in shared memory; all of a warpgroup's threads do it together."""

    def copy(i: Array, _: None) -> None:
        part = pl.ds(i * WGMMA_ROWS, WGMMA_ROWS)
        block = plgpu.load(narrow.at[part], layout=plgpu.Layout.WGMMA_UPCAST_2X).astype(wide.dtype)
        wide.at[part][...] = plgpu.layout_cast(block, plgpu.Layout.WGMMA)

    lax.fori_loop(0, narrow.shape[0] // WGMMA_ROWS, copy, None)
    plgpu.commit_smem()


def clear_rows(smem: Ref, end: Array, begin: Array | None = None) -> None:
    """Zero the rows of a block of V or Y from `end` on, and those before `begin`, if any.

    Slots behind the last position, or before all windows, may hold NaN, and 0 * NaN is NaN.
    """
    rows, columns = smem.shape
    piece = (64, min(columns, 64))  # few registers; the layout is that of a product's operand

    def clear(i: Array, _: None) -> None:
        row = plgpu.broadcasted_iota(jnp.int32, piece, 0, layout=plgpu.Layout.WGMMA) + i * piece[0]
        for column in range(0, columns, piece[1]):
            part = smem.at[pl.ds(i * piece[0], piece[0]), pl.ds(column, piece[1])]
            old = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            kept = row < end if begin is None else (row < end) & (row >= begin)
            part[...] = jnp.where(kept, old, jnp.zeros_like(old))

    lax.fori_loop(lax.div(end, piece[0]) if begin is None else 0, rows // piece[0], clear, None)
    plgpu.commit_smem()
