"""The cost model of a prefill, the speeds that it takes, and admission that uses it."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import CONFIG, TINY, idle, sharded_tiny, tiny_engine, tiny_params

import sparsex_jax.engine
from sparsex_jax import Engine, EngineConfig, InvalidRequestError, ReuseConfig
from sparsex_jax.device import measuring, speeds
from sparsex_jax.device.compilation import num_compilations
from sparsex_jax.eval.flops import _Layers
from sparsex_jax.reuse.cost import ChunkTimes, Speeds, mean_keys, prefill_seconds

DOCUMENT, NEW = np.split(np.random.default_rng(0).integers(1, 97, 340).astype(np.int32), [300])
PROMPT = np.concatenate([NEW, DOCUMENT, NEW])

# In arbitrary units. A layer takes 1 for each row, or 512 for any number of rows; a copied token next to nothing.
CHUNK = ChunkTimes(rows=(1, 512), layer=(1.0, 512.0), key=(0.0, 0.0))
PER_ROW = Speeds(small=CHUNK, large=CHUNK, start=0.0, boundary=0.0, copy=0.0, copied_token=1e-3)
WHOLE = dataclasses.replace(CHUNK, layer=(512.0, 512.0))
PER_CHUNK = dataclasses.replace(PER_ROW, small=WHOLE, large=WHOLE)


@pytest.fixture
def engine(tiny) -> Engine:
    tiny.remember(DOCUMENT, namespace="n")
    return tiny


def seconds(engine: Engine, speeds: Speeds = PER_ROW, **options) -> float:
    with engine.prefilled(PROMPT, reuse=ReuseConfig(**options), namespace="n") as sequence:
        return prefill_seconds(TINY, sequence.plan, speeds)


# The formula ------------------------------------------------------------------------------------------------


def test_less_work_is_predicted_to_take_less_time(engine):
    full, late, early, none = (
        seconds(engine, **options)
        for options in ({"method": "full"}, {"boundary_layer": 3}, {"boundary_layer": 1}, {"method": "naive"})
    )
    assert full > late > early > none > 0


def test_the_parts_of_a_prefill_add_up(engine):
    """Computed by hand: 380 tokens in 4 layers, and 80 of them fresh beside 300 that are copied."""
    speeds = dataclasses.replace(PER_ROW, start=7.0, copy=5.0)
    assert seconds(engine, speeds, method="full") == pytest.approx(7 + 4 * 380)
    assert seconds(engine, speeds, method="naive") == pytest.approx(7 + 4 * 80 + 5 + 300e-3)
    with_keys = dataclasses.replace(speeds, small=dataclasses.replace(CHUNK, key=(0.1, 0.1)))
    keys = (128 + 256 + 380) / 3  # that a tile of 128 rows reads
    assert seconds(engine, with_keys, method="full") == pytest.approx(7 + 4 * (380 + 0.1 * keys))


def test_each_layer_a_probe_runs_is_counted(engine):
    probe, plain = (seconds(engine, method=name) for name in ("prophetkv", "sparsex"))
    assert probe > seconds(engine, method="sparsex", boundary_layer=0) > 0
    assert plain > 0


def test_rows_go_through_a_layer_a_chunk_at_a_time():
    times = ChunkTimes(rows=(1, 2, 4), layer=(3.0, 3.0, 5.0), key=(0.0, 0.0, 0.0))
    taken = [times.layer_seconds(np.arange(rows)) for rows in range(10)]
    assert taken == [0, 3, 3, 4, 5, 8, 8, 9, 10, 13]


def test_a_plans_rows_keep_its_shape():
    speeds = dataclasses.replace(PER_ROW, small=dataclasses.replace(CHUNK, rows=(1, 64)))
    assert [speeds.of_plan(rows) is speeds.small for rows in (1, 64, 65)] == [True, True, False]


def test_a_tile_of_rows_reads_the_keys_up_to_its_last_row():
    assert mean_keys(np.arange(0)) == 0
    assert mean_keys(np.array([0, 999])) == 1000
    assert mean_keys(np.arange(128)) == 128
    assert mean_keys(np.arange(129)) == (128 + 129) / 2


def test_a_tile_of_rows_reads_what_its_windows_show():
    assert mean_keys(np.arange(128), 10) == 128
    assert mean_keys(np.arange(500, 628), 10) == 137
    assert mean_keys(np.array([500]), 10) == 10
    assert mean_keys(np.array([3]), 10) == 4
    times = ChunkTimes(rows=(1, 512), layer=(1.0, 512.0), key=(1.0, 1.0))
    assert times.layers_seconds(np.array([99]), [None, 10, 10]) == 3 + 100 + 10 + 10


def test_operations_count_what_windows_show():
    rows, mlp = np.ones(100, bool), dataclasses.replace(TINY, layer_windows=(10, None, None, 10))
    plain, windowed = (_Layers(model).run(rows) for model in (TINY, mlp))
    hidden = 90 * 91 // 2  # keys before the windows, of all rows in a layer
    assert plain - windowed == 4 * TINY.num_q_heads * TINY.head_dim * 2 * hidden


# What admission does with it --------------------------------------------------------------------------------


@pytest.mark.parametrize(("speeds", "reused"), [(PER_ROW, 300), (PER_CHUNK, 0)], ids=["pays", "does not pay"])
def test_segments_that_do_not_save_time_are_recomputed(engine, speeds, reused):
    engine.admission.choice.speeds = speeds
    asked = ReuseConfig("naive")
    out = engine.prefill(PROMPT, reuse=asked, namespace="n", keep=False)
    assert out.report.reused_tokens == reused
    forced = asked.updated(method="naive" if reused else "full", only_if_faster=False)
    expected = engine.prefill(PROMPT, reuse=forced, namespace="n", keep=False)
    np.testing.assert_allclose(out.logits, expected.logits, atol=2e-5)
    assert idle(engine)


def test_what_is_forced_is_reused_even_if_it_is_slower(engine):
    engine.admission.choice.speeds = PER_CHUNK
    asked = ReuseConfig("naive", only_if_faster=False)
    assert engine.prefill(PROMPT, reuse=asked, namespace="n", keep=False).report.reused_tokens == 300


@pytest.fixture
def measured(monkeypatch) -> list[Speeds]:
    """Engines measure as they do outside of tests, but are given these speeds; those that were given."""
    given: list[Speeds] = []

    def give(runner, lend):
        with lend(64) as pages:
            assert len(pages) == 4
        given.append(PER_CHUNK)
        return given[-1]

    monkeypatch.setattr(sparsex_jax.engine, "speeds_for", give)
    return given


def test_an_engine_measures_when_a_request_first_finds_something(measured):
    engine = Engine(TINY, tiny_params(), config=CONFIG)
    engine.remember(DOCUMENT)
    for reuse in (ReuseConfig("prefix"), ReuseConfig("naive", only_if_faster=False)):
        engine.prefill(PROMPT, reuse=reuse, keep=False)
        assert not measured
    for _ in range(2):
        assert engine.prefill(PROMPT, reuse=ReuseConfig("naive"), keep=False).report.reused_tokens == 0
        assert len(measured) == 1
    assert idle(engine)


def test_an_engine_that_always_reuses_measures_nothing(measured):
    engine = tiny_engine(choose="always")
    engine.remember(DOCUMENT)
    assert engine.prefill(PROMPT, reuse=ReuseConfig("naive")).report.reused_tokens == 300
    assert not measured
    with pytest.raises(InvalidRequestError, match="choose='never' must be one of measured, always"):
        EngineConfig(choose="never")


def test_what_is_found_is_reused_where_measuring_fails(monkeypatch, caplog):
    monkeypatch.setattr(sparsex_jax.engine, "speeds_for", lambda *_: 1 / 0)
    engine = Engine(TINY, tiny_params(), config=CONFIG)
    engine.remember(DOCUMENT)
    assert engine.prefill(PROMPT, reuse=ReuseConfig("naive")).report.reused_tokens == 300
    assert "could not be measured" in caplog.text


# The measurement --------------------------------------------------------------------------------------------


def check(speeds: Speeds) -> None:
    small, large = speeds.small, speeds.large
    times = [
        *small.layer,
        *small.key,
        *large.layer,
        *large.key,
        speeds.start,
        speeds.boundary,
        speeds.copy,
        speeds.copied_token,
    ]
    assert np.isfinite(times).all()
    assert min(times) >= 0
    assert speeds.start > 0
    assert (small.rows, large.rows) == ((1, 4, 16), (1, 8, 32))


@pytest.fixture
def quick(monkeypatch) -> None:
    """A single round of timings."""
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)


def test_a_measurement_leaves_the_cached_kv_alone_and_compiles_nothing_that_runs_do_not_need(engine, quick):
    before = engine.prefill(PROMPT, reuse=ReuseConfig("naive"), namespace="n", keep=False).logits
    for number in (3, 400):  # of fresh tokens: in the two smallest plans
        engine.prefill(np.arange(number) % 90, reuse=ReuseConfig("full"), keep=False)
    compiled = num_compilations()
    with engine.admission.lend(measuring.wanted_tokens(engine.runner)) as pages:
        check(measuring.measure_speeds(engine.runner, pages))
    assert num_compilations() <= compiled + 3  # the smallest copy, and arithmetic on scalars
    after = engine.prefill(PROMPT, reuse=ReuseConfig("naive"), namespace="n", keep=False)
    assert after.report.reused_tokens == 300
    np.testing.assert_array_equal(after.logits, before)
    assert idle(engine)


def test_a_full_store_lends_a_page(engine, quick):
    with contextlib.ExitStack() as stack:
        free = engine.stats()["free"]
        stack.enter_context(engine.admission.lend(free * CONFIG.page_size))
        with engine.admission.lend(100) as pages:
            assert len(pages) == 1
            check(measuring.measure_speeds(engine.runner, pages))
    assert idle(engine)


@pytest.mark.slow
def test_several_devices_are_measured_together(quick):
    engine = sharded_tiny(2)
    check(measuring.measure_speeds(engine.runner, range(8)))
    assert len(engine.runner.store.sharding.device_set) == 2


# On disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch, tmp_path) -> list[Speeds]:
    """The measurements that were made. The cache directory is a temporary one."""
    made: list[Speeds] = []

    def measure(runner, pages):
        made.append(dataclasses.replace(PER_ROW, start=float(len(made) + 1)))
        return made[-1]

    monkeypatch.setattr(speeds, "measure_speeds", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return made


def ask(engine: Engine) -> Speeds:
    return speeds.speeds_for(engine.runner, engine.admission.lend)


def test_a_measurement_is_kept_for_the_next_process(tiny, counted, tmp_path):
    assert ask(tiny) == ask(tiny) == counted[0]
    (file,) = tmp_path.rglob("speeds-*.json")
    assert json.loads(file.read_text())["about"]["model"]["hidden_size"] == TINY.hidden_size
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert len(counted) == 1


def test_each_mesh_is_measured_by_itself(tiny, counted):
    wide = sharded_tiny(2)
    assert [ask(each).start for each in (tiny, wide, tiny, wide)] == [1.0, 2.0, 1.0, 2.0]


def changed(**fields):
    return lambda content: json.dumps(content | {"speeds": content["speeds"] | fields})


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "{",
        lambda _: "[]",
        lambda content: json.dumps(content | {"about": {}}),
        changed(small={"rows": [1], "layer": [1.0], "key": []}),
        changed(large={"rows": [1], "layer": [1.0]}),
        changed(large=None),
        changed(start="fast"),
        changed(start=float("nan")),
        changed(copy=-1.0),
        changed(copy=10**400),
        changed(large={"rows": [0, 0], "layer": [1.0, 1.0], "key": [0.0, 0.0]}),
        lambda _: "[" * 100_000,
    ],
)
def test_a_file_that_says_something_else_is_written_again(tiny, counted, tmp_path, damage):
    ask(tiny)
    (file,) = tmp_path.rglob("speeds-*.json")
    file.write_text(damage(json.loads(file.read_text())))
    assert ask(tiny) == ask(tiny) == counted[1]
    assert len(counted) == 2


def test_other_devices_models_and_versions_have_speeds_of_their_own(tiny, counted, monkeypatch):
    ask(tiny)
    ask(Engine.from_config(dataclasses.replace(TINY, intermediate_size=64), **vars(CONFIG)))
    ask(Engine(TINY, tiny_params(), config=dataclasses.replace(CONFIG, dtype="bfloat16")))
    ask(sharded_tiny(2))
    monkeypatch.setattr(speeds, "version", lambda _: "0.0.0")
    ask(tiny)
    monkeypatch.setattr(jax, "__version__", "0.0.0")
    ask(tiny)
    assert len(counted) == 6


def test_where_nothing_can_be_written_it_is_measured_each_time(tiny, counted, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert [ask(tiny), ask(tiny)] == counted
    assert len(counted) == 2


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tiny, counted, tmp_path):
    ask(tiny)
    (file,) = tmp_path.rglob("speeds-*.json")
    file.unlink()
    file.mkdir()
    assert ask(tiny) == counted[1]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
