"""The Triton kernel of key mass; imported when it is launched, as it needs Triton."""

from typing import no_type_check

import triton
import triton.language as tl

from sparsex_kernels.paged_attention.triton_kernels import pages_of, slot_offsets


@triton.jit
@no_type_check
def _add(
    sums: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    end: tl.tensor,
    k: tl.tensor,
    keys: tl.tensor,
    q: tl.tensor,
    lse: tl.tensor,
    positions: tl.tensor,
    window: tl.tensor,
    head: tl.tensor,
    MASK: tl.constexpr,
    WINDOWED: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    PADDED_SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """Add the weights of rows `begin .. stop`, some at a time; those from `end` on are another request's."""
    packed, dims = tl.arange(0, ROWS * PADDED_SHARE), tl.arange(0, DIM)
    member = packed % PADDED_SHARE
    for first in tl.range(begin, stop, ROWS):
        row = first + packed // PADDED_SHARE
        live = (row < end) & (member < SHARE)
        at = row * (HEADS * SHARE) + head * SHARE + member
        queries = tl.load(q + at.to(tl.int64)[:, None] * DIM + dims[None, :], mask=live[:, None], other=0.0)
        total = tl.load(lse + at, mask=live, other=float("inf"))  # a weight of 0
        p = tl.exp2(tl.dot(queries, tl.trans(k)) * SCALE - total[:, None])
        if MASK:
            bound = tl.load(positions + row, mask=row < end, other=-1)
            p = tl.where(keys[None, :] <= bound[:, None], p, 0.0)
            if WINDOWED:
                p = tl.where(keys[None, :] >= (bound - window + 1)[:, None], p, 0.0)
        sums += p
    return sums


@triton.jit
@no_type_check
def column_sums(
    q: tl.tensor,
    store: tl.tensor,
    tables: tl.tensor,
    ranges: tl.tensor,
    positions: tl.tensor,
    lse: tl.tensor,
    max_pages: tl.tensor,
    mass: tl.tensor,
    WINDOWED: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    PADDED_SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """The mass of one block of keys: the sum over all rows of its request and the query heads of one KV head."""
    block, request, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = request * tl.num_programs(0) + block
    line = ranges + place * (5 if WINDOWED else 3)
    first, clear, end = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    keys = block * BLOCK + tl.arange(0, BLOCK)
    out = mass + (head * tl.num_programs(1) * tl.num_programs(0) + place).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if first >= end:
        tl.store(out, tl.zeros([BLOCK], tl.float32))
        return
    pages = pages_of(tables + request * max_pages, block * BLOCK, BLOCK, PAGE)
    offsets = slot_offsets(pages, block * BLOCK, head // (HEADS // KV_HEADS), 2 * KV_HEADS, BLOCK, PAGE, DIM)
    k = tl.load(store + offsets[:, None] + tl.arange(0, DIM)[None, :]).to(q.dtype.element_ty)
    clear = tl.minimum(first + (clear - first + ROWS - 1) // ROWS * ROWS, end)
    sums = tl.zeros([ROWS * PADDED_SHARE, BLOCK], tl.float32)
    clear_end, window = end, 0
    if WINDOWED:
        # Whole steps of rows that see the block in full; a tile's worth of rows more would be hidden from some.
        clear_end, window = tl.load(line + 3), tl.load(line + 4)
        clear_end = clear + tl.maximum(clear_end - clear, 0) // ROWS * ROWS
    sums = _add(
        sums,
        first,
        clear,
        end,
        k,
        keys,
        q,
        lse,
        positions,
        window,
        head,
        True,
        WINDOWED,
        SCALE,
        ROWS,
        SHARE,
        PADDED_SHARE,
        HEADS,
        DIM,
    )
    sums = _add(
        sums,
        clear,
        clear_end,
        end,
        k,
        keys,
        q,
        lse,
        positions,
        window,
        head,
        False,
        WINDOWED,
        SCALE,
        ROWS,
        SHARE,
        PADDED_SHARE,
        HEADS,
        DIM,
    )
    if WINDOWED:
        sums = _add(
            sums,
            clear_end,
            end,
            end,
            k,
            keys,
            q,
            lse,
            positions,
            window,
            head,
            True,
            WINDOWED,
            SCALE,
            ROWS,
            SHARE,
            PADDED_SHARE,
            HEADS,
            DIM,
        )
    tl.store(out, tl.sum(sums, 0))
