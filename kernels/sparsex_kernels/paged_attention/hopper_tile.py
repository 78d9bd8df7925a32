"""What one program of attention for Hopper GPUs does: a tile of rows, the query heads of one KV head, their keys.

Each compute warpgroup has its rows packed as `[head, row]` into the 64 rows of its matrix products, so that a K or V
block is read once for all of them. One more warpgroup fetches K and V blocks by TMA through the page tables
(`hopper_blocks.py`).

A tile may hold rows of several requests. The program folds the keys of one request after the other, from the start
each time, or from the first block that some row's window touches, and keeps each row's result of its own request. What
is not finite in another request's keys or values never reaches the row. Rows therefore need not be cut at the requests'
borders, and every output tile is stored once.

In a call that may cut tiles (`tiles.py`), a program has a part of its tile's key blocks, as a table says. In any other
it has all of them, and there is no table.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from sparsex_kernels import mosaic
from sparsex_kernels.gpu import LOG2_E
from sparsex_kernels.mosaic import ROWS, WGMMA_ROWS, Ref, Softmax
from sparsex_kernels.paged_attention.hopper_blocks import Block, BlockRing, fetch_blocks, ring_scratch, staging_scratch
from sparsex_kernels.paged_attention.hopper_low_rank import Expansion, LowRankRefs, first_column, matrix_scratch
from sparsex_kernels.paged_attention.hopper_shape import Config, Shape, copies_a_block
from sparsex_kernels.paged_attention.tiles import TilePart


def scratch_types(shape: Shape, config: Config) -> dict[str, Any]:
    block, pieces = (config.stages, config.block, shape.head_dim), copies_a_block(shape, config)
    ring = ring_scratch(
        block,
        shape.dtype,
        pieces=1 if shape.narrow else pieces,
        readers=config.warpgroups,
        values=shape.values,
        rank=shape.rank,
    )
    ring |= matrix_scratch(shape, config.warpgroups)
    if shape.narrow:
        ring |= staging_scratch((config.staged, config.block, shape.head_dim), shape.stored, pieces=pieces)
    return ring | {
        "q_smem": mosaic.tiled_smem((config.warpgroups, WGMMA_ROWS, shape.head_dim), shape.dtype),
        "lse_smem": plgpu.SMEM((config.warpgroups, WGMMA_ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=shape.share, num_barriers=config.warpgroups),
        "turn": plgpu.Barrier(num_arrivals=config.warpgroups),
    }


class Operands(NamedTuple):
    """What the kernel reads in global memory."""

    query: Ref  # [padded_rows, q_heads, head_dim]
    store: Ref  # [layers * pages, 2 * kv_heads, page_size, head_dim]
    layer: Ref  # [1]
    tables: Ref  # [requests, pages]
    spans: Ref  # [tiles, requests, 2], or 4 where there are windows
    ranges: Ref  # [tiles, 2]
    packed: Ref  # [tiles, warpgroups, 2, 64], positions and requests; where there are windows, also first keys
    parts: Ref | None = None  # [lines, 4], if tiles may be cut
    low_rank: LowRankRefs | None = None  # if there are adapters

    @classmethod
    def of(cls, shape: Shape, refs: tuple[Ref, ...]) -> "Operands":
        """These of the kernel's references."""
        low_rank = LowRankRefs(*refs[-len(LowRankRefs._fields) :]) if shape.rank else None
        return cls(*refs[: 7 + shape.cut])._replace(low_rank=low_rank)


class Program(NamedTuple):
    """What a program works on, and what it writes.

    Attributes:
      line: its number, and of its part in the table of parts.
      requests: the tile's first request and the one behind its last.
      outs: where it writes, by name: `out` and `lse` of whole tiles, `partial` and `partial_lse` of parts.
    """

    line: Array
    part: TilePart
    head: Array
    requests: tuple[Array, Array]
    operands: Operands
    outs: dict[str, Ref]


