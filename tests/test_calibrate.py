"""Calibration: the selection among measured candidates, a run on a tiny model, and the file and its readers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from conftest import closed_engine, closed_model
from hypothesis import given
from hypothesis import strategies as st
from sparsex_jax.eval.calibrate import Interval, Measured, PromptSet, Target, select
from test_cli import GOLDEN, invoke, one_object
from typer.testing import CliRunner

from sparsex_jax import Engine, InvalidRequestError, ReuseConfig
from sparsex_jax.checkpoints import open_checkpoint
from sparsex_jax.cli import app
from sparsex_jax.cli.calibrate import target_of
from sparsex_jax.config import architecture
from sparsex_jax.eval import calibrate, quality

PROMPTS = PromptSet(["qa"], ["independent"], num_tokens=200, num_segments=2, samples=2)
ANYTHING = Target("disagreement", 0.999)
shares = st.floats(0, 1)


def candidate(number, fraction, shortfalls):
    reuse = ReuseConfig(boundary_layer=number)
    return Measured(reuse, tuple(shortfalls), fraction, score=1.0, agreement=1.0, kl=0.0, ttft_s=0.1)


@pytest.fixture(scope="module")
def model():
    return closed_model()


@pytest.fixture(scope="module")
def engine():
    """Its random weights answer nothing, so only agreement can be a target."""
    return closed_engine(1)


@pytest.fixture
def directory(tmp_path):
    """A model's directory that may be written to."""
    return shutil.copytree(GOLDEN / "llama", tmp_path / "llama")


# The selection ----------------------------------------------------------------------------------------------


def test_the_cheapest_candidate_that_meets_the_target_is_selected():
    measured = [candidate(0, 0.2, [0, 1]), candidate(1, 0.4, [0, 0]), candidate(2, 0.3, [0, 0.02])]
    selection = select(measured, Target("loss", 0.02))
    assert (selection.met, selection.reuse, selection.basis) == (True, measured[2].reuse, measured[2])


def test_the_better_of_two_equally_cheap_candidates_is_selected():
    measured = [candidate(0, 0.3, [0.02, 0]), candidate(1, 0.3, [0, 0])]
    assert select(measured, Target()).basis is measured[1]


def test_full_recompute_is_selected_if_no_candidate_meets_the_target():
    measured = [candidate(0, 0.2, [1, 1]), candidate(1, 0.4, [0, 0.5])]
    selection = select(measured, Target())
    assert (selection.met, selection.reuse, selection.basis) == (False, ReuseConfig("full"), measured[1])


@given(st.lists(st.tuples(shares, st.lists(shares, min_size=1, max_size=5)), min_size=1, max_size=6), shares)
def test_the_selected_candidate_meets_the_target_and_no_cheaper_one_does(figures, most):
    target = Target(most=min(most, 0.99))
    measured = [candidate(i, fraction, values) for i, (fraction, values) in enumerate(figures)]
    selection = select(measured, target)
    good = [each for each in measured if np.mean(each.shortfalls) <= target.most]
    assert selection.met or not good
    if selection.met:
        assert target.met_by(selection.basis.shortfalls)
        assert all(selection.basis.computed_fraction <= each.computed_fraction for each in good)


@given(st.lists(shares, min_size=1, max_size=12), st.integers(0, 11), shares, st.booleans())
def test_an_abandoned_candidate_could_not_have_met_the_target(shortfalls, seen, most, confident):
    target = Target(most=min(most, 0.99), confident=confident)
    if target.met_by(shortfalls):
        assert target.in_reach(shortfalls[: seen + 1], len(shortfalls))


@pytest.mark.parametrize("most", [0.02, 0.1, 0.5])
def test_confidence_needs_enough_prompts(most):
    target, needed = Target(most=most, confident=True), calibrate.samples_needed(most)
    calibrate.check_samples(target, needed)
    with pytest.raises(InvalidRequestError, match=f"at least {needed} prompts"):
        calibrate.check_samples(target, needed - 1)
    calibrate.check_samples(Target(most=most), 1)


