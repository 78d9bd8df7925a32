"""Adapters of roles: what the schemes of sharing must agree on, what roles read, and the files that are written."""

import dataclasses
import json
import re
from pathlib import Path

import adapter_roles as roles
import adapter_schemes as schemes
import bench_adapters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_adapters
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsex_jax import ModelConfig
from sparsex_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from sparsex_jax.eval import lexicon
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params

SHIPPED = Path(__file__).parents[1] / "configs" / "ruler-tiny-adapters"

CONFIG = ModelConfig(
    vocab_size=1536,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=1024,
    tied_embeddings=True,
)
SHAPE = roles.Shape(turns=4, facts=2, noise=1, asked=1)
KINDS = tuple(dict.fromkeys(scheme.kind for scheme in schemes.SCHEMES))


@pytest.fixture(scope="module")
def team():
    """A random model and random adapters, strong enough to show in every layer."""
    adapters = schemes.init_adapters(CONFIG, 1)
    strong = {
        name: jax.random.normal(jax.random.key(at), getattr(adapters, name).shape) * 0.3
        for at, name in enumerate(("q_b", "v_b"))
    }
    return schemes.Team(random_params(CONFIG, "float32", make_mesh(1)), CONFIG, adapters.replace(**strong))


@pytest.fixture(scope="module")
def batch():
    return roles.make_trajectories((3, 0), 2, SHAPE)


def _new_rows(team, scheme, batch):
    """What the schemes compute of each turn's new tokens, put together."""
    rows = np.zeros((*batch.tokens.shape, CONFIG.hidden_size), np.float32)
    for turn, hidden in team.play(scheme, batch):
        rows = np.where(np.asarray(turn.new)[..., None], np.asarray(hidden), rows)
    return rows


def _differs(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def _scheme(kind, share=0.5):
    return schemes.Scheme(kind, share if kind == "refresh" else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("isolated", "rebase")])
def test_where_one_role_wrote_everything_sharing_is_exact(team, batch, kind):
    """All but rebase, which never keeps what an adapter wrote."""
    alone = batch._replace(roles=np.full_like(batch.roles, 2))
    assert _differs(_new_rows(team, _scheme(kind), alone), _new_rows(team, _scheme("isolated"), alone)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "isolated"])
def test_where_roles_differ_sharing_is_not_exact(team, batch, kind):
    assert _differs(_new_rows(team, _scheme(kind, 0.05), batch), _new_rows(team, _scheme("isolated"), batch)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "isolated"])
