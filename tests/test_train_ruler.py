"""The trainer of ruler-tiny: it trains what the engine runs, on what it says, and goes on where it stopped."""

import json

import jax
import numpy as np
import pytest
import train_ruler

from sparsex_jax import Engine, ModelConfig, ReuseConfig
from sparsex_jax.eval import lexicon
from sparsex_jax.eval.tasks import CLOSED_TASKS

MICRO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
OPTIONS = ("--workers", "0", "--warmup", "1", "--batch-tokens", "512", "--max-length", "256", "--dtype", "float32")


@pytest.fixture
def config():
    return ModelConfig.from_hf(train_ruler.RULER_TINY | MICRO)


def _trainer(out, steps):
    args = train_ruler.parse(["--out", str(out), "--total-steps", str(steps), "--model", json.dumps(MICRO), *OPTIONS])
    return train_ruler.make_trainer(args)


def _run(out, steps, stop_at=None):
    """Parameters and losses after training up to a step."""
    trainer = _trainer(out, steps)
    found = []
    while trainer.step < (stop_at or steps):
        found.append(float(trainer.train()[1]["answer_loss"]))
    trainer.save()
    trainer.close()
    return jax.device_get(trainer.state.params), found


def test_the_size_fits_the_repository():
    config = ModelConfig.from_hf(train_ruler.RULER_TINY)
    assert 10e6 < train_ruler.num_parameters(config) < 15.5e6
    assert config.vocab_size >= len(lexicon.vocabulary())


