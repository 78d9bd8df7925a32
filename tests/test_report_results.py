"""READMEs: their tables are what the result files say, their links lead somewhere, their examples are Python."""

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import report_results
import views

ROOT = Path(__file__).parents[1]

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "kernels" / "README.md"]
PAGES += [
    ROOT / folder / "README.md"
    for folder in (
        "sparsex_jax",
        "sparsex_jax/distributed",
        "sparsex_jax/reuse",
        "sparsex_jax/routing",
        "sparsex_jax/serving",
        "scripts/results",
    )
]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", report_results.READMES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_what_the_files_say(page):
    text = page.read_text()
    assert "<!-- results: " in text
    assert report_results.refreshed(text) == text, "run python scripts/report_results.py"


def test_a_figure_that_was_changed_by_hand_is_noticed():
    text = (report_results.RESULTS / "README.md").read_text()
    tampered = re.sub(r"0\.62 \[", "0.99 [", text, count=1)
    assert tampered != text
    assert report_results.refreshed(tampered) == text


def test_every_result_file_is_on_the_page():
    shown = report_results.files_shown((report_results.RESULTS / "README.md").read_text())
    calibrations = report_results.ROOT / "configs" / "calibrations"
    paths = [*report_results.RESULTS.glob("*.json"), *calibrations.glob("*.json")]
    assert {(report_results.RESULTS / name).resolve() for name in shown} == set(paths)


@pytest.mark.parametrize("name", [each.name for each in pkgutil.iter_modules(views.__path__)])
def test_views_do_what_their_docstrings_say(name):
    assert doctest.testmod(importlib.import_module(f"views.{name}")).failed == 0


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pages
def test_files_that_are_named_exist(page):
    """Paths in backquotes, from the repository's root or from the page's folder; not those with placeholders."""
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|json|toml|png))`", page.read_text()):
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


@pages
def test_examples_are_python(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        ast.parse(code)
