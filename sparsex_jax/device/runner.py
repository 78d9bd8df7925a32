"""The device side of an engine: it owns the parameters and the store, and runs the jitted steps on them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from sparsex_jax.cache import Segment
from sparsex_jax.config import EngineConfig, ModelConfig
from sparsex_jax.device.decode import DecodeState, decode
from sparsex_jax.device.prefill import align, prefill
from sparsex_jax.device.sampling import Sampled, Sampling, sample_step
from sparsex_jax.model.decoder import Decoder
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.store import make_store
from sparsex_jax.model.weights import Params
from sparsex_jax.reuse.planner import RequestPlan, Shapes, needed_phases, plan_copies, plan_prefill

_sample_step = jax.jit(sample_step)


class PrefillRun:
    """A prefill under way, which can rest between two layers.

    Attributes:
      requests: what it prefills: requests of one schedule.
      next_layer: layers before it have run.
      logits: float32 `[requests, vocab]` of each line's last token, on the device, once all layers have run.
    """

    def __init__(self, requests: Sequence[RequestPlan], num_layers: int) -> None:
        self.requests, self.num_layers, self.next_layer = requests, num_layers, 0
        self.logits: Float[Array, "requests vocab"] | None = None
        self._computed: list[np.ndarray] = []

    @property
    def done(self) -> bool:
        return self.next_layer == self.num_layers

    def computed(self) -> list[np.ndarray]:
        """For each request which of its tokens each phase computed, `[phases, tokens]`, once all layers have run. May
        wait for the device."""
        return self._computed


class Runner:
    """Runs plans. Each call donates the store to a jitted step and keeps what comes back."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, params: Params, mesh: Mesh) -> None:
        self.model, self.engine, self.mesh, self.params = model, engine, mesh, params
        self.decoder = Decoder(model, Ops.on(mesh))
        self.shapes = Shapes.of_engine(model, engine, platform=mesh.devices.flat[0].platform)
        self.store = make_store(model, engine, mesh)

    def begin(self, requests: Sequence[RequestPlan]) -> PrefillRun:
        """Align the copies of requests with the same schedule; no layer has run yet."""
        return PrefillRun(requests, self.model.num_layers)

    def advance(self, run: PrefillRun, layers: int | None = None) -> None:
        """Run the next so many layers, or all that are left."""
        run.next_layer = self.model.num_layers if layers is None else min(run.next_layer + layers, run.num_layers)
        if run.done:
            run.logits, run._computed = self.prefill(run.requests)

    def prefill(self, requests: Sequence[RequestPlan]) -> tuple[Float[Array, "requests vocab"], list[np.ndarray]]:
        """Align and prefill requests with the same schedule.

        Returns:
          Float32 logits of each line's last token, and for each request which of its tokens each phase computed,
          `[phases, tokens]`.
        """
        self.copy([(segment, request.pages) for request in requests for segment in request.copies])
        plan, signals = plan_prefill(requests, self.shapes, self.model.num_layers)
        _, chunk = self.shapes.bucket(plan.fresh.size)
        with self._precision():
            self.store, logits, active = prefill(
                self.params, self.store, plan, decoder=self.decoder, signals=signals, chunk=chunk
            )
        return logits, _computed(requests, active, self.model.num_layers)

    def copy(self, runs: Sequence[tuple[Segment, Sequence[int]]]) -> None:
        """Copy and align runs of cached KV, each into the pages of the sequence it belongs to."""
        for copies in plan_copies(runs, self.shapes, self.engine.page_size):
            with self._precision():
                self.store = align(self.store, copies, decoder=self.decoder)

    def first_tokens(
        self, logits: Float[Array, "requests vocab"], sampling: Sampling, position: Int[np.ndarray, "requests"]
    ) -> Sampled:
        """Sample from prefill logits the tokens that will stand at these positions: one step, on the host."""
        return jax.device_get(_sample_step(logits, sampling, position))

    def decode(self, state: DecodeState, steps: int) -> tuple[DecodeState, Sampled]:
        """Up to `steps` tokens for each request of the state, on the host; -1 behind a request's end."""
        state, sampled = self.start_decode(state, steps)
        return state, jax.device_get(sampled)

    def start_decode(self, state: DecodeState, steps: int) -> tuple[DecodeState, Sampled]:
        """The same without waiting for the device. At most the engine's `decode_steps`."""
        most = self.engine.decode_steps
        # From the host, or from the dispatch before: placed alike, both run the same program.
        state = jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))
        with self._precision():
            self.store, state, sampled = decode(
                self.params, self.store, state, np.int32(steps), decoder=self.decoder, steps=most
            )
        return state, sampled

    def recover(self) -> bool:
        """Make a new store if a failed step took the old one with it. True if the KV is lost."""
        try:
            jax.block_until_ready(self.store)
        except Exception:  # deleted, or what a step that failed on the device left behind
            self.store = make_store(self.model, self.engine, self.mesh)
            return True
        return False

    def _precision(self) -> AbstractContextManager[None]:
        """Float32 means float32: accelerators would otherwise round the operands of a product."""
        return jax.default_matmul_precision("float32" if self.engine.dtype == "float32" else "default")


def _computed(
    requests: Sequence[RequestPlan], active: Bool[Array, "later_phases rows"], num_layers: int
) -> list[np.ndarray]:
    """From rows of the plan to tokens of each prompt. Waits for the device only if there is a later phase.

    A phase that the plan left out computes what the one before it does.
    """
    needed = needed_phases(requests, num_layers)
    ran = np.searchsorted(needed, np.arange(len(requests[0].phases)), side="right") - 1
    sizes = [request.num_rows for request in requests]
    rows = np.ones((len(needed), sum(sizes)), bool)
    if len(needed) > 1:
        rows[1:] = np.asarray(active)[:, : sum(sizes)]
    masks = [np.zeros((len(ran), len(request.prompt)), bool) for request in requests]
    for request, mask, part in zip(requests, masks, np.split(rows, np.cumsum(sizes)[:-1], axis=1), strict=True):
        mask[:, request.phases[0].forced] = part[ran]
    return masks
