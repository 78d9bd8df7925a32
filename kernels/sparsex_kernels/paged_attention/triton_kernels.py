"""Triton kernels of paged attention; imported when one is launched, as they need Triton."""

from typing import no_type_check

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # finite, so that a row which has seen no key yet does not make NaN of inf - inf


@triton.jit
@no_type_check
def pages_of(table: tl.tensor, key: tl.tensor, BLOCK: tl.constexpr, PAGE: tl.constexpr) -> tl.tensor:
    """The page of `BLOCK` keys from `key` on, a multiple of it; or, where that is more than one page, of each key."""
    keys = key if BLOCK <= PAGE else key + tl.arange(0, BLOCK)
    return tl.load(table + keys // PAGE)


@triton.jit
@no_type_check
def slot_offsets(
    pages: tl.tensor,
    key: tl.tensor,
    line: tl.tensor,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """Offsets into the store of `BLOCK` keys from `key` on; `line` is a head's K or V among the `LINES` of a page."""
    offsets = ((pages.to(tl.int64) * LINES + line) * PAGE + key % PAGE) * DIM
    return offsets + tl.arange(0, BLOCK) % PAGE * DIM


@triton.jit
@no_type_check
def _attend(
    state: tl.tuple,
    begin: tl.tensor,
    end: tl.tensor,
    q: tl.tensor,
    store: tl.tensor,
    low: tl.tensor,
    table: tl.tensor,
    column: tl.tensor,
    bound: tl.tensor,
    last: tl.tensor,
    first_key: tl.tensor,
    window: tl.tensor,
    kv_head: tl.tensor,
    MASK: tl.constexpr,
    WINDOWED: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Fold key blocks `begin .. end` into the online softmax: accumulator, maximum (in base 2) and denominator.

    With MASK a row sees keys up to its `bound`, and none behind `last` is read for its value: such slots may hold
    NaN, and 0 * NaN is NaN. If it is WINDOWED, it sees `window` of these keys, and no value before `first_key` is read.

    If adapters have a RANK, the state's fourth is the sum of Y, whose first column is `column`, of WIDTH in the store.
    The sum has as many COLUMNS, and those behind the RANK are 0.
    """
    acc, top, total, sums = state
    dims = tl.arange(0, DIM)
    # Page numbers are loaded a step ahead: keys cannot be loaded before their page is known.
    pages = pages_of(table, begin * BLOCK, BLOCK, PAGE)
    for block in tl.range(begin, end):
        key = block * BLOCK
        keys = key + tl.arange(0, BLOCK)
        offsets = slot_offsets(pages, key, kv_head, 2 * KV_HEADS, BLOCK, PAGE, DIM)
        if RANK:
            y_offsets = slot_offsets(pages, key, 0, 1, BLOCK, PAGE, WIDTH)
        pages = pages_of(table, key + BLOCK, BLOCK, PAGE)
        k = tl.load(store + offsets[:, None] + dims[None, :]).to(q.dtype)
        s = tl.dot(q, tl.trans(k))
        if MASK:
            s = tl.where(keys[None, :] <= bound[:, None], s, float("-inf"))
            if WINDOWED:
                s = tl.where(keys[None, :] >= (bound - window + 1)[:, None], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - new_top[:, None])
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(p, 1)
        if VALUES:
            v_pointers = store + (offsets + KV_HEADS * PAGE * DIM)[:, None] + dims[None, :]
            if MASK and WINDOWED:
                v = tl.load(v_pointers, mask=((keys <= last) & (keys >= first_key))[:, None], other=0.0)
            else:
                v = tl.load(v_pointers, mask=(keys <= last)[:, None], other=0.0) if MASK else tl.load(v_pointers)
            acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * decay[:, None])
        if RANK:
            columns = tl.arange(0, COLUMNS)
            y_pointers = low + y_offsets[:, None] + (column + columns)[None, :]
            read = tl.full([BLOCK, COLUMNS], True, tl.int1)
            if MASK:
                read = read & (keys <= last)[:, None]
                if WINDOWED:
                    read = read & (keys >= first_key)[:, None]
            if COLUMNS > RANK:
                read = read & (columns < RANK)[None, :]
            y = tl.load(y_pointers, mask=read, other=0.0) if MASK or COLUMNS > RANK else tl.load(y_pointers)
            sums = tl.dot(p.to(q.dtype), y, sums * decay[:, None])
        top = new_top
    return acc, top, total, sums


@triton.jit
@no_type_check
def _add_expanded(
    out: tl.tensor,
    sums: tl.tensor,
    matrices: tl.tensor,
    pick: tl.tensor,
    kv_head: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """`out + sums @ B` of a request's adapter, or `out` for one without, whose sums may be NaN.

    The request's `pick` is its first column, -1 without an adapter, and which of the matrices is its B.
    """
    ranks, dims = tl.arange(0, COLUMNS), tl.arange(0, DIM)
    matrix = (tl.load(pick + 1) * KV_HEADS + kv_head).to(tl.int64) * RANK
    b = tl.load(matrices + (matrix + ranks)[:, None] * DIM + dims[None, :], mask=(ranks < RANK)[:, None], other=0.0)
    sums = tl.where(tl.load(pick) >= 0, sums, 0.0)
    return tl.dot(sums.to(b.dtype), b, out)


@triton.jit
@no_type_check
def _attend_all(
    state: tl.tuple,
    begin: tl.tensor,
    clear: tl.tensor,
    full: tl.tensor,
    end: tl.tensor,
    q: tl.tensor,
    store: tl.tensor,
    low: tl.tensor,
    table: tl.tensor,
    column: tl.tensor,
    bound: tl.tensor,
    last: tl.tensor,
    first_key: tl.tensor,
    window: tl.tensor,
    kv_head: tl.tensor,
    WINDOWED: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Fold key blocks `clear .. full`, which every row sees in full, and then `full .. end`, which need a mask.

    If rows are WINDOWED, blocks `begin .. clear` come first, which also need one; otherwise `clear` is `begin`.
    """
    if WINDOWED:
        state = _attend(
            state,
            begin,
            clear,
            q,
            store,
            low,
            table,
            column,
            bound,
            last,
            first_key,
            window,
            kv_head,
            True,
            True,
            VALUES,
            SCALE,
            KV_HEADS,
            BLOCK,
            PAGE,
            DIM,
            RANK,
            COLUMNS,
            WIDTH,
        )
    state = _attend(
        state,
        clear,
        full,
        q,
        store,
        low,
        table,
        column,
        bound,
        last,
        first_key,
        window,
        kv_head,
        False,
        WINDOWED,
        VALUES,
        SCALE,
        KV_HEADS,
        BLOCK,
        PAGE,
        DIM,
        RANK,
        COLUMNS,
        WIDTH,
    )
    return _attend(
        state,
        full,
        end,
        q,
        store,
        low,
        table,
        column,
        bound,
        last,
        first_key,
        window,
        kv_head,
        True,
        WINDOWED,
        VALUES,
        SCALE,
        KV_HEADS,
        BLOCK,
        PAGE,
        DIM,
        RANK,
        COLUMNS,
        WIDTH,
    )


@triton.jit
@no_type_check
def attention(
    q: tl.tensor,
    store: tl.tensor,
    tables: tl.tensor,
    tiles: tl.tensor,
    positions: tl.tensor,
    max_pages: tl.tensor,
    low: tl.tensor,
    matrices: tl.tensor,
    picks: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    WINDOWED: tl.constexpr,
    VALUES: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    SHARE: tl.constexpr,
    PADDED_SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One tile of rows of one request, and `SHARE` query heads of one KV head; `lse` is in base 2.

    A line of `tiles` has 5 numbers, and 3 more if rows are WINDOWED. `low`, `matrices` and `picks` mean nothing unless
    adapters have a RANK.
    """
    # Late tiles have the most keys: they go first, so that the short ones fill the gaps at the end.
    tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * (8 if WINDOWED else 5)
    head = tl.program_id(1)
    first, end, request = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    last, full = tl.load(tile + 3), tl.load(tile + 4)
    if first >= end:
        return
    packed, dims = tl.arange(0, ROWS * PADDED_SHARE), tl.arange(0, DIM)
    row, member = first + packed // PADDED_SHARE, packed % PADDED_SHARE
    live = (row < end) & (member < SHARE)
    at = row * (HEADS * SHARE) + head * SHARE + member
    places = at.to(tl.int64)[:, None] * DIM + dims[None, :]
    queries = tl.load(q + places, mask=live[:, None], other=0.0)
    bound = tl.load(positions + row, mask=row < end, other=-1)
    state = (
        tl.zeros([ROWS * PADDED_SHARE, DIM], tl.float32),
        tl.full([ROWS * PADDED_SHARE], MASKED, tl.float32),
        tl.zeros([ROWS * PADDED_SHARE], tl.float32),
        tl.zeros([ROWS * PADDED_SHARE, COLUMNS if RANK else 1], tl.float32),
    )
    column = tl.maximum(tl.load(picks + request * 2), 0) if RANK else 0
    table, kv_head = tables + request * max_pages, head // (HEADS // KV_HEADS)
    blocks = (last + BLOCK) // BLOCK  # last is -1 for padding, which sees nothing
    begin, clear, first_key, window = 0, 0, 0, 0
    if WINDOWED:
        first_key, clear, window = tl.load(tile + 5), tl.load(tile + 6), tl.load(tile + 7)
        begin = first_key // BLOCK
        clear = tl.minimum(clear, blocks)
        full = tl.maximum(full, clear)
    acc, top, total, sums = _attend_all(
        state,
        begin,
        clear,
        full,
        blocks,
        queries,
        store,
        low,
        table,
        column,
        bound,
        last,
        first_key,
        window,
        kv_head,
        WINDOWED,
        VALUES,
        SCALE,
        KV_HEADS,
        BLOCK,
        PAGE,
        DIM,
        RANK,
        COLUMNS,
        WIDTH,
    )
    tl.store(lse + at, top + tl.log2(total), mask=live)
    if VALUES:
        seen = tl.maximum(total, 1e-37)[:, None]  # padding gets 0
        acc = acc / seen
        if RANK:
            acc = _add_expanded(acc, sums / seen, matrices, picks + request * 2, kv_head, KV_HEADS, DIM, RANK, COLUMNS)
        tl.store(out + places, acc.to(out.dtype.element_ty), mask=live[:, None])


@triton.jit
@no_type_check
def decode(
    q: tl.tensor,
    store: tl.tensor,
    tables: tl.tensor,
    parts: tl.tensor,
    max_pages: tl.tensor,
    low: tl.tensor,
    matrices: tl.tensor,
    picks: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    WINDOWED: tl.constexpr,
    SCALE: tl.constexpr,
    SHARE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One part of a row's keys, and `SHARE` query heads of one KV head; `lse` is in base 2."""
    head, number = tl.program_id(0), tl.program_id(1)
    part = parts + number * (6 if WINDOWED else 5)
    row, request, position = tl.load(part), tl.load(part + 1), tl.load(part + 2)
    begin, end = tl.load(part + 3), tl.load(part + 4)
    if begin >= end:
        return
    member, dims = tl.arange(0, 16), tl.arange(0, DIM)  # the fewest rows that a product can have
    live = member < SHARE
    at = (row * HEADS + head) * SHARE + member
    queries = tl.load(q + at[:, None] * DIM + dims[None, :], mask=live[:, None], other=0.0)
    bound = tl.zeros([16], tl.int32) + position
    state = (
        tl.zeros([16, DIM], tl.float32),
        tl.full([16], MASKED, tl.float32),
        tl.zeros([16], tl.float32),
        tl.zeros([16, COLUMNS if RANK else 1], tl.float32),
    )
    column = tl.maximum(tl.load(picks + request * 2), 0) if RANK else 0
    table, kv_head = tables + request * max_pages, head // (HEADS // KV_HEADS)
    clear, first_key = begin, 0
    if WINDOWED:
        first_key = tl.load(part + 5)
        clear = tl.maximum(tl.minimum((first_key + BLOCK - 1) // BLOCK, end), begin)
    full = tl.maximum(tl.minimum((position + 1) // BLOCK, end), clear)
    acc, top, total, sums = _attend_all(
        state,
        begin,
        clear,
        full,
        end,
        queries,
        store,
        low,
        table,
        column,
        bound,
        position,
        first_key,
        position - first_key + 1,
        kv_head,
        WINDOWED,
        True,
        SCALE,
        KV_HEADS,
        BLOCK,
        PAGE,
        DIM,
        RANK,
        COLUMNS,
        WIDTH,
    )
    to = (number * HEADS + head) * SHARE + member
    tl.store(lse + to, top + tl.log2(total), mask=live)
    places = out + to[:, None] * DIM + dims[None, :]
    acc = acc / total[:, None]
    if RANK:
        sums = sums / total[:, None]
        acc = _add_expanded(acc, sums, matrices, picks + request * 2, kv_head, KV_HEADS, DIM, RANK, COLUMNS)
    tl.store(places, acc, mask=live[:, None])


@triton.jit
@no_type_check
def merge(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    spans: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """Sum the parts of one row and query head in a fixed order, weighted by their share of the denominator."""
    row, head, dims = tl.program_id(0), tl.program_id(1), tl.arange(0, DIM)
    acc, top, total = tl.zeros([DIM], tl.float32), tl.full([], MASKED, tl.float32), tl.zeros([], tl.float32)
    end = tl.load(spans + row * 2 + 1)
    for first in tl.range(tl.load(spans + row * 2), end, STEP):
        part = first + tl.arange(0, STEP)
        at = part * HEADS + head
        own = tl.load(partial_lse + at, mask=part < end, other=float("-inf"))
        tile = tl.load(partial + at[:, None] * DIM + dims[None, :], mask=(part < end)[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(own, 0))
        decay, weights = tl.exp2(top - new_top), tl.exp2(own - new_top)
        acc = acc * decay + tl.sum(weights[:, None] * tile, 0)
        total = total * decay + tl.sum(weights, 0)
        top = new_top
    at = row * HEADS + head
    tl.store(lse + at, top + tl.log2(total))
    tl.store(out + at * DIM + dims, (acc / tl.maximum(total, 1e-37)).to(out.dtype.element_ty))  # padding gets 0
