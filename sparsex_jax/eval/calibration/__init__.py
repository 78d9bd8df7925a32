"""Calibration: finds the cheapest reuse that keeps a stated quality, on the user's own model and a few prompts.

The candidates are all methods that a user may choose, with options that matter (`candidates`). They are measured from
the cheapest to the most expensive by the operations that they are predicted to take, until one meets the target. One is
abandoned as soon as it can no longer meet it, since only the cheapest is wanted. So the figures of abandoned candidates
come from few prompts, and from hard ones.

How quality is measured. The default is the *loss*: how much less an answer scores than full recompute's answer to the
same prompt, and 0 where it scores as much or more, so that a lucky answer does not make up for a spoiled one. Its mean
may be at most 0.02. A loss is what users notice, and harmless rewording costs nothing. The alternative is the
*disagreement*, 1 - `scores.agreement`, for which a greedy continuation that differs in one word counts as different
from there on. It needs no tasks that the model can do.

How sure it is. The mean has to meet the target, and the 95 % interval is reported with it: with 16 answers of which
none is spoiled, the loss may still be 0.19. With `confident`, the whole interval has to meet the target, and 0.02 takes
189 prompts. The first of many candidates that meets the target may have been lucky. So it has to meet it once more, on
as many other prompts, and both figures are reported; one that does not is passed over.

Regimes. What holds for documents that were stored in company does not hold for documents that were stored alone. So
each regime has a selection of its own. What is used is the cheapest candidate that meets the target in all of them, but
where an engine makes its donors in company, the selection for that.
"""

from sparsex_jax.eval.calibration.candidates import find_candidates
from sparsex_jax.eval.calibration.report import file_content, table, verdict
from sparsex_jax.eval.calibration.search import Attempt, Calibration, Selection, Trial, calibrate
from sparsex_jax.eval.calibration.targets import DISAGREEMENT, LOSS, MAX_LOSS, Interval, Target, check_samples
from sparsex_jax.eval.calibration.trials import PromptSet, Trials

__all__ = [
    "DISAGREEMENT",
    "LOSS",
    "MAX_LOSS",
    "Attempt",
    "Calibration",
    "Interval",
    "PromptSet",
    "Selection",
    "Target",
    "Trial",
    "Trials",
    "calibrate",
    "check_samples",
    "file_content",
    "find_candidates",
    "table",
    "verdict",
]
