"""Host arrays in one buffer: what comes out on the devices is what went in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparsex_jax.device.packed import packed

DTYPES = st.sampled_from([np.int32, np.uint32, np.float32, np.bool_])
ARRAYS = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=5)))
TREES = st.recursive(
    ARRAYS | st.none(), lambda inner: st.tuples(inner, inner) | st.lists(inner, max_size=3), max_leaves=8
)


@settings(max_examples=40)
@given(TREES)
def test_a_tree_comes_out_as_it_went_in(tree):
    """Bit for bit, NaNs included. Packed arrays make no copies that are padded to more than a word."""
    laid_out = packed(tree)
    with jax.disable_jit():
        back = laid_out.tree()
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert (one.shape, one.dtype) == (np.shape(other), other.dtype)
        assert np.asarray(one).tobytes() == other.tobytes()
    bytes_of_all = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert bytes_of_all <= laid_out.words.nbytes <= bytes_of_all + 3 * len(jax.tree.leaves(tree))


def test_trees_of_the_same_shapes_run_the_same_program():
    run = jax.jit(lambda laid_out: laid_out.tree()["a"] + laid_out.tree()["b"].sum())
    for fill in (1, 2):
        tree = {"a": np.full((2, 3), fill, np.int32), "b": np.full(5, True)}
        np.testing.assert_array_equal(run(packed(tree)), np.full((2, 3), fill + 5))
    assert run._cache_size() == 1


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.uint8])
def test_numbers_of_other_sizes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"an array of {np.dtype(dtype)} cannot be packed; numbers must have 4 bytes"):
        packed((jnp.zeros(2), np.zeros(3, dtype)))
