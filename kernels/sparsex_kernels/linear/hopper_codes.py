"""Products of few rows with weights in codes of 8 bits, fp8 or int8, for Hopper GPUs, by Pallas' Mosaic GPU.

Reading the codes should take all the time, so turning them into floats must not. The matrix is therefore the left side
of a product, `y.T = W.T @ x.T`, whose left side `wgmma` takes from registers: a warpgroup loads codes of 64 outputs,
turns them there into the dtype of the rows, and multiplies them with 8 to 64 rows. Nothing goes back to shared memory,
and few rows cost few operations. A thread must find codes of consecutive inputs side by side, so squares of 128 inputs
and 128 outputs are kept turned around (`Quantised.turned`).

One warpgroup fetches by TMA, the others multiply, each its outputs. The sum over inputs is split so that every
multiprocessor reads its share, and XLA adds the parts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, Num

from sparsex_kernels.backend import Backend
from sparsex_kernels.layout import pad_rows
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS, Ref, as_scalar, drain, kernel, tiled_smem
from sparsex_kernels.quantised import SQUARE

OUTPUTS = WGMMA_ROWS  # of a warpgroup


@dataclasses.dataclass(frozen=True)
class Config:
    """What may be tuned.

    Attributes:
      warpgroups: that multiply, each `OUTPUTS` outputs; those of a program divide every width.
      splits: parts of the sum over the inputs.
      stages: blocks in flight.
    """

    warpgroups: int
    splits: int
    stages: int


class Shape(NamedTuple):
    """Static sizes of one call."""

    rows: int  # a multiple of 8
    steps: int  # over the inputs
    starts: tuple[int, ...]  # first tile of each weight's outputs, and their number
    interpreted: bool


def products_of_codes(
    inputs: Float[Array, "rows inputs"],
    codes: Sequence[Num[Array, "matrices inputs _"]],
    matrix: Int[Array, ""] | int,
    config: Config,
    backend: Backend,
    scales: Sequence[Float[Array, "steps _"]] | None = None,
) -> Float[Array, "rows outputs"]:
    """The rows times one matrix of each stack, side by side, in float32.

    Args:
      inputs: bfloat16 or float16, at most 64 rows.
      codes: all float8_e4m3fn or all int8, their squares turned around.
      matrix: which of each stack.
      scales: of each weight, what multiplies each square; None: nothing.

    Raises:
      NotImplementedError: the rows have another dtype.
    """
    if inputs.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"rows of {inputs.dtype} on codes; the kernel takes bfloat16 or float16")
    rows, width = inputs.shape
    inputs = pad_rows(inputs, 8)
    ends = np.cumsum([stack.shape[2] for stack in codes]) // (OUTPUTS * config.warpgroups)
    shape = Shape(len(inputs), width // SQUARE, (0, *map(int, ends)), backend.interpreted)
    run = kernel(
        functools.partial(_kernel, shape, config, scales is not None),
        backend,
        out_type=jax.ShapeDtypeStruct(
            (config.splits, len(inputs), sum(stack.shape[2] for stack in codes)), jnp.float32
        ),
        grid=(shape.starts[-1] * config.splits,),
        grid_names=("program",),
        num_threads=config.warpgroups + 1,
        scratch_types={
            "x_smem": tiled_smem((config.stages, len(inputs), SQUARE), inputs.dtype),
            "codes_smem": tiled_smem((config.stages, config.warpgroups, OUTPUTS, SQUARE), codes[0].dtype),
            "out_smem": tiled_smem((config.warpgroups, len(inputs), OUTPUTS), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=1 + config.warpgroups, num_barriers=config.stages),
            "used": plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        },
    )
    factors = () if scales is None else (jnp.concatenate(scales, axis=1),)
    parts = run(inputs, *codes, *factors, as_scalar(jnp.asarray(matrix)))
    return parts.sum(0)[:rows]


def _kernel(shape: Shape, config: Config, scaled: bool, x_ref: Ref, *refs: Ref, **scratch: Ref) -> None:
    *codes, matrix, out_ref = refs
    scales = codes.pop() if scaled else None
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    tile, split = lax.rem(program, shape.starts[-1]), lax.div(program, shape.starts[-1])
    begin, end = (lax.div(at * shape.steps, config.splits) for at in (split, split + 1))

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        first = tile * config.warpgroups + wg  # of `OUTPUTS` outputs
        sums = _sums(shape, config, wg, begin, end, scales, lax.div(first * OUTPUTS, SQUARE), scratch)
        smem = scratch["out_smem"].at[wg]
        smem.transpose((1, 0))[...] = plgpu.layout_cast(sums, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, out_ref.at[split, :, pl.ds(first * OUTPUTS, OUTPUTS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        for start, stop, stack in zip(shape.starts[:-1], shape.starts[1:], codes, strict=True):
            mine = (tile >= start) & (tile < stop)
            pl.when(mine)(
                functools.partial(_fetch, config, begin, end, tile - start, x_ref, stack.at[matrix[0]], scratch)
            )
        drain((scratch["used"],), begin, end, config.stages)


def _sums(
    shape: Shape,
    config: Config,
    wg: Array,
    begin: Array,
    end: Array,
    scales: Ref | None,
    square: Array,
    scratch: dict[str, Ref],
) -> Array:
    """The products of a warpgroup's outputs with all rows, `[OUTPUTS, rows]`, over the steps `begin .. end`."""
    x_smem, codes_smem = scratch["x_smem"], scratch["codes_smem"]

    def step(k: Array, acc: Array) -> Array:
        slot = lax.rem(k - begin, config.stages)
        plgpu.barrier_wait(scratch["ready"].at[slot])
        weights = _decoded(codes_smem.at[slot, wg], x_smem.dtype)
        if scales is None:
            acc = _add_product(acc, weights, x_smem.at[slot], shape.interpreted)
        else:
            acc += _add_product(jnp.zeros_like(acc), weights, x_smem.at[slot], shape.interpreted) * scales[k, square]
        plgpu.barrier_arrive(scratch["used"].at[slot])
        return acc

    zeros = jnp.zeros((OUTPUTS, shape.rows), jnp.float32)
    return lax.fori_loop(begin, end, step, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))


