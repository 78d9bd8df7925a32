"""Linear layers on stacked weights for Hopper GPUs: all tiles of rows are multiplied with one layer's matrices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from sparsex_kernels.arguments import Added, LinearArgs
from sparsex_kernels.hopper_products import DEPTH, SMALLEST, Config, RowTiles, product_parts
from sparsex_kernels.linear import hopper_codes
from sparsex_kernels.linear.apart import plus
from sparsex_kernels.linear.hopper_codes import products_of_codes
from sparsex_kernels.linear.xla import ACTIVATIONS
from sparsex_kernels.mosaic import MULTIPROCESSORS, WGMMA_ROWS
from sparsex_kernels.product_parts import MOST_ROWS, ProductParts, one_part, sum_parts
from sparsex_kernels.quantised import SQUARE, Quantised, floats

NARROW = 512  # up to this many columns, few rows take tiles of 64: of 128 there are too few for all multiprocessors
# Parts whose number is data have room for all rows: 134 MB for 8 of 1024 rows of 4096 columns, of which one round of
# programs writes 17.
MOST_PARTS = 8
SPLIT_ROWS = 1024  # up to this many, the number of parts is data where it may be
# Steps that two parts have to save a program to be worth it: of 1319 rows of 4096, to write and read them takes 15 us.
WORTH_PARTS = 48


def linear(args: LinearArgs, config: Config | None = None) -> tuple[Float[Array, "rows _"], ...]:
    """See `sparsex_kernels.linear`."""
    if _reads_codes(args):
        return plus(_split(_in_codes(args), args), args.added, functools.partial(_added_product, args))
    args = _as_floats(args)
    return _split(sum_parts(_products(args, args.widths, config or _config(args)), args.inputs.dtype), args)


def _split(out: Float[Array, "rows widths"], args: LinearArgs) -> tuple[Float[Array, "rows _"], ...]:
    return tuple(jnp.split(out, np.cumsum(args.widths)[:-1], axis=1))


def _added_product(args: LinearArgs, added: Added) -> Float[Array, "rows _"]:
    """What is added to a product, where the kernel of that one cannot go on with it."""
    return linear(LinearArgs(added.own, (added.stack,), args.layer, args.count, args.backend))[0]


def linear_parts(args: LinearArgs, config: Config | None = None) -> ProductParts:
    """See `sparsex_kernels.linear`."""
    if _reads_codes(args):
        return one_part(_in_codes(args))
    return _products(_as_floats(args), args.widths, config or _config(args, fits=True))


def _config(args: LinearArgs, *, fits: bool = False) -> Config:
    rows, inputs = args.inputs.shape
    return choose_config(rows, inputs, args.widths, fits=fits)


def gated_linear(args: LinearArgs, config: Config | None = None) -> Float[Array, "rows width"]:
    """See `sparsex_kernels.gated_linear`."""
    if args.activation != "silu" and not args.added:  # XLA's two products would be followed by those that are added
        raise NotImplementedError(f"activation={args.activation!r}; the kernel gates with silu")
    (rows, inputs), (width, _) = args.inputs.shape, args.widths
    config = config or choose_config(rows, inputs, (2 * width,), matrices=2)
    if config.splits > 1 or _reads_codes(args) or args.activation != "silu":
        gate, up = linear(args)  # the sum must be complete, and scaled, before it is gated
        return ACTIVATIONS[args.activation](gate) * up
    return _products(_as_floats(args), (width,), config).parts[0]


def _reads_codes(args: LinearArgs) -> bool:
    """Whether the kernel takes the weights' codes. Of many rows it does not: they would be decoded for each tile."""
    quantised = [weight for weight in args.weights if isinstance(weight, Quantised)]
    return len(args.inputs) <= WGMMA_ROWS and bool(quantised) and all(map(_has_readable_codes, quantised))


