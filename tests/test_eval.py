"""The quality bench: generated tasks and their tokenizer, caching regimes, scores, and a run from end to end."""

import json
import re

import numpy as np
import pytest
from conftest import closed_engine
from typer.testing import CliRunner

from sparsex_jax import InvalidRequestError, Oracle, ReuseConfig
from sparsex_jax.cli import app
from sparsex_jax.cli.bench import BenchSettings, example_maps
from sparsex_jax.cli.options import parse_method
from sparsex_jax.eval import lexicon, maps, plots, quality, regimes, results, scores, summaries
from sparsex_jax.eval.flops import flops_fraction
from sparsex_jax.eval.regimes import Regime
from sparsex_jax.eval.rows import RowLog
from sparsex_jax.eval.tasks import CLOSED_TASKS, STRANGERS, TASKS, make_sample, word_count
from sparsex_jax.reuse.prompt import TokenKind

pytestmark = pytest.mark.usefixtures("every_signal")

SIZES = ((40, 1), (300, 4), (2000, 3))  # tokens of body, segments
METHODS = {"full": ReuseConfig("full"), "naive": ReuseConfig("naive"), "sparsex": ReuseConfig("sparsex")}


@pytest.fixture(scope="module")
def tokenizer():
    return lexicon.ruler_tokenizer()


@pytest.fixture(scope="module")
def engine():
    return closed_engine(2)


def sample_of(task, seed=0, tokens=300, segments=4, questions=1):
    return make_sample(task, np.random.default_rng(seed), tokens, segments, questions)


def texts_of(sample):
    asked = [text for question in sample.questions for text in (question.text, question.reference)]
    return [sample.instruction, lexicon.EARLIER_INSTRUCTION, *sample.segments, *asked]


# Tasks and tokenizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", CLOSED_TASKS)
def test_joined_tokens_restore_every_text(task, tokenizer):
    for seed in range(12):
        for tokens, segments in SIZES:
            for text in texts_of(sample_of(task, seed, tokens, segments, questions=3)):
                bos, *ids = tokenizer(text)["input_ids"]
                assert bos == tokenizer.bos_token_id
                assert tokenizer.decode(ids) == text
                assert tokenizer.unk_token_id not in ids
                np.testing.assert_array_equal(lexicon.encode(text), ids)


@pytest.mark.parametrize("task", CLOSED_TASKS)
@pytest.mark.parametrize(("tokens", "segments"), SIZES)
def test_the_body_has_every_answer_and_the_length_asked_for(task, tokens, segments):
    sample = sample_of(task, 1, tokens, segments, questions=5)
    body = "".join(sample.segments)
    assert len(sample.segments) == segments
    assert all(segment.endswith("\n") and not segment[0].isspace() for segment in sample.segments)
    words = [word for question in sample.questions for answer in question.answers for word in answer.split()]
    assert all(word in sample.instruction + body for word in words)
    assert 1 <= len(sample.questions) <= 5
    if tokens >= 1000:  # the facts that must be in a shorter one may fill it
        assert abs(word_count(body) - tokens) < 0.03 * tokens


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_sample(task):
    assert sample_of(task, 5) == sample_of(task, 5) != sample_of(task, 6)


@pytest.mark.parametrize("task", ["notes_codes", "notes_people", "notes_years"])
def test_every_note_has_another_answer(task):
    for seed in range(20):
        sample = make_sample(task, np.random.default_rng(seed), 400, num_segments=5, num_questions=5)
        assert len({segment.split(" of ")[0] for segment in sample.segments}) == len(sample.questions) == 5
        for segment in sample.segments:
            assert not re.search(r"[{}]|\.\.", segment)
            assert segment.endswith(".\n")
        for question in sample.questions:
            (answer,) = question.answers
            asked = re.search(r"(?:code of the|Who is the|was the) ([\w ]+?)(?: built)?\?", question.text).group(1)
            telling = [segment for segment in sample.segments if answer in segment]
            assert len(telling) == 1 or task == "notes_people"
            assert any(f" {asked} " in segment or f"the {asked}:" in segment for segment in telling)


def test_strangers_are_of_another_kind():
    for task, other in STRANGERS.items():
        assert (task in CLOSED_TASKS) == (other in CLOSED_TASKS)
        assert sample_of(task).segments[0][:8] != sample_of(other).segments[0][:8]
    assert {*STRANGERS} == {*TASKS}


