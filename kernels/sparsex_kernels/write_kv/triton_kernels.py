"""The Triton kernel of KV writes; imported when it is launched, as it needs Triton."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def write(
    keys: tl.tensor,
    values: tl.tensor,
    pages: tl.tensor,
    offsets: tl.tensor,
    store: tl.tensor,
    rows: tl.tensor,
    TILE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """Put a tile of rows' K and V of one head at its slots; those of page -1 write nothing."""
    row, head = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1)
    page = tl.load(pages + row, mask=row < rows, other=-1)
    offset = tl.load(offsets + row, mask=row < rows, other=0)
    live, dims = (page >= 0)[:, None], tl.arange(0, DIM)[None, :]
    read = (row * KV_HEADS + head).to(tl.int64)[:, None] * DIM + dims
    slot = (page.to(tl.int64) * (2 * KV_HEADS) + head) * PAGE + offset
    to = store + slot[:, None] * DIM + dims
    tl.store(to, tl.load(keys + read, mask=live), mask=live)
    tl.store(to + KV_HEADS * PAGE * DIM, tl.load(values + read, mask=live), mask=live)
