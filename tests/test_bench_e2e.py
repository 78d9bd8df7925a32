"""The end-to-end bench: its reference computes the same as the engine, and its counts of bytes and tokens are right."""

import dataclasses
import json

import bench_e2e as bench
import jax
import numpy as np
import pytest
from conftest import CONFIG, TINY

from sparsex_jax import Engine, ReuseConfig


@pytest.mark.parametrize("qk_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_plain_program_computes_full_recompute(qk_norm):
    engine = Engine.from_config(dataclasses.replace(TINY, qk_norm=qk_norm), **vars(CONFIG))
    prompt = np.random.default_rng(0).integers(1, TINY.vocab_size, 60).astype(np.int32)
    logits, kv = bench.plain(engine.runner.params, prompt, config=engine.model)
    expected = engine.prefill(prompt, reuse=ReuseConfig("full"), keep=False).logits
    np.testing.assert_allclose(logits[0], expected, atol=2e-5)
    assert kv.shape == (TINY.num_layers, 2, 60, TINY.num_kv_heads, TINY.head_dim)


def test_first_tokens_of_a_prompt_of_stored_segments(tiny):
    asked = {"full": ReuseConfig("full"), "naive": ReuseConfig("naive")}
    rows = list(bench.first_tokens(tiny, 120, segments=3, reused=0.8, runs=1, asked=asked))
    assert [row.implementation for row in rows] == ["full", "plain scan", "naive", "host, before the device"]
    full, _, naive, host = rows
    assert full.computed == 1
    assert full.bound == full.figure
    assert naive.computed == pytest.approx((120 - 3 * 32) / 120, abs=0.02)  # a segment's neighbour may match by chance
    # Fresh tokens are spread evenly, so they attend to as many keys on average as all tokens do.
    assert naive.bound == pytest.approx(full.figure * naive.computed, rel=0.02)
    assert 0 < host.figure < naive.figure
    assert naive.predicted is None  # tests measure nothing
    json.dumps([dataclasses.asdict(row) for row in rows])


def test_the_first_token_behind_a_prefix(tiny):
    row = bench.first_token_behind_a_prefix(tiny, 128, reused=0.75, runs=1)
    assert (row.work, row.implementation) == ("TTFT, 128 tokens, 75% a prefix", "prefix")
    assert row.computed == 0.25


def test_a_plain_program_that_finds_no_memory_loses_its_own_row_only(tiny, monkeypatch, capsys):
    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(bench, "plain", fails)
    message = "RESOURCE_EXHAUSTED: Out of memory"
    assert list(bench.plain_rows(tiny, np.ones(8, np.int32), 1, "some work")) == []
    assert "some work: the plain scan found no memory" in capsys.readouterr().err
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        list(bench.plain_rows(tiny, np.ones(8, np.int32), 1, "some work"))


def test_cases_share_no_tokens(tiny):
    for segments, reused in ((3, 0.8), (3, 0.4), (1, 0.4)):
        rows = list(bench.first_tokens(tiny, 120, segments, reused, runs=1, asked={"naive": ReuseConfig("naive")}))
        stored = int(120 * reused) // segments * segments
        assert rows[0].computed == pytest.approx((120 - stored) / 120, abs=0.02)


def test_a_decode_step_reads_the_kv_and_all_weights_but_the_embedding_table(tiny):
    params = jax.tree.leaves(tiny.runner.params)
    table = 0 if TINY.tied_embeddings else tiny.runner.params.embed.nbytes
    weights = sum(leaf.nbytes for leaf in params) - table
    one = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    assert bench.decode_bytes(tiny, 10) == weights + 10 * one
