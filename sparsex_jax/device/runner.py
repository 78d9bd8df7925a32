"""The device side of an engine: it owns the parameters and the store, and runs the jitted steps on them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Concatenate, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int, UInt32

from sparsex_jax.cache import Segment
from sparsex_jax.cache.mirrors import Packing
from sparsex_jax.config import MAX_LOGPROBS, EngineConfig, ModelConfig
from sparsex_jax.device.adapters import (
    check_pairs,
    check_shared,
    make_apart,
    make_stacks,
    pairs_with_kv_copies,
    put,
    put_apart,
)
from sparsex_jax.device.ahead import Ahead, Key, key_of
from sparsex_jax.device.arrivals import Arrivals, Late
from sparsex_jax.device.decode import (
    DecodeState,
    behind_prefill,
    choose,
    decode,
    decode_in_graphs,
    forward,
    is_for_graphs,
    steps_together,
)
from sparsex_jax.device.packed import Packed, packed
from sparsex_jax.device.prefill import (
    align,
    begin,
    chunk_of,
    cross,
    last_layers,
    last_logits,
    pack,
    prefill,
    with_chunk,
)
from sparsex_jax.device.probe import ProbeState, probe
from sparsex_jax.device.sampling import Sampled, Sampling, sample_step
from sparsex_jax.device.scoring import Scores, score
from sparsex_jax.device.signals import CROSSED_ALONE, Signal, signals_for
from sparsex_jax.model.adapters import AdapterWeights
from sparsex_jax.model.decoder import Decoder
from sparsex_jax.model.forward_pass import ForwardPass
from sparsex_jax.model.kv_copies import with_kv_copies
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import to_devices
from sparsex_jax.model.store import AnyStore, SharedStore, kv_of, make_store
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.plan import Copies, PrefillPlan, PrefillState, Rows
from sparsex_jax.reuse.planner import (
    RequestPlan,
    Shapes,
    last_choice,
    needed_phases,
    page_tables,
    plan_copies,
    plan_packing,
    plan_prefill,
)
from sparsex_kernels.mailboxes import make_mailboxes

_PAGES_LOOKED_AT = 16  # together, so that one program does for any number
# Which layers a probe watches is a request's choice: for the first few choices there are programs of all their layers.
_PROBES_TOGETHER = 4


@functools.partial(jax.jit, static_argnames="ops")
def _sample_step(logits: Float[Array, "requests vocab"], wanted: Packed[tuple[Sampling, Any]], *, ops: Ops) -> Sampled:
    return ops.replicated(sample_step(logits, *wanted.tree()))


@functools.partial(jax.jit, static_argnames="ops")
def _unpacked(sent: Packed[tuple[DecodeState, Any]], first: Int[Array, "lines 1"], *, ops: Ops) -> DecodeState:
    state, line = sent.tree()
    return ops.replicated(behind_prefill(state, first, line))


@jax.jit
def _joined(parts: Sequence[Sampled]) -> Sampled:
    return jax.tree.map(lambda *steps: jnp.concatenate(steps, axis=1), *parts)


@jax.jit
def _are_finite(logits: Float[Array, "requests vocab"]) -> Bool[Array, "requests"]:
    return jnp.all(jnp.isfinite(logits), axis=-1)


@functools.partial(jax.jit, static_argnames="ops")
def _line(logits: Float[Array, "requests vocab"], number: Int[Array, ""], *, ops: Ops) -> Float[Array, "vocab"]:
    return ops.replicated(lax.dynamic_index_in_dim(logits, number, keepdims=False))


@jax.jit
def _finite_slots(store: AnyStore, pages: Int[Array, "asked"]) -> Bool[Array, "asked page_size"]:
    finite = jnp.isfinite(kv_of(store)[:, pages]).all(axis=(0, 2, 3, 5))
    return (
        finite & jnp.isfinite(store.low_rank[:, pages]).all(axis=(0, 3)) if isinstance(store, SharedStore) else finite
    )


class Computed(NamedTuple):
    """What a prefill computed of one request.

    Attributes:
      tokens: which of its tokens each phase computed.
      confidence: of the scores of the reused tokens where a signal first looked, the share of those that were computed
        from there on. None where none looked.
    """

    tokens: Bool[np.ndarray, "phases tokens"]
    confidence: float | None


class PrefillRun:
    """A prefill under way, which can rest between two layers while the device does something else.

    Attributes:
      requests: what it prefills: requests of one schedule.
      signals: those that its program has, by name.
      next_layer: layers before it have run, or are on their way.
      logits: float32 `[requests, vocab]` of each line's last token, on the device, once all layers have run.
      late, late_copies: what is still to be pasted, from layer `num_pasted` on.
    """

    def __init__(
        self,
        requests: Sequence[RequestPlan],
        plan: PrefillPlan,
        state: PrefillState,
        signals: Mapping[str, Signal],
        late: Sequence[Late] = (),
        late_copies: Sequence[Packed[Copies]] = (),
        first_reading_layer: int = 0,
    ) -> None:
        self.requests, self.plan, self.state, self.signals = requests, plan, state, signals
        self.next_layer = 0
        self.logits: Float[Array, "requests vocab"] | None = None
        self.late, self.late_copies = late, late_copies
        self.num_pasted = self._first_reading_layer = first_reading_layer

    @property
    def done(self) -> bool:
        return self.logits is not None

    @property
    def layers_read_next(self) -> int:
        """How many leading layers must have all that is pasted before the next layer runs."""
        if self.next_layer < self._first_reading_layer:
            return 0
        return max(request.layers_read_at(self.next_layer) for request in self.requests)

    def start_fetching(self) -> None:
        """Begin to bring to the host what `computed` reads, once all layers are on their way."""
        if len(self._needed) > 1:
            self.state.active.copy_to_host_async()
            self.state.covered.copy_to_host_async()

    @property
    def _needed(self) -> list[int]:
        return needed_phases(self.requests, self.next_layer)

    def computed(self) -> list[Computed]:
        """What was computed of each request, once all layers have run.

        Waits for the device only if some phase after the first leaves tokens out. A phase that the plan left out,
        because it narrows nothing, computes what the one before it does.
        """
        requests, sizes = self.requests, [request.num_rows for request in self.requests]
        needed = self._needed
        ran = np.searchsorted(needed, np.arange(len(requests[0].phases)), side="right") - 1
        rows, covered = np.ones((len(needed), sum(sizes)), bool), np.zeros((0, len(requests)), np.float32)
        if len(needed) > 1:
            active, covered = jax.device_get((self.state.active, self.state.covered))
            rows[1:] = active[: len(needed) - 1, : sum(sizes)]
        masks = [np.zeros((len(ran), len(request.prompt)), bool) for request in requests]
        for request, mask, part in zip(requests, masks, np.split(rows, np.cumsum(sizes)[:-1], axis=1), strict=True):
            mask[:, request.phases[0].forced] = part[ran]
        return [Computed(mask, _first_number(covered[:, line])) for line, mask in enumerate(masks)]


def _signal_at(requests: Sequence[RequestPlan], layer: int) -> str | None:
    """The name of the signal by which these requests leave rows out from this layer on."""
    return next(phase.signal for phase in requests[0].phases[1:] if phase.start == layer)


def _first_number(values: Float[np.ndarray, "_"]) -> float | None:
    return next((float(value) for value in values if not np.isnan(value)), None)


class ProbeRun:
    """A probe under way. It can rest between two layers as a prefill can.

    Attributes:
      requests: what it looks at.
      looking: the rows whose attention is noted, bool `[rows]`.
      next_layer: layers before it have run, or are on their way.
    """

    def __init__(self, requests: Sequence[RequestPlan], plan: PrefillPlan, rows: Rows, state: ProbeState) -> None:
        self.requests, self.plan, self.rows, self.state = requests, plan, rows, state
        self.looking = np.zeros(len(rows.token), bool)
        looking = [request.probe.looking[request.prompt.fresh] for request in requests if request.probe]
        self.looking[: sum(map(len, looking))] = np.concatenate(looking)
        self.next_layer = 0

    @property
    def watched(self) -> tuple[int, int]:
        """The first layer that is looked at, and the first behind those."""
        probe = self.requests[0].probe
        assert probe is not None
        return probe.first_layer, probe.end_layer

    @property
    def done(self) -> bool:
        return self.next_layer == self.watched[1]

    def focus(self) -> list[Float[np.ndarray, "tokens"]]:
        """How much each token of each request was looked at, once all layers have run. Waits for the device."""
        focus = np.asarray(self.state.focus)  # whole: to cut it on the device would compile for each number of requests
        return [line[: len(request.prompt)] for line, request in zip(focus, self.requests, strict=False)]


class Relay(Protocol):
    """Makes a runner's calls here and in other processes."""

    def __call__[Result](
        self, method: Callable[..., Result], runner: Runner, args: Sequence[Any], options: Mapping[str, Any]
    ) -> Result:
        """What `method(runner, *args, **options)` returns."""


