"""Where rows stand that are to be multiplied by groups: tiles of equal size, each with rows of one group."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

SMALLEST, LARGEST = 8, 128  # rows of a tile
_FEW = 1024  # up to this number of members, comparing all pairs is faster than sorting


class Tiles(NamedTuple):
    """Members of groups, laid out in tiles. Two groups with members 0 2 5 and 3, in tiles of two:

    members   0 2 | 5 . | 3 .
    groups      0     0     1

    Attributes:
      members: what stands at each place; 0 where nothing does.
      groups: each tile's group, rising; -1 for tiles that are not used, which stand at the end.
      places: where each member stands; -1 for members of no group.
    """

    members: Int[Array, "tiles*rows"]
    groups: Int[Array, "tiles"]
    places: Int[Array, "members"]


def rows_a_tile(members: int, groups: int) -> int:
    """A power of two about as large as a group is on average: smaller tiles read weights more often, larger ones
    multiply rows that are not there.

    >>> rows_a_tile(64, 128), rows_a_tile(3000, 128), rows_a_tile(65536, 128)
    (8, 32, 128)
    """
    average = -(-members // groups)
    return min(max(1 << (average - 1).bit_length(), SMALLEST), LARGEST)


def make_tiles(group: Int[Array, "members"], groups: int, rows: int) -> Tiles:
    """Tiles that hold the members of these groups. A member whose group is not from 0 to `groups` - 1 has none.

    The number of tiles is the largest that these members can need.
    """
    members = len(group)
    tiles = (members + min(groups, members) * (rows - 1)) // rows
    group = jnp.where((group >= 0) & (group < groups), group, groups)  # those of no group are behind the last
    sizes = (group[:, None] == jnp.arange(groups + 1)).sum(0, dtype=jnp.int32)
    in_tiles = -(-sizes[:groups] // rows)
    ends = jnp.cumsum(in_tiles)
    first = jnp.append(ends - in_tiles, 0)
    places = jnp.where(group < groups, first[group] * rows + _ranks(group, sizes), -1)
    standing = jnp.where(places >= 0, places, tiles * rows)
    of_tile = jnp.searchsorted(ends, jnp.arange(tiles), side="right", method="compare_all").astype(jnp.int32)
    return Tiles(
        members=jnp.zeros(tiles * rows, jnp.int32).at[standing].set(jnp.arange(members, dtype=jnp.int32), mode="drop"),
        groups=jnp.where(of_tile < groups, of_tile, -1),
        places=places,
    )


def _ranks(group: Int[Array, "members"], sizes: Int[Array, "_"]) -> Int[Array, "members"]:
    """How many earlier members each has in its group."""
    numbers = jnp.arange(len(group), dtype=jnp.int32)
    if len(group) <= _FEW:
        return ((group == group[:, None]) & (numbers < numbers[:, None])).sum(1, dtype=jnp.int32)
    order = jnp.argsort(group, stable=True)
    begins = jnp.cumsum(sizes) - sizes
    return jnp.zeros_like(numbers).at[order].set(numbers - begins[group[order]])
