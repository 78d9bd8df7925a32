"""A reuse method of your own, complete: a signal, a method, and a comparison with SparseX and full recompute.

    uv run python scripts/new_method.py

The signal scores by change: how far the layers before the boundary turned a token's hidden state away from its
embedding. The method recomputes the highest-scored 15 % of the reused tokens from the boundary on.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from sparsex_jax import Engine, ReuseConfig
from sparsex_jax.device.signals import Boundary, Scores, signal
from sparsex_jax.model import decoder
from sparsex_jax.reuse.methods import Count, Method, Phase, Share, budget
from sparsex_jax.reuse.prompt import PromptMap
from sparsex_kernels.layout import Store


@signal("turned")  # runs on the device, inside the jitted prefill: jax.numpy only, and shapes that do not change
def turned(boundary: Boundary, store: Store) -> tuple[Store, Scores]:
    """1 - cosine between each row's hidden state at the boundary and its embedding."""
    start = decoder.embed(boundary.forward.params, boundary.forward.decoder.config, boundary.rows.token)
    size = jnp.linalg.norm(start, axis=-1) * jnp.linalg.norm(boundary.hidden, axis=-1)
    return store, 1 - (start * boundary.hidden).sum(-1) / size  # one score for each row; the store is unchanged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turned(Method, name="turned"):
    """Compute everything up to the boundary layer, then the fresh tokens and those that the signal chooses."""

    boundary_layer: Count = 5  # the annotations say which values an option may have
    recompute_ratio: Share = 0.15

    def schedule(self, prompt: PromptMap, num_layers: int) -> list[Phase]:
        """Runs on the host, for each prompt: NumPy, before anything is computed."""
        chosen = budget(prompt, prompt.fresh, self.recompute_ratio)
        return [Phase(0, prompt.computed), Phase(self.boundary_layer, prompt.fresh, "turned", chosen)]


FACTS = (
    "Notes of Monday. The red box was carried down to the cellar and left beside the stairs.",
    "Notes of Tuesday. Anna owns the red box; she paid nine coins for it at the market.",
)
PROMPT = f"Read this.\n{FACTS[1]}\n{FACTS[0]}\nQuestion: where is the box that Anna owns? Answer: it is in the"


def main() -> None:
    engine = Engine.from_pretrained("smollm2-135m-instruct", dtype="float32", store_tokens=4096)
    for fact in FACTS:  # each is prefilled alone: later prompts find its KV, which has not seen the others
        engine.remember(fact)
    full = _log_softmax(engine.prefill(PROMPT, reuse=ReuseConfig("full"), keep=False).logits)
    print(f"{'method':10} {'computed':>9} {'KL from full':>13}  next token")
    for name in ("full", "sparsex", "turned", "naive"):
        # `fitting` gives each method those of the options that it has.
        asked = ReuseConfig.fitting(name, overflow_tokens=2, only_if_faster=False)
        out = engine.prefill(PROMPT, reuse=asked, keep=False)
        ours = _log_softmax(out.logits)
        divergence = (np.exp(full) * (full - ours)).sum()
        best = engine.tokenizer.decode([int(ours.argmax())])
        print(f"{name:10} {out.report.computed_fraction:9.0%} {divergence:13.4f}  {best!r}")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


if __name__ == "__main__":
    main()
