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
    store: tl.tensor,
    tokens: tl.tensor,
    pages: tl.tensor,
    TILE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    MOST: tl.constexpr,
) -> None:
    """Move a tile of tokens in one layer of the store, head after head."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    old = tl.load(source + token, mask=token < tokens, other=-1)
    new = tl.load(target + token, mask=token < tokens, other=-1)
    copied = (tl.program_id(1) >= tl.load(layers)) & (tl.program_id(1) < tl.load(layers + 1))
    live = ((new >= 0) & copied)[:, None]
    half, dims = tl.arange(0, DIM // 2), tl.arange(0, DIM)
    angle = token[:, None] * (DIM // 2) + half[None, :]
    c, s = tl.load(cos + angle, mask=live, other=0.0), tl.load(sin + angle, mask=live, other=0.0)
    first_page = tl.program_id(1) * pages
    old_k = ((first_page + old // PAGE).to(tl.int64) * (2 * KV_HEADS * PAGE) + old % PAGE) * DIM
    new_k = ((first_page + new // PAGE).to(tl.int64) * (2 * KV_HEADS * PAGE) + new % PAGE) * DIM
    for head in tl.range(KV_HEADS):
        read = store + (old_k + head * (PAGE * DIM))[:, None]
        write = store + (new_k + head * (PAGE * DIM))[:, None]
        first = tl.load(read + half[None, :], mask=live).to(tl.float32)
        second = tl.load(read + DIM // 2 + half[None, :], mask=live).to(tl.float32)
        v = tl.load(read + KV_HEADS * PAGE * DIM + dims[None, :], mask=live)
        tl.store(write + half[None, :], rounded(first * c - second * s, v.dtype, MOST), mask=live)
        tl.store(write + DIM // 2 + half[None, :], rounded(second * c + first * s, v.dtype, MOST), mask=live)
        tl.store(write + KV_HEADS * PAGE * DIM + dims[None, :], v, mask=live)