def _decoded(codes: Ref, dtype: Any) -> Array:
    """Codes as floats in registers, laid out as the left side of a product."""
    loaded = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    if loaded.dtype == jnp.float8_e4m3fn:  # to float16 a GPU turns two in one instruction, and loses nothing
        loaded = loaded.astype(jnp.float16)
        loaded = loaded if dtype == jnp.float16 else loaded.astype(jnp.float32)
    return plgpu.layout_cast(loaded.astype(dtype), plgpu.Layout.WGMMA)


def _add_product(acc: Array, weights: Array, x: Ref, interpreted: bool) -> Array:
    """`acc + weights @ x.T`, of weights in registers and rows in shared memory."""
    if interpreted:
        return acc + jnp.dot(weights.astype(jnp.float32), x[...].astype(jnp.float32).T)

    def product(acc: Any) -> None:
        plgpu.wgmma(acc, weights, x.transpose((1, 0)))

    return pl.run_state(product)(plgpu.ACC.init(acc))


def _fetch(
    config: Config, begin: Array, end: Array, tile: Array, x_ref: Ref, codes: Ref, scratch: dict[str, Ref]
) -> None:
    """Copy blocks of rows and of one weight's codes to shared memory, in a ring."""

    def step(k: Array, _: None) -> None:
        slot = lax.rem(k - begin, config.stages)
        ready = scratch["ready"].at[slot]
        pl.when(k - begin >= config.stages)(lambda: plgpu.barrier_wait(scratch["used"].at[slot]))
        plgpu.copy_gmem_to_smem(x_ref.at[:, pl.ds(k * SQUARE, SQUARE)], scratch["x_smem"].at[slot], ready)
        for n in range(config.warpgroups):
            output = (tile * config.warpgroups + n) * OUTPUTS
            outputs = pl.ds(k * SQUARE + lax.rem(output, SQUARE), OUTPUTS)
            inputs = pl.ds(lax.div(output, SQUARE) * SQUARE, SQUARE)
            plgpu.copy_gmem_to_smem(codes.at[outputs, inputs], scratch["codes_smem"].at[slot, n], ready)

    lax.fori_loop(begin, end, step, None)


def choose_config(inputs: int, widths: tuple[int, ...]) -> Config:
    """Sizes that suit this number of inputs, and weights of these widths; a split has four steps or more."""
    splits = round(2 * MULTIPROCESSORS / (sum(widths) // OUTPUTS))
    return Config(1, max(min(splits, inputs // (4 * SQUARE)), 1), 4)
