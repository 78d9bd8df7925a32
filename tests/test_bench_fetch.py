"""The bench of fetching moves what it says between two processes, and its file makes the tables of the README."""

import bench_fetch as bench
import pytest
from views import VIEWS


def test_the_report_shows_all_that_was_measured():
    names = (("first round", "GB/s"), ("later round", "GB/s"), ("processor, giving", "s/GB"))
    rows = [bench.Row("32 MiB a block", name, 1.25, unit) for name, unit in (*names, ("processor, asking", "s/GB"))]
    rows += [bench.Row("one thread", "SHA-256", 0.75, "s/GB")]
    args = bench.parse(["--mebibytes", "64"])
    document = bench.about(args) | {"rows": [row.to_dict() for row in rows]}
    assert document["settings"] == {"mebibytes": 64, "page_sizes": [8, 16], "threads": [1, 4], "layers": 32}
    text = VIEWS["fetch"](document)
    assert "| 32 MiB a block | 1.25 | 1.25 | 1.25 | 1.25 |" in text
    assert "| SHA-256 | 0.75 |" in text


def test_blocks_are_those_of_an_8b_model():
    setup = bench.Setup(layers=32, page_size=16, mebibytes=256)
    assert (setup.block_bytes, setup.num_blocks) == (32 << 20, 8)
    [first, second, *_] = setup.blocks()
    assert (first.before, second.before, second.start) == (b"", first.key, 256)


@pytest.mark.slow
def test_all_blocks_come_in_each_round():
    rows = [*bench.fetched(bench.Setup(layers=2, page_size=8, mebibytes=4), threads=2)]
    assert [row.unit for row in rows] == ["GB/s", "GB/s", "s/GB", "s/GB"]
    assert all(row.figure > 0 for row in rows)
