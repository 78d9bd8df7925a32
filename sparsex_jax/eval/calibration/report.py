"""What a calibration found: the file that engines read, a table and a verdict for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsex_jax.config import architecture
from sparsex_jax.engine import Engine
from sparsex_jax.eval import results
from sparsex_jax.eval.calibration.search import Attempt, Calibration, Selection
from sparsex_jax.eval.calibration.targets import Interval
from sparsex_jax.eval.calibration.trials import PromptSet


def model_name(model: str) -> str:
    """A model's name without its place.

    >>> model_name("models/tiny-q4_k_m.gguf")
    'tiny-q4_k_m'
    """
    return Path(model).expanduser().absolute().name.removesuffix(".gguf")


def file_content(engine: Engine, model: str, prompts: PromptSet, found: Calibration) -> dict[str, Any]:
    """The content of the file: the method and options to use, for which regimes they hold, and how they were found."""
    about = {"model": model_name(model), "architecture": architecture(engine.model), "holds_for": found.holds_for}
    measured = {
        "target": dataclasses.asdict(found.target),
        "prompts": dataclasses.asdict(prompts) | {"dtype": engine.config.dtype},
        "full_scores": dict(found.full_scores),
        "used": _selection(found.used, found) | {"times": {name: dict(each) for name, each in found.times.items()}},
        "by_regime": {regime: _selection(selection, found) for regime, selection in found.by_regime.items()},
    }
    used = found.used.reuse.to_dict() | _in_company(found)
    return about | used | {"measured": measured} | results.provenance(engine.mesh.size)


def _in_company(found: Calibration) -> dict[str, Any]:
    """What is used where donors are made in company, if that differs."""
    best = found.in_company
    return {} if best is None or best.reuse == found.used.reuse else {"in_company": best.reuse.to_dict()}


def _selection(selection: Selection, found: Calibration) -> dict[str, Any]:
    """A selection, with the figures of what it is based on, by regime."""
    basis = selection.basis(found.target.metric)
    return {
        "reuse": selection.reuse.to_dict(),
        "met": selection.met,
        "basis": basis.reuse.spec(),
        "candidates": len(selection.attempts),
        "refuted": sum(attempt.refuted for attempt in selection.attempts),
        "figures": figures(basis, found.target.metric),
    }


def figures(attempt: Attempt, metric: str) -> dict[str, Any]:
    """A candidate's figures by regime, ready for JSON."""
    return {
        name: {key: _plain(value) for key, value in trial.figures(metric).items()}
        for name, trial in attempt.trials.items()
    }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Interval) else value


# For people -------------------------------------------------------------------------------------------------


def table(found: Calibration) -> str:
    """Every candidate that was measured, in Markdown: a table for each regime."""
    return "\n".join(_table(selection, found) for selection in found.by_regime.values())


def _table(selection: Selection, found: Calibration) -> str:
    metric, (regime,) = found.target.metric, selection.regimes
    heading = [regime, "FLOPs", f"{metric} [95 %]", "prompts", "confirmed", "KL", "agreement", "score"]
    rule = ["---", *["--:"] * (len(heading) - 1)]
    lines = [
        heading,
        rule,
        *(
            _line(attempt.reuse.spec(), attempt.trials[regime].figures(metric), metric)
            for attempt in selection.attempts
        ),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _line(name: str, values: Mapping[str, Any], metric: str) -> list[str]:
    intervals = [_short(values[metric]), str(values[metric].samples), _short(values.get("confirmed"))]
    means = [f"{values[key]:.3f}" for key in ("flops_fraction", "kl", "agreement", "score")]
    return [name, means[0], *intervals, *means[1:]]


def _short(interval: Interval | None) -> str:
    return "-" if interval is None else results.score(dataclasses.asdict(interval))


def verdict(found: Calibration) -> str:
    """The result in sentences: for each regime, and what is used."""
    lines = [_sentence(selection, found) for selection in found.by_regime.values()]
    if len(found.by_regime) > 1:
        lines.append(f"Used: {found.used.reuse.spec()}, which holds for {', '.join(found.holds_for)}.")
    if found.in_company is not None and found.in_company.reuse != found.used.reuse:
        lines.append(f"Used by engines that make donors in company: {found.in_company.reuse.spec()}.")
    return "\n".join(lines)


def _sentence(selection: Selection, found: Calibration) -> str:
    (regime,), basis = selection.regimes, selection.basis(found.target.metric)
    values = basis.trials[regime].figures(found.target.metric)
    measured = (
        f"{found.target.metric} {values[found.target.metric]} at {values['flops_fraction']:.0%} of the operations"
    )
    scores = f"In {regime} full recompute scores {found.full_scores[regime]:.2f}. "
    if not selection.met:
        return (
            f"{scores}None of {len(selection.attempts)} candidates meets {found.target}, so segments are recomputed "
            f"there ({selection.reuse.spec()}). The nearest: {basis.reuse.spec()}, {measured}."
        )
    passed = sum(attempt.refuted for attempt in selection.attempts)
    return (
        f"{scores}The first of {len(selection.attempts)} candidates that meets {found.target}: {basis.reuse.spec()}, "
        f"{measured}. It was chosen by that figure, which flatters it; on other prompts: {values['confirmed']}."
        + f" {passed} cheaper ones met it on the first prompts only."
        * bool(passed)
    )