def test_words_without_tokens_are_refused(tokenizer):
    with pytest.raises(InvalidRequestError, match="'notes_codes' has words"):
        regimes.tokenize(make_sample("notes_codes", np.random.default_rng(0), 400), tokenizer)


def test_lengths_follow_the_given_count():
    sample = make_sample("vt", np.random.default_rng(0), 6000, count=len)
    assert abs(len("".join(sample.segments)) - 6000) < 200


def _values(texts):
    """Every variable's value after these texts."""
    values = {}
    for text in texts:
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text):
            values[name] = values.get(source, source)
    return values


def _numbered(question):
    """The keys that a question asks for at once."""
    return re.findall(r"(?:first|second|third|fourth) ([\w ]+)", question.text)


def test_values_of_variables_do_not_depend_on_the_order_of_the_segments():
    for seed in range(10):
        sample = sample_of("vt", seed, tokens=1500, questions=5)
        for segments in (sample.segments, sample.segments[::-1]):
            values = _values([sample.instruction, *segments])
            for question in sample.questions:
                names = _numbered(question)
                assert len({values[name] for name in names}) == len(names) == 4
                assert question.answers == tuple(f"{name} {values[name]}" for name in names)


def test_most_variables_have_no_value_without_the_instruction():
    sample = sample_of("vt", tokens=4000, questions=9)
    alone, whole = _values(sample.segments), _values([sample.instruction, *sample.segments])
    lost = [name for name in alone if alone[name] != whole[name]]
    assert 0.5 < len(lost) / len(whole) < 0.67


def test_needles_are_asked_in_the_order_of_the_answers():
    sample = sample_of("mq_niah", tokens=1500)
    (question,), body = sample.questions, "".join(sample.segments)
    pairs = list(zip(_numbered(question), question.answers, strict=True))
    assert len(pairs) == 4
    assert all(lexicon.NEEDLE.format(key=key, value=value) in body for key, value in pairs)
    assert question.reference.startswith(f" first {pairs[0][0]} {pairs[0][1]}, second")


@pytest.mark.parametrize("task", ["cwe", "fwe"])
def test_counted_words_are_the_most_frequent(task):
    sample = sample_of(task, tokens=2000)
    words = "".join(sample.segments).split()
    times = {word: words.count(word) for word in set(words) - {"Words:", "Coded", "text:"}}
    answers = sample.questions[0].answers
    assert min(times[word] for word in answers) > max(times[word] for word in times.keys() - set(answers))


def test_agents_give_different_answers():
    sample = sample_of("agents", tokens=1000, questions=8)
    assert all(len(set(question.answers)) == 2 for question in sample.questions)


def test_noise_has_no_word_that_is_asked_for():
    noise = {*lexicon.NOUNS, *lexicon.PLACES, *lexicon.ADJECTIVES, *lexicon.VERBS, *lexicon.ADVERBS}
    assert not noise & {*lexicon.THINGS, *lexicon.CODED_WORDS}


def test_unknown_tasks_and_sizes_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        sample_of("nothing")
    with pytest.raises(ValueError, match="at least 1"):
        sample_of("vt", tokens=0)


# Regimes ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("regime", "number"), [("company", 4), ("company:2", 2), ("company:0", 0), ("strangers:5", 5)])
def test_company_is_the_opening_and_segments_of_others(engine, regime, number):
    cells = [("niah", regime, index) for index in (0, 1)]
    asked = quality.prepare_batch(engine, cells, 200, seed=0, num_segments=4)
    samples = [make_sample("niah", np.random.default_rng([0, TASKS.index("niah"), index]), 200) for index in (0, 1)]
    opening = regimes.tokenize(samples[0], engine.tokenizer).opening
    for one, sample in zip(asked, samples, strict=True):
        report = answer_of(engine, one, "naive").report
        assert report.prefix_tokens == len(opening)  # the opening is stored as an exact prefix
        segments = regimes.tokenize(sample, engine.tokenizer).segments
        assert report.reused_tokens == sum(map(len, segments))
    before = [engine.entries(one.namespace)[0].num_tokens for one in asked]
    assert before[0] == before[1] >= len(opening) + 30 * number