def test_adapters_that_change_nothing_lose_nothing(team, batch, kind):
    same = dataclasses.replace(team, adapters=schemes.init_adapters(CONFIG, 1))
    assert _differs(_new_rows(same, _scheme(kind), batch), _new_rows(same, _scheme("isolated"), batch)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("power", schemes.POWERS)
def test_a_refresh_of_all_tokens_is_isolated(team, batch, power):
    everything = _new_rows(team, schemes.Scheme("refresh", 1.0, power), batch)
    assert _differs(everything, _new_rows(team, _scheme("isolated"), batch)) < 1e-4


@pytest.mark.slow
def test_adapters_on_queries_alone_lose_only_by_hidden_states(team, batch):
    """In the first layer nothing then differs between roles but queries: all its keys and values are shared exactly."""
    silent = team.adapters.replace(v_b=jnp.zeros_like(team.adapters.v_b))
    one = CONFIG.num_layers - 1
    cut = dataclasses.replace(
        team,
        config=dataclasses.replace(CONFIG, num_layers=one),
        params=team.params.replace(layers=jax.tree.map(lambda x: x[:one], team.params.layers)),
        adapters=jax.tree.map(lambda x: x[:one], silent),
    )
    for kind in ("full_shared", "base_shared", "pre_lr", "rebase"):
        assert _differs(_new_rows(cut, _scheme(kind), batch), _new_rows(cut, _scheme("isolated"), batch)) < 1e-4


def test_an_adapter_is_its_products_merged_into_the_weights(team, batch):
    adapters, layers, role = team.adapters, team.params.layers, 1
    scale = schemes.ALPHA / schemes.RANK

    def merged(weight, a, b):
        added = jnp.einsum("ldr,lro->ldo", a[:, role % a.shape[1]], b[:, role]) * scale
        return weight + added.reshape(weight.shape)

    wq, wv = merged(layers.wq, adapters.q_a, adapters.q_b), merged(layers.wv, adapters.v_a, adapters.v_b)
    params = team.params.replace(layers=layers.replace(wq=wq, wv=wv))
    whole = dataclasses.replace(team, params=params, adapters=schemes.init_adapters(CONFIG, 0))
    alone, isolated = batch._replace(roles=np.full_like(batch.roles, role)), _scheme("isolated")
    assert _differs(_new_rows(team, isolated, alone), _new_rows(whole, isolated, alone)) < 1e-4


@pytest.mark.slow
def test_without_adapters_it_is_the_model_that_the_engine_runs(team, batch):
    """The trainer of ruler-tiny runs the engine's own functions."""
    import train_ruler

    tokens = jnp.asarray(batch.tokens)
    found = schemes.run(team.params, CONFIG, team.adapters, tokens, jnp.full(2, schemes.NEUTRAL)).hidden
    expected = train_ruler.forward(team.params, CONFIG, tokens).hidden
    assert _differs(np.asarray(found), np.asarray(expected)) < 1e-4


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 2), st.integers(1, 4))
def test_a_role_answers_what_its_code_makes_of_each_assignment(seed, facts, noise, asked):
    """The text, read by a second implementation."""
    shape = roles.Shape(turns=5, facts=facts, noise=noise, asked=min(asked, facts))
    drawn = roles.make_trajectories((seed,), 1, shape)
    names = {number: token for token, number in lexicon.vocabulary().items()}
    text, assigned = "", {}
    for turn, role in enumerate(drawn.roles[0]):
        text = "".join(names[token] for token in drawn.tokens[0][drawn.turn[0] == turn].tolist())
        assigned |= dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text))
        answers = re.findall(r"(?:first|second|third|fourth) (\w+) (\w+)[,.]", text.partition("? Answer:")[2])
        assert len(answers) == shape.asked
        step = list(roles.STEPS.values())[role]
        for name, value in answers:
            looks, found = 0, name
            while found not in roles.VALUES:
                looks, found = looks + 1, assigned[found]
            assert value == roles.VALUES[(roles.VALUES.index(found) + looks * step) % len(roles.VALUES)]
    assert drawn.asked.sum() == 5 * shape.asked


def test_no_two_roles_read_alike():
    for looks in (1, 2):
        read = [roles.reading(np.arange(8), np.full(8, looks), role) for role in range(len(roles.ROLES))]
        assert all((a != b).all() for a in read for b in read if a is not b)


def test_training_rows_score_each_role_for_its_own_answers(batch):
    rows = train_adapters.make_rows(batch, SHAPE)
    for number in range(len(roles.ROLES)):
        own = slice(2 * number, 2 * number + 2)
        turns = (batch.writer == number) & (batch.turn >= 0)
        assert rows.scored[own].sum() == (batch.answer & turns).sum()
        asked = rows.looks[own] > 0
        assert asked.sum() == (batch.asked & turns).sum()
        said = rows.targets[own][asked]
        expected = roles.reading(batch.value[asked], batch.looks[asked], number)
        assert (said == roles.VALUE_IDS[expected]).all()
        assert (rows.hints[own] >= 0).sum() == (batch.value >= 0).sum()


