"""Which replica should a request go to: the one where least work is left, counting what it has stored already.

It is pure Python and NumPy, and knows nothing of Ray, HTTP or devices.

Read in this order: `digest` (what a replica says of its store), `updates` (how that travels), `policy` (the choice, by
numbers alone), `holders` (who holds what), `fleet` (what each has to do), `expected` (what is not told yet), and
`router`, which ties them together for one process that routes.
"""

from sparsex_jax.routing.digest import Ask, Holdings, Sketch
from sparsex_jax.routing.fleet import Load
from sparsex_jax.routing.policy import POLICIES, Candidates, LeastLoaded, Policy, RoundRobin, SegmentPolicy
from sparsex_jax.routing.router import Applied, Position, Router, Ticket
from sparsex_jax.routing.updates import Update

__all__ = [
    "POLICIES",
    "Applied",
    "Ask",
    "Candidates",
    "Holdings",
    "LeastLoaded",
    "Load",
    "Policy",
    "Position",
    "RoundRobin",
    "Router",
    "SegmentPolicy",
    "Sketch",
    "Ticket",
    "Update",
]
