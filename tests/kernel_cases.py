"""Cases for the kernels, and dense references: what their tests share, in the interpreters and on a GPU.

Every slot that no row may see holds NaN. References are computed in float32 from the same rounded inputs.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np

import sparsex_kernels.api as kernels
from sparsex_kernels.product_parts import ProductParts


@functools.cache  # a `jax.jit` of its own for every case would compile each again
def jitted(operation):
    """Compiled as a whole: step by step, each step would be a program."""
    known = {"implementation", "power", "return_lse"} & inspect.signature(operation).parameters.keys()
    return jax.jit(operation, static_argnames=known)


def scattered(
    lengths,
    rows,
    *,
    live=None,
    kv_heads=2,
    group=4,
    dim=64,
    page_size=64,
    layers=2,
    dtype="bfloat16",
    stored=None,
    seed=0,
):
    """Queries, store and addresses of `rows` rows, spread over requests of these lengths, padding behind.

    The store has the dtype of the queries, or `stored`. Of the rows, `live` are not padding, and the first of them is
    at position 0; without `live`, nearly all.
    """
    rng = np.random.default_rng(seed)
    max_pages = -(-max(lengths) // page_size)
    pages = len(lengths) * max_pages + 3
    tables = rng.permutation(pages)[: len(lengths) * max_pages].reshape(len(lengths), max_pages).astype(np.int32)
    store = np.full((layers, pages, 2, kv_heads, page_size, dim), np.nan, np.float32)
    for request, length in enumerate(lengths):
        for begin in range(0, length, page_size):
            used = min(page_size, length - begin)
            shape = (layers, 2, kv_heads, used, dim)
            store[:, tables[request, begin // page_size], :, :, :used] = rng.normal(size=shape)
    tokens = [(request, position) for request, length in enumerate(lengths) for position in range(length)]
    used = min(live or rows - rows // 16, len(tokens))
    chosen = np.array(tokens)[np.sort(rng.permutation(len(tokens))[:used])]
    if live:
        chosen[0] = 0
    requests, positions = np.zeros(rows, np.int32), np.full(rows, -1, np.int32)
    requests[:used], positions[:used] = chosen.T
    q = jnp.asarray(rng.normal(size=(rows, kv_heads * group, dim)), dtype)
    arrays = (jnp.asarray(x) for x in (positions, requests, tables))
    return q, jnp.asarray(store, stored or dtype), jnp.int32(layers - 1), *arrays


def with_adapters(case, rank, *, used=None, adapters=3, seed=0):
    """Low-rank parts of the values of a case's requests, which have adapters 0, 1, none, 2 and so on.

    Y is there where K and V are, and only in the columns of the request's adapter; all else holds NaN. Of an adapter's
    columns, those behind `used` are 0.
    """
    q, store, _, _, _, tables = case
    rng, (layers, pages, _, kv_heads, page_size, dim) = np.random.default_rng(seed), store.shape
    number = np.array([[0, 1, -1, 2][request % 4] for request in range(len(tables))])
    low = np.full((layers, pages, page_size, adapters * rank), np.nan, np.float32)
    written = np.isfinite(np.asarray(store[:, :, 0, 0, :, 0], np.float32))
    for request, pages_of in enumerate(np.asarray(tables)):
        if number[request] >= 0:
            new = rng.normal(size=(layers, len(pages_of), page_size, rank)) * (np.arange(rank) < (used or rank))
            own = slice(number[request] * rank, (number[request] + 1) * rank)
            low[:, pages_of, :, own] = np.where(written[:, pages_of, :, None], new, np.nan)
    matrices = rng.normal(size=(layers, adapters, kv_heads, rank, dim)) * (used or rank) ** -0.5
    of_request = (jnp.asarray(x, jnp.int32) for x in (np.where(number < 0, -1, number * rank), number))
    return kernels.LowRank(jnp.asarray(low, q.dtype), jnp.asarray(matrices, q.dtype), *of_request)


def over_whole_values(case, low_rank):
    """The case in float32 with V + Y B in place of V."""
    q, store, layer, positions, requests, tables = in_float32(case)
    store, (low, matrices) = np.array(store), (np.asarray(x, np.float64) for x in (low_rank.store, low_rank.matrices))
    rank = low_rank.rank
    for pages, column, adapter in zip(*map(np.asarray, (tables, low_rank.columns, low_rank.adapters)), strict=True):
        for at in range(len(store) if column >= 0 else 0):
            own = low[at, pages][..., column : column + rank]
            store[at, pages, 1] += np.einsum("ptk,hkd->phtd", own, matrices[at, adapter])
    return q, jnp.asarray(store), layer, positions, requests, tables


def late_rows(case):
    """The case without the first half of its rows, so that windows may hide keys from all rows of a request."""
    q, store, layer, positions, requests, tables = case
    half = int((positions >= 0).sum()) // 2
    return (
        q,
        store,
        layer,
        *(jnp.roll(x.at[:half].set(fill), -half) for x, fill in ((positions, -1), (requests, 0))),
        tables,
    )


def behind_windows(case, window):
    """The case with NaN in all slots that the window hides from every row."""
    q, store, layer, positions, requests, tables = case
    page_size = store.shape[4]
    for request, pages in enumerate(tables):
        own = positions[(requests == request) & (positions >= 0)]
        hidden = np.arange(max(int(own.min()) - window + 1, 0) if own.size else 0)
        store = store.at[:, pages[hidden // page_size], :, :, hidden % page_size].set(jnp.nan)
    return q, store, layer, positions, requests, tables


def in_float32(case):
    return *(x.astype(jnp.float32) for x in case[:2]), *case[2:]


def relative_error(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def last_rows(lengths, **options):
    """One row a request, at its last token; the second request has none."""
    q, store, layer, _, _, tables = scattered(lengths, len(lengths), **options)
    positions = jnp.asarray(lengths, jnp.int32).at[1].set(0) - 1
    return q, store, layer, positions, jnp.arange(len(lengths)), tables


def stacks(rows, inputs, widths, dtype="bfloat16"):
    """Rows, and weights of three layers."""
    rng = np.random.default_rng(rows)
    x, *weights = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in [(rows, inputs), *((3, inputs, w) for w in widths)]
    )
    return x, tuple(weights)


def gated_stacks(rows, inputs, width, dtype="bfloat16"):
    """Rows, gate and up; products are about 1, where SiLU is neither 0 nor the identity."""
    x, weights = stacks(rows, inputs, (width, width), dtype)
    return x, *(weight * inputs**-0.5 for weight in weights)


def exact(x, weights, layer):
    return [np.asarray(x, np.float64) @ np.asarray(weight[layer], np.float64) for weight in weights]


def exact_gated(x, gate, up, layer):
    gates, ups = exact(x, (gate, up), layer)
    return gates / (1 + np.exp(-gates)) * ups


def with_added(rows, widths, ranks, dtype="bfloat16", own=16):
    """What is added to products of these widths, about 1, each of this rank, inputs side by side; None for rank 0.

    A row has `own` inputs that are not zero, as one of an adapter among others, and every third row has none.
    """
    rng = np.random.default_rng(rows + 1)
    stacks, narrow = [], []
    for width, rank in zip(widths, ranks, strict=True):
        slots = rng.integers(0, max(rank // own, 1), rows)[:, None]
        mine = (np.arange(rank) // own == slots) & (np.arange(rows) % 3 > 0)[:, None]
        inputs, stack = rng.normal(size=(rows, rank)), rng.normal(size=(3, rank, width)) * own**-0.5
        stacks.append(jnp.asarray(stack, dtype))
        narrow.append(np.where(mine, inputs, 0))
    together, begins = jnp.asarray(np.concatenate(narrow, axis=1), dtype), np.cumsum([0, *ranks]).tolist()
    each = zip(stacks, ranks, begins, strict=False)
    return [kernels.Added(together, stack, begin) if rank else None for stack, rank, begin in each]


def exact_sums(x, weights, added, layer):
    """Products with what is added to them."""
    parts = [0 if each is None else exact(each.own, [each.stack], layer)[0] for each in added]
    return [product + part for product, part in zip(exact(x, weights, layer), parts, strict=True)]


def residuals(rows, width, parts, dtype="bfloat16", scaled="bfloat16"):
    """A product in parts, the residual, and scales of three layers."""
    rng = np.random.default_rng(rows)
    summed = dtype if parts == 1 else "float32"
    shapes = ((parts, rows, width), summed), ((rows, width), dtype), ((3, width), scaled)
    product, *others = (jnp.asarray(rng.normal(size=shape), kind) for shape, kind in shapes)
    return ProductParts(product), *others


def cut_to(used, product):
    """With this number of parts; the others are NaN."""
    parts, _ = product
    unused = jnp.arange(len(parts))[:, None, None] >= used
    return ProductParts(jnp.where(unused, jnp.nan, parts), jnp.int32(used))


def exact_add_norm(product, residual, scales, layer, eps):
    """The sum, and its norm, of the product and the sum as they are rounded."""
    parts, used = product
    whole = np.asarray(parts, np.float64)[: None if used is None else int(used)].sum(0)
    rounded = jnp.asarray(whole, residual.dtype)
    hidden = np.asarray(residual, np.float64) + np.asarray(rounded, np.float64)
    wide = np.asarray(jnp.asarray(hidden, residual.dtype), np.float64)
    return hidden, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * np.asarray(scales[layer], np.float64)


def products_to_write(parts, case, dtype="bfloat16"):
    """Parts of the product that makes queries, keys and values of a case's rows; and rotary frequencies."""
    q, store, *_ = case
    width = (q.shape[1] + 2 * store.shape[3]) * q.shape[2]
    new = np.random.default_rng(parts).normal(size=(parts, len(q), width))
    product = ProductParts(jnp.asarray(new, dtype if parts == 1 else "float32"))
    return product, 10000.0 ** -jnp.linspace(0, 1, q.shape[2] // 2)


def same(a, b):
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32), equal_nan=True)