def kernel(shape: Shape, config: Config, names: tuple[str, ...], *refs: Ref, **scratch: Ref) -> None:
    """The kernel's body. Its references are those of `Operands`, then the outputs of these names (`Program.outs`)."""
    operands = Operands.of(shape, refs[: len(refs) - len(names)])
    outs = dict(zip(names, refs[len(refs) - len(names) :], strict=True))
    line, head, wg = lax.axis_index("program"), lax.axis_index("heads"), lax.axis_index("wg")
    part = _part(shape, operands, line)
    tile = jnp.maximum(part.tile, 0) if shape.cut else part.tile
    requests = operands.ranges[tile, 0], operands.ranges[tile, 1]
    program = Program(line, part, head, requests, operands, outs)

    registers = config.narrow_registers if shape.narrow else config.registers

    def unless_idle(body: Callable[[], None]) -> None:
        pl.when(part.tile >= 0)(body) if shape.cut else body()

    @pl.when(wg < config.warpgroups)
    def compute() -> None:
        plgpu.set_max_registers(registers[0], action="increase")
        unless_idle(lambda: _compute(shape, config, program, wg, scratch))

    @pl.when(wg == config.warpgroups)
    def fetch() -> None:
        plgpu.set_max_registers(registers[1], action="decrease")
        unless_idle(lambda: _fetch(shape, config, program, BlockRing.of(scratch)))


def _part(shape: Shape, operands: Operands, line: Array) -> TilePart:
    if operands.parts is not None:
        return TilePart(*(operands.parts[line, n] for n in range(4)))
    # Late tiles have the most keys: they go first, so that the short ones fill the gaps at the end.
    return TilePart(shape.tiles - 1 - line, begin=0, end=None, whole=1)


class RequestKeys(NamedTuple):
    """The key blocks of one request that a program reads.

    Attributes:
      first_step: the program's step that reads block 0, or would; block i is read in step `first_step + i`.
      first_key: the first key that some row sees.
      first: the block that it is in.
      last: the last position among the tile's rows of the request; -1 if it has none.
      blocks: up to that position.
      begin: of the part, which has blocks `begin .. end`.
    """

    request: Array
    first_step: Array
    first_key: Array | int
    first: Array | int
    last: Array
    blocks: Array
    begin: Array | int
    end: Array


def _over_requests(shape: Shape, config: Config, program: Program, body: Callable[[RequestKeys], None]) -> Array:
    """Call the body for each of the tile's requests. Returns the program's number of steps."""
    part, spans = program.part, program.operands.spans

    def over_request(request: Array, first_step: Array) -> Array:
        last = spans[part.tile, request, 0]
        blocks = lax.div(last + config.block, config.block)
        first_key = spans[part.tile, request, 2] if shape.windowed else 0
        first = lax.div(first_key, config.block) if shape.windowed else 0
        first_step = first_step - first if shape.windowed else first_step
        own = _own_blocks(part, first_step, first, blocks)
        body(RequestKeys(request, first_step, first_key, first, last, blocks, *own))
        return first_step + blocks

    steps = lax.fori_loop(*program.requests, over_request, jnp.int32(-part.begin))
    return steps if part.end is None else part.end - part.begin


def _own_blocks(part: TilePart, first_step: Array, first: Array | int, blocks: Array) -> tuple[Array | int, Array]:
    if part.end is None:
        return first, blocks
    return jnp.clip(-first_step, first, blocks), jnp.clip(part.end - part.begin - first_step, first, blocks)


