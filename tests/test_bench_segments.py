"""The bench of segments in host memory runs anywhere."""

import json

import pytest
from test_bench_link import loaded


@pytest.mark.slow
def test_each_way_is_measured(tmp_path, capsys):
    loaded("bench_segments").main(["--length", "512", "--runs", "1", "--rates", "0"], tmp_path)
    [file] = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert [row["loaded_tokens"] for row in rows] == [0, 0, 512]
    assert "loaded beside the first layers" in capsys.readouterr().out
