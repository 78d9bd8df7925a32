"""The kernels as the model calls them: bound to a mesh, each device working on the KV heads it holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from sparsex_jax.model.experts import ExpertStacks, Routing, run_experts
from sparsex_jax.model.low_rank import Adapting, LowRank, ValuesApart, narrow_products
from sparsex_jax.model.sharding import SPARED, TENSOR_AXIS
from sparsex_jax.model.sharding import spec as spec_of
from sparsex_jax.model.store import STORE_AXES, AnyStore, SharedStore, kv_of
from sparsex_jax.reuse.adapters import NO_SLOT
from sparsex_jax.reuse.plan import ROW_MULTIPLES, Copies, PackedRows, Rows
from sparsex_kernels import api as kernels
from sparsex_kernels.add_norm import adds_devices
from sparsex_kernels.arguments import Heads, Matrices
from sparsex_kernels.backend import Backend
from sparsex_kernels.layout import Frequencies, LowRankStore, PageTables, Power, Queries, Store, Window, read_kv
from sparsex_kernels.mailboxes import Mailboxes, reach_one_another
from sparsex_kernels.product_parts import FEW_ROWS, ProductParts, one_part
from sparsex_kernels.rotate_and_write import is_one_kernel

_STORE = spec_of(STORE_AXES)
_HEADS = PartitionSpec(None, TENSOR_AXIS, None)  # [rows, heads, head_dim]
_EXPERTS = PartitionSpec(None, TENSOR_AXIS, None, None)  # [layers, experts, ...]
_INPUTS = PartitionSpec(None, TENSOR_AXIS, None)  # [layers, inputs, outputs]
_OUTPUTS = PartitionSpec(None, None, TENSOR_AXIS)
_ALL = PartitionSpec()
_PARTS = PartitionSpec(TENSOR_AXIS)  # [devices, rows, width]
_EACH_HAS_PARTS: Any = ProductParts(_PARTS, _ALL)  # type: ignore
_BY_OUTPUTS, _BY_INPUTS = Adapting(_ALL, _OUTPUTS, _ALL, _ALL), Adapting(_INPUTS, _ALL, _ALL, _ALL)  # type: ignore
# Of `LowRank`: Y is whole on each device, and matrices, [layers, adapters, kv_heads, rank, head_dim], are divided.
_LOW_RANK: Any = _ALL, PartitionSpec(None, None, TENSOR_AXIS, None, None), _ALL, _ALL


# Of up to how many rows a mesh's sums are waited for, if they go by mailboxes. Other rows go through layers in halves,
# whose sums are hidden. But each half has a last round of programs of its own, in which multiprocessors idle: with 1319
# rows of an 8B model, a layer takes two GPUs 777 us in halves, and 688 if the rows are whole.
WHOLE_ROWS = 1536
# Up to how many rows a device sends for a sum by mailboxes, to all others together. Collectives send fewer.
SENT_ROWS = 3072

DeviceParts = Float[Array, "devices rows width"]  # of sums over a mesh, each device's own


class PartsToExchange(NamedTuple):
    """A product over inputs that a mesh divides, for `add_norm` to sum over the mesh.

    Attributes:
      product: the parts of all devices, each device's own on it.
      mailboxes: by which they are exchanged.
    """

    product: ProductParts
    mailboxes: Mailboxes


def _rank_of(low_rank: Sequence[LowRank | None]) -> int:
    """Columns of a slot; stacks agree in it. 1 where there are none."""
    return next((each.rank for each in low_rank if each is not None), 1)


class NewKV(NamedTuple):
    """What a layer computed of some rows, to be stored.

    Attributes:
      keys: rotated.
      values: with what adapters add to them, but for a `SharedStore`.
      low_rank: Y of the adapters of all slots, for a `SharedStore`; else None. It may have columns behind those.
    """

    keys: Float[Array, "rows kv_heads head_dim"]
    values: Float[Array, "rows kv_heads head_dim"]
    low_rank: Float[Array, "rows ranks"] | None = None


def low_rank_of(store: AnyStore, apart: ValuesApart | None, rows: Rows, num_requests: int) -> kernels.LowRank | None:
    """What the rows' adapters add to the values of a `SharedStore`. None: there is nothing apart from those.

    All rows of a request have the same slot: an adapter that adds to values acts from position 0 on
    (`device.adapters.check_shared`). The slot of a line of the page tables without rows here is -1.
    """
    if not isinstance(store, SharedStore) or apart is None or rows.adapter is None:
        return None
    slots = _slot_of_each(rows, num_requests)
    return kernels.LowRank(store.low_rank, apart.b, _columns_of(slots, store.rank), jnp.maximum(slots, 0))


def _slots_of(rows: Rows) -> Int[Array, "rows"]:
    assert rows.adapter is not None, "rows that adapters add to say which one does"
    return rows.adapter


def _slot_of_each(rows: Rows, num_requests: int) -> Int[Array, "requests"]:
    """The slot of each request's rows; -1 where it has none, or no rows here."""
    return jnp.full(num_requests, NO_SLOT).at[rows.request].max(_slots_of(rows), mode="drop")


