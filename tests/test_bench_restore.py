"""The bench of restored prefixes runs anywhere."""

import json

import bench_restore as bench
import pytest


@pytest.mark.slow
def test_each_way_is_measured(tmp_path, capsys):
    bench.main(["--lengths", "512", "--runs", "1", "--rates", "equal", "0"], tmp_path)
    [file] = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert [row["implementation"] for row in rows] == [
        bench.COMPUTED,
        *(2 * [bench.LOADED, bench.BOTH, "share that was loaded"]),
    ]
    assert all(row["figure"] > 0 for row in rows)
    assert "512 tokens" in capsys.readouterr().out
