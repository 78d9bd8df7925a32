"""Key mass in Triton: a pass for the log-sum-exp, and one for the column sums.

In the second pass a program owns a block of keys and the query heads of one KV head, and goes through the rows that
see them. No sum is shared between programs, which makes the result deterministic.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.backend import Backend
from sparsex_kernels.gpu import in_float16, power_of_two, raised
from sparsex_kernels.layout import Power, RowInts, Window
from sparsex_kernels.paged_attention.triton import attend
from sparsex_kernels.triton import (
    Config,
    attention_constants,
    call,
    check_attention,
    little_shared_memory,
    tables_ahead,
)


def config_for(backend: Backend) -> Config:
    """What suits the device, for 16-bit types."""
    return Config(packed=64, block=128, warps=4, stages=2 if little_shared_memory(backend) else 3)


def key_mass(args: AttentionArgs, power: Power = 1, config: Config | None = None) -> Float[Array, "requests context"]:
    """See `sparsex_kernels.key_mass`."""
    args, config = in_float16(args), config or config_for(args.backend)
    check_attention(args, config.block)
    from sparsex_kernels.key_mass.triton_kernels import column_sums

    _, lse = attend(args, values=False)
    args = raised(args, power)
    num_requests, constants = len(args.page_tables), attention_constants(args, config.block)
    heads, padded_share = constants["HEADS"], power_of_two(constants["SHARE"])
    ranges = seen_by(
        args.positions, args.requests, num_requests, -(-args.context // config.block), config.block, args.window
    )
    tables = tables_ahead(args, config.block)
    mass = call(
        column_sums,
        *(args.query, args.store, tables, ranges, args.positions.astype(jnp.int32), power * lse, tables.shape[1]),
        grid=(ranges.shape[1], num_requests, heads),
        out_type=jax.ShapeDtypeStruct((heads, *ranges.shape[:2], config.block), jnp.float32),
        num_warps=config.warps,
        num_stages=config.stages,
        WINDOWED=args.window is not None,
        ROWS=config.packed // padded_share,
        PADDED_SHARE=padded_share,
        **constants,
    )
    return mass.sum(axis=0).reshape(num_requests, -1)[:, : args.context]


def seen_by(
    positions: RowInts, requests: RowInts, num_requests: int, blocks: int, block: int, window: Window | None = None
) -> Int[Array, "requests blocks fields"]:
    """Which rows see each request's blocks of keys; they are consecutive.

    Returns:
      For each block the first row that sees anything of it, the first that is not before any of its keys, and the one
      behind the last that sees anything of it. With a window also the one behind the last that it hides nothing of the
      block from, and the window.
    """
    # Blocks of 8 keys, 2 a request: rows 0 1 2 of request 0 at positions 2 7 9, rows 3 4 of request 2 at 0 and 15, and
    # padding give [[0, 1, 3], [2, 3, 3]] for request 0 and [[3, 4, 5], [4, 4, 5]] for request 2.
    context = blocks * block
    if (num_requests + 1) * context >= 2**31:
        raise NotImplementedError(
            f"{num_requests} requests of {context} tokens; the kernel takes fewer than 2^31 slots"
        )
    # A number for each row, in the order of the rows: by request, then by position.
    place = jnp.where(positions >= 0, requests * context + positions, num_requests * context)
    begin = jnp.arange(num_requests)[:, None] * context + jnp.arange(blocks) * block
    end = jnp.broadcast_to(jnp.arange(1, num_requests + 1)[:, None] * context, begin.shape)
    bounds = [begin, begin + block - 1, end]
    if window is not None:
        reach = jnp.minimum(window, context)  # no further than the request's end
        bounds = [*bounds[:2], jnp.minimum(begin + block - 1 + reach, end), jnp.minimum(begin + reach, end)]
    wanted = jnp.stack(bounds, axis=-1)
    found = jnp.searchsorted(place, wanted.reshape(-1), method="compare_all").reshape(wanted.shape)
    found = jnp.minimum(found, found[..., 2:3]).astype(jnp.int32)
    if window is None:
        return found
    return jnp.append(found, jnp.broadcast_to(window, (*found.shape[:-1], 1)), axis=-1)
