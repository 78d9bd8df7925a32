"""Products of groups of rows for Hopper GPUs: each tile of rows is multiplied with its own group's matrix."""

from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import GroupedArgs
from sparsex_kernels.hopper_products import Config, RowTiles, product_parts
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS
from sparsex_kernels.product_parts import sum_parts


def grouped_linear(args: GroupedArgs, config: Config | None = None) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.grouped_linear`."""
    if args.tile not in (8, 16, 32, WGMMA_ROWS, 2 * WGMMA_ROWS):
        raise NotImplementedError(f"tiles of {args.tile} rows; the kernel takes 8, 16, 32, 64 and 128")
    tiles = RowTiles(args.tile, args.used, args.matrix_of_tile, together=False)
    config = config or choose_config(args.tile, args.width, len(args.weights))
    parts = product_parts(args.inputs, args.matrices, (args.width,), tiles, config, args.backend)
    return sum_parts(parts, args.inputs.dtype)


gated_grouped_linear = grouped_linear  # of two weights it is the gated product


def choose_config(tile: int, width: int, matrices: int) -> Config:
    """The block sizes for tiles of this number of rows and results of this width, from one matrix or a gated pair."""
    few = tile <= WGMMA_ROWS
    choices = (128, 64) if few else (256, 128, 64)
    columns = next((n for n in choices if n // matrices >= 64 and not width % (n // matrices)), 0)
    if not columns:
        raise NotImplementedError(f"weights of {width} columns; the kernel takes multiples of 64")
    return Config(1, columns, 1, 3, 2 * MULTIPROCESSORS) if few else Config(2, columns, 1, 4, MULTIPROCESSORS)
