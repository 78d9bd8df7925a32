"""The benches of segments in host memory and of agents run anywhere."""

import json

import pytest
from test_bench_link import loaded
from test_report_results import report_results


@pytest.mark.slow
def test_each_way_to_answer_a_round_is_measured(tmp_path):
    sizes = {"agents": 2, "shared": 64, "private": 16, "rounds": 1, "answer": 2, "workloads": "debate"}
    asked = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    loaded("bench_agents").main([*asked, "--ways", "reordered", "one by one"], tmp_path)
    loaded("bench_agents").main([*asked, "--ways", "round", "--add"], tmp_path)
    [file] = tmp_path.iterdir()
    table = report_results.agents(json.loads(file.read_text()))
    assert all(f"| {way} | " in table for way in ("reordered", "one by one", "round"))


@pytest.mark.slow
def test_each_way_is_measured(tmp_path, capsys):
    loaded("bench_segments").main(["--length", "512", "--runs", "1", "--rates", "0"], tmp_path)
    [file] = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert [row["loaded_tokens"] for row in rows] == [0, 0, 512]
    assert "loaded beside the first layers" in capsys.readouterr().out