_RELAYED: set[str] = set()


def relayed[**Arguments, Result](
    method: Callable[Concatenate[Runner, Arguments], Result],
) -> Callable[Concatenate[Runner, Arguments], Result]:
    """A method of `Runner` that dispatches programs: where several processes have the devices, all of them call it.

    Its arguments are values of the host, or what another such method returned.
    """
    _RELAYED.add(method.__name__)

    @functools.wraps(method)
    def call(self: Runner, *args: Arguments.args, **options: Arguments.kwargs) -> Result:
        return method(self, *args, **options) if self.relay is None else self.relay(method, self, args, options)

    return call


def relayed_methods() -> frozenset[str]:
    """The names of all of them."""
    return frozenset(_RELAYED)


class Runner:
    """Runs plans. Each call donates the store to a jitted step and keeps what comes back.

    Attributes:
      relay: has other processes make the calls too. None: there is one process, or this one makes others' calls.
      params: as given, but for KV heads, of which each device of the mesh has one at least (`model.kv_copies`).
      store: the KV of all pages; where adapters share it, with what they add to values beside it.
      losses: how often the store was lost, and made anew.
      arrivals: what comes into the store from a lower tier; None: there is none.
      host_steers: whether the host answers what a program asks on its way, as for GPUs, which idle until then. Then
        decode asks nothing: what can be decided before is, and a dispatch is a few short ones that always run to their
        ends.
    """

    def __init__(self, model: ModelConfig, engine: EngineConfig, params: Params, mesh: Mesh) -> None:
        self.model, self.engine, self.mesh = model, engine, mesh
        self.params = with_kv_copies(params, model, mesh)
        if engine.max_adapters:
            stacks, apart = make_stacks(model, engine, mesh), make_apart(model, engine, mesh)
            self.params = self.params.replace(adapters=stacks, values_apart=apart)  # type: ignore[attr-defined]
        self.decoder = Decoder(model, Ops.on(mesh))
        self.host_steers = self.decoder.ops.host_steers
        platform, pairs = mesh.devices.flat[0].platform, self.decoder.ops.hides_sums
        self.shapes = Shapes.of_engine(model, engine, platform=platform, pairs=pairs)
        self.store: Any = make_store(model, engine, mesh)  # AnyStore; where there are lower tiers, KV alone
        self.losses = 0
        self.relay: Relay | None = None
        self.arrivals: Arrivals | None = None
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        # On the devices, so that no step waits for one of them behind what comes from host memory.
        rows = self.shapes.max_rows // self.shapes.unit
        most = max(model.num_layers, engine.decode_steps, rows, self.shapes.max_requests)
        self._numbers: list[Any] = self._placed([np.int32(number) for number in range(most + 1)])
        self._flags = self._placed([np.bool_(False), np.bool_(True)])
        self._no_first: Any = self._placed(np.full((self.shapes.max_requests, 1), -1, np.int32))
        self._probed_together: set[tuple[int, int]] = set()
        self._ahead: Ahead | None = None
        self._found: dict[Key, jax.stages.Compiled] = {}
        self._place_mailboxes()

    @relayed
    def begin(self, requests: Sequence[RequestPlan], late: Sequence[Late] = ()) -> PrefillRun:
        """Make the copies of requests with the same schedule, and lay out their prefill; no layer has run yet.

        Args:
          late: what is copied later, before the first layer that reads it.
        """
        self.copy([(segment, request.pages) for request in requests for segment in request.copies])
        signals = signals_for((phase.signal for phase in requests[0].phases), self.engine.mirrors)
        laid_out = plan_prefill(requests, self.shapes, self.model.num_layers, tuple(signals))
        plan, state = self._call(begin, self.params, self._sent(laid_out), decoder=self.decoder)
        first = min(request.first_reading_layer(self.model.num_layers) for request in requests)
        run = PrefillRun(requests, plan, state, signals, late, self._late_copies(late), first)
        if self.arrivals is not None and late:
            self.arrivals.send()  # behind the plan, which would have to wait for it
        return run

    def _late_copies(self, late: Sequence[Late]) -> list[Packed[Copies]]:
        runs = [(segment, each.pages) for each in late for segment in each.segments]
        return [self._sent(copies) for copies in plan_copies(runs, self.shapes, self.engine.page_size)]

    def _run(self, program: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a jitted program, or begin to compile it where that is all that is asked for."""
        if self._ahead is None:
            return self._call(program, *args, **options)
        return self._ahead.run(program, self.store, self._everywhere, *args, **options)

    def _call(self, program: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a jitted program in any case. Its options are static."""
        if self._ahead is not None:
            return self._ahead.call(program, self.store, self._everywhere, *args, **options)
        found = self._found.get(key_of(program, args, options)) if self._found else None
        return program(*args, **options) if found is None else found(*args)

    def use(self, found: Mapping[Key, jax.stages.Compiled]) -> None:
        """Call these programs, which were found on disk, in place of what JAX would trace and compile."""
        self._found = dict(found)

    def outlined(self) -> Runner:
        """The same runner for the `outline` from which another process makes one, to compile programs for this one."""
        runner = copy.copy(self)
        runner.relay = runner.arrivals = runner._ahead = None
        return runner

    @contextlib.contextmanager
    def compiling(self, ahead: Ahead) -> Iterator[None]:
        """Within, programs are compiled and not run, and give zeros. Plans begin and copies are made all the same."""
        self._ahead = ahead
        try:
            yield
        finally:
            self._ahead = None

    @contextlib.contextmanager
    def padding_to(self, bucket: tuple[int, int], at_once: int | None = None) -> Iterator[None]:
        """Within, all plans and copies have the shape of this bucket of `shapes`, however few rows they have, and so
        many rows go through all layers at once; None: the bucket's chunks."""
        before = self.shapes.buckets, self.shapes.at_once
        self.set_shapes((bucket,), (bucket[1] if at_once is None else at_once,))
        try:
            yield
        finally:
            self.set_shapes(*before)

    @relayed
    def set_shapes(self, buckets: tuple[tuple[int, int], ...], at_once: tuple[int, ...]) -> None:
        """The buckets that plans are padded to from now on, and how many rows go through all layers at once: some of
        the engine's."""
        self.shapes = dataclasses.replace(self.shapes, buckets=buckets, at_once=at_once)

    @relayed
    def advance(self, run: PrefillRun, layers: int | None = None) -> Float[Array, "requests vocab"] | None:
        """Dispatch the next `layers` layers, or all that are left. Returns `run.logits`.

        The loops of a prefill read their bounds on the host on some devices, GPUs among them; the call returns there
        when its last layer is on its way.

        Raises:
          LinkError: what comes late has failed to come.
        """
        num_layers = self.model.num_layers
        until = num_layers if layers is None else min(run.next_layer + layers, num_layers)
        while run.next_layer < until:
            self._advance(run, self._paste_late(run, until))
        if run.done:
            run.start_fetching()
        return run.logits

    def _advance(self, run: PrefillRun, until: int) -> None:
        """Dispatch the layers from the next one up to `until`."""
        with self._precision():
            whole = self.host_steers and (run.next_layer, until) == (0, self.model.num_layers)
            choice = last_choice(run.requests, self.model.num_layers) if whole else None
            if choice is not None and self._goes_at_once(*choice):
                self._run_at_once(run, *choice)
            else:
                logits = self._run_layers(run, until)
                run.logits = logits if until == self.model.num_layers else None
        run.next_layer = until

    def _run_layers(self, run: PrefillRun, until: int, *, crossing: bool = False) -> Float[Array, "requests vocab"]:
        """Dispatch layers of all rows, up to `until`, and if `crossing` the choice of rows for that one."""
        about = self.params, self.store, run.plan, run.state, self._numbers[until], self._flags[crossing]
        static = {"decoder": self.decoder, "signals": tuple(run.signals.values()), "chunk": self._chunk(run.plan)}
        self.store, run.state, logits = self._run(prefill, *about, **static)
        return logits

    def asks_nothing(self, requests: Sequence[RequestPlan]) -> bool:
        """Whether all layers of a prefill are on their way at once, since nothing is asked of the host between them."""
        if not self.host_steers:
            return True
        first, rows = last_choice(requests, self.model.num_layers)
        asks = first is not None and (first > 0 or _signal_at(requests, first) not in CROSSED_ALONE)
        return self._goes_at_once(first, rows) and not asks

    def _goes_at_once(self, first: int | None, rows: int) -> bool:
        """Whether rows that are left out no more, from a layer on, should go through the layers chunk by chunk.

        From layer 0 on the host is not asked. Behind that it is, in each layer of each chunk, so there is one at most.
        """
        return not first or rows <= self.shapes.at_once[-1]

    def _run_at_once(self, run: PrefillRun, first: int | None, rows: int) -> None:
        """Dispatch all layers: of all rows up to the choice before layer `first`, and of the others chunk by chunk."""
        if first is not None:
            self._run_to_choice(run, first)
        start = None if not first else self._numbers[first]
        for number, size in self.shapes.chunks_at_once(rows):
            self._run_chunk(run, number, size, start)
        run.logits = self._run(last_logits, self.params, run.plan, run.state, decoder=self.decoder)

    def _run_to_choice(self, run: PrefillRun, first: int) -> None:
        """Dispatch the layers before `first`, and the choice of rows for that one, which is the last."""
        signal = _signal_at(run.requests, first)
        if signal not in CROSSED_ALONE:
            self._run_layers(run, first, crossing=True)
            return
        if first:
            self._run_layers(run, first)
        about = self.params, self.store, run.plan, run.state
        static = {"decoder": self.decoder, "signal": run.signals[signal], "chunk": self._chunk(run.plan)}
        self.store, run.state = self._run(cross, *about, **static)

    def _run_chunk(self, run: PrefillRun, number: int, size: int, start: Array | None) -> None:
        """Dispatch the layers from `start` on of one chunk, which may be all rows that the plan has room for."""
        is_all = size == run.plan.fresh.size
        at, static = self._numbers[number], {"decoder": self.decoder, "unit": self.shapes.unit}
        chunk = run.state.rows, run.state.hidden
        if not is_all:
            chunk = self._run(chunk_of, run.state, at, size=size, **static)
        about = self.params, self.store, run.plan.page_tables, *chunk, start
        self.store, hidden = self._run(last_layers, *about, decoder=self.decoder)
        if is_all:
            run.state = dataclasses.replace(run.state, hidden=hidden, layer=self._numbers[self.model.num_layers])
        else:
            run.state = self._run(with_chunk, run.state, at, hidden, **static)

    def _paste_late(self, run: PrefillRun, until: int) -> int:
        """Paste what the next layer reads, and take what has come. Returns up to where layers can run now.

        Between two layers, more can be placed and sent for. The first layers read nothing, and run together if all has
        been sent for.
        """
        num_layers, arrivals = self.model.num_layers, self.arrivals
        if arrivals is None or not run.late or run.num_pasted == num_layers:
            return until
        if not run.layers_read_next and arrivals.all_sent:
            return min(until, run.num_pasted)
        self.store = arrivals.pump(self.store)
        self._paste(run, run.layers_read_next, arrivals)
        if all(late.done for late in run.late):
            self._paste(run, num_layers, arrivals)
            return until
        return run.next_layer + 1

    def _paste(self, run: PrefillRun, layers: int, arrivals: Arrivals) -> None:
        """Copy what is late in the layers before `layers`, and in those that come together with them."""
        if layers <= run.num_pasted:
            return
        for incoming in dict.fromkeys(each for late in run.late for each in late.incoming):
            self.store = arrivals.bring(self.store, incoming, layers)
        for late in run.late:
            if late.error is not None:
                raise late.error
        layers = arrivals.come_with(layers)
        for copies in run.late_copies:
            self._align(copies, run.num_pasted, layers)
        run.num_pasted = layers

    def _chunk(self, plan: PrefillPlan) -> int:
        """Rows of a plan that go through a layer at a time."""
        _, chunk = self.shapes.bucket(plan.fresh.size)
        return chunk

    @relayed
    def begin_probe(self, requests: Sequence[RequestPlan]) -> ProbeRun:
        """Make the copies of requests, and lay out the pass of their fresh tokens; no layer has run yet."""
        begun = self.begin(requests)
        forward = ForwardPass(self.params, begun.plan.page_tables, self.decoder, self._chunk(begun.plan))
        state = ProbeState(begun.state.layer, begun.state.hidden, forward.no_mass(self.store))
        return ProbeRun(requests, begun.plan, begun.state.rows, self._placed(state))

    @relayed
    def advance_probe(self, run: ProbeRun, layers: int | None = None) -> None:
        """Dispatch the next `layers` layers, or all. There are programs of a single layer, and of all layers for the
        first few choices of layers that are watched.

        So the programs do not depend on how many layers fit a turn, nor on how many choices requests come with.
        """
        first, end = run.watched
        until = end if layers is None else min(run.next_layer + layers, end)
        together = end if until - run.next_layer == end and self._probes_together(first, end) else 1
        with self._precision():
            for layer in range(run.next_layer, until, together):
                self.store, run.state = self._run(
                    probe,
                    self.params,
                    self.store,
                    run.plan.page_tables,
                    run.rows,
                    run.looking,
                    run.state,
                    decoder=self.decoder,
                    layers=together,
                    watched=max(layer + together - max(layer, first), 0),
                    chunk=self._chunk(run.plan),
                )
        run.next_layer = until

    def _probes_together(self, first: int, end: int) -> bool:
        """Whether there is a program of all layers of this probe, or there may be one more."""
        if len(self._probed_together) < _PROBES_TOGETHER:
            self._probed_together.add((first, end))
        return (first, end) in self._probed_together

    @relayed
    def prefill(self, requests: Sequence[RequestPlan]) -> tuple[Float[Array, "requests vocab"], list[Computed]]:
        """Align and prefill requests with the same schedule, all layers at once.

        Returns:
          Float32 logits of each line's last token, and what was computed of each request.
        """
        run = self.begin(requests)
        self.advance(run)
        assert run.logits is not None
        return run.logits, run.computed()

    @relayed
    def copy(self, runs: Sequence[tuple[Segment, Sequence[int]]]) -> None:
        """Copy and align runs of cached KV, each into the pages of the sequence it belongs to."""
        for copies in plan_copies(runs, self.shapes, self.engine.page_size):
            self._align(self._sent(copies), 0, self.model.num_layers)

    @relayed
    def pack(self, packing: Packing) -> None:
        """Move patch rows, bit for bit, to the pages that keep them."""
        for rows in plan_packing(packing, self.shapes):
            self.store = self._call(pack, self.store, self._sent(rows), decoder=self.decoder)

    def _align(self, copies: Packed[Copies], first_layer: int, end_layer: int) -> None:
        layers = self._numbers[first_layer], self._numbers[end_layer]
        with self._precision():
            self.store = self._call(align, self.store, copies, layers, decoder=self.decoder)

    @relayed
    def first_tokens(
        self, logits: Float[Array, "requests vocab"], sampling: Sampling, position: Int[np.ndarray, "requests"]
    ) -> Sampled:
        """Sample from prefill logits the tokens that will stand at these positions: one step. Does not wait for the
        device."""
        sampled = _sample_step(logits, self._sent((sampling, position)), ops=self.decoder.ops)
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        return sampled

    @relayed
    def score(self, run: PrefillRun, following: Sequence[Int[np.ndarray, "_"]], number: int) -> list[Scores]:
        """Log-probabilities of tokens of the prompts, once all layers have run, on the host.

        Args:
          following: of each row of each request, the token to score behind it; -1: none.
          number: of the most probable tokens, for each. There are programs for at most one and for `MAX_LOGPROBS`.

        Returns:
          For each request, the scores of its rows, with `number` of the most probable tokens or more; with all tokens
          of the vocabulary where that is smaller.
        """
        asked = np.full(run.plan.fresh.size, -1, np.int32)
        sizes = [len(each) for each in following]
        asked[: sum(sizes)] = np.concatenate(following)
        number = min(1 if number <= 1 else MAX_LOGPROBS, self.model.vocab_size)
        with self._precision():
            scores = jax.device_get(
                self._run(score, self.params, run.state, asked, decoder=self.decoder, number=number)
            )
        own = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
        return [scores.of_rows(rows) for rows in own]

    @relayed
    def logits_of(self, logits: Float[Array, "requests vocab"], line: int) -> Float[Array, "vocab"]:
        """One line of logits, on its way to the host. Does not wait for the device."""
        found: Float[Array, "vocab"] = self._run(_line, logits, self._numbers[line], ops=self.decoder.ops)
        found.copy_to_host_async()
        return found

    @relayed
    def are_finite(self, logits: Float[Array, "requests vocab"]) -> Bool[np.ndarray, "requests"]:
        """Whether all logits of each line are finite. Waits for the device."""
        return np.asarray(self._call(_are_finite, logits))

    @relayed
    def finite_slots(self, pages: Sequence[int]) -> Bool[np.ndarray, "pages page_size"]:
        """Whether all KV of each slot of these pages is finite. Waits for the device."""
        batches = [
            np.resize(pages[at : at + _PAGES_LOOKED_AT], _PAGES_LOOKED_AT)
            for at in range(0, len(pages), _PAGES_LOOKED_AT)
        ]
        finite = [np.asarray(_finite_slots(self.store, batch)) for batch in batches]
        return np.concatenate([np.ones((0, self.engine.page_size), bool), *finite])[: len(pages)]

    @relayed
    def start_decode(
        self,
        state: DecodeState,
        steps: int,
        first: Sampled | None = None,
        line: Int[np.ndarray, "requests"] | None = None,
    ) -> tuple[DecodeState, Sampled]:
        """Up to `steps` tokens for each sequence of the state, at most the engine's `decode_steps`; -1 behind a
        sequence's end. Does not wait for the device.

        Args:
          first: what `first_tokens` gave, if some sequences get the token from there that stands in front of these.
          line: theirs in it, as `decode.behind_prefill` has it.
        """
        most, parts = self.engine.decode_steps, []
        together = steps_together(most, host_steers=self.host_steers)
        state = self.place(state, first, line)
        for begun in range(0, min(steps, most), together):
            state, sampled = self._decode(state, min(steps - begun, together), together)
            parts.append(sampled)
        return state, parts[0] if len(parts) == 1 else self._run(_joined, parts)

    def _decode(self, state: DecodeState, steps: int, together: int) -> tuple[DecodeState, Sampled]:
        """Dispatch the program of `together` steps once, for so many of them."""
        with self._precision():
            self.store, state, sampled = self._run(
                decode_in_graphs if is_for_graphs(self.decoder, len(state.token)) else decode,
                self.params,
                self.store,
                state,
                self._numbers[steps],
                decoder=self.decoder,
                steps=together,
                stops_early=not self.host_steers,
            )
        return state, sampled

    @relayed
    def start_forward(self, state: DecodeState) -> Float[Array, "requests vocab"]:
        """The last token of each sequence through all layers, for `choose`. Does not wait for the device."""
        with self._precision():
            self.store, scores = self._run(forward, self.params, self.store, self.place(state), decoder=self.decoder)
        return scores

    @relayed
    def choose(
        self, scores: Float[Array, "requests vocab"], state: DecodeState, allowed: UInt32[np.ndarray, "requests words"]
    ) -> tuple[DecodeState, Sampled]:
        """The next token of each sequence among those allowed. Does not wait for the device."""
        return self._run(choose, scores, self.place(state), self._placed(allowed))

    @relayed
    def with_pages(self, state: DecodeState, pages: Sequence[Sequence[int]]) -> DecodeState:
        """A placed state with other page tables: the physical pages of the sequence in each slot, in order."""
        tables = page_tables(pages, *state.page_tables.shape)
        return dataclasses.replace(state, page_tables=self._placed(tables))

    @relayed
    def place(
        self, state: DecodeState, first: Sampled | None = None, line: Int[np.ndarray, "requests"] | None = None
    ) -> DecodeState:
        """A state on the devices. It comes from the host, or from the dispatch before: placed alike, both run the same
        program. Arguments as `start_decode`.

        Where all of it is placed already, nothing is done: to find that out by `device_put` takes the host 1 ms.
        """
        if isinstance(state.token, np.ndarray):
            sampling = state.sampling.decided() if self.host_steers else state.sampling
            line = np.full(len(state.token), -1, np.int32) if line is None else line
            sent = self._sent((dataclasses.replace(state, sampling=sampling), line))
            token = self._no_first if first is None else first.token
            state = self._call(_unpacked, sent, token, ops=self.decoder.ops)
        is_placed = all(array.sharding == self._everywhere for array in jax.tree.leaves(state))
        return state if is_placed else self._placed(state)

    def _sent[Tree](self, tree: Tree) -> Packed[Tree]:
        """NumPy arrays on their way to every device, in one buffer."""
        return self._placed(packed(tree))

    def _placed[Tree](self, tree: Tree) -> Tree:
        """Arrays whole on every device, where they may be already."""
        placed: Tree = to_devices(tree, self._everywhere)
        return placed

    @relayed
    def place_adapter(self, slot: int, name: str, weights: AdapterWeights) -> None:
        """Write an adapter into a slot that no running sequence has. What is under way goes on with what it has.

        Raises:
          InvalidRequestError: it does not fit the model, or the dtype.
        """
        check_pairs(name, weights, self.model, self.mesh, self.engine.dtype)
        if self.engine.share_adapters:
            check_shared(name, weights)
        pairs = pairs_with_kv_copies(weights.pairs, self.model, self.mesh)
        stacks, apart = dict(self.params.adapters or {}), self.params.values_apart
        for target in stacks:
            stacks[target] = put(stacks[target], slot, pairs.get(target))
        apart = put_apart(apart, slot, pairs.get("wv")) if apart is not None else None
        self.params = self.params.replace(adapters=stacks, values_apart=apart)  # type: ignore[attr-defined]

    @relayed
    def recover(self) -> bool:
        """Make a new store if a failed step took the old one with it. True if the KV is lost."""
        try:
            jax.block_until_ready(self.store)
        except Exception:  # deleted, or what a step that failed on the device left behind
            self.store = make_store(self.model, self.engine, self.mesh)
            self._place_mailboxes()
            self.losses += 1
            return True
        return False

    def _place_mailboxes(self) -> None:
        """Give programs mailboxes for sums over the mesh, new ones, where its devices and the model can use them."""
        ops = self.decoder.ops
        if ops.exchanges(self.model.hidden_size, self.engine.dtype):
            mailboxes = make_mailboxes(self.mesh, ops.exchanged_rows, self.model.hidden_size)
            self.params = self.params.replace(mailboxes=mailboxes)  # type: ignore[attr-defined]

    def _precision(self) -> AbstractContextManager[None]:
        """Float32 means float32: accelerators would otherwise round the operands of a product."""
        return jax.default_matmul_precision("float32" if self.engine.dtype == "float32" else "default")
