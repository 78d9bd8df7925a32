"""The arguments of each operation as one record, which its public function builds and every implementation takes.

Records are pytrees. Their arrays may be traced; numbers of Python and `backend` are static.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from sparsex_kernels.backend import Backend
from sparsex_kernels.layout import (
    FLOAT8,
    Frequencies,
    KVRows,
    LowRankStore,
    PageTables,
    Queries,
    RowInts,
    Slots,
    Store,
    Window,
)
from sparsex_kernels.mailboxes import Mailboxes
from sparsex_kernels.product_parts import ProductParts
from sparsex_kernels.quantised import Mixed, Quantised

_STATIC: Any = {"static": True}

# Matrices of all layers, or of all groups of all layers. Implementations take no `Mixed`: operations take them apart.
Stack = Float[Array, "layers inputs _"] | Quantised
GroupStack = Float[Array, "layers groups inputs width"] | Quantised
Matrices = Stack | Mixed
Groups = GroupStack | Mixed


class LowRank(NamedTuple):
    """What adapters add to the values of their requests: key t has the value `V[t] + Y[t] @ B` (LRAgent's
    Flash-LoRA-Attention).

    `Y = X A` is stored once for all heads; B, with the adapter's scale in it, expands it to the values of each.

    Attributes:
      store: Y of all layers, on the pages of the KV store, in the dtype of the queries. An adapter has `rank` of the
        columns; adapters that have the same A may share them. What is in no column of a request's adapter, or in slots
        that no row sees, may hold anything, NaN too.
      matrices: B of each adapter. Finite.
      columns: the first column of each request's adapter, a multiple of the rank; -1 for requests without one, to which
        nothing is added.
      adapters: which of the matrices each request's B is; anything for requests without an adapter.
    """

    store: LowRankStore
    matrices: Float[Array, "layers adapters kv_heads rank head_dim"]
    columns: Int[Array, "requests"]
    adapters: Int[Array, "requests"]

    @property
    def rank(self) -> int:
        """Columns of one adapter."""
        return self.matrices.shape[3]

    def check(self, store: Store, query: Queries) -> None:
        """Raise `ValueError` where this does not belong to such a KV store and such queries."""
        layers, pages, _, kv_heads, page_size, head_dim = store.shape
        *slots, width = self.store.shape
        of_layers, adapters, *heads = self.matrices.shape
        if slots != [layers, pages, page_size]:
            raise ValueError(f"low_rank.store: layers, pages, page_size {slots}, not {[layers, pages, page_size]}")
        if self.store.dtype != query.dtype or self.store.dtype == FLOAT8:
            raise ValueError(f"low_rank.store of {self.store.dtype} under queries of {query.dtype}; they must agree")
        if not self.rank or width % self.rank:
            raise ValueError(f"low_rank.store has {width} columns, which is no multiple of the rank {self.rank}")
        if of_layers != layers or not adapters or heads != [kv_heads, self.rank, head_dim]:
            expected = f"[{layers}, at least 1, {kv_heads}, {self.rank}, {head_dim}]"
            raise ValueError(f"low_rank.matrices of shape {list(self.matrices.shape)}; it must be {expected}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionArgs:
    """Rows that attend to the keys of their requests.

    Attributes:
      query: one vector a row and query head, rotated; any float dtype. Query head h reads KV head
        `h // (q_heads / kv_heads)`.
      store: all layers' K and V, in the dtype of the queries or in float8 (e4m3). Every slot of a request from
        position 0 to that of its last row must have been written, the rows' own included (`write_kv`); slots behind it
        may hold anything, NaN too. With a `window`, so may slots before the first key that the request's first row
        sees.
      layer: which layer of the store.
      positions: each row's position in its request; -1 is padding. Rows are sorted by (request, position), with the
        padding last.
      requests: each row's line of `page_tables`.
      page_tables: the pages of each request in order; entries behind its last page are not read.
      scale: of the scores before the softmax.
      backend: where the operation runs; tile sizes follow it.
      window: how many keys a row sees at most, its own among them: a row at position p sees keys `p - window + 1 .. p`.
        At least 1. It is data, so layers of one loop may differ; the largest int32 is no limit. None: the program has
        no windows.
      low_rank: what adapters add to the values. None: the program knows of no adapters.
    """

    query: Queries
    store: Store
    layer: Int[Array, ""]
    positions: RowInts
    requests: RowInts
    page_tables: PageTables
    scale: float = dataclasses.field(metadata=_STATIC)
    backend: Backend = dataclasses.field(metadata=_STATIC)
    window: Window | None = None
    low_rank: LowRank | None = None

    @property
    def is_decode(self) -> bool:
        """Whether there are no more rows than requests. A tile of rows would then read every key for one of them."""
        return len(self.query) <= len(self.page_tables)

    @property
    def context(self) -> int:
        """Slots of a line of the page tables: the most keys that a request can have."""
        return self.page_tables.shape[1] * self.store.shape[4]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WriteLowRankArgs:
    """New Y of one layer, and the rows whose it is.

    Attributes:
      store: Y of all layers; donated by the caller's jit, so that it is updated in place.
      layer: which layer of the store.
      values: some columns of each row, rounded to the store's dtype.
      positions, requests, page_tables: as in `WriteArgs`.
      columns: the first column that each request's rows are written to; rows of requests with -1 are not written.
        None: `values` has all the store's columns.
      backend: where the operation runs.
    """

    store: LowRankStore
    layer: Int[Array, ""]
    values: Float[Array, "rows columns"]
    positions: RowInts
    requests: RowInts
    page_tables: PageTables
    columns: Int[Array, "requests"] | None
    backend: Backend = dataclasses.field(metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WriteArgs:
    """New K and V of one layer, and the rows whose they are.

    Attributes:
      store: all layers' K and V; donated by the caller's jit, so that it is updated in place.
      layer: which layer of the store.
      keys, values: one vector a row and KV head; keys are rotated. They are rounded to the store's dtype (`as_stored`).
      positions, requests, page_tables: as in `AttentionArgs`; no two rows share a slot, and padding writes nothing.
      backend: where the operation runs.
    """

    store: Store
    layer: Int[Array, ""]
    keys: KVRows
    values: KVRows
    positions: RowInts
    requests: RowInts
    page_tables: PageTables
    backend: Backend = dataclasses.field(metadata=_STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AddNormArgs:
    """A product, the residual that it is added to, and what normalises the sum.

    Attributes:
      product: is rounded to the dtype of the residual before it is added.
      residual: the rows.
      scales: of the norms of all layers. Of a wider dtype than the rows, it multiplies before they are rounded.
      layer: which of the scales.
      backend: where the operation runs.
      eps: added to the mean square.
      count: how many rows are wanted. Results of those behind are undefined and may be NaN. None: all.
      mailboxes: under `shard_map`, of the mesh, each of whose devices has parts of the product. Each device's parts are
        rounded before they are added up. None: the product is whole.
    """

    product: ProductParts
    residual: Float[Array, "rows width"]
    scales: Float[Array, "layers width"]
    layer: Int[Array, ""] | int
    backend: Backend = dataclasses.field(metadata=_STATIC)
    eps: float = dataclasses.field(metadata=_STATIC)
    count: Int[Array, ""] | int | None = None
    mailboxes: Mailboxes | None = None


class Heads(NamedTuple):
    """How many heads a row has of queries, and of keys and of values each, and the numbers of one."""

    queries: int
    keys: int
    dim: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RotateArgs:
    """The product that makes queries, keys and values of some rows, and where keys and values go.

    Attributes:
      product: all query heads, then all key heads, then all value heads. It is rounded to `dtype` before anything else
        is done.
      store: all layers' K and V; donated by the caller's jit, so that it is updated in place.
      layer: which layer of the store.
      positions, requests, page_tables: as in `WriteArgs`.
      inv_freq: rotary frequencies of this layer, radians a position; the rotation is done in float32.
      backend: where the operation runs.
      dtype: of the queries.
      count: how many rows are wanted; those behind are padding, and their queries undefined. None: all.
    """

    product: ProductParts
    store: Store
    layer: Int[Array, ""]
    positions: RowInts
    requests: RowInts
    page_tables: PageTables
    inv_freq: Float[Array, "half"]
    backend: Backend = dataclasses.field(metadata=_STATIC)
    dtype: Any = dataclasses.field(metadata=_STATIC)
    count: Int[Array, ""] | int | None = None

    @property
    def heads(self) -> Heads:
        """Those of keys are the store's, and those of queries what is left of the product."""
        keys, dim = self.store.shape[3], self.store.shape[5]
        return Heads(self.product.width // dim - 2 * keys, keys, dim)


class Patch(NamedTuple):
    """Where the first layers of tokens come from that take only the others from their source.

    Rows of the same depth that are next to each other should be in consecutive slots and have the same layer offset:
    kernels then move them together.

    Attributes:
      slots: where a token's patch rows are, one of each layer below its depth.
      layers: layer l of the token is in layer `l + layers` of that slot, so several short stacks of rows may share one.
      depth: how many layers of the token, from the first on, are patch rows. 0: none, whatever its other numbers are.
      shift: what keys of patch rows are rotated by. 0 copies them bit for bit.
    """

    slots: Slots
    layers: Slots
    depth: Slots
    shift: Slots


class Spans(NamedTuple):
    """Which layers each entry of a copy moves, and out of which layers of its source.

    Attributes:
      first, end: the first layer at the target, and the first behind those. An entry that moves none has the target -1.
      offset: the layer at the source minus that at the target.
      as_is: keys are copied bit for bit. A rotation by 0 would make a negative zero a positive one.
    """

    first: Slots
    end: Slots
    offset: Slots
    as_is: Bool[Array, "tokens"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CopyArgs:
    """Cached tokens to copy to other slots of the same store.

    Attributes:
      store: all layers' K and V, or their Y; donated by the caller's jit, so that it is updated in place.
      source, target: slots. No row (a slot in one layer) is both read and written, and none is written twice. Padding
        has the target -1. It stands at the end, unless there are `spans`.
      shift: a token's new position minus the position that its key was computed at.
      inv_freq: rotary frequencies in radians a position, the same for all layers or a line for each; the rotation is
        done in float32 and rounded to the store's dtype. A pair of frequency 0 is copied. None: no key is rotated.
      layers: the first layer to copy, and the first behind those.
      backend: where the operation runs.
      spans: None: all of `layers` move, each out of the same layer, and the program knows of nothing else.
    """

    store: Store | LowRankStore
    source: Slots
    target: Slots
    shift: Slots
    inv_freq: Frequencies | None
    layers: Int[Array, "2"]
    backend: Backend = dataclasses.field(metadata=_STATIC)
    spans: Spans | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Added:
    """What is added to a product `x @ W[layer]`: `own @ stack[layer]`, of few inputs for each of its rows, such as
    adapters (LoRA) have them.

    Attributes:
      inputs: in the dtype of x. Those of several products may be side by side.
      stack: matrices of the same layers as W, with its outputs. Finite where inputs are zeros: they should add nothing.
      begin: the first column of the product's own inputs.
    """

    inputs: Float[Array, "rows _"]
    stack: Float[Array, "layers ranks outputs"]
    begin: int = dataclasses.field(default=0, metadata=_STATIC)

    @property
    def ranks(self) -> int:
        """How many inputs the product has."""
        return self.stack.shape[1]

    @property
    def own(self) -> Float[Array, "rows ranks"]:
        """The product's inputs."""
        return jax.lax.slice_in_dim(self.inputs, self.begin, self.begin + self.ranks, axis=1)

    def of_layer(self, layer: Int[Array, ""] | int) -> "Added":
        """With a stack of this layer alone: a copy."""
        return dataclasses.replace(self, stack=jax.lax.dynamic_index_in_dim(self.stack, layer))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearArgs:
    """Rows, and weights of all layers to multiply them with.

    Attributes:
      inputs: the rows.
      weights: stacks of matrices with the same number of inputs.
      layer: which matrix of each stack.
      count: how many rows are wanted. Results of those behind are undefined and may be NaN. None: all.
      backend: where the operation runs.
      activation: of a gate.
      added: to the product with each of the weights, or None for those to which nothing is. Empty: the program adds
        nothing.
    """

    inputs: Float[Array, "rows inputs"]
    weights: tuple[Stack, ...]
    layer: Int[Array, ""] | int
    count: Int[Array, ""] | int | None
    backend: Backend = dataclasses.field(metadata=_STATIC)
    activation: str = dataclasses.field(default="silu", metadata=_STATIC)
    added: tuple[Added | None, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each weight."""
        return tuple(weight.shape[2] for weight in self.weights)

    @property
    def arrays(self) -> tuple[Float[Array, "layers inputs _"], ...]:
        """The weights, where none is quantised; else raises NotImplementedError."""
        return _arrays(self.weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedArgs:
    """Tiles of rows, and weights of all layers and groups to multiply them with.

    Attributes:
      inputs: the tiles one behind the other, all with the same number of rows.
      weights: stacks of matrices of the same shape: one, or a gate and what it gates.
      layer: which layer of the stacks.
      groups: each tile's group, rising. Tiles that are not used have -1 and stand at the end.
      backend: where the operation runs.
    """

    inputs: Float[Array, "rows inputs"]
    weights: tuple[GroupStack, ...]
    layer: Int[Array, ""] | int
    groups: Int[Array, "tiles"]
    backend: Backend = dataclasses.field(metadata=_STATIC)

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return len(self.inputs) // len(self.groups)

    @property
    def used(self) -> Int[Array, ""]:
        """How many tiles are used."""
        return (self.groups >= 0).sum(dtype=jnp.int32)

    @property
    def width(self) -> int:
        """Columns of each matrix."""
        return self.weights[0].shape[3]

    @property
    def matrices(self) -> tuple[Float[Array, "matrices inputs width"], ...]:
        """The stacks of arrays with layers and groups as one axis. No copy.

        Raises:
          NotImplementedError: weights are quantised.
        """
        return tuple(weight.reshape(-1, *weight.shape[2:]) for weight in self.arrays)

    @property
    def arrays(self) -> tuple[Float[Array, "layers groups inputs width"], ...]:
        """The weights, where none is quantised; else raises NotImplementedError."""
        return _arrays(self.weights)

    @property
    def matrix_of_tile(self) -> Int[Array, "tiles"]:
        """Which of `matrices` each tile takes; any for tiles that are not used."""
        return jnp.asarray(self.layer, jnp.int32) * self.weights[0].shape[1] + jnp.maximum(self.groups, 0)


def _arrays(weights: tuple[Any, ...]) -> tuple[Array, ...]:
    kinds = [weight.kind for weight in weights if isinstance(weight, Quantised)]
    if kinds:
        raise NotImplementedError(f"weights in {kinds[0]}")
    return weights