def copies(runs):
    """Addresses of runs of `(source, target, length, shift)`; the last two tokens are padding."""
    source, target, shift = (
        np.concatenate([first + step * np.arange(length) for first, step, length in column])
        for column in (
            [(source, 1, length) for source, _, length, _ in runs],
            [(target, 1, length) for _, target, length, _ in runs],
            [(by, 0, length) for _, _, length, by in runs],
        )
    )
    target[-2:] = -1
    return tuple(jnp.asarray(x, jnp.int32) for x in (source, target, shift))


@jax.jit
def dense_head(q, keys, values, positions, scale):
    seen = jnp.arange(len(keys)) <= positions[:, None]
    scores = jnp.where(seen, jnp.dot(q, keys.T, precision="highest") * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.dot(weights, values, precision="highest"), jax.nn.logsumexp(scores, axis=-1), weights.sum(0)


def dense(case, scale):
    """Outputs, log-sum-exps and key mass in float32, head by head."""
    q, store, layer, positions, requests, tables = (np.asarray(x) for x in in_float32(case))
    outs, lses = np.zeros(q.shape, np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    mass = np.zeros((len(tables), tables.shape[1] * store.shape[4]))
    for request, pages in enumerate(tables):
        rows = np.flatnonzero((requests == request) & (positions >= 0))
        for head in range(q.shape[1] if len(rows) else 0):
            kv = store[layer, pages, :, head // (q.shape[1] // store.shape[3])].swapaxes(0, 1)
            keys, values = np.nan_to_num(kv.reshape(2, -1, kv.shape[-1]))
            outs[rows, head], lses[rows, head], sums = dense_head(q[rows, head], keys, values, positions[rows], scale)
            mass[request] += sums
    return outs, lses, mass


def check_nan_stays(case, implementation):
    """NaN in a page of the third request reaches its rows and no others."""
    q, store, _, positions, requests, tables = case
    attend = jax.jit(lambda *args: kernels.paged_attention(*args, implementation=implementation))
    out = attend(*case)
    poisoned = np.asarray(attend(q, store.at[:, tables[2, 0]].set(jnp.nan), *case[2:]))
    others = np.asarray((requests != 2) | (positions < 0))
    np.testing.assert_array_equal(poisoned[others], np.asarray(out)[others])
    assert np.isnan(poisoned[~others]).any(axis=(1, 2)).all()


def check_moved(moved, expected):
    """Stores of float8 whose keys were rotated: a cosine with another last bit may round a number to the next."""
    moved, expected = (np.asarray(x, np.float32) for x in (moved, expected))
    np.testing.assert_array_equal(moved[:, :, 1], expected[:, :, 1])
    np.testing.assert_allclose(moved, expected, rtol=0.13, atol=2**-8)  # neighbours are 1/8 apart at most
    assert (np.nan_to_num(moved) != np.nan_to_num(expected)).mean() < 2e-3


def by_slot(store):
    """A store's rows in an array `[layers, slots, 2, kv_heads, head_dim]`."""
    rows = np.asarray(store).transpose(0, 1, 4, 2, 3, 5)
    return rows.reshape(len(rows), -1, *rows.shape[3:])


def paged(rows, page_size, dtype):
    """The store of such an array, with empty slots (NaN) up to the end of the last page."""
    missing = -rows.shape[1] % page_size
    rows = np.pad(rows.astype(np.float32), [(0, 0), (0, missing), *[(0, 0)] * 3], constant_values=np.nan)
    pages = rows.reshape(len(rows), -1, page_size, *rows.shape[2:])
    return jnp.asarray(pages.transpose(0, 1, 3, 4, 2, 5), dtype)


def bits(store):
    """The rows of `by_slot` as unsigned integers; all NaN are one number."""
    canonical = jnp.where(jnp.isnan(store), jnp.asarray(jnp.nan, store.dtype), store)
    return by_slot(canonical).view(f"u{store.dtype.itemsize}")


def restored(dtype, *, layers=4, kv_heads=2, dim=64, page_size=64, runs=1, seed=0):
    """A store, copies of runs of 72 tokens and of one of 4, and their patch; NaN wherever nothing is to be read.

    In each run, 32 tokens are patched in all layers, and 12 in one or two layers, two of them in one slot. Every second
    of these 12 is rotated. Two tokens are padding. Where a token has no patch rows, its other numbers mean nothing.
    """
    rng = np.random.default_rng(seed)
    begins, free = 80 * np.arange(runs), 80 * runs
    long = [(11 + begin, 2 * free + 5 + begin, 72, 700 * n - 300) for n, begin in enumerate(begins)]
    moves = copies([*long, (3, 2 * free, 4, 0)])
    source, target, _ = map(np.asarray, moves)
    slots, offsets = np.full(len(source), -1), np.full(len(source), 99)
    depth, by = np.zeros(len(source), int), np.full(len(source), 7)
    for n, begin in enumerate(begins):
        deep, few = 72 * n + 13 + np.arange(32), 72 * n + 50 + np.arange(12)
        slots[deep], offsets[deep], depth[deep], by[deep] = free + begin + np.arange(32), 0, layers, 0
        slots[few], offsets[few] = free + begin + 40 + np.arange(12) // 2, np.arange(12) % 2 * 2
        depth[few], by[few] = 1 + np.arange(12) // 6, np.arange(12) % 2 * 50
    rows = np.full((layers, 3 * free + 5, 2, kv_heads, dim), np.nan)
    for token in np.flatnonzero(target >= 0):
        new, own = rng.normal(size=(layers, 2, kv_heads, dim)), depth[token]
        rows[own:, source[token]] = new[own:]
        rows[offsets[token] : offsets[token] + own, slots[token]] = new[:own]
    rows[0, slots[13]] = -0.0  # a rotation by 0 would make it a positive one
    patch = kernels.Patch(*(jnp.asarray(x, jnp.int32) for x in (slots, offsets, depth, by)))
    return paged(rows, page_size, dtype), moves, patch


def check_restored(align, store, moves, inv_freq, layers, patch):
    """Restored tokens, put together out of copies that `align` makes without a patch. No bit may differ.

    Args:
      align: `align_and_copy` of one implementation.
      layers: the first to copy, and the first behind those.
    """
    (source, target, shift), (slots, offsets, depth, by) = (map(np.asarray, x) for x in (moves, patch))
    rows, live = by_slot(store), np.flatnonzero(target >= 0)
    # Patch rows lie in their own layers in slots behind the store's, and are rotated into as many behind those.
    flat, turned = rows.shape[1] + np.arange(2 * len(source)).reshape(2, -1)
    rows = np.pad(rows.astype(np.float32), [(0, 0), (0, 2 * len(source)), *[(0, 0)] * 3], constant_values=np.nan)
    for token in live:
        own = np.arange(depth[token])
        rows[own, flat[token]] = rows[own + offsets[token], slots[token]]
    lists = (np.r_[source, flat], np.r_[target, turned], np.r_[shift, by])
    apart = paged(rows, store.shape[4], store.dtype)
    apart = bits(align(apart, *(jnp.asarray(x, jnp.int32) for x in lists), inv_freq, jnp.array([0, len(store)])))
    expected = bits(store).copy()
    for token in live:
        for layer in range(*layers):
            patched = turned[token] if by[token] else flat[token]
            expected[layer, target[token]] = apart[layer, patched if layer < depth[token] else target[token]]
    moved = align(store, *moves, inv_freq, jnp.array(layers), patch)
    np.testing.assert_array_equal(bits(moved), expected)


def check_packed(pack, store, moves, patch):
    """Rows that are packed lie where the patch says, bit for bit, and nothing else has changed."""
    source, (slots, offsets, depth, _) = np.asarray(moves[0]), map(np.asarray, patch)
    rows = np.random.default_rng(1).normal(size=by_slot(store).shape)
    full = paged(rows, store.shape[4], store.dtype)
    expected = bits(full).copy()
    for token in np.flatnonzero(depth > 0):
        own = np.arange(depth[token])
        expected[own + offsets[token], slots[token]] = expected[own, source[token]]
    packed = pack(full, moves[0], *patch[:3])
    np.testing.assert_array_equal(bits(packed), expected)
