"""The engine's steps lowered for devices that are described, not present: what compiles, and what it would take.

`lower_prefill(...).compile(described.compile_options(mesh))` runs the device's own compiler on any machine, down to the
machine code of Pallas' kernels. Weights and store are shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from inspect import unwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from sparsex_jax.config import EngineConfig, ModelConfig, SamplingParams
from sparsex_jax.device.adapters import abstract_apart, abstract_stacks
from sparsex_jax.device.decode import DecodeState, decode, steps_together
from sparsex_jax.device.described import backend_of, lowering_for
from sparsex_jax.device.packed import packed
from sparsex_jax.device.pieces import gather, layer_groups, piece_sharding, scatter
from sparsex_jax.device.prefill import align, cross, last_layers, prefill
from sparsex_jax.device.probe import ProbeState, probe
from sparsex_jax.device.signals import BUILT_IN, Signal
from sparsex_jax.device.state import BatchSlot, state_in
from sparsex_jax.model.decoder import Decoder, Hidden
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import on_mesh
from sparsex_jax.model.store import AnyStore, abstract_any_store, abstract_store
from sparsex_jax.model.weights import Params, abstract_params
from sparsex_jax.reuse.methods import Method, SparseX
from sparsex_jax.reuse.plan import Copies, PrefillPlan, PrefillState, Rows
from sparsex_jax.reuse.planner import RequestPlan, Shapes, plan_prefill
from sparsex_jax.reuse.prompt import PromptMap, TokenKind
from sparsex_kernels.layout import PageTables
from sparsex_kernels.mailboxes import Mailboxes, abstract_mailboxes


def replicated(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a pytree's arrays, each whole on every device unless it is placed there already."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        placed = isinstance(x, jax.ShapeDtypeStruct) and x.sharding is not None
        return x if placed else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    return jax.tree.map(shape, tree)


def half_reused(
    num_tokens: int, reuse: Method, model: ModelConfig, shapes: Shapes, signals: Sequence[str] = tuple(BUILT_IN)
) -> tuple[PrefillPlan, Rows]:
    """The plan of a prompt whose first half is reused, and its rows. Only their shapes matter here."""
    kind = np.full(num_tokens, TokenKind.FRESH, np.uint8)
    kind[: num_tokens // 2] = TokenKind.REUSED
    prompt = PromptMap(np.zeros(num_tokens, np.int32), kind)
    request = RequestPlan(prompt, reuse.phases(prompt, model.num_layers), range(shapes.max_pages))
    return plan_prefill([request], shapes, model.num_layers, signals)


def lower_prefill(
    model: ModelConfig,
    engine: EngineConfig,
    mesh: Mesh,
    num_tokens: int,
    signals: Mapping[str, Signal] = BUILT_IN,
) -> Lowered:
    """The prefill of the bucket that holds this number of tokens. With all signals it serves every method."""
    shapes = _shapes(model, engine, mesh)
    plan, state = _begun(num_tokens, model, engine, shapes, tuple(signals))
    _, chunk = shapes.bucket(plan.fresh.size)
    static = {"decoder": _decoder(model, mesh), "signals": tuple(signals.values()), "chunk": chunk}
    params, store = _params(model, engine, mesh), abstract_any_store(model, engine, mesh)

    def step(store: AnyStore, params: Params, plan: PrefillPlan, state: PrefillState, until: jax.Array) -> Any:
        return unwrap(prefill)(params, store, plan, state, until, jnp.bool(False), **static)

    return _lower(step, mesh, store, params, plan, state, jnp.int32(model.num_layers))


def lower_choice(model: ModelConfig, engine: EngineConfig, mesh: Mesh, num_tokens: int) -> Lowered:
    """The choice of rows by key mass, of the bucket that holds this number of tokens."""
    shapes = _shapes(model, engine, mesh)
    plan, state = _begun(num_tokens, model, engine, shapes, tuple(BUILT_IN))
    _, chunk = shapes.bucket(plan.fresh.size)
    static = {"decoder": _decoder(model, mesh), "signal": BUILT_IN["key_mass"], "chunk": chunk}
    params, store = _params(model, engine, mesh), abstract_any_store(model, engine, mesh)

    def step(store: AnyStore, params: Params, plan: PrefillPlan, state: PrefillState) -> Any:
        return unwrap(cross)(params, store, plan, state, **static)

    return _lower(step, mesh, store, params, plan, state)


def lower_prefill_at_once(model: ModelConfig, engine: EngineConfig, mesh: Mesh, num_rows: int) -> Lowered:
    """All layers of a chunk of this number of rows."""
    plan, state = _begun(num_rows, model, engine, _shapes(model, engine, mesh), tuple(BUILT_IN))
    decoder, params = _decoder(model, mesh), _params(model, engine, mesh)
    store = abstract_any_store(model, engine, mesh)
    rows, hidden = state.rows.chunk(0, num_rows), state.hidden[:num_rows]

    def step(store: AnyStore, params: Params, tables: PageTables, rows: Rows, hidden: Hidden) -> Any:
        return unwrap(last_layers)(params, store, tables, rows, hidden, None, decoder=decoder)

    return _lower(step, mesh, store, params, plan.page_tables, rows, hidden)


def _begun(
    num_tokens: int, model: ModelConfig, engine: EngineConfig, shapes: Shapes, signals: Sequence[str]
) -> tuple[PrefillPlan, PrefillState]:
    """A prefill before layer 0."""
    plan, rows = half_reused(num_tokens, SparseX(), model, shapes, signals)
    hidden = jnp.zeros((len(rows.token), model.hidden_size), engine.dtype)
    boundaries = plan.boundaries
    active, covered = jnp.zeros(boundaries.forced.shape, bool), jnp.zeros(boundaries.budget.coverage.shape)
    return plan, PrefillState(jnp.int32(0), rows, hidden, active, covered)


def lower_probe(model: ModelConfig, engine: EngineConfig, mesh: Mesh, num_tokens: int) -> Lowered:
    """The probe of the bucket that holds this number of tokens, all layers of it, the last half looked at."""
    shapes = _shapes(model, engine, mesh)
    plan, rows = half_reused(num_tokens, SparseX(), model, shapes)
    _, chunk = shapes.bucket(plan.fresh.size)
    params, store = _params(model, engine, mesh), abstract_any_store(model, engine, mesh)
    hidden = jnp.zeros((len(rows.token), model.hidden_size), engine.dtype)
    focus = jnp.zeros((len(plan.page_tables), shapes.max_pages * engine.page_size))
    layers = model.num_layers
    static = {"decoder": _decoder(model, mesh), "layers": layers, "watched": layers // 2, "chunk": chunk}

    def step(
        store: AnyStore, params: Params, tables: jax.Array, rows: Rows, looking: jax.Array, state: ProbeState
    ) -> Any:
        return unwrap(probe)(params, store, tables, rows, looking, state, **static)

    state = ProbeState(jnp.int32(0), hidden, focus)
    return _lower(step, mesh, store, params, plan.page_tables, rows, plan.fresh, state)


def lower_decode(model: ModelConfig, engine: EngineConfig, mesh: Mesh, num_requests: int) -> Lowered:
    """One dispatch for a power of two of requests, as `Runner.decode` makes it."""
    shapes, decoder = _shapes(model, engine, mesh), _decoder(model, mesh)
    host_steers = decoder.ops.host_steers
    slot = BatchSlot(prompt=[0], answer=[0], sampling=SamplingParams(), pages=[0])
    state = state_in([slot] * num_requests, shapes, model.vocab_size)
    if host_steers:
        state = dataclasses.replace(state, sampling=state.sampling.decided())
    steps = steps_together(engine.decode_steps, host_steers=host_steers)
    static = {"decoder": decoder, "steps": steps, "stops_early": not host_steers}
    params, store = _params(model, engine, mesh), abstract_any_store(model, engine, mesh)

    def step(store: AnyStore, params: Params, state: DecodeState, limit: jax.Array) -> Any:
        return unwrap(decode)(params, store, state, limit, **static)

    return _lower(step, mesh, store, params, state, jnp.int32(steps))


def lower_align(model: ModelConfig, engine: EngineConfig, mesh: Mesh, num_tokens: int) -> Lowered:
    """The copies of the bucket that holds this number of tokens."""
    size, _ = _shapes(model, engine, mesh).bucket(num_tokens)
    slots = jnp.zeros(size, jnp.int32)
    copies, layers = packed(Copies(slots, slots, slots)), (np.int32(0), np.int32(model.num_layers))
    decoder = _decoder(model, mesh)
    store = abstract_any_store(model, engine, mesh)
    return _lower(
        lambda store, copies, layers: unwrap(align)(store, copies, layers, decoder=decoder), mesh, store, copies, layers
    )


def lower_gather(model: ModelConfig, engine: EngineConfig, mesh: Mesh, num_pages: int) -> Lowered:
    """What spilling this many pages runs on the devices, in four groups of layers."""
    groups, store = layer_groups(model.num_layers, 4), abstract_store(model, engine, mesh)
    (pages,) = replicated((np.zeros(num_pages, np.int32),), mesh)
    return gather.lower(store, pages, mesh=mesh, groups=groups)


def lower_scatter(model: ModelConfig, engine: EngineConfig, mesh: Mesh, num_pages: int) -> Lowered:
    """What loading this many pages of a quarter of the layers runs on the devices."""
    store = abstract_store(model, engine, mesh)
    shape = (num_pages, model.num_layers // 4, *store.shape[2:])
    piece = jax.ShapeDtypeStruct(shape, store.dtype, sharding=piece_sharding(mesh, shape, "device"))
    pages, layer = replicated((np.zeros(num_pages, np.int32), np.int32(0)), mesh)
    return scatter.lower(store, piece, pages, layer, mesh=mesh)


def _decoder(model: ModelConfig, mesh: Mesh) -> Decoder:
    return Decoder(model, Ops(mesh, backend_of(mesh)))


def _shapes(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Shapes:
    return Shapes.of_engine(model, engine, platform=backend_of(mesh).platform)


def _params(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Params:
    params = abstract_params(on_mesh(model, mesh), engine.dtype, mesh)
    stacks, apart = abstract_stacks(model, engine, mesh), abstract_apart(model, engine, mesh)
    mailboxes = _mailboxes(model, engine, mesh)
    return params.replace(adapters=stacks, values_apart=apart, mailboxes=mailboxes)  # type: ignore[attr-defined]


def _mailboxes(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> Mailboxes | None:
    """As if the devices could write into the memory of one another."""
    ops = Ops(mesh, backend_of(mesh))
    takes = ops.takes_mailboxes(model.hidden_size, engine.dtype)
    return abstract_mailboxes(mesh, ops.exchanged_rows, model.hidden_size) if takes else None


def _lower(step: Callable[..., Any], mesh: Mesh, store: Any, *args: Any) -> Lowered:
    """A step with the store donated. It is lowered on leaves, because checked dataclasses take nothing but arrays."""
    leaves, tree = jax.tree.flatten(args)

    def flat(store: AnyStore, *leaves: jax.Array) -> Any:
        return step(store, *jax.tree.unflatten(tree, leaves))

    with lowering_for(mesh):
        return jax.jit(flat, donate_argnums=0).lower(store, *replicated(leaves, mesh))
