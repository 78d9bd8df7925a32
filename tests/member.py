"""A process of a group, or all of it: serves requests that come and go, and prints the tokens of each as JSON.

python tests/member.py SEED TENSOR_PARALLEL [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from sparsex_jax import Engine, ReuseConfig, SamplingParams
from sparsex_jax.distributed import Membership, join, secret_of
from sparsex_jax.model.sharding import make_mesh

MODEL = Path(__file__).parent / "golden" / "llama"
METHODS = ("full", "prefix", "sparsex")


def main(seed, tensor_parallel, *membership):
    group = None
    if membership:
        coordinator, number, own = membership
        group = join(Membership(coordinator, int(number), int(own)), secret_of(os.environ), {})
    few = {"store_tokens": 12 * 16, "page_size": 16, "chunk_rows": 32, "max_num_seqs": 4, "choose": "always"}
    engine = Engine.from_pretrained(MODEL, mesh=make_mesh(int(tensor_parallel)), **few)
    if group is not None and not group.leads:
        group.follow(engine.runner)
    else:
        if group is not None:
            group.lead(engine.runner)
        print(json.dumps(serve(engine, np.random.default_rng(int(seed)))))
    if group is not None:
        group.close()


def serve(engine, rng):
    """On few pages, so that sequences are preempted. Some are cancelled; their tokens are not told."""
    known = rng.integers(1, 120, (3, 20)).tolist()
    engine.remember(known[0])
    tokens, ends, tickets = {}, {}, []
    for number in range(8):
        prompt = [int(rng.integers(1, 120)), *known[int(rng.integers(3))], *rng.integers(1, 120, rng.integers(1, 9))]
        sampling = SamplingParams(
            max_new_tokens=int(rng.integers(10, 90)),
            temperature=float(rng.choice([0.0, 1.0])),
            seed=number,
            ignore_eos=True,
        )
        tokens[number] = []

        def listen(event, number=number):
            tokens[number] += event.token_ids
            ends[number] = event.finish_reason or ends.get(number)

        reuse = ReuseConfig(METHODS[int(rng.integers(len(METHODS)))])
        options = {"reuse": reuse, "namespace": f"n{number % 2}", "listener": listen}
        tickets.append(engine.loop.submit([int(token) for token in prompt], sampling, **options))
        for _ in range(int(rng.integers(0, 3))):
            engine.loop.step()
        if rng.random() < 0.2:
            tickets[int(rng.integers(len(tickets)))].cancel()
    while engine.loop.step():
        pass
    engine.cache.check(held=[])
    preempted = engine.loop.stats.preempted
    return {
        "tokens": {number: tokens[number] for number, end in ends.items() if end == "length"},
        "preempted": preempted,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