@pytest.mark.slow
def test_the_engine_computes_what_is_trained(config):
    params = train_ruler.init_params(config, seed=1)
    rows, *_ = train_ruler.make_batch((0, 0, 0), 2, 128, {"niah": 1.0})
    hidden = train_ruler.forward(params, config, rows).hidden[-1]
    trained = np.asarray(train_ruler.logits(params, config, hidden))
    engine = Engine(config, params)
    for row, scores in zip(rows, trained, strict=True):
        for length in (17, 128):
            found = engine.prefill(row[:length], reuse=ReuseConfig(method="full"), keep=False).logits
            np.testing.assert_allclose(found, scores[length - 1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("task", [*train_ruler.DRILLS, *CLOSED_TASKS])
def test_the_loss_covers_exactly_the_answers(task):
    tokens, kind, *_ = train_ruler.make_row(task, np.random.default_rng(3), 512)
    names = {number: token for token, number in lexicon.vocabulary().items()}
    text = ["".join(names[token] for token in tokens[kind == number].tolist()) for number in np.unique(kind)]
    padding, context, *answers = text if kind[-1] == 0 else ["", *text]
    assert set(padding.split("<pad>")) <= {""}
    assert context.startswith("<bos>" + lexicon.INSTRUCTIONS.get(task, lexicon.WORD_LIST))
    assert answers
    assert all(answer.startswith(" ") and answer.endswith(".<eos>") for answer in answers)
    # An answer stands right behind its question, whose text ends where the model is to go on.
    for number in range(train_ruler.ANSWER, kind.max() + 1):
        (places,) = np.nonzero(kind == number)
        assert names[int(tokens[places[0] - 1])] == ":"
        assert np.array_equal(places, np.arange(places[0], places[-1] + 1))


@pytest.mark.slow
def test_losses_count_what_the_kinds_say(config):
    params = train_ruler.init_params(config, seed=0)
    *rows, _ = train_ruler.make_batch((0, 0, 1), 2, 256, {"mq_niah": 1.0, "vt": 1.0})
    tokens, kind, hints, _ = rows
    recipe = train_ruler.Recipe(digit_weight=1.0)
    losses = jax.jit(train_ruler.losses, static_argnums=(1, 2, 3))
    means, hinted, right = losses(params, config, recipe, "float32", tuple(rows))
    hidden = train_ruler.forward(params, config, tokens).hidden[-1]
    final = np.asarray(train_ruler.logits(params, config, hidden), np.float64)
    halfway = final  # this model ends before the layers of the hints
    surprise = _surprise(final[:, :-1], tokens[:, 1:])
    is_answer = kind[:, 1:] >= train_ruler.ANSWER
    np.testing.assert_allclose(means["answer"], surprise[is_answer].mean(), rtol=1e-5)
    np.testing.assert_allclose(means["text"], surprise[kind[:, 1:] == train_ruler.CONTEXT].mean(), rtol=1e-5)
    np.testing.assert_allclose(means["hint"], _surprise(halfway, hints)[hints > 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(hinted[-1], (halfway.argmax(-1) == hints)[hints > 0].mean(), rtol=1e-5)
    assert np.array_equal(right[:, :-1] >= 0, is_answer)
    assert np.array_equal((right[:, :-1] == 1)[is_answer], (final[:, :-1].argmax(-1) == tokens[:, 1:])[is_answer])


def _surprise(scores, targets):
    return np.log(np.exp(scores).sum(-1)) - np.take_along_axis(scores, targets[..., None].astype(int), -1)[..., 0]


def test_hints_follow_assignments_through_the_row():
    first, second, third, unknown = lexicon.VARIABLES[:4]
    text = f"VAR {first} = acorn. The VAR {second} = VAR {first}. VAR {third} = VAR {second}. {third} {unknown}\n"
    hints, places = train_ruler.make_hints(lexicon.encode(text))
    pieces, acorn = lexicon.split(text), lexicon.vocabulary()[" acorn"]
    at = np.flatnonzero(hints)
    assert [pieces[i] for i in at] == [f" {first}", f" {second}", f" {third}"]
    assert set(hints[at].tolist()) == {acorn}
    assert places[at].tolist() == [pieces.index(" acorn"), at[0], at[1]]


@pytest.mark.parametrize("drill", train_ruler.DRILLS)
def test_drills_have_their_answers_in_the_text(drill):
    sample = train_ruler.draw_sample(drill, np.random.default_rng(0), 200, 1, 3)
    assert len(sample.questions) == 3
    for question in sample.questions:
        assert set(" ".join(question.answers).split()) <= set(sample.segments[0].replace(".", "").split())
        assert question.reference.startswith(" ")


def test_batches_repeat_and_have_every_task():
    weights = train_ruler.Recipe().task_weights(0.5)
    first, again = (train_ruler.make_batch((0, 0, 5), 96, 256, weights) for _ in range(2))
    other = train_ruler.make_batch((0, 0, 6), 96, 256, weights)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert set(first[-1].tolist()) == set(range(len(weights)))


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="vt does not fit into 64 tokens"):
        train_ruler.make_row("vt", np.random.default_rng(0), 64)


def test_the_schedule():
    recipe = train_ruler.Recipe()
    assert recipe.rate(0.0, step=0) < 0.01 * recipe.learning_rate  # however long the first compilation took
    assert recipe.rate(0.02, step=1000) == pytest.approx(recipe.learning_rate, rel=0.01)
    assert recipe.rate(1.0, step=1000) == pytest.approx(0, abs=1e-9)
    assert max(recipe.lengths(0.0)) <= 512
    assert max(recipe.lengths(1.0)) == 8192
    assert max(train_ruler.Recipe(max_length=1024).lengths(1.0)) == 1024


@pytest.mark.slow
def test_training_lowers_the_loss_and_resumes_exactly(tmp_path):
    whole, losses = _run(tmp_path / "whole", 12)
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.3
    _, first = _run(tmp_path / "parts", 12, stop_at=3)
    parts, second = _run(tmp_path / "parts", 12)
    assert first + second == losses
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.slow
def test_a_finished_training_is_exported_and_opens(tmp_path):
    command = ["--out", str(tmp_path / "out"), "--total-steps", "2", "--export", str(tmp_path / "model"), *OPTIONS]
    train_ruler.main([*command, "--model", json.dumps(MICRO)])
    assert (tmp_path / "out" / "log.json").is_file()
    assert "--total-steps 2" in (tmp_path / "model" / "README.md").read_text()
    engine = Engine.from_pretrained(tmp_path / "model")
    assert engine.model.hidden_size == 32
    assert engine.model.eos_token_ids == (train_ruler.EOS,)
    assert engine.generate("Memorize it.").report.prompt_tokens == 1 + len(lexicon.encode("Memorize it."))


@pytest.mark.slow
def test_export_in_shards_keeps_every_weight(tmp_path, config):
    params = train_ruler.init_params(config, seed=2)
    train_ruler.export(tmp_path, train_ruler.RULER_TINY | MICRO, params, "command", max_shard=60_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    engine = Engine.from_pretrained(tmp_path)
    tokens = lexicon.encode(f"Memorize it. VAR {lexicon.VARIABLES[0]} = 12.")
    rounded = jax.tree.map(lambda w: w.astype("bfloat16").astype("float32"), params)
    expected = Engine(config, rounded).prefill(tokens).logits
    np.testing.assert_allclose(engine.prefill(tokens).logits, expected, rtol=1e-5, atol=1e-5)