def answer_of(engine, prepared, method):
    return quality.answer(engine, quality.asks(engine, [prepared], ReuseConfig(method)))[0]


@pytest.mark.parametrize("name", ["some", "joint:2", "company:x", "company:", "strangers:-1"])
def test_unknown_regimes_are_refused(name):
    with pytest.raises(InvalidRequestError, match=f"regime='{name}'"):
        Regime.parse(name)


def test_what_was_before_the_segments_is_the_samples_own_if_it_matters(engine):
    sample = make_sample("changed", np.random.default_rng(0), 200)
    case = regimes.tokenize(sample, AnyWords())
    np.testing.assert_array_equal(case.earlier, case.known)
    assert AnyWords.texts(case.earlier) == sample.earlier != sample.instruction == AnyWords.texts(case.opening)


class AnyWords:
    """A tokenizer of the characters of a text."""

    chat_template = unk_token_id = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": list(map(ord, text))}

    @staticmethod
    def texts(tokens):
        return "".join(map(chr, tokens))


@pytest.mark.slow
def test_reorder_finds_the_prefix_that_the_order_hides(engine):
    (asked,) = quality.prepare_batch(engine, [("niah", "shuffled", 0)], 200, seed=0, num_segments=4)
    assert not np.array_equal(asked.prompt, asked.reordered)
    assert sorted(asked.prompt) == sorted(asked.reordered)
    (ask,) = quality.asks(engine, [asked], parse_method("reorder"))
    found, hidden = quality.answer(engine, [ask])[0], answer_of(engine, asked, "prefix")
    assert found.report.prefix_tokens > hidden.report.prefix_tokens > 0
    assert found.report.reused_tokens == 0
    full = engine.prefill(asked.reordered, reuse=ReuseConfig("full"), keep=False)
    np.testing.assert_allclose(found.logits, full.logits, atol=1e-4)  # nothing is lost
    with pytest.raises(InvalidRequestError, match="unknown"):
        ReuseConfig("reorder")


@pytest.mark.parametrize("regime", sorted({*regimes.REGIMES} - {"shuffled"}))
@pytest.mark.parametrize("task", [pytest.param("vt", marks=pytest.mark.slow), "chat"])
def test_the_body_is_reused(engine, regime, task):
    sample, namespace = sample_of(task), f"reused/{regime}/{task}"
    asked = quality.prepare(engine, sample, Regime(regime), namespace, np.random.default_rng(0))
    report = engine.prefill(asked.prompt, reuse=ReuseConfig("naive"), namespace=namespace, keep=False).report
    segments = regimes.tokenize(sample, engine.tokenizer).segments
    assert 0 <= report.reused_tokens - sum(map(len, segments)) <= 4  # the ends of the two instructions are equal
    assert len(report.segments) == (1 if regime == "joint" else 4)
    text = engine.tokenizer.decode(asked.prompt)
    assert all(segment in text for segment in sample.segments)


@pytest.mark.slow
def test_full_recompute_between_two_methods_evicts_nothing(engine):
    asked = quality.prepare(
        engine, sample_of("niah", tokens=430), Regime("independent"), "evict", np.random.default_rng(0)
    )
    before, _, after = (answer_of(engine, asked, method) for method in ("naive", "full", "naive"))
    assert before.report.reused_tokens == after.report.reused_tokens > 400
    np.testing.assert_array_equal(before.logits, after.logits)


def test_a_store_that_cannot_hold_donors_and_prompts_is_refused(engine):
    case = regimes.tokenize(sample_of("niah", tokens=430), engine.tokenizer)
    regimes.check_room(engine, case, new_tokens=8)
    with pytest.raises(InvalidRequestError, match=r"store_tokens=2048 must be at least .* for 3 such prompts"):
        regimes.check_room(engine, case, new_tokens=8, share=3)


def test_chat_models_get_one_user_message(tokenizer):
    tokenizer = lexicon.ruler_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"
    sample = sample_of("qa")
    case = regimes.tokenize(sample, tokenizer)
    body = "".join(sample.segments)
    assert tokenizer.decode(case.prompt) == f"User: {sample.instruction}{body}{sample.questions[0].text}\nAssistant:"
    assert tokenizer.decode(case.earlier) == f"User: {lexicon.EARLIER_INSTRUCTION}"


