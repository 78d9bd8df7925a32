"""Few rows at once, each over a copy of its request's keys: of all of them, or of one block after the other.

Without a window there is no loop, but memory for rows x context. With one, which is data, a loop goes over blocks of
keys, each row from its own first to its own last, so that it reads no more than its window touches.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from sparsex_kernels.arguments import AttentionArgs
from sparsex_kernels.layout import Queries, Window, first_seen, group_heads, visible, widen
from sparsex_kernels.paged_attention.low_rank import beside, expanded, low_rank_values
from sparsex_kernels.paged_attention.online_softmax import Softmax, add_block, no_keys

KEYS_A_STEP = 1024  # of each row where there is a window, rounded to whole pages


def paged_attention(
    args: AttentionArgs, return_lse: bool = False
) -> Queries | tuple[Queries, Float[Array, "rows q_heads"]]:
    """See `sparsex_kernels.paged_attention`."""
    query, positions, low_rank = args.query, args.positions, args.low_rank
    if args.window is not None:
        out, lse = _attend_blocks(args, args.window)
        return (out, lse) if return_lse else out
    pages = args.page_tables.at[args.requests].get(mode="clip")
    keys, values = _read(args, pages)
    seen = jnp.arange(keys.shape[2]) <= positions[:, None]
    scores = _scores(args, keys)
    weights = jax.nn.softmax(scores, axis=-1, where=seen[:, None, None])
    weights = jnp.where((positions >= 0)[:, None, None, None], weights, 0)  # padding sees no key; its output is 0
    values = _with_low_rank(args, values, pages)
    values = jnp.where(seen[:, None, :, None], values, 0)  # 0 * NaN would be NaN
    out = jnp.einsum("rhgk,rhkd->rhgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    if low_rank is not None:
        out = expanded(low_rank, args.layer, out, args.requests)
    out = out.reshape(query.shape).astype(query.dtype)
    if not return_lse:
        return out
    lse = jax.nn.logsumexp(scores, axis=-1, where=seen[:, None, None])
    return out, jnp.where((positions >= 0)[:, None], lse.reshape(query.shape[:2]), -jnp.inf)


def _attend_blocks(args: AttentionArgs, window: Window) -> tuple[Queries, Float[Array, "rows q_heads"]]:
    query, positions, page_size, low_rank = args.query, args.positions, args.store.shape[4], args.low_rank
    pages_each = min(max(KEYS_A_STEP // page_size, 1), args.page_tables.shape[1])
    keys_each = pages_each * page_size
    first = first_seen(positions, window) // keys_each

    def step(i: Array, state: Softmax) -> Softmax:
        block = (first + i)[:, None]
        pages = block * pages_each + jnp.arange(pages_each)
        pages = args.page_tables.at[args.requests[:, None], pages].get(mode="clip")
        keys, values = _read(args, pages)
        values = _with_low_rank(args, values, pages)
        seen = visible(block * keys_each + jnp.arange(keys_each), positions[:, None], window)
        scores = jnp.where(seen[:, None, None], _scores(args, keys), -jnp.inf)
        return add_block(state, scores, jnp.where(seen[:, None, :, None], values, 0))  # 0 * NaN would be NaN

    blocks = jnp.where(positions >= 0, positions // keys_each + 1 - first, 0)
    more = low_rank.rank if low_rank is not None else 0
    out, lse = lax.fori_loop(0, blocks.max(), step, no_keys(group_heads(query, args.store), more)).result()
    if low_rank is not None:
        out = expanded(low_rank, args.layer, out, args.requests)
    return out.reshape(query.shape).astype(query.dtype), lse.reshape(query.shape[:2])


def _read(args: AttentionArgs, pages: Int[Array, "rows pages"]) -> tuple[Array, Array]:
    """K and V of each row's pages, `[rows, kv_heads, keys, head_dim]`."""
    tiles = widen(args.store[args.layer, pages], args.query.dtype)  # [rows, pages, 2, kv_heads, page_size, head_dim]
    keys, values = (
        tiles[:, :, kv].swapaxes(1, 2).reshape(len(pages), tiles.shape[3], -1, tiles.shape[5]) for kv in (0, 1)
    )
    return keys, values


def _with_low_rank(args: AttentionArgs, values: Array, pages: Int[Array, "rows pages"]) -> Array:
    """V of each row's pages, and Y as more columns where there are adapters."""
    if args.low_rank is None:
        return values
    read = jax.vmap(low_rank_values, in_axes=(None, None, 0, 0))
    return beside(values, read(args.low_rank, args.layer, pages, args.requests))


def _scores(args: AttentionArgs, keys: Float[Array, "rows kv_heads keys head_dim"]) -> Array:
    grouped = group_heads(args.query, args.store)
    return jnp.einsum("rhgd,rhkd->rhgk", grouped, keys, preferred_element_type=jnp.float32) * args.scale
