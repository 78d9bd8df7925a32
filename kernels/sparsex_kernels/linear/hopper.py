"""Linear layers on stacked weights for Hopper GPUs: all tiles of rows are multiplied with one layer's matrices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import LinearArgs
from sparsex_kernels.hopper_products import DEPTH, SMALLEST, Config, RowTiles, products
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS
from sparsex_kernels.quantised import KINDS, Quantised, floats

COLUMNS_OF_CODES = 128  # of a block: a line of shared memory


def linear(args: LinearArgs, config: Config | None = None) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    rows, inputs = args.inputs.shape
    config = config or choose_config(rows, inputs, args.widths)
    if _reads_codes(args, config):
        out = _in_codes(args, config)
    else:
        args = _as_floats(args)
        out = _products(args, args.arrays, args.widths, config)
    return tuple(jnp.split(out, np.cumsum(args.widths)[:-1], axis=1))


def gated_linear(args: LinearArgs, config: Config | None = None) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_linear`."""
    if args.activation != "silu":
        raise NotImplementedError(f"activation={args.activation!r}; the kernel gates with silu")
    (rows, inputs), (width, _) = args.inputs.shape, args.widths
    config = config or choose_config(rows, inputs, (2 * width,))
    if config.splits > 1 or _reads_codes(args, config):  # the sum must be complete, and scaled, before it is gated
        gate, up = linear(args)
        return jax.nn.silu(gate) * up
    args = _as_floats(args)
    return _products(args, args.arrays, (width,), config)


def _reads_codes(args: LinearArgs, config: Config) -> bool:
    """Whether the kernel takes the weights' codes. Of many rows it does not: they would be decoded for each tile."""
    quantised = [weight for weight in args.weights if isinstance(weight, Quantised)]
    fits = len(args.inputs) <= WGMMA_ROWS and config.columns == COLUMNS_OF_CODES
    return fits and bool(quantised) and all(_has_scales_of_blocks(weight) for weight in quantised)


def _has_scales_of_blocks(weight: Quantised) -> bool:
    """Whether codes are numbers, and scales those of outputs or of whole blocks of the kernel's."""
    if KINDS[weight.kind].block:
        return False
    blocks = [size // parts for size, parts in zip(weight.shape[-2:], weight.scales.shape[-2:], strict=True)]
    return weight.scaled_by_output or (blocks[0] % DEPTH == 0 and blocks[1] % COLUMNS_OF_CODES == 0)


def _in_codes(args: LinearArgs, config: Config) -> Float[Array, "rows widths"]:
    """Products with codes. What differs only from output to output is scaled after the sum."""
    weights = [weight for weight in args.weights if isinstance(weight, Quantised)]
    codes = tuple(weight.codes for weight in weights)
    scales = [jax.lax.dynamic_index_in_dim(weight.scales, args.layer, keepdims=False) for weight in weights]
    if all(weight.scaled_by_output for weight in weights):
        product = _products(args, codes, args.widths, config).astype(jnp.float32)
        return (product * jnp.concatenate(scales, axis=1)).astype(args.inputs.dtype)
    blocks = [
        jnp.repeat(jnp.repeat(scale, inputs // DEPTH // len(scale), 0), width // COLUMNS_OF_CODES // scale.shape[1], 1)
        for scale, inputs, width in ((s, w.shape[1], w.shape[2]) for s, w in zip(scales, weights, strict=True))
    ]
    return _products(args, codes, args.widths, config, jnp.concatenate(blocks, axis=1))


def _as_floats(args: LinearArgs) -> LinearArgs:
    """With the layer's matrices dequantised, if they are quantised."""
    if not any(isinstance(weight, Quantised) for weight in args.weights):
        return args
    layers = (jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, args.layer), each) for each in args.weights)
    return dataclasses.replace(args, weights=tuple(floats(each, args.inputs.dtype) for each in layers), layer=0)


def _products(
    args: LinearArgs, stacks: tuple[Array, ...], widths: tuple[int, ...], config: Config, scales: Array | None = None
) -> Float[Array, "rows widths"]:
    rows = len(args.inputs)
    tile = min(rows + -rows % SMALLEST, WGMMA_ROWS) if config.warpgroups == 1 else WGMMA_ROWS * config.warpgroups
    row_tiles = -(-rows // tile)
    count = jnp.asarray(rows if args.count is None else args.count, jnp.int32)
    wanted = jnp.clip(-(-count // tile), 0, row_tiles)
    layers = jnp.full(row_tiles, args.layer, jnp.int32)
    tiles = RowTiles(tile, wanted, layers, together=True)
    return products(args.inputs, stacks, widths, tiles, config, args.backend, scales)


def choose_config(rows: int, inputs: int, widths: tuple[int, ...]) -> Config:
    """Sizes that suit this number of rows and inputs, and weights of these widths; a split has four steps or more."""
    few = rows <= WGMMA_ROWS
    columns = next((n for n in ((128, 64) if few else (256, 128, 64)) if not any(w % n for w in widths)), 0)
    if not columns:
        raise NotImplementedError(f"weights of {widths} columns; the kernel takes multiples of 64")
    tiles = sum(widths) // columns * -(-rows // (WGMMA_ROWS if few else 2 * WGMMA_ROWS))
    wanted = 2 * MULTIPROCESSORS if few else MULTIPROCESSORS
    splits = max(min(round(wanted / tiles), inputs // (4 * DEPTH)), 1)
    if few:
        return Config(1, columns, splits, 3, tiles * splits)
    return Config(2, columns, splits, 4, MULTIPROCESSORS)
