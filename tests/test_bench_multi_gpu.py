"""The bench of many devices: what it leaves out, how it goes on when a process died, and its rows on processors."""

import dataclasses
import json

import bench_multi_gpu
import pytest
from conftest import TINY, tiny_engine
from views import VIEWS

from sparsex_jax import Engine
from sparsex_jax.config import named_config
from sparsex_jax.model.sharding import make_mesh

ORIGIN = {"command": "bench_multi_gpu.py", "device": "cpu", "commit": ""}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(bench_multi_gpu, "origin", lambda: ORIGIN)
    return bench_multi_gpu


@pytest.fixture
def processes(bench, monkeypatch):
    """What processes were asked to measure. A decode of 2 requests kills its process."""
    asked = []

    def run(text):
        told = json.loads(text)
        asked.append(told)
        for case in told["decode"]:
            work = f"decode, {case.replace('x', ' x ')}"
            if [work, "decode"] in told["done"]:
                continue
            row = bench.Row(work, "decode", told["devices"], None, "ms a step", why=bench._BEGUN)
            yield row
            if case.startswith("2x"):
                raise bench.ChildFailed("exit code -9; its error is above")
            yield dataclasses.replace(row, figure=8.0 / told["devices"], why="")

    monkeypatch.setattr(bench, "in_a_process", run)
    return asked


def rows(folder):
    [file] = folder.iterdir()
    return {(row["work"], row["devices"]): row for row in json.loads(file.read_text())["rows"]}


COMMAND = ["--models", "tiny", "--tokens", "--lengths", "--devices", "1", "4", "--decode", "1x64", "2x64", "3x64"]


def test_a_process_that_dies_loses_one_row_and_another_goes_on(bench, processes, tmp_path):
    bench.main(COMMAND, tmp_path)
    figures = {named: row["figure"] for named, row in rows(tmp_path).items()}
    each = {1: 8.0, 4: 2.0}
    assert figures == {(f"decode, {n} x 64", d): None if n == 2 else each[d] for d in (1, 4) for n in (1, 2, 3)}
    assert rows(tmp_path)["decode, 2 x 64", 4]["why"] == "its process ended before the figure was there"
    assert [told["devices"] for told in processes] == [1, 1, 4, 4]


def test_a_process_that_measures_nothing_is_not_started_for_ever(bench, monkeypatch, tmp_path):
    def run(text):
        raise bench.ChildFailed("exit code 1")
        yield

    monkeypatch.setattr(bench, "in_a_process", run)
    bench.main(COMMAND, tmp_path)
    assert [row["why"] for row in rows(tmp_path).values()] == ["exit code 1"] * 2


def test_resuming_measures_what_lacks_and_what_failed(bench, processes, tmp_path):
    bench.main(COMMAND[:-1], tmp_path)
    processes.clear()
    bench.main([*COMMAND, "--resume"], tmp_path)
    done = {(told["devices"], tuple(sorted(map(tuple, told["done"])))) for told in processes}
    first = ("decode, 1 x 64", "decode")
    assert {(1, (first,)), (4, (first,))} <= done
    assert {named for named, row in rows(tmp_path).items() if row["figure"]} == {
        (f"decode, {n} x 64", d) for n in (1, 3) for d in (1, 4)
    }


def test_rows_of_a_process_come_until_it_fails(bench, monkeypatch, tmp_path):
    row = {"work": "w", "implementation": "i", "devices": 2, "figure": 1.0, "unit": "ms"}
    script = tmp_path / "child.py"
    script.write_text(f"print('a warning')\nprint({json.dumps(row)!r})\nraise SystemExit(3)")
    monkeypatch.setattr(bench, "__file__", str(script))
    found = []
    with pytest.raises(bench.ChildFailed, match="exit code 3"):
        found.extend(bench.in_a_process())
    coming = bench.in_a_process()
    assert next(coming) == bench.Row(**row)


def asked(bench, **more):
    settings = {"model": "llama-3.3-70b", "dtype": "bfloat16", "devices": 1, "lengths": (8192,), "runs": 1}
    return bench.Asked(**settings | {"decode": (bench.Case(1, 64),)} | more)


