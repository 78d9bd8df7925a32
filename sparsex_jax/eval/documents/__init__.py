"""Tasks on documents that read like real ones, of any length, for models that read English.

Each segment is one document: a report about a place, the logbook of a ship, the portrait of a person, an e-mail or a
Python module. The facts that are asked for stand between sentences of `prose`. The documents of a sample are all of one
kind, and others than the one with the answer have facts of the kind asked for. The names begin as RULER's tasks do,
where they ask for the same: `mq` for several keys, `mv` for several values of one key, `vt` for a value that is handed
on, `cwe` for what is most common, `qa` for facts.
"""

from typing import Protocol

import numpy as np

from sparsex_jax.eval.documents import emails, logbooks, modules, parts, portraits, reports
from sparsex_jax.eval.samples import Body, BodySize


class Task(Protocol):
    """Generates the body of a sample."""

    __name__: str

    def __call__(self, rng: np.random.Generator, size: BodySize) -> Body: ...


# The prompts of a task depend on its place in this list, so that new ones stand at the end.
_TASKS: tuple[Task, ...] = (
    reports.report_codes,
    reports.report_people,
    reports.two_hop,
    reports.changed,
    logbooks.log_cargo,
    logbooks.mv_niah,
    reports.mq_codes,
    logbooks.mv_ports,
    logbooks.vt_keys,
    logbooks.cwe_goods,
    portraits.qa_people,
    emails.email_rooms,
    modules.module_constants,
    modules.module_returns,
)
TASKS = {task.__name__: task for task in _TASKS}
_ON_MODULES = (modules.module_constants, modules.module_returns)
INSTRUCTIONS = {name: modules.INSTRUCTION if task in _ON_MODULES else parts.INSTRUCTION for name, task in TASKS.items()}
# For each task, one on documents of another kind.
STRANGERS = {
    name: "report_codes" if task.__module__ == logbooks.__name__ else "log_cargo" for name, task in TASKS.items()
}