def test_16_perfect_answers_leave_a_wide_interval():
    assert Interval.of([0.0] * 16).high == pytest.approx(0.19, abs=0.005)


@pytest.mark.parametrize("num_layers", [1, 2, 4, 30, 32])
def test_candidates_go_from_cheap_to_expensive(num_layers):
    found = calibrate.candidates(num_layers, 1000, ReuseConfig(tail_tokens=8))
    work = [calibrate.predicted_fraction(each, num_layers, 1000) for each in found]
    assert work == sorted(work)
    assert len(set(found)) == len(found)
    assert all(each.tail_tokens == 8 for each in found)
    assert len(found) == 30 or num_layers < 30


# A run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loose(engine):
    return calibrate.calibrate(engine, PROMPTS, ANYTHING)


def test_a_calibration_stops_at_the_first_candidate_that_meets_the_target(engine, loose):
    assert loose.selection.met
    assert [each.reuse for each in loose.measured] == calibrate.candidates(4, 200)[: len(loose.measured)]
    assert loose.selection.basis is loose.measured[-1]
    assert len(loose.selection.basis.shortfalls) == PROMPTS.total


def test_a_calibration_measures_what_the_bench_measures(engine, loose):
    basis = loose.selection.basis
    rows = quality.run(engine, {"it": basis.reuse}, ["qa"], ["independent"], 200, samples=2, num_segments=2)
    np.testing.assert_allclose([1 - row["agreement"] for row in rows], basis.shortfalls)
    assert np.mean([row["computed_fraction"] for row in rows]) == pytest.approx(basis.computed_fraction)
    assert np.mean([row["kl"] for row in rows]) == pytest.approx(basis.kl, rel=1e-3)
    assert basis.ttft_s > 0


@pytest.fixture
def third_is_spoiled(monkeypatch):
    """Replaces the model: every answer equals full recompute's, except to the third prompt. Gives the batches asked."""
    asked = []
    row = {"computed_fraction": 0.3, "score": 1.0, "agreement": 1.0, "kl": 0.0, "disagreement": 0.0}
    monkeypatch.setattr(calibrate, "answer_batch", lambda *call: asked.append(call[2]) or [(None, None)])
    monkeypatch.setattr(calibrate, "mean_score", lambda _: 1.0)
    monkeypatch.setattr(calibrate, "compare", lambda *_: [row | {"loss": float(asked[-1][0][2] == 2)}])
    monkeypatch.setattr(quality, "time_prefill", lambda *_: 0.1)
    return asked


def test_a_candidate_that_cannot_meet_the_target_is_abandoned_at_the_worst_prompt(engine, third_is_spoiled):
    found = calibrate.calibrate(engine, dataclasses.replace(PROMPTS, samples=3))
    assert (found.selection.met, found.selection.reuse) == (False, ReuseConfig("full"))
    assert [len(each.shortfalls) for each in found.measured] == [3, *[1] * (len(found.measured) - 1)]
    assert len(found.measured) == len(calibrate.candidates(engine.model.num_layers, 200))
    assert "method=full" in calibrate.verdict(found)
    assert calibrate.table(found).count("\n") == 2 + len(found.measured)


def test_a_candidate_that_can_meet_the_target_answers_all_prompts(engine, third_is_spoiled):
    found = calibrate.calibrate(engine, dataclasses.replace(PROMPTS, samples=3), Target("loss", 0.4))
    assert [len(each.shortfalls) for each in found.measured] == [3]
    assert found.selection.met


def test_a_loss_needs_a_model_that_answers(engine):
    with pytest.raises(InvalidRequestError, match="full recompute itself scores only"):
        calibrate.calibrate(engine, PROMPTS, Target())


