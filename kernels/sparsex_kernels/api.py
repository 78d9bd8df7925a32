"""All operations under one name: `from sparsex_kernels import api`, then `api.paged_attention(...)`."""

from sparsex_kernels.add_norm import add_norm
from sparsex_kernels.align_and_copy import align_and_copy, pack_rows
from sparsex_kernels.arguments import Added, LowRank, Patch
from sparsex_kernels.copy_low_rank import copy_low_rank, pack_low_rank
from sparsex_kernels.grouped_linear import gated_grouped_linear, grouped_linear
from sparsex_kernels.key_mass import key_mass
from sparsex_kernels.linear import gated_linear, linear, linear_parts
from sparsex_kernels.paged_attention import paged_attention
from sparsex_kernels.rope import apply_rope
from sparsex_kernels.rotate_and_write import rotate_and_write
from sparsex_kernels.write_kv import write_kv
from sparsex_kernels.write_low_rank import write_low_rank

__all__ = [
    "Added",
    "LowRank",
    "Patch",
    "add_norm",
    "align_and_copy",
    "apply_rope",
    "copy_low_rank",
    "gated_grouped_linear",
    "gated_linear",
    "grouped_linear",
    "key_mass",
    "linear",
    "linear_parts",
    "pack_low_rank",
    "pack_rows",
    "paged_attention",
    "rotate_and_write",
    "write_kv",
    "write_low_rank",
]