def _columns_of(slots: Int[Array, "n"], rank: int) -> Int[Array, "n"]:
    """Where Y of slots begins in the store; -1 for those that are none."""
    return jnp.where(slots >= 0, slots * rank, -1)


@dataclasses.dataclass(frozen=True)
class Ops:
    """Operations on the sharded store. Hashable, so that it can be a static argument of a jitted step.

    No operation but the key mass combines heads, and some linear layers sum over inputs that the mesh divides: those
    are summed over the mesh. So each operation runs under `shard_map` on what is local, and no kernel ever sees a
    sharded array.

    Attributes:
      mesh: the devices; its first one stands for all.
      backend: which implementations are tried on these devices. It is fixed here: `prefer` and `SPARSEX_KERNELS` have
        no effect on operations that exist already.
      sums_later: whether products over inputs that the mesh divides stay in parts, one of each device, until `summed`
        adds them: `[devices, rows, width]` instead of `[rows, width]`.
    """

    mesh: Mesh
    backend: Backend
    sums_later: bool = False

    @classmethod
    def on(cls, mesh: Mesh) -> Ops:
        """Operations on a mesh, by the implementations that its devices, `prefer` or `SPARSEX_KERNELS` call for now."""
        return cls(mesh, Backend.of(mesh.devices.flat[0]))

    @property
    def row_multiple(self) -> int:
        """Rows should be padded to a multiple of it once a step: kernels for GPUs pad, each of them otherwise."""
        return ROW_MULTIPLES.get(self.backend.platform, 1)

    @property
    def pays_for_launches(self) -> bool:
        """Whether steps of few rows take longer for each operation that XLA does apart, however small: as on GPUs."""
        return self.backend.platform == "gpu"

    @property
    def host_steers(self) -> bool:
        """Whether the host answers what a program asks on its way, which idles until then: as on GPUs."""
        return self.backend.platform == "gpu"

    @property
    def hides_sums(self) -> bool:
        """Whether sums over the mesh should run beside other work, which somebody has to arrange: as on GPUs."""
        return self.backend.platform == "gpu" and self.mesh.size > 1

    @property
    def later(self) -> Ops:
        """The same with sums left to `summed`, and with room for those on each device."""
        return dataclasses.replace(self, sums_later=True, backend=dataclasses.replace(self.backend, spared=SPARED))

    def exchanges(self, width: int, dtype: Any) -> bool:
        """Whether the devices sum rows of this width and dtype by mailboxes."""
        return self.takes_mailboxes(width, dtype) and reach_one_another(list(self.mesh.devices.flat))

    def takes_mailboxes(self, width: int, dtype: Any) -> bool:
        """Whether they would, if they reach one another."""
        takes = adds_devices(self.exchanged_rows, width, dtype=jnp.dtype(dtype), backend=self.backend)
        return self.mesh.size > 1 and takes

    @property
    def exchanged_rows(self) -> int:
        """Of up to how many rows the devices make sums by mailboxes, where they can."""
        return min(WHOLE_ROWS, SENT_ROWS // max(self.mesh.size - 1, 1))

    def linear(
        self,
        x: Float[Array, "rows inputs"],
        weights: Sequence[Matrices],
        layer: Int[Array, ""] | int,
        rows: Rows,
        *,
        over_inputs: bool,
        low_rank: Sequence[LowRank | None] = (),
        apart: ValuesApart | None = None,
    ) -> tuple[Float[Array, "... rows _"], ...]:
        """Rows times each weight. A mesh divides weights by columns, or by inputs if the product is `over_inputs`.

        Args:
          low_rank: what adapters add to each of the weights, or None, for rows that have one. A mesh divides their B by
            columns, or their A by inputs. None are given: nothing is added.
          apart: Y of these, whole on each device, comes behind the products.
        """
        rank = _rank_of(low_rank)

        def run(x: Array, weights: Any, layer: Array, count: Array, adapting: Adapting, **on: Any) -> tuple[Any, Any]:
            added, y = narrow_products(x, adapting, layer, count, rank=rank, **on)
            products = kernels.linear(x, weights, layer, count, added=added, **on)
            return tuple(map(self._sum, products)) if over_inputs else products, y

        if over_inputs:
            divided, by, adapted, out = PartitionSpec(None, TENSOR_AXIS), _INPUTS, _BY_INPUTS, self._sums
        else:
            divided, by, adapted, out = _ALL, _OUTPUTS, _BY_OUTPUTS, PartitionSpec(None, TENSOR_AXIS)
        apply = self._over_heads(run, (divided, by, _ALL, _ALL, adapted), (out, _ALL))
        adapting = Adapting.of(low_rank, rows.adapter, apart)
        products, y = apply(x, tuple(weights), jnp.asarray(layer), rows.count, adapting)
        return products if y is None else (*products, y)

    def linear_parts(
        self,
        x: Float[Array, "rows inputs"],
        weight: Matrices,
        layer: Int[Array, ""] | int,
        rows: Rows,
        mailboxes: Mailboxes | None = None,
    ) -> ProductParts | DeviceParts | PartsToExchange:
        """Rows times a weight that a mesh divides by inputs, in parts for `add_norm`. A mesh adds them here, but for a
        few rows where there are mailboxes; and it leaves the devices' parts as they are where its `sums_later`."""
        if mailboxes is not None and len(x) <= mailboxes.rows and not self.sums_later:
            return self._parts_to_exchange(x, weight, layer, rows, mailboxes)
        if self.mesh.size > 1:
            (product,) = self.linear(x, [weight], layer, rows, over_inputs=True)
            return product if self.sums_later else one_part(product)
        return kernels.linear_parts(x, [weight], jnp.asarray(layer), rows.count, backend=self.backend)

    def _parts_to_exchange(
        self, x: Array, weight: Matrices, layer: Array | int, rows: Rows, mailboxes: Mailboxes
    ) -> PartsToExchange:
        def parts(x: Array, weight: Matrices, *args: Any, **on: Any) -> ProductParts:
            return kernels.linear_parts(x, [weight], *args, **on)

        run = self._over_heads(parts, (PartitionSpec(None, TENSOR_AXIS), _INPUTS, _ALL, _ALL), _EACH_HAS_PARTS)
        return PartsToExchange(run(x, weight, jnp.asarray(layer), rows.count), mailboxes)

    def _sum(self, x: Float[Array, "rows width"]) -> Float[Array, "rows width"] | DeviceParts:
        """Within the mesh: the sum over it, or this device's part where sums come later."""
        if self.mesh.size == 1:
            return x
        return x[None] if self.sums_later else jax.lax.psum(x, TENSOR_AXIS)

    @property
    def _sums(self) -> PartitionSpec:
        """How a mesh divides what `_sum` gives."""
        return _PARTS if self.sums_later else _ALL

    def summed(self, parts: DeviceParts) -> Float[Array, "rows width"]:
        """The sum of the devices' parts, whole on each."""
        add = self._local(lambda own: jax.lax.psum(own[0], TENSOR_AXIS), (_PARTS,), _ALL)
        return add(parts)

    def no_parts(self, shape: tuple[int, ...], dtype: Any) -> DeviceParts:
        """Zeros, divided as parts are."""
        zeros = jnp.zeros((self.mesh.size, *shape), dtype)
        return jax.lax.with_sharding_constraint(zeros, NamedSharding(self.mesh, _PARTS))

    def add_norm(
        self,
        product: ProductParts | PartsToExchange,
        residual: Float[Array, "rows hidden"],
        scales: Float[Array, "layers hidden"],
        layer: Int[Array, ""],
        rows: Rows,
        eps: float,
    ) -> tuple[Float[Array, "rows hidden"], Float[Array, "rows hidden"]]:
        """The product added to the residual, and the sum's norm, on each device. Those of padding are undefined."""
        add_norm, about = functools.partial(kernels.add_norm, eps=eps), (residual, scales, layer, rows.count)
        if isinstance(product, PartsToExchange):
            return self._over_heads(add_norm, (_EACH_HAS_PARTS, *(_ALL,) * 4, _PARTS), _ALL)(
                product.product, *about, product.mailboxes
            )
        return self._over_heads(add_norm, (_ALL,) * 5, _ALL)(product, *about)

    def gated_linear(
        self,
        x: Float[Array, "rows inputs"],
        gate: Matrices,
        up: Matrices,
        layer: Int[Array, ""] | int,
        rows: Rows,
        *,
        activation: str = "silu",
        low_rank: Sequence[LowRank | None] = (),
    ) -> Float[Array, "rows width"]:
        """`activation(x @ gate) * (x @ up)`; a mesh divides both matrices and the result by columns.

        Args:
          low_rank: what adapters add to each of the two products, as in `linear`.
        """
        rank = _rank_of(low_rank)

        def run(x: Array, gate: Any, up: Any, layer: Array, count: Array, adapting: Adapting, **on: Any) -> Array:
            added, _ = narrow_products(x, adapting, layer, count, rank=rank, **on)
            return kernels.gated_linear(x, gate, up, layer, count, activation=activation, added=added, **on)

        specs = (_ALL, _OUTPUTS, _OUTPUTS, _ALL, _ALL, _BY_OUTPUTS)
        gated = self._over_heads(run, specs, PartitionSpec(None, TENSOR_AXIS))
        return gated(x, gate, up, jnp.asarray(layer), rows.count, Adapting.of(low_rank, rows.adapter, None))

    def experts(
        self,
        x: Float[Array, "rows hidden"],
        routing: Routing,
        stacks: ExpertStacks,
        layer: Int[Array, ""] | int,
        rows: Rows,
    ) -> Float[Array, "rows hidden"] | DeviceParts:
        """The weighted sum of what each row's experts compute. A mesh divides the experts: each device computes the
        rows of its own."""
        num_experts, sharded = stacks.gate.shape[1], self.mesh.size > 1

        def run(x: Array, routing: Routing, stacks: ExpertStacks, *rest: Array, **on: Any) -> Array:
            first = jax.lax.axis_index(TENSOR_AXIS) * stacks.gate.shape[1] if sharded else 0
            return self._sum(run_experts(x, routing, stacks, *rest, first=first, num_experts=num_experts, **on))

        specs = (_ALL, _ALL, _EXPERTS, _ALL, _ALL)
        return self._over_heads(run, specs, self._sums)(x, routing, stacks, jnp.asarray(layer), rows.count)

    def attention(
        self,
        q: Queries,
        store: AnyStore,
        layer: Int[Array, ""],
        rows: Rows,
        tables: PageTables,
        window: Window | None = None,
        low_rank: kernels.LowRank | None = None,
    ) -> Queries:
        """Attention of the rows to their requests' keys. A mesh divides K, V and what expands Y by KV heads, and has
        all of Y on each device: it has no heads.

        Args:
          low_rank: what the rows' adapters add to values, as `low_rank_of` has it.
        """

        def attend(*args: Any, **on: Any) -> Any:
            *rows, window, low_rank = args
            return kernels.paged_attention(*rows, window=window, low_rank=low_rank, **on)

        by_adapter: Any = _ALL if low_rank is None else kernels.LowRank(*_LOW_RANK)
        run = self._over_heads(attend, (_HEADS, _STORE, *[_ALL] * 5, by_adapter), _HEADS)
        return run(q, kv_of(store), layer, rows.position, rows.request, tables, window, low_rank)

    def key_mass(
        self,
        q: Queries,
        store: AnyStore,
        layer: Int[Array, ""],
        rows: Rows,
        tables: PageTables,
        power: Power = 1,
        window: Window | None = None,
    ) -> Float[Array, "requests context"]:
        """The key mass of the rows, whole on each device.

        Args:
          power: of the attention. A number is static.
        """
        fixed, given = (power, None) if isinstance(power, int) else (None, power)

        def summed(*args: Any, **on: Any) -> Array:
            *rows, window, given = args
            mass = kernels.key_mass(*rows, window=window, power=given if fixed is None else fixed, **on)
            return jax.lax.psum(mass, TENSOR_AXIS) if self.mesh.size > 1 else mass

        run = self._over_heads(summed, (_HEADS, _STORE, *[_ALL] * 6), _ALL)
        return run(q, kv_of(store), layer, rows.position, rows.request, tables, window, given)

    def write_kv(
        self,
        store: AnyStore,
        layer: Int[Array, ""],
        new: NewKV,
        rows: Rows,
        tables: PageTables,
    ) -> AnyStore:
        """The store with what was computed of the rows. Of those that are `unseen`, that is Y of their own adapter."""
        specs = (_STORE, _ALL, _HEADS, _HEADS, _ALL, _ALL, _ALL)
        write = self._over_heads(kernels.write_kv, specs, _STORE)
        kv = write(kv_of(store), layer, new.keys, new.values, rows.written, rows.request, tables)
        if not isinstance(store, SharedStore):
            return kv
        assert new.low_rank is not None, "a shared store takes Y beside K and V"
        y = self._write_low_rank(store, layer, new.low_rank[:, : store.low_rank.shape[3]], rows, tables)
        return store.replace(kv=kv, low_rank=y)  # type: ignore[attr-defined]

    def _write_low_rank(
        self,
        store: SharedStore,
        layer: Int[Array, ""],
        values: Float[Array, "rows columns"],
        rows: Rows,
        tables: PageTables,
    ) -> LowRankStore:
        """The store with the rows' Y of all adapters, or of their own where they are unseen; each device has all of it.

        Others may be reading an unseen row's Y of theirs.
        """
        write = self._over_heads(kernels.write_low_rank, (_ALL,) * 6, _ALL)
        written = write(store.low_rank, layer, values, rows.written, rows.request, tables)
        if rows.unseen is None:
            return written
        by_slot = values.reshape(len(values), -1, store.rank)
        own = by_slot[jnp.arange(len(values)), jnp.maximum(_slots_of(rows), 0)]
        positions = jnp.where(rows.unseen, rows.position, -1)
        columns = _columns_of(_slot_of_each(rows, len(tables)), store.rank)
        write = self._over_heads(kernels.write_low_rank, (_ALL,) * 7, _ALL)
        return write(written, layer, own, positions, rows.request, tables, columns)

    def fuses_rotation(self, x: Float[Array, "rows hidden"], q_heads: int, store: Store) -> bool:
        """Whether `project_and_write` is for these rows: a kernel of the backend's may do most of it. Of more than a
        decode step's it must, since XLA would read parts of the product that nobody wrote."""
        if len(x) <= FEW_ROWS:
            return "hopper" in self.backend.order("rotate_and_write")
        heads = Heads(q_heads // self.mesh.size, store.shape[3] // self.mesh.size, store.shape[5])
        return is_one_kernel(len(x), heads, dtype=x.dtype, stored=store.dtype, backend=self.backend)

    def project_and_write(
        self,
        x: Float[Array, "rows hidden"],
        weights: Sequence[Matrices],
        store: Store,
        layer: Int[Array, ""],
        rows: Rows,
        tables: PageTables,
        inv_freq: Float[Array, "half"],
    ) -> tuple[Queries, Store]:
        """Rotated queries of the rows, and the store with their rotated keys and their values.

        Args:
          weights: of queries, keys and values; a mesh divides each by heads.
        """

        def run(x: Array, weights: Any, *args: Any, **on: Any) -> tuple[Array, Array]:
            _, layer, *_, count = args
            product = kernels.linear_parts(x, weights, layer, count, **on)
            return kernels.rotate_and_write(product, *args, dtype=x.dtype, **on)

        on_heads = self._over_heads(run, (_ALL, _OUTPUTS, _STORE, *[_ALL] * 6), (_HEADS, _STORE))
        about = rows.position, rows.request, tables, inv_freq, rows.count
        return on_heads(x, tuple(weights), store, layer, *about)

    def read_kv(
        self, store: AnyStore, layer: Int[Array, ""], rows: Rows, tables: PageTables
    ) -> Float[Array, "rows 2 kv_heads head_dim"]:
        """What the store holds for these rows; anything for padding."""
        specs = (_STORE, _ALL, _ALL, _ALL, _ALL)
        read = self._local(read_kv, specs, PartitionSpec(None, None, TENSOR_AXIS, None))
        return read(kv_of(store), layer, rows.position, rows.request, tables)

    def align_and_copy(
        self, store: AnyStore, copies: Copies, layers: tuple[Int[Array, ""], Int[Array, ""]], inv_freq: Frequencies
    ) -> AnyStore:
        """The store with copies made in the layers from the first up to the second: keys are rotated, values and Y are
        as they were."""
        move = self._over_heads(kernels.align_and_copy, (_STORE, *[_ALL] * 6), _STORE)
        bounds = jnp.stack(layers)
        kv = move(kv_of(store), copies.source, copies.target, copies.shift, inv_freq, bounds, copies.patch)
        if not isinstance(store, SharedStore):
            return kv
        y = self._copy_low_rank(store.low_rank, copies, bounds)
        return store.replace(kv=kv, low_rank=y)  # type: ignore[attr-defined]

    def pack_rows(self, store: Store, rows: PackedRows) -> Store:
        """For mirrors, which are of engines without a `SharedStore`."""
        move = self._over_heads(kernels.pack_rows, (_STORE, *[_ALL] * 4), _STORE)
        return move(store, rows.source, rows.target, rows.layer, rows.depth)

    def _copy_low_rank(self, store: LowRankStore, copies: Copies, layers: Int[Array, "2"]) -> LowRankStore:
        """What `align_and_copy` does, to Y."""
        move = self._over_heads(kernels.copy_low_rank, (_ALL,) * 5, _ALL)
        return move(store, copies.source, copies.target, layers, copies.patch)

    def pack_low_rank(self, store: LowRankStore, rows: PackedRows) -> LowRankStore:
        """What `pack_rows` does, to Y."""
        move = self._over_heads(kernels.pack_low_rank, (_ALL,) * 5, _ALL)
        return move(store, rows.source, rows.target, rows.layer, rows.depth)

    def replicated[T](self, tree: T) -> T:
        """A pytree of arrays, whole on every device of the mesh."""
        if self.mesh.size == 1:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, _ALL))

    def _over_heads(self, op: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
        """The operation on the mesh's backend, each device running it on what it holds of the sharded arguments."""
        return self._local(functools.partial(op, backend=self.backend), in_specs, out_specs)

    def _local(self, function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any) -> Callable[..., Any]:
        if self.mesh.size == 1:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
