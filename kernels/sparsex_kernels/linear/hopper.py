"""Linear layers on stacked weights for Hopper GPUs: all tiles of rows are multiplied with one layer's matrices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import LinearArgs
from sparsex_kernels.hopper_products import DEPTH, SMALLEST, Config, RowTiles, products
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS


def linear(args: LinearArgs, config: Config | None = None) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    rows, inputs = args.inputs.shape
    out = _products(args, args.widths, config or choose_config(rows, inputs, args.widths))
    return tuple(jnp.split(out, np.cumsum(args.widths)[:-1], axis=1))


def gated_linear(args: LinearArgs, config: Config | None = None) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_linear`."""
    if args.activation != "silu":
        raise NotImplementedError(f"activation={args.activation!r}; the kernel gates with silu")
    (rows, inputs), (width, _) = args.inputs.shape, args.widths
    config = config or choose_config(rows, inputs, (2 * width,))
    if config.splits > 1:  # the sum must be complete before it is gated
        gate, up = linear(args)
        return jax.nn.silu(gate) * up
    return _products(args, (width,), config)


def _products(args: LinearArgs, widths: tuple[int, ...], config: Config) -> Float[Array, "rows widths"]:
    rows = len(args.inputs)
    tile = min(rows + -rows % SMALLEST, WGMMA_ROWS) if config.warpgroups == 1 else WGMMA_ROWS * config.warpgroups
    row_tiles = -(-rows // tile)
    count = jnp.asarray(rows if args.count is None else args.count, jnp.int32)
    wanted = jnp.clip(-(-count // tile), 0, row_tiles)
    layers = jnp.full(row_tiles, args.layer, jnp.int32)
    tiles = RowTiles(tile, wanted, layers, together=True)
    return products(args.inputs, args.arrays, widths, tiles, config, args.backend)


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
