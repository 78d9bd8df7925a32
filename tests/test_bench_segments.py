"""The benches of segments in host memory and of agents run anywhere."""

import json

import bench_agents
import bench_segments
import count_mirrors
import pytest
from views import VIEWS


@pytest.mark.slow
def test_each_way_to_answer_a_round_is_measured(tmp_path):
    sizes = {"agents": 2, "shared": 64, "private": 16, "rounds": 1, "answer": 2, "workloads": "debate"}
    asked = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    bench_agents.main([*asked, "--ways", "reordered", "one by one"], tmp_path)
    bench_agents.main([*asked, "--ways", "round", "--add"], tmp_path)
    [file] = tmp_path.iterdir()
    table = VIEWS["agents"](json.loads(file.read_text()))
    assert all(f"| {way} | " in table for way in ("reordered", "one by one", "round"))


def test_what_mirrors_take_is_counted(tmp_path, capsys):
    sizes = {"agents": 3, "shared": 1600, "private": 64, "rounds": 1, "answer": 8, "keep": 6}
    count_mirrors.main([word for name, value in sizes.items() for word in (f"--{name}", str(value))], tmp_path)
    [file] = tmp_path.iterdir()
    document = json.loads(file.read_text())
    figures = {(row["implementation"], row["work"].split(": ")[1]): row["figure"] for row in document["rows"]}
    for way in ("round", "one by one"):
        assert figures[way, "kept"] == 1
        assert 0.05 < figures[way, "mirror, of dense"] < 0.35
        assert 1.5 < figures[way, "smaller than dense"] < 3
    assert figures["dense", "kept"] < 4 < figures["mirrors", "kept"] == 6
    assert f"| 3 | 1600 | round | {figures['round', 'mirror, of dense']:.3f} |" in VIEWS["mirrors"](document)
    assert "turns, 6 agents in a store for 4" in capsys.readouterr().out


@pytest.mark.slow
def test_each_way_is_measured(tmp_path, capsys):
    bench_segments.main(["--length", "512", "--runs", "1", "--rates", "0"], tmp_path)
    [file] = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert [row["loaded_tokens"] for row in rows] == [0, 0, 512]
    assert "loaded beside the first layers" in capsys.readouterr().out