def test_a_lucky_answer_does_not_make_up_for_a_spoiled_one(monkeypatch):
    scores = iter([1.0, 0.0])  # full recompute's scores; the candidate's are 0 and 1
    monkeypatch.setattr(calibrate.scores, "task_score", lambda *_: next(scores))
    rows = iter([{"score": 0.0, "agreement": 1.0}, {"score": 1.0, "agreement": 0.5}])
    monkeypatch.setattr(calibrate.scores, "compare", lambda *_: next(rows))
    pair = (quality.PreparedPrompt(np.zeros(1, np.int32), np.zeros(1, np.int32), "n", None, ()), None)
    assert [
        row["loss"] for row in calibrate.compare([pair] * 2, [(pair[0], quality.Answer("", (), None, None))] * 2)
    ] == [1, 0]


# The file ---------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_written_file_can_be_read(engine, loose, tmp_path):
    content = calibrate.file_content(engine, "tiny", PROMPTS, loose)
    path = write(tmp_path / "some.json", content)
    assert ReuseConfig.load(path, engine.model) == loose.selection.reuse
    assert {"model", "measured", "command", "versions", "commit"} <= content.keys()
    assert content["measured"]["disagreement"]["samples"] == PROMPTS.total


def test_a_file_written_by_hand_needs_only_fields(tmp_path, model):
    path = write(tmp_path / "some.json", {"recompute_ratio": 0.3})
    assert ReuseConfig.load(path, model) == ReuseConfig(recompute_ratio=0.3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"depth": 3}, "depth=3 has no meaning for method 'sparsex'; its options: .*boundary_layer"),
        ({"boundary_layer": "5"}, "boundary_layer='5'"),
        ({"boundary_layer": True}, "boundary_layer=True"),
        ({"recompute_ratio": [0.1]}, r"recompute_ratio=\[0.1\]"),
        ({"method": None}, "method=None"),
        (
            {"model": "big", "architecture": {"num_layers": 80}},
            "for 'big' with num_layers=80; this model has num_layers=4",
        ),
        ({"architecture": 3}, "architecture=3"),
        ([], "must be a JSON object"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_the_error_for_a_wrong_file_names_it(tmp_path, model, content, said):
    path = write(tmp_path / "some.json", content)
    with pytest.raises(InvalidRequestError, match=f"some.json.*{said}"):
        ReuseConfig.load(path, model)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        ReuseConfig.load(tmp_path / "none.json")


def test_another_method_starts_from_the_defaults():
    calibrated = ReuseConfig(boundary_layer=1, pool_tokens=8)
    assert calibrated.updated(recompute_ratio=0.5) == dataclasses.replace(calibrated, recompute_ratio=0.5)
    assert calibrated.updated(method="naive") == ReuseConfig("naive")


# Readers of the file -----------------------------------------------------------------------------------------------


def test_the_engine_reads_the_file_beside_the_model(directory):
    options, path = {"store_tokens": 64, "page_size": 16}, directory / "sparsex.json"
    assert Engine.from_pretrained(directory, **options).reuse == ReuseConfig()
    write(path, {"method": "full", "architecture": architecture(open_checkpoint(directory).config)})
    assert Engine.from_pretrained(directory, **options).reuse == ReuseConfig("full")
    assert Engine.from_pretrained(directory, reuse=ReuseConfig("naive"), **options).reuse == ReuseConfig("naive")
    other = write(path.with_name("other.json"), {"method": "prefix"})
    assert Engine.from_pretrained(directory, reuse=other, **options).reuse == ReuseConfig("prefix")
    write(path, {"method": "full", "architecture": {"num_layers": 5}})
    with pytest.raises(InvalidRequestError, match="num_layers=5"):
        Engine.from_pretrained(directory, **options)


def test_calls_without_reuse_use_the_engines(engine, monkeypatch):
    used = []

    def admit(sequence, tokens, slots, reuse):
        used.append(reuse)
        raise RuntimeError("that is enough")

    monkeypatch.setattr(engine.admission, "admit", admit)
    monkeypatch.setattr(engine, "reuse", ReuseConfig("naive"))
    for call in (engine.prefill, engine.generate):
        for reuse in (None, ReuseConfig("full")):
            with pytest.raises(RuntimeError, match="that is enough"):
                call([1, 2, 3], reuse=reuse)
    assert used == [ReuseConfig("naive"), ReuseConfig("full")] * 2


def test_cache_reads_the_file_and_options_override_it(tmp_path):
    text = "The red door opens with the code 3615 and it closes again when nobody is there to see it at night.\n" * 3
    donor, file = write(tmp_path / "donor.txt", text), write(tmp_path / "full.json", {"method": "full"})

    def work(*options):
        found = invoke("cache", f"Read this.\n{text}Which code?", "--remember", donor, "--json", *options)
        return one_object(found)["computed_fraction"]

    assert work("--reuse-config", file) == 1
    assert work("--reuse-config", file, "--method", "naive") < 1


def test_generate_takes_the_engines_reuse_and_options_override_it(monkeypatch):
    class Told:
        reuse, tokenizer = ReuseConfig(boundary_layer=3, recompute_ratio=0.4), None

        def generate(self, prompt, sampling, *, reuse, namespace):
            raise InvalidRequestError(f"{reuse.boundary_layer}, {reuse.recompute_ratio}")

    monkeypatch.setattr("sparsex_jax.cli.generate.EngineChoice.load", lambda choice: Told())
    result = invoke("generate", "hi", "--no-chat", "--recompute-ratio", "0.1")
    assert "error: 3, 0.1" in result.stderr


def test_a_wrong_file_gives_one_line_on_stderr(tmp_path):
    file = write(tmp_path / "wrong.json", {"depth": 3})
    result = invoke("generate", "hi", "--model", GOLDEN / "llama", "--reuse-config", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "depth=3 has no meaning for method 'sparsex'" in result.stderr


# The command ------------------------------------------------------------------------------------------------


def calibrate_tiny(monkeypatch, engine, *options):
    monkeypatch.setattr("sparsex_jax.cli.generate.EngineChoice.load", lambda choice: engine)
    return CliRunner().invoke(app, ["calibrate", "tiny", "--tasks", "qa", "--samples", "2", *map(str, options)])


def test_the_command_writes_a_file_and_prints_one_object(monkeypatch, engine, loose, tmp_path):
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: loose)
    path = tmp_path / "out.json"
    found = one_object(calibrate_tiny(monkeypatch, engine, "--min-agreement", "0.001", "--out", path, "--json"))
    assert found["file"] == str(path)
    assert found["candidates"][-1]["computed_fraction"] == found["measured"]["computed_fraction"] < 1
    assert ReuseConfig.load(path, engine.model).boundary_layer == found["boundary_layer"]


def test_the_command_prints_a_table_and_a_verdict(monkeypatch, engine, third_is_spoiled, tmp_path):
    result = calibrate_tiny(monkeypatch, engine, "--out", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "The cheapest that meets loss <= 0.02: sparsex, boundary_layer=" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-loss", "0.1", "--min-agreement", "0.9"], "max_loss and min_agreement are both given"),
        (["--min-agreement", "1.5"], "min_agreement=1.5"),
        (["--max-loss", "-1"], "loss=-1.0"),
        (["--confident"], "at least 189 prompts"),
        (["--out", "no/such/folder/file.json"], "no directory 'no/such/folder'"),
        (["--samples", "0"], "samples=0"),
    ],
)
def test_the_command_refuses_before_it_measures(monkeypatch, engine, options, said):
    result = calibrate_tiny(monkeypatch, engine, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_target_of_the_options():
    assert target_of(None, None, False) == Target("loss", 0.02)
    assert target_of(None, 0.9, True) == Target("disagreement", 0.1, True)