# Scores -----------------------------------------------------------------------------------------------------


def test_task_score_is_the_share_of_answers_found():
    assert scores.task_score("It is 123, or RED.", ("123", "red", "blue", "4")) == 0.5


def test_kl_divergence_of_known_distributions():
    p, q = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    assert scores.kl_divergence(p + 7, q - 3) == pytest.approx(0.25 * np.log(2))
    assert scores.kl_divergence(p.astype(np.float32), p.astype(np.float32)) == 0


@pytest.mark.parametrize(
    ("tokens", "share"), [([1, 2, 3, 4], 1), ([1, 2, 3, 4, 5], 1), ([1, 2], 0.5), ([9, 2, 3, 4], 0), ([], 0)]
)
def test_agreement_counts_leading_tokens(tokens, share):
    assert scores.agreement([1, 2, 3, 4], tokens) == share


def test_intervals_of_known_samples():
    low, high = summaries.wilson_interval(np.array([1.0] * 8 + [0.0] * 2))
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert summaries.wilson_interval(np.ones(10)) == pytest.approx((0.7225, 1.0), abs=1e-4)
    for number in range(1, 200):  # plots take the distances to both ends, which must not be negative
        for mean in (0.0, 1.0):
            low, high = summaries.wilson_interval(np.full(number, mean))
            assert 0 <= low <= mean <= high <= 1
    assert summaries.t_interval(np.array([1.0, 2, 3])) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert summaries.t_interval(np.array([3.0])) == (3, 3)


def test_summaries_pair_the_methods_and_pool_the_tasks():
    figures = dict.fromkeys(scores.UNITS, 0.5)
    rows = [
        figures | {"task": task, "regime": "joint", "sample": i, "method": method, "score": score}
        for task in ("vt", "qa")
        for i in range(2)
        for method, score in (("full", 1.0), ("naive", 0.25 if task == "vt" else 0.75))
    ]
    found = {(s["task"], s["method"], s["metric"]): s for s in summaries.summarize(rows)}
    assert found["all", "naive", "score"]["mean"] == 0.5
    assert found["all", "naive", "score"]["samples"] == 4
    assert found["vt", "naive", "loss"] | {"mean": 0.75, "low": 0.75, "high": 0.75} == found["vt", "naive", "loss"]
    assert found["qa", "full", "loss"]["mean"] == 0


# The bench --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(engine):
    return quality.run(engine, METHODS, ["vt", "qa"], ["joint", "independent"], num_tokens=300, samples=2)


def test_a_run_has_a_row_for_every_cell_and_method(rows):
    assert len(rows) == 2 * 2 * 2 * 3
    for row in rows:
        assert {*scores.UNITS, "text", "expected"} - {"confidence"} <= row.keys()
        assert ("confidence" in row) == (row["method"] != "naive")
        assert row["speedup"] == pytest.approx(row["full_ttft_s"] / row["ttft_s"])
    full = [row for row in rows if row["method"] == "full"]
    assert all((row["kl"], row["top1"], row["agreement"], row["computed_fraction"]) == (0, 1, 1, 1) for row in full)
    work = {name: [r["computed_fraction"] for r in rows if r["method"] == name] for name in METHODS}
    assert all(n < s < f for n, s, f in zip(work["naive"], work["sparsex"], work["full"], strict=True))


def test_operations_are_counted_with_the_signals_own_pass(engine):
    (asked,) = quality.prepare_batch(engine, [("niah", "independent", 0)], 300, seed=0, num_segments=3)
    found = {}
    for name in ("full", "naive", "epic", "sparsex", "prophetkv", "qcfuse:recompute_ratio=0.15", "cacheblend", "focus"):
        (ask,) = quality.asks(engine, [asked], parse_method(name))
        (out,) = quality.answer(engine, [ask])
        found[name.split(":")[0]] = flops_fraction(engine.model, ask.reuse, out.report), out.report.computed_fraction
    assert found["full"] == (1, 1)
    assert all(flops == pytest.approx(work, rel=0.5) for flops, work in found.values())
    assert found["naive"] < found["epic"] < found["qcfuse"] < found["prophetkv"]
    model = engine.model
    q, kv = model.num_q_heads * model.head_dim, model.num_kv_heads * model.head_dim
    token = 2 * model.hidden_size * (2 * q + 2 * kv + 3 * model.intermediate_size)
    n, fresh = len(asked.prompt), np.flatnonzero(answer_of(engine, asked, "naive").report.kind == TokenKind.FRESH)
    naive = token * len(fresh) + 4 * q * (fresh + 1).sum()
    assert found["naive"][0] == pytest.approx(naive / (token * n + 2 * q * n * (n + 1)))