def _compute(shape: Shape, config: Config, program: Program, wg: Array, scratch: dict[str, Ref]) -> None:
    one = _Warpgroup.of(shape, config, program, wg, scratch)
    take_turn = one.take_turn
    # Warpgroup 0 starts. Both take as many turns: 1 waits for its first, and 0 takes one more at the end.
    if one.alternates:
        pl.when(wg == 1)(take_turn)
    _over_requests(shape, config, program, one.over_request)
    if one.alternates:
        pl.when(wg == 0)(take_turn)
    one.store()


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
    """A warpgroup that computes: its rows, in shared memory and registers, and what it does with blocks of keys.

    Attributes:
      wg: its number in the program.
      row: the first of its rows.
      q_smem: the queries of its packed rows, and in the end their results.
      lse_smem: their log-sum-exps.
      turn: where two warpgroups hand the tensor cores to each other.
      positions, owners: position and request of each packed row.
      first_keys: the first key that each sees, where there are windows.
      expansion: what adds Y's sums to the output, where there are adapters.
    """

    shape: Shape
    config: Config
    program: Program
    wg: Array
    row: Array
    ring: BlockRing
    q_smem: Ref
    lse_smem: Ref
    turn: Ref
    positions: Array
    owners: Array
    first_keys: Array | None
    expansion: Expansion | None

    @classmethod
    def of(cls, shape: Shape, config: Config, program: Program, wg: Array, scratch: dict[str, Ref]) -> "_Warpgroup":
        """With its queries in shared memory."""
        operands, tile = program.operands, program.part.tile
        ring = BlockRing.of(scratch)
        q_smem, lse_smem, q_ready = (scratch[name].at[wg] for name in ("q_smem", "lse_smem", "q_ready"))
        row = (tile * config.warpgroups + wg) * shape.rows
        for h in range(shape.share):
            source = operands.query.at[pl.ds(row, shape.rows), program.head * shape.share + h]
            plgpu.copy_gmem_to_smem(source, q_smem.at[pl.ds(h * shape.rows, shape.rows)], q_ready)
        positions, owners = (_rows_of(operands, tile, wg, kind) for kind in (0, 1))
        first_keys = _rows_of(operands, tile, wg, 2) if shape.windowed else None
        expansion = Expansion.of(scratch, wg) if shape.rank else None
        plgpu.barrier_wait(q_ready)
        own = q_smem, lse_smem, scratch["turn"]
        return cls(shape, config, program, wg, row, ring, *own, positions, owners, first_keys, expansion)

    # Keys ---------------------------------------------------------------------------------------------------

    def over_request(self, keys: RequestKeys) -> None:
        """Fold a request's keys into the rows, and keep the results of its own rows."""
        shape, spans, tile = self.shape, self.program.operands.spans, self.program.part.tile
        clear, full = keys.begin, spans[tile, keys.request, 1]
        if shape.windowed:
            clear = jnp.clip(spans[tile, keys.request, 3], keys.begin, keys.end)
        full = jnp.clip(full, clear, keys.end) if shape.cut or shape.windowed else full
        bound = jnp.where(self.owners == keys.request, self.positions, -1)
        self._fetch_expansion(keys.request)

        whole = functools.partial(self.step, keys, None)
        masked = functools.partial(self.step, keys, bound)
        state = mosaic.empty_softmax(shape.head_dim if shape.values else 8, shape.rank)
        if shape.windowed:
            # 0. Blocks that the window hides from some row in part or in full.
            state = lax.fori_loop(keys.begin, clear, masked, state)
        # 1. Blocks that every row of the tile sees in full.
        state = lax.fori_loop(clear, full, whole, state)
        # 2. Blocks that some row sees in part or not at all.
        state = lax.fori_loop(full, keys.end, masked, state)
        self.keep_result(keys.request, bound < 0, state)

    def _fetch_expansion(self, request: Array) -> None:
        operands, low_rank, shape = self.program.operands, self.program.operands.low_rank, self.shape
        if self.expansion is not None and low_rank is not None:
            layer, kv_head = operands.layer[0], lax.div(self.program.head, shape.repeat)
            self.expansion.fetch(shape, low_rank, layer, request, kv_head)

    def step(self, keys: RequestKeys, bound: Array | None, i: Array, state: Softmax) -> Softmax:
        """Fold block `i` of a request into the state.

        Args:
          bound: the last position that each row sees, where some see the block in part. None: all see all of it.
        """
        acc, top, total, low = state
        slot = lax.rem(keys.first_step + i, self.config.stages)
        s = self._scores(slot)
        if bound is not None:
            s = self._masked(s, i, bound)
        new_top, p, decay = mosaic.softmax_weights(s, top, self.shape.scale)
        total = total * decay + p.sum(axis=1)
        if not self.shape.values:
            self.take_turn()
            return Softmax(acc, new_top, total)
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        weights = p.astype(self.shape.dtype)
        if low is not None:
            low *= lax.broadcast_in_dim(decay, low.shape, [0])
        # The softmax must be done before the other warpgroup is let into its own: the compiler may not move it.
        acc, new_top, total, weights, low = lax.optimization_barrier((acc, new_top, total, weights, low))
        acc, low = self._add_values(slot, acc, low, weights)
        return Softmax(acc, new_top, total, low)

    def _scores(self, slot: Array) -> Array:
        """Products of the queries with a block of keys."""
        plgpu.barrier_wait(self.ring.k_ready.at[slot])
        s = mosaic.products(self.q_smem, self.ring.k_smem.at[slot], meanwhile=self.take_turn)
        plgpu.barrier_arrive(self.ring.k_used.at[slot])
        return s

    def _masked(self, scores: Array, i: Array, bound: Array) -> Array:
        """-inf where a row does not see a key of block `i`."""
        packed = WGMMA_ROWS, self.config.block
        key = plgpu.broadcasted_iota(jnp.int32, packed, 1, layout=plgpu.Layout.WGMMA) + i * self.config.block
        seen = lax.broadcast_in_dim(bound, packed, [0]) >= key
        if self.first_keys is not None:
            seen &= lax.broadcast_in_dim(self.first_keys, packed, [0]) <= key
        return jnp.where(seen, scores, -jnp.inf)

    def _add_values(self, slot: Array, acc: Array, low: Array | None, weights: Array) -> tuple[Array, Array | None]:
        """The sums with a block of values, which comes meanwhile."""
        if self.alternates:
            plgpu.barrier_arrive(self.turn)
        plgpu.barrier_wait(self.ring.v_ready.at[slot])
        if self.alternates:
            plgpu.barrier_wait(self.turn)
        acc, low = self.ring.add_values(slot, acc, low, weights, self.shape.interpreted)
        plgpu.barrier_arrive(self.ring.v_used.at[slot])
        return acc, low

    # Turns --------------------------------------------------------------------------------------------------

    @property
    def alternates(self) -> bool:
        return self.config.alternate and self.config.warpgroups == 2

    def take_turn(self) -> None:
        """Let the other warpgroup start its product, and wait until it lets this one start the next."""
        if self.alternates:
            plgpu.barrier_arrive(self.turn)
            plgpu.barrier_wait(self.turn)

    # Results ------------------------------------------------------------------------------------------------

    def keep_result(self, request: Array, others: Array, state: Softmax) -> None:
        """Write the results of one request's rows over their queries, which are not needed any more. Padding gets 0."""
        shape, (acc, top, total, _) = self.shape, state
        others &= self.positions >= 0
        if shape.values:
            square = functools.partial(lax.broadcast_in_dim, shape=acc.shape, broadcast_dimensions=[0])
            out = jnp.where(square(total) == 0, 0.0, acc / square(total))
            out = self._expanded(out, request, state).astype(shape.dtype)
            held = plgpu.load(self.q_smem, layout=plgpu.Layout.WGMMA)
            self.q_smem[...] = jnp.where(square(others), held, out)
        if shape.lse or shape.cut:
            # Parts stay in base 2.
            base = jnp.where(self.program.part.whole == 1, LOG2_E, 1.0) if shape.cut else LOG2_E
            held = plgpu.load(self.lse_smem, layout=ROWS)
            self.lse_smem[...] = jnp.where(others, held, (top + jnp.log2(total)) / base)
        plgpu.commit_smem()

    def _expanded(self, out: Array, request: Array, state: Softmax) -> Array:
        """The output with what the request's adapter adds, if it has one."""
        low, low_rank = state.low, self.program.operands.low_rank
        if low is None or self.expansion is None or low_rank is None:
            return out
        wide = lax.broadcast_in_dim(state.total, low.shape, [0])
        sums, column = jnp.where(wide == 0, 0.0, low / wide), low_rank.columns[request]
        return self.expansion.add(out, sums, column >= 0, self.shape)

    def store(self) -> None:
        if self.shape.cut:
            pl.when(self.program.part.whole == 1)(self._store_whole)
            pl.when(self.program.part.whole == 0)(self._store_part)
        else:
            self._store_whole()
        plgpu.wait_smem_to_gmem(0)

    def _store_whole(self) -> None:
        shape, (_, part, head, _, _, outs) = self.shape, self.program
        if shape.values:
            for h in range(shape.share):
                target = outs["out"].at[pl.ds(self.row, shape.rows), head * shape.share + h]
                plgpu.copy_smem_to_gmem(self.q_smem.at[pl.ds(h * shape.rows, shape.rows)], target)
        if shape.lse:
            plgpu.copy_smem_to_gmem(self.lse_smem, outs["lse"].at[head, part.tile, self.wg])

    def _store_part(self) -> None:
        program = self.program
        packed_rows = pl.ds((program.head * self.config.warpgroups + self.wg) * WGMMA_ROWS, WGMMA_ROWS)
        if self.shape.values:
            plgpu.copy_smem_to_gmem(self.q_smem, program.outs["partial"].at[program.line, packed_rows])
        plgpu.copy_smem_to_gmem(self.lse_smem, program.outs["partial_lse"].at[program.line, packed_rows])


