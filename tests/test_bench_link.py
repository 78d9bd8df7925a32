"""The link's bench runs anywhere, moves what it says, and its file makes the tables of the README."""

import dataclasses

import bench_link as bench
import pytest
from conftest import TINY
from views import VIEWS

from sparsex_jax import EngineConfig


@pytest.fixture(scope="module")
def setup():
    engine = EngineConfig(store_tokens=32 * 8, page_size=8, dtype="bfloat16")
    return bench.Setup(dataclasses.replace(TINY, num_kv_heads=4), engine, devices=2, pages=32, matrix=64)


def test_it_moves_all_pages_of_its_store(setup):
    made = bench.Bench(setup, block_pages=8, num_groups=2)
    assert setup.nbytes == made.store.nbytes == sum(block.nbytes for block in made.blocks)
    assert made.piece_bytes == setup.nbytes // 4 // 2
    assert sum(piece.nbytes for piece in made.up()) == sum(piece.nbytes for piece in made.down()) == setup.nbytes


def test_the_report_shows_all_that_was_measured(setup):
    rows = [*bench.other_steps(setup), *bench.beside_compute(setup)]
    rows += [bench.Row("pieces of 1 MiB", way, 12.34, "GB/s") for way in ("down", "up", "both")]
    assert all(row.figure > 0 for row in rows)
    document = bench.about(setup) | {"rows": [row.to_dict() for row in rows]}
    assert document["bench"] == "link-2-devices"
    assert "no link" in document["note"]
    text = VIEWS["link"](document)
    assert "| pieces of 1 MiB | 12.3 | 12.3 | 12.3 |" in text
    assert all(row.implementation in text for row in rows)


def test_the_default_shape_is_that_of_an_8b_model():
    setup = bench.Setup.of(2048, devices=1, layers=32, matrix=8192)
    assert (setup.pages, setup.nbytes) == (256, 2048 << 20)
