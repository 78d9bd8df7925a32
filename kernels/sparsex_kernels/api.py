"""All operations under one name: `from sparsex_kernels import api`, then `api.paged_attention(...)`."""

from sparsex_kernels.align_and_copy import align_and_copy, pack_rows
from sparsex_kernels.arguments import Patch
from sparsex_kernels.grouped_linear import gated_grouped_linear, grouped_linear
from sparsex_kernels.key_mass import key_mass
from sparsex_kernels.linear import gated_linear, linear
from sparsex_kernels.paged_attention import paged_attention
from sparsex_kernels.rope import apply_rope
from sparsex_kernels.write_kv import write_kv

__all__ = [
    "Patch",
    "align_and_copy",
    "apply_rope",
    "gated_grouped_linear",
    "gated_linear",
    "grouped_linear",
    "key_mass",
    "linear",
    "pack_rows",
    "paged_attention",
    "write_kv",
]
