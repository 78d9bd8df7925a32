"""Operations on a paged KV store, each with a plain reference and its platform versions side by side.

Usable without the serving system. The store is one array of all layers,

    store: [layers, pages, 2, kv_heads, page_size, head_dim]      (index 0 of axis 2 is K, 1 is V)

so that the K or V of one head in one page is a contiguous `[page_size, head_dim]` tile. A *slot* is a token's
place in it: `page * page_size + offset`. A *row* is a token that is being computed: it has a position in its
request and the index of that request, whose pages are a line of `page_tables`. Rows may be any subset of a
request's tokens, in any number of requests; a row of position -1 is padding.
"""

from sparsex_kernels.align_and_copy import align_and_copy
from sparsex_kernels.key_mass import key_mass
from sparsex_kernels.linear import gated_linear, linear
from sparsex_kernels.paged_attention import paged_attention
from sparsex_kernels.rope import apply_rope
from sparsex_kernels.write_kv import write_kv

__all__ = ["align_and_copy", "apply_rope", "gated_linear", "key_mass", "linear", "paged_attention", "write_kv"]
