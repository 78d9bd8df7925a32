"""The Triton kernel of alignment; imported when it is launched, as it needs Triton."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def rounded(x: tl.tensor, dtype: tl.constexpr, MOST: tl.constexpr) -> tl.tensor:
    """In the store's dtype; where that has a largest number (`MOST`; 0: none), larger ones become that one."""
    if MOST:
        x = tl.clamp(x, -MOST, MOST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
@no_type_check
def align(
    layers: tl.tensor,
    source: tl.tensor,
    target: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    spans: tl.tensor,
    store: tl.tensor,
    tokens: tl.tensor,
    pages: tl.tensor,
    TILE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    MOST: tl.constexpr,
    SPANS: tl.constexpr,
    ROTATE: tl.constexpr,
) -> None:
    """Move a tile of tokens in one layer of the store, head after head.

    With `SPANS`, `spans` has lines of one number a token: the first layer that it moves, the first behind those, by
    how much higher the source's layer is, and 1 where keys keep their bits. Without `ROTATE` all do, and `cos` and
    `sin` are not read.
    """
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    old = tl.load(source + token, mask=token < tokens, other=-1)
    new = tl.load(target + token, mask=token < tokens, other=-1)
    copied = (tl.program_id(1) >= tl.load(layers)) & (tl.program_id(1) < tl.load(layers + 1))
    from_layer = tl.program_id(1)
    heads = KV_HEADS
    if SPANS:
        first_layer = tl.load(spans + token, mask=token < tokens, other=0)
        end_layer = tl.load(spans + tokens + token, mask=token < tokens, other=0)
        copied = copied & (tl.program_id(1) >= first_layer) & (tl.program_id(1) < end_layer)
        from_layer = tl.program_id(1) + tl.load(spans + 2 * tokens + token, mask=token < tokens, other=0)
        as_is = tl.load(spans + 3 * tokens + token, mask=token < tokens, other=0)[:, None] > 0
        heads = tl.max(((new >= 0) & copied).to(tl.int32)) * KV_HEADS  # none where no token moves
    live = ((new >= 0) & copied)[:, None]
    half, dims = tl.arange(0, DIM // 2), tl.arange(0, DIM)
    if ROTATE:
        angle = token[:, None] * (DIM // 2) + half[None, :]
        c, s = tl.load(cos + angle, mask=live, other=0.0), tl.load(sin + angle, mask=live, other=0.0)
    first_page = tl.program_id(1) * pages
    old_k = ((from_layer * pages + old // PAGE).to(tl.int64) * (2 * KV_HEADS * PAGE) + old % PAGE) * DIM
    new_k = ((first_page + new // PAGE).to(tl.int64) * (2 * KV_HEADS * PAGE) + new % PAGE) * DIM
    for head in tl.range(heads):
        read = store + (old_k + head * (PAGE * DIM))[:, None]
        write = store + (new_k + head * (PAGE * DIM))[:, None]
        old_first = tl.load(read + half[None, :], mask=live)
        old_second = tl.load(read + DIM // 2 + half[None, :], mask=live)
        v = tl.load(read + KV_HEADS * PAGE * DIM + dims[None, :], mask=live)
        new_first, new_second = old_first, old_second
        if ROTATE:
            first, second = old_first.to(tl.float32), old_second.to(tl.float32)
            new_first = rounded(first * c - second * s, v.dtype, MOST)
            new_second = rounded(second * c + first * s, v.dtype, MOST)
            if SPANS:
                new_first = tl.where(as_is, old_first, new_first)
                new_second = tl.where(as_is, old_second, new_second)
        tl.store(write + half[None, :], new_first, mask=live)
        tl.store(write + DIM // 2 + half[None, :], new_second, mask=live)
        tl.store(write + KV_HEADS * PAGE * DIM + dims[None, :], v, mask=live)