def test_a_run_can_be_repeated(engine, rows):
    again = quality.run(engine, METHODS, ["qa"], ["independent"], num_tokens=300, samples=1)
    before = [r for r in rows if (r["task"], r["regime"], r["sample"]) == ("qa", "independent", 0)]
    times = dict.fromkeys(("ttft_s", "full_ttft_s", "speedup"))
    assert [r | times for r in again] == [r | times for r in before]


def test_a_run_that_was_stopped_goes_on(engine, rows, tmp_path, monkeypatch):
    path, made_with = tmp_path / "rows.jsonl", {"model": "tiny", "sizes": (1, 2)}
    log, cells = RowLog(path, made_with), [(r["task"], r["regime"], r["sample"]) for r in rows[::3]]
    log.add(rows[:5])
    with path.open("a") as file:
        file.write('{"task": "vt", "regi')  # the line in which it was killed
    log = RowLog(path, made_with)
    assert log.missing(cells[:2], list(METHODS)) == (cells[1:2], [rows[5]["method"]])
    asked = []

    def measure(engine, methods, batch, *sizes):
        asked.append((list(methods), list(batch)))
        return [
            row for row in rows if (row["task"], row["regime"], row["sample"]) in batch and row["method"] in methods
        ]

    monkeypatch.setattr(quality, "measure", measure)
    found = quality.run(engine, METHODS, ["vt", "qa"], ["joint", "independent"], 300, samples=2, log=log)
    assert asked[0] == ([rows[5]["method"]], cells[1:2])
    assert found == rows
    assert len(path.read_text().splitlines()) == 1 + len(rows)
    assert RowLog(path, made_with).of(cells, list(METHODS)) == rows
    with pytest.raises(InvalidRequestError, match="model='tiny', not 'other'; write to another place"):
        RowLog(path, made_with | {"model": "other"})


def test_a_run_that_failed_before_its_first_row_leaves_the_place_to_others(rows, tmp_path):
    path, [row, *_] = tmp_path / "rows.jsonl", rows
    RowLog(path, {"length": 100000})
    RowLog(path, {"length": 1000}).add([row])
    assert len(path.read_text().splitlines()) == 2
    with pytest.raises(InvalidRequestError, match="length=1000, not 100000"):
        RowLog(path, {"length": 100000})


def test_what_is_no_file_of_rows_is_left_alone(tmp_path):
    for text in ("notes\n", '{"a": 1}\n', "[]\n"):
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        with pytest.raises(InvalidRequestError, match="is no file of rows"):
            RowLog(path, {})
        assert path.read_text() == text


def test_the_oracle_is_a_method_of_the_bench(engine):
    methods = METHODS | {"oracle": Oracle(recompute_ratio=0.2)}
    rows = quality.run(engine, methods, ["qa"], ["independent"], num_tokens=300, samples=1)
    oracle = next(row for row in rows if row["method"] == "oracle")
    assert 0 < oracle["computed_fraction"] < 1
    with pytest.raises(InvalidRequestError, match="unknown"):
        engine.generate([1, 2, 3], reuse=ReuseConfig("oracle"))