def test_a_device_holds_its_share_of_weights_and_store(bench):
    model = named_config("llama-3.3-70b")
    alone, share = (bench.bytes_needed(model, "bfloat16", number, 0) - bench._BESIDE_BYTES for number in (1, 4))
    assert alone == pytest.approx(2 * 70.55e9, rel=0.001)
    assert share == pytest.approx(alone / 4, rel=0.001)
    token = bench.bytes_needed(model, "bfloat16", 8, 1000) - bench.bytes_needed(model, "bfloat16", 8, 0)
    assert token == 1000 * 2 * 80 * 128 * 2  # one KV head


def test_what_does_not_fit_is_told_and_not_loaded(bench, monkeypatch):
    monkeypatch.setattr(bench, "device_bytes", lambda: 60e9)
    monkeypatch.setattr(bench, "make_engine", lambda *_, **__: pytest.fail("it would load"))
    told = [(row.work, row.figure, row.why) for row in bench.rows_of(asked(bench))]
    why = "it does not fit into 60 GB a device"
    assert told == [("TTFT, 8192 tokens, 95% reused in 16", None, why), ("decode, 1 x 64", None, why)]


def test_devices_that_are_not_there_are_told(bench):
    [row] = bench.rows_of(asked(bench, devices=16))
    assert "tensor_parallel=16 must be from 1 to 8" in row.why


def test_only_chooses_by_name(bench):
    chosen = asked(bench, only=("prefix", "decode"))
    assert [work for work, _ in bench.to_measure(chosen, 8192)] == ["TTFT, 8192 tokens, 95% a prefix"]
    assert chosen.lacks("decode, 1 x 64", "decode")
    assert not dataclasses.replace(chosen, done=frozenset([("decode, 1 x 64", "decode")])).lacks(
        "decode, 1 x 64", "decode"
    )


def test_the_table_has_scaling_all_reduces_and_reasons(bench):
    work = "TTFT, 8192 tokens, 95% reused in 16"
    given = [
        bench.Row(work, "full", 1, 200.0, "ms"),
        bench.Row(work, "sparsex l*=0, 5 %", 1, 50.0, "ms"),
        bench.Row(work, "full", 4, 80.0, "ms", all_reduces=20.0),
        bench.Row(work, "sparsex l*=0, 5 %", 4, 32.0, "ms"),
        bench.Row("decode, 64 x 8192", "", 1, None, "ms", why="it does not fit"),
    ]
    text = VIEWS["multi_gpu"](ORIGIN | {"rows": [dataclasses.asdict(row) for row in given]})
    assert f"| {work} | full | ms | 200.00 | 80.00 (2.50 times, all-reduces 25 %) |" in text
    assert f"| {work} | sparsex l*=0, 5 % | 4.00 | 2.50 |" in text
    assert "* Not measured on 1: decode, 64 x 8192: it does not fit" in text


def test_a_prompt_whose_stored_text_was_evicted_is_told_and_not_measured(bench):
    engine, length = tiny_engine(), 256
    work = bench.prefix_work(length, bench.REUSED)
    prompt = bench.stored_prompt(engine, length, work)
    case, reuse = asked(bench), bench.ReuseConfig("prefix")
    assert bench.first_token(case, engine, prompt, reuse, (work, "prefix")).figure > 0
    row = bench.first_token(case, engine, prompt, reuse, ("a namespace without it", "prefix"))
    assert (row.figure, row.why) == (None, "0 of the 243 stored tokens were found; the store is too small")


@pytest.mark.slow
def test_everything_is_measured_on_devices_that_share_the_model(bench, monkeypatch):
    model = dataclasses.replace(TINY, max_position=4096)

    def engine_of(_, *, tensor_parallel, **options):
        return Engine.from_config(model, mesh=make_mesh(tensor_parallel), **options)

    monkeypatch.setattr(bench, "named_config", lambda _: model)
    monkeypatch.setattr(bench, "make_engine", engine_of)
    small = asked(bench, model="tiny", dtype="float32", devices=2, lengths=(1024,))  # segments of 60
    figures = {(row.work, row.implementation): row.figure for row in bench.rows_of(small)}
    assert len(figures) == 5
    assert all(figure > 0 for figure in figures.values())
    [*equal] = bench.equal_tokens("tiny", [1, 2])
    assert [row.figure for row in equal] == [1.0] * 3
