"""A reuse method of your own, complete: a signal, a method, and a comparison with SparseX and full recompute.

    uv run python scripts/new_method.py

The signal scores by surprise: tokens whose hidden state the layers before the boundary turned furthest from the
input embedding. The method recomputes the highest-scored 15 % of the reused tokens from the boundary on.
"""

import jax.numpy as jnp
import numpy as np

from sparsex_jax import Engine, ReuseConfig
from sparsex_jax.device.signals import signal
from sparsex_jax.model import decoder
from sparsex_jax.reuse.methods import Phase, boundary_layer, budget, method


@signal("turned")  # runs on the device, inside the jitted prefill: jax.numpy only, shapes fixed
def turned(boundary, store):
    """1 - cosine between each row's hidden state at the boundary and its embedding."""
    start = decoder.embed(boundary.run.params, boundary.rows.token)
    size = jnp.linalg.norm(start, axis=-1) * jnp.linalg.norm(boundary.hidden, axis=-1)
    return store, 1 - (start * boundary.hidden).sum(-1) / size  # one score a row; the store is as it was


@method("turned", uses_segments=True)  # runs on the host, for each prompt: NumPy, before anything is computed
def by_turn(prompt, reuse, num_layers):
    """All tokens up to the boundary layer, then the fresh ones and those that the signal chooses."""
    chosen = budget(prompt, prompt.fresh, reuse.recompute_ratio)
    return [
        Phase(0, prompt.computed),
        Phase(boundary_layer(reuse, num_layers), prompt.fresh, "turned", chosen),
    ]


def main() -> None:
    engine = Engine.from_pretrained("smollm2-135m-instruct", dtype="float32", store_tokens=4096)
    facts = [
        "Notes of Monday. The red box was carried down to the cellar and left beside the stairs.",
        "Notes of Tuesday. Anna owns the red box; she paid nine coins for it at the market.",
    ]
    for fact in facts:  # each is prefilled alone: later prompts find its KV, which has not seen the others
        engine.remember(fact)
    prompt = f"Read this.\n{facts[1]}\n{facts[0]}\nQuestion: where is the box that Anna owns? Answer: it is in the"
    full = _log_softmax(engine.prefill(prompt, reuse=ReuseConfig("full"), keep=False).logits)
    print(f"{'method':10} {'computed':>9} {'KL from full':>13}  next token")
    for name in ("full", "sparsex", "turned", "naive"):
        out = engine.prefill(prompt, reuse=ReuseConfig(name, overflow_tokens=2), keep=False)
        ours = _log_softmax(out.logits)
        divergence = (np.exp(full) * (full - ours)).sum()
        best = engine.tokenizer.decode([int(ours.argmax())])
        print(f"{name:10} {out.report.computed_fraction:9.0%} {divergence:13.4f}  {best!r}")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


if __name__ == "__main__":
    main()
