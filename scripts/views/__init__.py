"""Views of result files, as Markdown: a module for each family of files, with its views by name at its end.

Needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Callable

from views import (
    agents,
    answers,
    calibration,
    conversations,
    drift,
    end_to_end,
    fleet,
    kernels,
    multi_gpu,
    plain,
    quality,
    serving,
    store,
    tpu,
    training,
)
from views.tables import Document

VIEWS: dict[str, Callable[[Document], str]] = (
    agents.VIEWS
    | answers.VIEWS
    | calibration.VIEWS
    | conversations.VIEWS
    | drift.VIEWS
    | end_to_end.VIEWS
    | fleet.VIEWS
    | kernels.VIEWS
    | multi_gpu.VIEWS
    | plain.VIEWS
    | quality.VIEWS
    | serving.VIEWS
    | store.VIEWS
    | tpu.VIEWS
    | training.VIEWS
)
