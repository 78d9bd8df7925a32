"""Operations on a paged KV store, each with a plain reference and its versions for several devices side by side.

Usable without the serving system:

    from sparsex_kernels import api

    out = api.paged_attention(query, store, layer, positions, requests, page_tables)

or, one at a time, `from sparsex_kernels.paged_attention import paged_attention`: an operation has the name of the
module that holds it, and its implementations are that module's submodules.

The store is one array of all layers,

    store: [layers, pages, 2, kv_heads, page_size, head_dim]      (index 0 of axis 2 is K, 1 is V)

so that the K or V of one head in one page is a contiguous `[page_size, head_dim]` tile. A *slot* is a token's place in
it: `page * page_size + offset`. A *row* is a token that is being computed: it has a position in its request and the
index of that request, whose pages are a line of `page_tables`. Rows may be any subset of a request's tokens, in any
number of requests; a row of position -1 is padding. For example, with pages of 4 slots,

    page_tables = [[7, 2], [5, 0]]
    positions   = [1, 5, 2, -1]
    requests    = [0, 0, 1,  0]

are tokens 1 and 5 of request 0, at slots 7 * 4 + 1 and 2 * 4 + 1, token 2 of request 1 at slot 5 * 4 + 2, and padding.
"""