def _has_readable_codes(weight: Quantised) -> bool:
    """Whether squares of codes are turned around, and scales those of outputs or of whole squares."""
    blocks = [size // parts for size, parts in zip(weight.shape[-2:], weight.scales.shape[-2:], strict=True)]
    return weight.turned and (weight.scaled_by_output or not any(size % SQUARE for size in blocks))


def _in_codes(args: LinearArgs) -> Float[Array, "rows widths"]:
    """Products with codes. What differs only from output to output is scaled after the sum."""
    weights = [weight for weight in args.weights if isinstance(weight, Quantised)]
    scales = [jax.lax.dynamic_index_in_dim(weight.scales, args.layer, keepdims=False) for weight in weights]
    by_output = all(weight.scaled_by_output for weight in weights)
    product = products_of_codes(
        args.inputs,
        [weight.codes for weight in weights],
        args.layer,
        hopper_codes.choose_config(args.inputs.shape[1], args.widths),
        args.backend,
        None if by_output else [_by_square(*pair) for pair in zip(scales, weights, strict=True)],
    )
    return (product * jnp.concatenate(scales, axis=1) if by_output else product).astype(args.inputs.dtype)


def _by_square(scales: Array, weight: Quantised) -> Float[Array, "steps squares"]:
    for axis, size in enumerate(weight.shape[-2:]):
        scales = jnp.repeat(scales, size // SQUARE // scales.shape[axis], axis)
    return scales


def _as_floats(args: LinearArgs) -> LinearArgs:
    """With the layer's matrices dequantised, if they are quantised."""
    if not any(isinstance(weight, Quantised) for weight in args.weights):
        return args
    layers = (jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, args.layer), each) for each in args.weights)
    weights = tuple(floats(each, args.inputs.dtype) for each in layers)
    added = tuple(each and each.of_layer(args.layer) for each in args.added)
    return dataclasses.replace(args, weights=weights, layer=0, added=added)


def _products(args: LinearArgs, widths: tuple[int, ...], config: Config) -> ProductParts:
    rows = len(args.inputs)
    tile = min(rows + -rows % SMALLEST, WGMMA_ROWS) if config.warpgroups == 1 else WGMMA_ROWS * config.warpgroups
    row_tiles = -(-rows // tile)
    count = jnp.asarray(rows if args.count is None else args.count, jnp.int32)
    wanted = jnp.clip(-(-count // tile), 0, row_tiles)
    layers = jnp.full(row_tiles, args.layer, jnp.int32)
    tiles = RowTiles(tile, wanted, layers, together=True)
    return product_parts(args.inputs, args.arrays, widths, tiles, config, args.backend, args.added)


def choose_config(rows: int, inputs: int, widths: tuple[int, ...], matrices: int = 1, *, fits: bool = False) -> Config:
    """Sizes that suit this number of rows and inputs, and weights of these widths; a split has four steps or more.

    Of few rows, two programs share a multiprocessor. They all begin at once: one more would begin when the others are
    done, and its loads alone do not fill the memory's bandwidth.

    Of more rows, all that are wanted may be in one tile, so one that fits has as many parts as suit that. With 256 of
    1024 rows wanted, 4096 outputs of 14336 inputs should take 56 steps of 0.7 us in 4 parts, not 224 in one; to write
    17 MB of parts and read them again takes some 9 us of the 118 that this saves.

    Of 1025 to 2048 rows, a sum has two parts where the tiles would leave half of a last round of programs idle. With
    1536 rows, 4096 outputs of 14336 inputs take 3 rounds of 112 steps, not 2 of 224.

    Args:
      matrices: 2 for a gated product, whose tile has half of its columns of each.
      fits: whether parts are added by who reads them, and of no more than are used.
    """
    few = rows <= WGMMA_ROWS
    most = (64 * matrices if sum(widths) <= NARROW else 128) if few else 256
    columns = next((n for n in (256, 128, 64) if n <= most and not any(w % n for w in widths)), 0)
    if not columns:
        raise NotImplementedError(f"weights of {widths} columns; the kernel takes multiples of 64")
    many = fits and SPLIT_ROWS < rows <= MOST_ROWS
    fits = fits and not few and rows <= SPLIT_ROWS
    row_tiles = 1 if fits else -(-rows // (WGMMA_ROWS if few else 2 * WGMMA_ROWS))
    tiles = sum(widths) // columns * row_tiles
    wanted = 2 * MULTIPROCESSORS // tiles if few else MULTIPROCESSORS // tiles
    splits = max(min(wanted, inputs // (4 * DEPTH), MOST_PARTS if fits else wanted), 1)
    if few:
        return Config(1, columns, splits, 3, tiles * splits)
    splits = _parts_of_many(tiles, inputs // DEPTH) if many else splits
    return Config(2, columns, splits, 4, MULTIPROCESSORS, fits and splits > 1)


def _parts_of_many(tiles: int, steps: int) -> int:
    rounds, of_halves = -(-tiles // MULTIPROCESSORS), -(-2 * tiles // MULTIPROCESSORS) / 2
    return 2 if (rounds - of_halves) * steps >= WORTH_PARTS else 1
