"""Result files: what was measured stays, whatever ends a bench; and how scripts end."""

import json
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest

from sparsex_jax.cli.terminal import run_script
from sparsex_jax.errors import ResultFileError
from sparsex_jax.eval import results
from sparsex_jax.eval.arguments import count, positive

ABOUT = {"bench": "cups", "device": "cpu"}


def measured(ends_with):
    yield {"figure": 1}
    yield {"figure": 2}
    raise ends_with


@pytest.mark.parametrize("end", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_rows_that_were_measured_stay(tmp_path, end):
    with pytest.raises(type(end)):
        results.write_rows(ABOUT, measured(end), tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    assert json.loads(path.read_text()) == ABOUT | {"rows": [{"figure": 1}, {"figure": 2}]}


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    rows = iter([{"figure": 1}])
    with pytest.raises(ResultFileError, match=r"nothing can be written to .*file: "):
        results.write_rows(ABOUT, rows, tmp_path / "file")
    assert next(rows) == {"figure": 1}


def test_what_cannot_be_written_is_printed(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(ResultFileError, match=r"cups-cpu.json cannot be written: .*; it is printed instead"):
        results.write_json(ABOUT | {"rows": [3]}, tmp_path / "file")
    assert json.loads(capsys.readouterr().out)["rows"] == [3]


@pytest.mark.parametrize("text", ["0", "-2", "1.5", "two", ""])
def test_counts_are_integers_of_one_or_more(text):
    with pytest.raises(ArgumentTypeError, match="must be an integer of 1 or more"):
        count(text)
    assert count("12") == 12


@pytest.mark.parametrize("text", ["0", "-0.5", "nan", "inf", "fast"])
def test_positive_numbers_are_finite_and_above_zero(text):
    with pytest.raises(ArgumentTypeError, match="must be a number above 0"):
        positive(text)
    assert positive("1e-3") == 0.001


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "Interrupted."), (ResultFileError("the disk is\nfull"), 2, "error: the disk is full")],
)
def test_scripts_end_with_one_line(error, code, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert (ended.value.code, capsys.readouterr().err.strip()) == (code, said)


def test_a_script_that_is_terminated_ends_what_it_started():
    script = """
import contextlib, sys
from sparsex_jax.cli.terminal import run_script
def main():
    with contextlib.closing(sys.stdout):
        try:
            print("ready", flush=True)
            sys.stdin.read()
        finally:
            print("cleared", flush=True)
run_script(main)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.stdout.read() == b"cleared\n"
        assert process.wait(30) == 143