def _rows_of(operands: Operands, tile: Array, wg: Array, kind: int) -> Array:
    """What `packed` says of a warpgroup's rows, in registers."""
    return plgpu.load(operands.packed.at[tile, wg, kind], layout=ROWS, optimized=False)


def _fetch(shape: Shape, config: Config, program: Program, ring: BlockRing) -> None:
    operands, kv_head = program.operands, lax.div(program.head, shape.repeat)
    first_page = operands.layer[0] * shape.pages
    pieces, size = copies_a_block(shape, config), min(config.block, shape.page_size)  # keys of a copy

    def copy_block(request: Array, i: Array, line: Array, smem: Ref, barrier: Ref) -> None:
        for n in range(pieces):
            key = i * config.block + n * size
            page = first_page + operands.tables[request, lax.div(key, shape.page_size)]
            source = operands.store.at[page, line, pl.ds(lax.rem(key, shape.page_size), size)]
            plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(n * size, size)], barrier)

    def copy_low_rank(refs: LowRankRefs, request: Array, column: Array, i: Array, smem: Ref, barrier: Ref) -> None:
        for n in range(pieces):
            key = i * config.block + n * size
            page = first_page + operands.tables[request, lax.div(key, shape.page_size)]
            keys = pl.ds(lax.rem(key, shape.page_size), size)
            source = refs.store.at[page, keys, pl.ds(column, shape.rank)]
            plgpu.copy_gmem_to_smem(source, smem.at[pl.ds(n * size, size)], barrier)

    def over_request(keys: RequestKeys) -> None:
        low_rank, copy_of = operands.low_rank, None
        if low_rank is not None:
            column = first_column(low_rank, keys.request, shape.rank)
            copy_of = functools.partial(copy_low_rank, low_rank, keys.request, column)

        def block_at(i: Array) -> Block:
            return Block(
                step=keys.first_step + i,
                copy_keys=functools.partial(copy_block, keys.request, i, kv_head),
                copy_values=functools.partial(copy_block, keys.request, i, shape.kv_heads + kv_head),
                is_trimmed=(i == keys.blocks - 1) | (i == keys.first) if shape.windowed else i == keys.blocks - 1,
                seen=keys.last + 1 - i * config.block,
                hidden=keys.first_key - i * config.block if shape.windowed else None,
                copy_low_rank=copy_of and functools.partial(copy_of, i),
            )

        fetch_blocks(ring, keys.begin, keys.end, block_at, pieces=pieces, kinds=(0, 1) if shape.values else (0,))

    steps = _over_requests(shape, config, program, over_request)
    mosaic.drain((ring.k_used, ring.v_used) if shape.values else (ring.k_used,), 0, steps, config.stages)