@pytest.mark.parametrize("shared", [False, True])
def test_peft_files_are_read_as_written(tmp_path, shared):
    adapters = schemes.init_adapters(CONFIG, 5, shared)
    adapters = adapters.replace(q_b=adapters.q_b + 0.25, v_b=adapters.v_b - np.arange(3)[:, None, None] / 8)
    for number, role in enumerate(roles.ROLES):
        train_adapters.write_peft(tmp_path / role, adapters, number)
    found = train_adapters.read_peft(tmp_path, CONFIG)
    for name in ("q_a", "q_b", "v_a", "v_b"):
        expected = np.broadcast_to(np.asarray(getattr(adapters, name), np.float16), getattr(found, name).shape)
        np.testing.assert_array_equal(getattr(found, name), expected)
    said = json.loads((tmp_path / "act" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["target_modules"]) == (8, 16, ["q_proj", "v_proj"])


def test_won_back_is_a_share_of_what_full_sharing_lost():
    def answers(*right):
        return train_adapters.Answers(np.array(right), np.full((2, 2), 4))

    by_scheme = {
        "isolated": answers([4, 4], [4, 4]),
        "full_shared": answers([0, 0], [0, 0]),
        "pre_lr": answers([4, 0], [4, 0]),
    }
    found = {(r["work"], r["implementation"]): r for r in train_adapters.figures(by_scheme, "own", 0)}
    assert found["own, find: won back", "pre_lr"]["figure"] == 1
    assert found["own, trace: won back", "pre_lr"]["figure"] == 0
    both = found["own, all: won back", "pre_lr"]
    assert both["low"] == both["figure"] == both["high"] == 0.5
    assert found["own, all: lost", "full_shared"]["figure"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_writes_adapters_and_figures(tmp_path, dtype):
    import train_ruler

    micro = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    raw = train_ruler.RULER_TINY | micro
    params = train_ruler.init_params(ModelConfig.from_hf(raw), seed=0)
    train_ruler.export(tmp_path / "model", raw, params, "")
    sizes = [
        "--rows",
        "2",
        "--turns",
        "3",
        "--facts",
        "2",
        "--noise",
        "1",
        "--eval-rows",
        "3",
        "--eval-batch",
        "2",
        "--steps",
        "2",
    ]
    common = ["--out", str(tmp_path), "--model", str(tmp_path / "model"), *sizes, "--dtype", dtype]
    path = train_adapters.main(common)
    first = json.loads(path.read_text())
    works = {row["work"] for row in first["rows"]}
    assert {"own, all: right", "shared, trace: won back", "own, roles: cosine of keys"} <= works
    again = json.loads(train_adapters.main([*common, "--adapters", str(tmp_path)]).read_text())
    assert again["rows"] == first["rows"]
    config = ModelConfig.from_hf(raw)
    shared, own = (train_adapters.read_peft(tmp_path / variant, config) for variant in ("shared", "own"))
    assert np.array_equal(shared.v_a[:, 0], shared.v_a[:, 1])
    assert not np.array_equal(own.v_a[:, 0], own.v_a[:, 1])
    assert np.abs(own.v_b).max() > 0


@pytest.mark.slow
def test_training_learns_what_it_is_taught():
    """On one small batch, over and over."""
    params = random_params(CONFIG, "float32", make_mesh(1))
    rows = train_adapters.make_rows(roles.make_trajectories((0, 0), 2, SHAPE), SHAPE)
    adapters = schemes.init_adapters(CONFIG, 0)
    state = train_adapters.State(adapters, train_adapters._OPTIMIZER.init(adapters))
    found = []
    for _ in range(60):
        state, metrics = train_adapters.train_step(state, params, CONFIG, rows, 1e-2, {"hint": 1.0, "quiet": 0.01})
        found.append(float(metrics["answer loss"]))
    assert found[-1] < 0.8 * found[0]


def test_the_trace_has_the_length_that_the_papers_give():
    """33.7K tokens with 8K in four of its 17 steps, and 66.4K with 16K (LRAgent and PReCache)."""
    steps = bench_adapters.steps_of(8192)
    assert len(steps) == 17
    assert sum(new + answer for _, new, answer in steps) == 33680
    assert sum(new + answer for _, new, answer in bench_adapters.steps_of(16384)) == 66448
    assert {agent for agent, *_ in steps} == set(roles.ROLES)


@pytest.mark.slow
def test_the_adapters_that_come_with_the_repository_lose_visibly_if_they_share_without_repair():
    checkpoint = HuggingFaceCheckpoint(train_adapters.RULER_TINY)
    config, params = checkpoint.config, checkpoint.load_params("float32", make_mesh(1))
    team = schemes.Team(params, config, train_adapters.read_peft(SHIPPED, config))
    held_out = [roles.make_trajectories((0, train_adapters.HELD_OUT, 0), 8, roles.Shape())]
    named = {scheme.name: scheme for scheme in schemes.SCHEMES}
    right = {}
    for name in ("isolated", "full_shared"):
        found = train_adapters.answers(team, named[name], held_out)
        right[name] = found.right.sum() / found.asked.sum()
    assert right["isolated"] > 0.95
    assert right["full_shared"] < 0.6
