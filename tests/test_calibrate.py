"""Calibration: candidates in order, the search, resuming, a run on a tiny model, the file and its readers."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
from conftest import TINY, closed_engine, closed_model
from hypothesis import given
from hypothesis import strategies as st
from test_cli import GOLDEN, invoke, one_object
from typer.testing import CliRunner

from sparsex_jax import Engine, Focus, InvalidRequestError, ReuseConfig, SparseX
from sparsex_jax.checkpoints import EMBEDDED_MODELS, open_checkpoint
from sparsex_jax.cli import app
from sparsex_jax.cli.calibrate import open_log, target_of
from sparsex_jax.cli.options import parse_method
from sparsex_jax.config import architecture, config_dir, find_defaults
from sparsex_jax.config.calibration import Calibrated, shipped_for
from sparsex_jax.eval import calibration, quality
from sparsex_jax.eval.calibration import Interval, PromptSet, Target, Trials, find_candidates
from sparsex_jax.eval.calibration import trials as trials_module
from sparsex_jax.eval.calibration.candidates import CHOICES, METHODS
from sparsex_jax.eval.calibration.search import LOSSLESS
from sparsex_jax.eval.calibration.targets import samples_needed
from sparsex_jax.eval.quality import FULL
from sparsex_jax.eval.rows import RowLog

BUILT_IN = ReuseConfig("excerpt")
PROMPTS = PromptSet(["qa"], ["independent"], num_tokens=200, num_segments=2, samples=2)
TWO_REGIMES = dataclasses.replace(PROMPTS, regimes=["independent", "company"], samples=3)
SMALL_LOSS, ANYTHING = Target(), Target("disagreement", 0.999)
CHEAP = ["naive", "epic", "prophetkv"]
shares = st.floats(0, 1)


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


# Targets ----------------------------------------------------------------------------------------------------


@given(st.lists(shares, min_size=1, max_size=12), st.integers(0, 11), shares, st.booleans())
def test_an_abandoned_candidate_could_not_have_met_the_target(shortfalls, seen, most, confident):
    target = Target(most=min(most, 0.99), confident=confident)
    if target.met_by(shortfalls):
        assert target.in_reach(shortfalls[: seen + 1], len(shortfalls))


@pytest.mark.parametrize("most", [0.02, 0.1, 0.5])
def test_confidence_needs_enough_prompts(most):
    target, needed = Target(most=most, confident=True), samples_needed(most)
    calibration.check_samples(target, needed)
    with pytest.raises(InvalidRequestError, match=f"at least {needed} prompts"):
        calibration.check_samples(target, needed - 1)
    calibration.check_samples(Target(most=most), 1)


def test_16_perfect_answers_leave_a_wide_interval():
    assert Interval.of([0.0] * 16).high == pytest.approx(0.19, abs=0.005)


# Candidates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 4, 30])
def test_candidates_of_all_methods_go_from_cheap_to_expensive(num_layers):
    model = dataclasses.replace(TINY, num_layers=num_layers)
    found = find_candidates(model, 1000, 4)
    assert found[0] == ReuseConfig("naive")
    assert len(set(found)) == len(found)
    assert {each.method for each in found} == set(METHODS) or num_layers == 1
    if num_layers == 30:
        for method, options in CHOICES:  # each line of the list counts
            assert sum(each.method == method and options.keys() <= vars(each).keys() for each in found)
    more = [each for each in found if each.method == "prophetkv"]
    assert [each.recompute_ratio for each in more] == sorted(each.recompute_ratio for each in more)


def test_the_first_pass_counts_in_the_order():
    """Both recompute as much, but focus runs the new tokens through all layers first."""
    model = dataclasses.replace(TINY, num_layers=30)
    plain, probing = SparseX(boundary_layer=0, pool_tokens=128), Focus()
    assert find_candidates(model, 1000, 4, [probing, plain]) == [plain, probing]


def test_methods_restrict_the_candidates():
    one = parse_method("sparsex:boundary_layer=1")
    found = find_candidates(TINY, 1000, 4, ["naive", one])
    assert found == [ReuseConfig("naive"), one]


@pytest.mark.parametrize(
    ("among", "said"),
    [
        (["full"], "'full' has no candidates; there are: naive, excerpt, epic"),
        (["magic"], "'magic' has no candidates"),
        ([ReuseConfig(boundary_layer=9)], "boundary_layer=9 must be at most 4"),
        ([FULL], "none of them takes less than full recompute"),
    ],
)
def test_wrong_methods_are_refused(among, said):
    with pytest.raises(InvalidRequestError, match=said):
        find_candidates(TINY, 1000, 4, among)


# The search, with answers that are made up ------------------------------------------------------------------


class Answers:
    """Replaces the model. `spoiled` says which prompts a method does not answer as full recompute does."""

    def __init__(self, spoiled=lambda regime, sample, reuse: False, last=10**6):
        self.spoiled, self.last = spoiled, last
        self.asked = []  # (samples, regime, method) of each batch

    def measure(self, trials, batch, reuse, name):
        self.asked.append(([index for _, _, index in batch], batch[0][1], name))
        if len(self.asked) > self.last:
            raise KeyboardInterrupt
        return [self.row(*cell, reuse, name) for cell in batch]

    def row(self, task, regime, index, reuse, name):
        loss = float(reuse != FULL and self.spoiled(regime, index, reuse))
        row = {"task": task, "regime": regime, "sample": index, "method": name, "loss": loss, "disagreement": loss}
        return row | {"score": 1 - loss, "agreement": 1.0, "kl": 0.0, "computed_fraction": 0.3, "flops_fraction": 0.4}


@pytest.fixture
def model_is(monkeypatch):
    def replace(answers):
        monkeypatch.setattr(Trials, "_measure", lambda *call: answers.measure(*call))
        monkeypatch.setattr(Trials, "times", lambda *_: {"ttft_s": 0.1, "full_ttft_s": 0.2})
        return answers

    return replace


def calibrate(engine, prompts=TWO_REGIMES, target=SMALL_LOSS, **options):
    return calibration.calibrate(engine, prompts, target, among=CHEAP, **options)


def test_the_first_candidate_that_meets_the_target_twice_is_selected(engine, model_is):
    model_is(Answers())
    found = calibrate(engine)
    assert (found.used.reuse, found.used.met, found.holds_for) == (
        ReuseConfig("naive"),
        True,
        ["independent", "company"],
    )
    assert [len(each.attempts) for each in found.by_regime.values()] == [1, 1]


def test_a_candidate_that_was_lucky_is_passed_over(engine, model_is):
    """Naive answers the first prompts, and not those that confirm."""
    model_is(Answers(lambda regime, sample, reuse: reuse.method == "naive" and sample > 100))
    found = calibrate(engine, dataclasses.replace(TWO_REGIMES, regimes=["independent"]))
    (selection,) = found.by_regime.values()
    assert (selection.attempts[0].refuted, selection.attempts[0].met) == (True, False)
    assert selection.reuse.method == "epic"
    assert "1 cheaper ones met it on the first prompts only" in calibration.verdict(found)
    confirmed = selection.attempts[-1].trials["independent"].figures("loss")["confirmed"]
    assert (confirmed.mean, confirmed.samples) == (0, 3)


def only_in_company(regime, sample, reuse):
    return regime == "independent" and reuse.method == "naive"


def test_each_regime_has_its_selection_and_what_holds_in_all_is_used(engine, model_is):
    model_is(Answers(only_in_company))
    found = calibrate(engine)
    methods = {regime: selection.reuse.method for regime, selection in found.by_regime.items()}
    assert methods == {"independent": "epic", "company": "naive"}
    assert (found.used.reuse.method, found.in_company.reuse.method) == ("epic", "naive")
    content = calibration.file_content(engine, "some/tiny.gguf", TWO_REGIMES, found)
    assert (content["model"], content["method"], content["in_company"]["method"]) == ("tiny", "epic", "naive")
    assert content["measured"]["by_regime"]["company"]["figures"]["company"]["confirmed"]["samples"] == 3


def test_the_user_may_say_which_regimes_selection_is_used(engine, model_is):
    model_is(Answers(only_in_company))
    found = calibrate(engine, use="company")
    assert (found.used.reuse.method, found.holds_for, found.in_company) == ("naive", ["company"], None)
    with pytest.raises(InvalidRequestError, match="use='joint' is none of the regimes that are measured"):
        calibrate(engine, use="joint")


def test_where_nothing_holds_only_an_exact_prefix_is_used(engine, model_is):
    """Every method fails at the third prompt, which is asked first from the second candidate on."""
    answers = model_is(Answers(lambda regime, sample, reuse: sample == 2))
    found = calibrate(engine, dataclasses.replace(TWO_REGIMES, regimes=["independent"]))
    assert (found.used.met, found.used.reuse, found.holds_for) == (False, LOSSLESS, ["independent"])
    first, *others = found.used.attempts
    assert len(first.trials["independent"].rows) == 3
    assert {len(each.trials["independent"].rows) for each in others} == {1}
    assert all(samples[0] < 100 for samples, _, _ in answers.asked)  # nothing was there to confirm
    assert f"None of {len(found.used.attempts)} candidates meets loss <= 0.02" in calibration.verdict(found)
    assert calibration.table(found).count("\n") == 2 + len(found.used.attempts)


def test_a_run_that_was_killed_goes_on_where_it_was(engine, model_is, tmp_path):
    whole = calibrate(engine, log=RowLog(tmp_path / "whole.jsonl")) if model_is(Answers(only_in_company)) else None
    total = len(model_is(Answers(only_in_company)).asked)
    path, asked = tmp_path / "rows.jsonl", 0
    for last in (4, 3, 7):
        answers = model_is(Answers(only_in_company, last))
        with pytest.raises(KeyboardInterrupt):
            calibrate(engine, log=RowLog(path))
        asked += len(answers.asked) - 1
    with path.open("a") as file:
        file.write('{"task": "qa", "regi')  # what a kill leaves in the middle of a line
    answers = model_is(Answers(only_in_company))
    found = calibrate(engine, log=RowLog(path))
    assert (found.used, found.by_regime) == (whole.used, whole.by_regime)
    everything = model_is(Answers(only_in_company))
    calibrate(engine)
    assert (total, asked + len(answers.asked)) == (0, len(everything.asked))
    again = model_is(Answers(only_in_company))
    assert calibrate(engine, log=RowLog(path)).used == whole.used
    assert again.asked == []


def test_a_stricter_target_takes_the_rows_that_are_there(engine, model_is, tmp_path):
    answers = model_is(Answers(lambda regime, sample, reuse: reuse.method == "naive" and sample % 100 == 0))
    assert calibrate(engine, target=Target(most=0.5), log=RowLog(tmp_path / "rows")).used.reuse.method == "naive"
    before = len(answers.asked)
    assert calibrate(engine, target=Target(most=0.1), log=RowLog(tmp_path / "rows")).used.reuse.method == "epic"
    assert not any(name in ("naive", "full") for _, _, name in answers.asked[before:])


def test_rows_of_another_model_are_refused(engine, tmp_path, monkeypatch):
    from sparsex_jax.cli.bench import BenchSettings

    settings = BenchSettings(["naive"], ["qa"], ["company"], 200, 2, 2, 1, 0)
    log = open_log(engine, "dir/tiny", settings, tmp_path / "out.json")
    log.add([{"task": "qa", "regime": "company", "sample": 0, "method": "naive"}])
    open_log(engine, "tiny", dataclasses.replace(settings, samples=9), tmp_path / "out.json")
    assert (tmp_path / "out.rows.jsonl").is_file()
    with pytest.raises(InvalidRequestError, match="made with model='tiny', not 'other'"):
        open_log(engine, "other", settings, tmp_path / "out.json")
    with pytest.raises(InvalidRequestError, match="made with length=200, not 300"):
        open_log(engine, "tiny", dataclasses.replace(settings, length=300), tmp_path / "out.json")
    monkeypatch.setattr(engine, "model", dataclasses.replace(engine.model, num_layers=9))
    with pytest.raises(InvalidRequestError, match="made with architecture="):
        open_log(engine, "tiny", settings, tmp_path / "out.json")


# A run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loose(engine):
    return calibration.calibrate(engine, PROMPTS, ANYTHING)


@pytest.mark.slow
def test_a_calibration_measures_what_the_bench_measures(engine, loose):
    assert loose.used.met
    attempts = loose.used.attempts
    assert [each.reuse for each in attempts] == find_candidates(engine.model, 200, 2)[: len(attempts)]
    trial, reuse = attempts[-1].trials["independent"], attempts[-1].reuse
    assert (len(trial.rows), len(trial.confirming)) == (PROMPTS.total, PROMPTS.total)
    rows = quality.run(engine, {"it": reuse}, ["qa"], ["independent"], 200, samples=2, num_segments=2)
    for name in ("agreement", "computed_fraction", "flops_fraction", "kl", "score"):
        np.testing.assert_allclose([row[name] for row in rows], [row[name] for row in trial.rows], rtol=1e-3, atol=1e-6)
    assert {row["text"] for row in trial.rows}.isdisjoint({row["text"] for row in trial.confirming})
    assert loose.times["independent"].keys() == {"ttft_s", "full_ttft_s"}


@pytest.mark.slow
def test_a_loss_needs_a_model_that_answers(engine):
    with pytest.raises(InvalidRequestError, match="full recompute itself scores only"):
        calibration.calibrate(engine, PROMPTS, Target())


def test_a_lucky_answer_does_not_make_up_for_a_spoiled_one(monkeypatch):
    scores = iter([1.0, 0.0])  # full recompute's scores; the candidate's are 0 and 1
    monkeypatch.setattr(trials_module.scores, "task_score", lambda *_: next(scores))
    rows = iter([{"score": 0.0, "agreement": 1.0}, {"score": 1.0, "agreement": 0.5}])
    monkeypatch.setattr(trials_module.scores, "compare", lambda *_: next(rows))
    answer = quality.Answer("", (), None, None)
    assert [trials_module.compare(answer, answer, ())["loss"] for _ in range(2)] == [1, 0]


# The file ---------------------------------------------------------------------------------------------------


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.slow
def test_the_written_file_can_be_read(engine, loose, tmp_path):
    content = calibration.file_content(engine, "tiny", PROMPTS, loose)
    path = write(tmp_path / "some.json", content)
    assert ReuseConfig.load(path, engine.model) == loose.used.reuse
    assert {"model", "measured", "command", "versions", "commit", "holds_for"} <= content.keys()
    figures = content["measured"]["used"]["figures"]["independent"]
    assert [figures[name]["samples"] for name in ("disagreement", "confirmed")] == [PROMPTS.total] * 2


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
        ({"architecture": 3}, "architecture=3 must be an object"),
        ({"model": 3}, "model=3 must be a string"),
        ({"holds_for": "company"}, "holds_for='company' must be a list of strings"),
        ({"in_company": ["naive"]}, r"in_company=\['naive'\] must be an object"),
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


def test_a_file_may_have_options_for_donors_that_are_made_in_company(tmp_path, model):
    path = write(tmp_path / "some.json", {"method": "epic", "in_company": {"method": "naive"}})
    assert ReuseConfig.load(path, model) == ReuseConfig("epic")
    assert ReuseConfig.load(path, model, company=True) == ReuseConfig("naive")
    wrong = write(tmp_path / "wrong.json", {"in_company": {"method": "magic"}})
    with pytest.raises(InvalidRequestError, match=r"wrong\.json: method='magic' is unknown"):
        ReuseConfig.load(wrong, model, company=True)


@pytest.mark.parametrize("reuse", find_candidates(closed_model(), 1000, 4)[::7])
def test_a_specification_is_what_the_command_line_takes(reuse):
    assert parse_method(reuse.spec()) == reuse


def test_another_method_starts_from_the_defaults():
    calibrated = ReuseConfig(boundary_layer=1, pool_tokens=8)
    assert calibrated.updated(recompute_ratio=0.5) == dataclasses.replace(calibrated, recompute_ratio=0.5)
    assert calibrated.updated(method="naive") == ReuseConfig("naive")


# Calibrations that come with the package --------------------------------------------------------------------


@pytest.fixture
def finds_shipped(monkeypatch):
    monkeypatch.setattr("sparsex_jax.config.defaults.shipped_for", shipped_for)


@pytest.fixture
def shipped(tmp_path, monkeypatch, finds_shipped):
    """An empty folder in place of `configs/calibrations`."""
    folder = tmp_path / "configs" / "calibrations"
    folder.mkdir(parents=True)
    monkeypatch.setattr("sparsex_jax.config.calibration.config_dir", lambda: folder.parent)
    return folder


def ship(folder, name, model, **content):
    return write(folder / f"{name}.json", {"model": name, "architecture": architecture(model)} | content)


def test_a_model_of_a_shipped_architecture_gets_its_defaults(shipped, directory, model, caplog):
    config = open_checkpoint(directory).config
    ship(shipped, "other", model, method="epic")
    assert find_defaults(directory, config).reuse == BUILT_IN
    assert "no calibration of this model is known" in str(find_defaults(directory, config))
    path = ship(shipped, "big", config, method="naive", holds_for=["company:2"], in_company={"method": "prefix"})
    with caplog.at_level(logging.INFO, "sparsex_jax.engine"):
        assert Engine.from_pretrained(directory, store_tokens=64, page_size=16).reuse == ReuseConfig("naive")
    lines = [record.getMessage() for record in caplog.records if record.name == "sparsex_jax.engine"]
    (line,) = [line for line in lines if line.startswith("Reuse by default")]
    origin = f"from {path}, calibrated for big, holds for donors in these regimes: company:2"
    assert line == f"Reuse by default: naive ({origin})"
    in_company = Engine.from_pretrained(directory, store_tokens=64, page_size=16, company_tokens=16)
    assert in_company.reuse == ReuseConfig("prefix")


def test_what_is_nearer_wins_over_what_is_shipped(shipped, directory):
    config = open_checkpoint(directory).config
    ship(shipped, "big", config, method="naive")
    assert find_defaults(directory, config, ReuseConfig("epic")).reuse == ReuseConfig("epic")
    beside = write(directory / "sparsex.json", {"method": "full"})
    assert find_defaults(directory, config).reuse == ReuseConfig("full")
    assert str(beside) in find_defaults(directory, config).origin


def test_of_two_models_of_an_architecture_the_one_of_that_name_is_taken(shipped, model):
    for name in ("tiny", "tiny-instruct", "tiny-zen"):
        ship(shipped, name, model)
    taken = [shipped_for(model, name).model for name in ("Tiny-Zen-Q4_K_M.gguf", "tiny-instruct", "my-weights")]
    assert taken == ["tiny-zen", "tiny-instruct", "tiny"]


def test_a_shipped_file_that_is_wrong_is_named(shipped, directory):
    config = open_checkpoint(directory).config
    ship(shipped, "big", config, method="magic")
    with pytest.raises(InvalidRequestError, match=r"big\.json: method='magic' is unknown"):
        find_defaults(directory, config)


@pytest.mark.parametrize("path", sorted((config_dir() / "calibrations").glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_files_are_sound(path, finds_shipped):
    found = Calibrated.read(path)
    assert (found.model, found.architecture.keys()) == (path.stem, architecture(TINY).keys())
    assert found.holds_for
    reuses = [ReuseConfig.load(path, company=company) for company in (False, True)]
    assert all(reuse.only_if_faster for reuse in reuses)
    if path.stem in EMBEDDED_MODELS:
        assert find_defaults(path.stem, open_checkpoint(path.stem).config).reuse == reuses[0]


# Readers of the file -----------------------------------------------------------------------------------------------


def test_the_engine_reads_the_file_beside_the_model(directory):
    options, path = {"store_tokens": 64, "page_size": 16}, directory / "sparsex.json"
    assert Engine.from_pretrained(directory, **options).reuse == BUILT_IN
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


@pytest.mark.slow
def test_cache_reads_the_file_and_options_override_it(tmp_path):
    text = "The red door opens with the code 3615 and it closes again when nobody is there to see it at night.\n" * 3
    donor, file = write(tmp_path / "donor.txt", text), write(tmp_path / "full.json", {"method": "full"})

    def work(*options):
        found = invoke("cache", f"Read this.\n{text}Which code?", "--remember", donor, "--json", *options)
        return one_object(found)["computed_fraction"]

    assert work("--reuse-config", file) == 1
    assert work("--reuse-config", file, "--method", "naive") < 1


def test_generate_loads_its_engine_with_the_options_over_the_file(tmp_path, monkeypatch):
    def load(choice):
        reuse = choice.defaults(closed_model()).reuse
        raise InvalidRequestError(f"{reuse.boundary_layer}, {reuse.recompute_ratio}")

    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", load)
    file = write(tmp_path / "own.json", {"method": "sparsex", "boundary_layer": 3, "recompute_ratio": 0.4})
    result = invoke("generate", "hi", "--no-chat", "--reuse-config", file, "--recompute-ratio", "0.1")
    assert "error: 3, 0.1" in result.stderr


def test_a_wrong_file_gives_one_line_on_stderr(tmp_path):
    file = write(tmp_path / "wrong.json", {"depth": 3})
    result = invoke("generate", "hi", "--model", GOLDEN / "llama", "--reuse-config", file)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "depth=3 has no meaning for method 'sparsex'" in result.stderr


# The command ------------------------------------------------------------------------------------------------


def calibrate_tiny(monkeypatch, engine, *options):
    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", lambda choice: engine)
    return CliRunner().invoke(app, ["calibrate", "tiny", "--tasks", "qa", "--samples", "2", *map(str, options)])


def test_the_command_writes_a_file_and_prints_one_object(monkeypatch, engine, model_is, tmp_path):
    model_is(Answers(only_in_company))
    path = tmp_path / "out.json"
    found = one_object(calibrate_tiny(monkeypatch, engine, "--methods", "naive,epic", "--out", path, "--json"))
    assert found["file"] == str(path)
    assert [each["method"] for each in found["candidates"]["independent"]] == ["naive", "epic"]
    assert found["candidates"]["company"][0]["flops_fraction"] == 0.4
    assert ReuseConfig.load(path, engine.model) == ReuseConfig("epic")
    assert ReuseConfig.load(path, engine.model, company=True) == ReuseConfig("naive")


def test_the_command_goes_on_where_it_was_killed(monkeypatch, engine, model_is, tmp_path):
    model_is(Answers(only_in_company, last=3))
    path = tmp_path / "out.json"
    assert calibrate_tiny(monkeypatch, engine, "--out", path).exit_code != 0
    assert not path.exists()
    answers = model_is(Answers(only_in_company))
    assert calibrate_tiny(monkeypatch, engine, "--out", path).exit_code == 0
    assert ([0], "independent", "full") not in answers.asked
    assert json.loads(path.read_text())["method"] == "epic"


def test_the_command_prints_tables_and_a_verdict(monkeypatch, engine, model_is, tmp_path):
    model_is(Answers(only_in_company))
    result = calibrate_tiny(
        monkeypatch, engine, "--out", tmp_path / "out.json", "--methods", "naive,epic:head_tokens=4"
    )
    assert result.exit_code == 0, result.output
    assert "The first of 2 candidates that meets loss <= 0.02: epic:head_tokens=4, loss 0.000 (95 %:" in result.stdout
    assert "Used: epic:head_tokens=4, which holds for independent, company." in result.stdout
    assert "Used by engines that make donors in company: naive." in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-loss", "0.1", "--min-agreement", "0.9"], "max_loss and min_agreement are both given"),
        (["--min-agreement", "1.5"], "min_agreement=1.5"),
        (["--max-loss", "-1"], "max_loss=-1.0"),
        (["--confident"], "at least 189 prompts"),
        (["--out", "no/such/folder/file.json"], "no directory 'no/such/folder'"),
        (["--samples", "0"], "samples=0"),
        (["--methods", " , "], "methods is empty"),
        (["--methods", "oracle,naive"], "'oracle' has no candidates"),
        (["--methods", "epic:depth=1"], "depth=1 has no meaning for method 'epic'"),
        (["--use", "joint"], "use='joint' is none of the regimes"),
        (["--regimes", "alone"], "regime='alone' is unknown"),
    ],
)
def test_the_command_refuses_before_it_measures(monkeypatch, engine, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    result = calibrate_tiny(monkeypatch, engine, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_target_of_the_options():
    assert target_of(None, None, False) == Target("loss", 0.02)
    assert target_of(None, 0.9, True) == Target("disagreement", 0.1, True)
    for wrong, limit in (
        ((1.5, None, False), "max_loss=1.5 must be"),
        ((None, 0.0, False), "min_agreement=0.0 must be"),
    ):
        with pytest.raises(InvalidRequestError, match=limit):
            target_of(*wrong)