def test_results_are_written_with_tables_and_plots(rows, tmp_path):
    found = summaries.summarize(rows)
    content = results.file_content("quality", "a/tiny", {"seed": 0}, found)
    path = results.write(content, found, tmp_path)
    assert path.name == f"quality-tiny-{content['device'].lower()}.json"
    read = json.loads(path.read_text())
    assert read == content
    assert {"command", "device", "versions", "commit", "settings"} <= read.keys()
    assert all({"work", "implementation", "figure", "unit"} <= row.keys() for row in read["rows"])
    table = path.with_suffix(".md").read_text()
    assert table.count("\n| sparsex |") == 2  # a table for each regime
    for plot in (plots.frontier, plots.scores_over_time):
        plot(found, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
        (tmp_path / "plot.png").unlink()


@pytest.mark.slow
def test_maps_show_where_reuse_goes_wrong(engine, tmp_path):
    settings = BenchSettings(["full"], ["vt"], ["independent"], length=300, segments=3, samples=1, batch=1, seed=0)
    found = example_maps(engine, settings, "vt", "independent")
    fresh = found.kind == TokenKind.FRESH
    assert found.key_mass.shape == found.key_deviation.shape == (engine.model.num_layers, len(fresh))
    np.testing.assert_allclose(found.key_mass.sum(1), 1, rtol=1e-4)
    np.testing.assert_allclose(found.key_deviation[0], 0, atol=1e-5)  # alignment is exact in layer 0
    np.testing.assert_allclose(found.value_deviation[0], 0, atol=1e-5)
    assert found.key_deviation[1:, ~fresh].mean() > 1e-3
    plots.heatmaps(found, tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 10_000


def test_key_mass_is_causal(engine):
    prompt, fresh = np.arange(5, 45, dtype=np.int32), np.arange(40) >= 36
    mass = maps.key_mass(engine, prompt, fresh, "mass")
    assert (mass >= 0).all()
    assert (mass[:, 39] <= 1 / 4).all()  # only one of the four queries can attend to it
    np.testing.assert_allclose(maps.key_mass(engine, prompt, fresh, "mass"), mass)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsex:depth=3", "depth=3 has no meaning for method 'sparsex'; its options: .*boundary_layer"),
        ("sparsex:boundary_layer=x", "boundary_layer='x'"),
    ],
)
def test_bad_options_of_a_method_are_refused(text, message):
    with pytest.raises(InvalidRequestError, match=message):
        parse_method(text)


def test_options_of_a_method():
    expected = ReuseConfig("sparsex", boundary_layer=0, recompute_ratio=0.3, second_boundary=None)
    assert parse_method("sparsex:boundary_layer=0:recompute_ratio=0.3:second_boundary=null") == expected


def test_a_folder_that_cannot_be_made_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "note").touch()
    options = ["--model", "no such model", "--out", str(tmp_path / "note" / "x")]
    result = CliRunner().invoke(app, ["bench", "quality", *options])
    assert result.exit_code == 2
    assert "cannot be made: Not a directory" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "vt,nothing"], "task='nothing' is unknown"),
        (["--regimes", "some"], "regime='some' is unknown"),
        (["--methods", "magic"], "method='magic' is unknown"),
        (["--samples", "0"], "samples=0 must be at least 1"),
        (["--methods", ","], "methods is empty"),
    ],
)
def test_the_command_refuses_bad_options_before_it_measures(monkeypatch, engine, options, message):
    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", lambda choice: engine)
    result = CliRunner().invoke(app, ["bench", "quality", *options])
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_command_prints_one_object_and_writes_a_folder(monkeypatch, engine, tmp_path):
    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", lambda choice: engine)
    options = ["--tasks", "niah", "--regimes", "joint", "--methods", "full,sparsex:boundary_layer=1"]
    options += ["--length", "200", "--samples", "1", "--json", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "quality", *options])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert {row["implementation"] for row in content["rows"]} == {"full", "sparsex:boundary_layer=1"}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".jsonl", ".md", ".png"]
    (log,) = tmp_path.glob("*.jsonl")
    before = log.read_text()
    monkeypatch.setattr(quality, "measure", lambda *_: pytest.fail("what is there was measured again"))
    assert CliRunner().invoke(app, ["bench", "quality", *options]).exit_code == 0
    assert log.read_text() == before
    result = CliRunner().invoke(app, ["bench", "quality", *options, "--segment-length", "60"])
    assert result.exit_code == 2
    assert "length=200, not 240" in " ".join(result.stderr.split())


def test_the_store_has_room_for_what_is_before_donors():
    alone, company = (
        BenchSettings(["full"], ["vt"], [regime], length=10240, segments=20, samples=1, batch=2, seed=0).store_tokens
        for regime in ("independent", "company:20")
    )
    assert alone > 2 * 2 * 10240
    assert company > alone + 2 * 10240
