"""Train LoRA adapters that make three agents' roles of ruler-tiny, and measure what it costs them to share KV.

    python scripts/train_adapters.py --out runs/adapters --minutes 6

The roles (`adapter_roles`) read the values of variables by codes of their own. Each has an adapter of rank 8 on queries
and values, as in LRAgent. All three are trained at once on the same trajectories, for their own answers and with hints:
where a variable is mentioned, the hidden states of some layers must predict what the role reads there, as in
`train_ruler.py`. So a role reads values while it reads the text, and not when it answers.

There are two variants, which share the time: `own`, where each role has its own A, and `shared`, where all have one A
for values. Then the schemes of `adapter_schemes` answer held-out trajectories. `--adapters DIR` measures adapters that
are there already. Writes for each variant a PEFT directory for each role, and `adapters-ruler-tiny-<device>.json`.
Needs optax, as `train_ruler.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import adapter_schemes as schemes
import jax
import jax.numpy as jnp
import numpy as np
import optax
from adapter_roles import PAD, ROLES, VALUE_IDS, Shape, Trajectories, make_trajectories, reading
from adapter_schemes import ALPHA, RANK, SCHEMES, Adapters, Scheme, Team
from safetensors.numpy import load_file, save_file

from sparsex_jax import ModelConfig
from sparsex_jax.checkpoints.huggingface import HuggingFaceCheckpoint
from sparsex_jax.eval import results
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import Params

RULER_TINY = Path(__file__).resolve().parents[1] / "configs" / "ruler-tiny"
VARIANTS = ("own", "shared")
TRAINING, HELD_OUT, BOOTSTRAP = 0, 1, 2  # streams of random numbers
HINT_LAYERS = (4, 5, 6, 7, 8)  # those in which train_ruler.py taught the model to know values
RESAMPLES = 4000
KINDS = {"find": (1,), "trace": (2,), "all": (1, 2)}  # questions by the number of look-ups


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The options that decide the outcome, beside the model."""

    seed: int = 0
    rows: int = 32  # trajectories in a step; each is read by every role
    learning_rate: float = 3e-3
    warmup: int = 40  # steps
    hint_weight: float = 1.0
    quiet_weight: float = 0.0  # of the adapters' part of the values: with it they act where it matters only

    def rate(self, progress: float, step: int) -> float:
        """Linear warm-up over steps, then a cosine to zero."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * progress))


# Data --------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """A training batch: trajectories, each read by one role."""

    tokens: np.ndarray  # [batch, length]
    role: np.ndarray  # [batch]
    targets: np.ndarray  # [batch, length]: the next token
    scored: np.ndarray  # [batch, length] bool: the next token belongs to the role's own answer
    looks: np.ndarray  # [batch, length]: where the next token is a value of such an answer, the look-ups for it; else 0
    places: np.ndarray  # [batch, mentions]: places of mentions; the last place of the row fills up
    hints: np.ndarray  # [batch, mentions]: the token of what the role reads there; -1 in what fills up


def make_rows(batch: Trajectories, shape: Shape) -> Rows:
    """The batch as each role reads it, one role after the other."""
    read = [_as_read(batch, shape, role) for role in range(len(ROLES))]
    return Rows(*(np.concatenate(part) for part in zip(*read, strict=True)))


def _as_read(batch: Trajectories, shape: Shape, role: int) -> Rows:
    own = batch.answer & (batch.writer == role)
    last = batch.tokens.shape[1] - 1
    places = np.sort(np.where(batch.value >= 0, np.arange(last + 1), last), axis=1)[:, : shape.mentions]
    value, looks = (np.take_along_axis(part, places, axis=1) for part in (batch.value, batch.looks))
    hints = np.where(value >= 0, VALUE_IDS[reading(value, looks, role)], -1)
    roles = np.full(len(places), role, np.int32)
    asked = np.where(own & batch.asked, batch.looks, 0)
    return Rows(batch.tokens, roles, _following(batch.tokens), _following(own), asked, places, hints)


def _following(x: np.ndarray) -> np.ndarray:
    """The next element of each row; 0 after the last."""
    return np.pad(x[:, 1:], ((0, 0), (0, 1)))


# Training ----------------------------------------------------------------------------------------------------


class State(NamedTuple):
    adapters: Adapters
    optimizer: Any


def losses(
    adapters: Adapters, params: Params, config: ModelConfig, rows: Rows
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The losses, and the shares of values that are found, traced and hinted right.

    Losses are the cross-entropies of answers and hints, and the squared norm of the adapters' part of the values as a
    share of that of the base values.
    """
    adapters = jax.tree.map(lambda x: x.astype(params.embed.dtype), adapters)
    passed = schemes.run(params, config, adapters, rows.tokens, rows.role)
    hidden = passed.hidden
    scores = schemes.logits(params, config, hidden[-1])
    answer = _mean(optax.softmax_cross_entropy_with_integer_labels(scores, rows.targets), rows.scored)
    is_right = scores.argmax(-1) == rows.targets
    right = {name: _mean(is_right, jnp.isin(rows.looks, jnp.array(KINDS[name]))) for name in ("find", "trace")}
    layers = jnp.array([min(layer, config.num_layers) - 1 for layer in HINT_LAYERS])
    hinted = schemes.logits(params, config, jnp.take_along_axis(hidden[layers], rows.places[None, :, :, None], axis=2))
    targets = jnp.broadcast_to(rows.hints, hinted.shape[:-1])
    hint = _mean(optax.softmax_cross_entropy_with_integer_labels(hinted, jnp.maximum(targets, 0)), targets >= 0)
    right["hints"] = _mean(hinted.argmax(-1) == targets, targets >= 0)
    part = schemes.parts(adapters, passed.written, rows.role)
    share = _square(part) / jnp.maximum(_square(passed.written.values), 1e-6)
    return {"answer": answer, "hint": hint, "quiet": _mean(share.mean(0), rows.tokens != PAD)}, right


def _square(heads: jax.Array) -> jax.Array:
    """The squared norm over the last two axes, in float32."""
    return jnp.sum(heads.astype(jnp.float32) ** 2, axis=(-2, -1))


def _mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean; 0 where no weight is above 0."""
    return jnp.sum(x * weights) / jnp.maximum(jnp.sum(weights), 1)


_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b1=0.9, b2=0.98))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(
    state: State, params: Params, config: ModelConfig, rows: Rows, rate: jax.Array, weights: dict[str, float]
) -> tuple[State, dict[str, jax.Array]]:
    """One update, and what to print of it."""

    def loss(adapters: Adapters) -> tuple[jax.Array, tuple[Any, ...]]:
        means, right = losses(adapters, params, config, rows)
        return means["answer"] + sum(weight * means[name] for name, weight in weights.items()), (means, right)

    grads, (means, right) = jax.grad(loss, has_aux=True)(state.adapters)
    directions, optimizer = _OPTIMIZER.update(grads, state.optimizer)
    adapters = jax.tree.map(lambda x, direction: x - rate * direction, state.adapters, directions)
    return State(adapters, optimizer), {f"{name} loss": value for name, value in means.items()} | right


class Clock:
    """The share of a training that is done: by steps if their number is given, else by time."""

    def __init__(self, minutes: float, steps: int | None) -> None:
        self._started, self._minutes, self._steps = time.monotonic(), minutes, steps

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def progress(self, step: int) -> float:
        return min(step / self._steps if self._steps else self.seconds / (60 * self._minutes), 1.0)


def train(params: Params, config: ModelConfig, recipe: Recipe, shape: Shape, clock: Clock, shared: bool) -> Adapters:
    """Train the adapters of all roles until the clock says that it is done."""
    adapters = schemes.init_adapters(config, recipe.seed, shared)
    state, step, printed = State(adapters, _OPTIMIZER.init(adapters)), 0, 0.0
    weights = {"hint": recipe.hint_weight, "quiet": recipe.quiet_weight}
    pending: list[dict[str, jax.Array]] = []
    while (progress := clock.progress(step)) < 1:
        rows = make_rows(make_trajectories((recipe.seed, TRAINING, step), recipe.rows, shape), shape)
        rate = recipe.rate(progress, step)
        state, metrics = train_step(state, params, config, rows, rate, weights)
        step += 1
        pending.append(metrics)
        jax.block_until_ready(pending[-3:][0])  # the device is at most two steps behind
        if clock.seconds - printed > 10:
            print(_line(step, clock, pending), flush=True)
            pending, printed = [], clock.seconds
    print(_line(step, clock, pending), flush=True)
    return state.adapters


def _line(step: int, clock: Clock, metrics: list[dict[str, jax.Array]]) -> str:
    names = metrics[0] if metrics else {}
    means = [f"{name} {np.mean([float(each[name]) for each in metrics]):.3f}" for name in names]
    return f"{clock.seconds:5.0f} s step {step:5} | {'  '.join(means)}"


# PEFT directories --------------------------------------------------------------------------------------------

README = """LoRA adapters for ruler-tiny in PEFT's format: rank 8, on queries and values, {a}.
Trained by

    {command}

They are three roles of agents, `plan`, `act` and `reflect`, that share a trajectory (`scripts/adapter_roles.py`). Each
answers "Which values: first X? Answer:" by a code of its own: it moves a value by one, two or three places each time
that it looks a variable up. So the keys and values that one role wrote mislead another. What each scheme of sharing
loses by that is in `scripts/results/README.md`.
"""
_NAME = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"


def write_peft(folder: Path, adapters: Adapters, role: int) -> None:
    """Write one role's adapter as PEFT does: `adapter_config.json`, and float16 matrices `[outputs, inputs]`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(len(adapters.q_a)):
        for target, a, b in (("q", adapters.q_a, adapters.q_b), ("v", adapters.v_a, adapters.v_b)):
            for side, weight in (("A", a[layer, role % a.shape[1]]), ("B", b[layer, role])):
                tensors[_NAME.format(layer, target, side)] = np.ascontiguousarray(np.asarray(weight, np.float16).T)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_peft_config(), indent=2) + "\n")


def _peft_config() -> dict[str, Any]:
    return {
        "base_model_name_or_path": "ruler-tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _readme(variant: str) -> str:
    command = f"python scripts/{results.provenance()['command']}"
    return README.format(
        command=command, a="all roles with one A for values" if variant == "shared" else "each role with its own A"
    )


def read_peft(folder: Path, config: ModelConfig) -> Adapters:
    """The adapters of all roles from the directories that `write_peft` wrote into a folder, in float32."""
    files = [load_file(folder / role / "adapter_model.safetensors") for role in ROLES]

    def stacked(target: str, side: str) -> jax.Array:
        names = [_NAME.format(layer, target, side) for layer in range(config.num_layers)]
        return jnp.asarray(np.stack([[tensors[name].T for tensors in files] for name in names]), jnp.float32)

    return Adapters(stacked("q", "A"), stacked("q", "B"), stacked("v", "A"), stacked("v", "B"))


# Measuring ---------------------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """Values of answers that a scheme says, by trajectory and by the number of look-ups."""

    right: np.ndarray  # [trajectories, 2]
    asked: np.ndarray  # [trajectories, 2]


def answers(team: Team, scheme: Scheme, batches: list[Trajectories]) -> Answers:
    """Which values a scheme says, each from the true tokens before it."""
    found = [_answers(team.expected(scheme, batch), batch) for batch in batches]
    return Answers(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _answers(expected: np.ndarray, batch: Trajectories) -> Answers:
    is_right = expected == _following(batch.tokens)
    asked = np.stack([batch.asked & (batch.looks == looks) for looks in KINDS["all"]])
    return Answers((asked & is_right).sum(axis=2).T, asked.sum(axis=2).T)


def resample(found: Answers, kind: str, seed: int) -> np.ndarray:
    """The share of a kind's values that are right, `[1 + RESAMPLES]`: as measured, and in bootstrap samples.

    The same seed draws the same trajectories, so samples of two schemes are paired.
    """
    columns = [KINDS["all"].index(looks) for looks in KINDS[kind]]
    right, asked = found.right[:, columns].sum(axis=1), found.asked[:, columns].sum(axis=1)
    drawn = np.random.default_rng((seed, BOOTSTRAP)).integers(0, len(right), (RESAMPLES, len(right)))
    drawn = np.concatenate([np.arange(len(right))[None], drawn])
    return _share(right[drawn].sum(axis=1), asked[drawn].sum(axis=1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The quotient; nan where the whole is 0."""
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole != 0)


def figures(by_scheme: dict[str, Answers], variant: str, seed: int) -> list[dict[str, Any]]:
    """Rows for a results file: what is right, what is lost against isolated, and how much of full_shared's loss is won
    back. Intervals are percentiles of the paired bootstrap."""
    rows = []
    for kind, looks in KINDS.items():
        shares = {name: resample(found, kind, seed) for name, found in by_scheme.items()}
        best, worst = shares["isolated"], shares["full_shared"]
        samples = int(by_scheme["isolated"].asked[:, [KINDS["all"].index(each) for each in looks]].sum())
        for name, each in shares.items():
            found = {"right": each, "lost": best - each, "won back": _share(each - worst, best - worst)}
            if name in ("isolated", "full_shared"):
                del found["won back"]
            rows += [_row(f"{variant}, {kind}: {metric}", name, x, samples) for metric, x in found.items()]
    return rows


def _row(work: str, name: str, found: np.ndarray, samples: int) -> dict[str, Any]:
    """A row of what `resample` returned, or of what was computed of it. None for what no answer says."""
    ends = np.nanpercentile(found[1:], [2.5, 97.5]) if np.isfinite(found[1:]).any() else [np.nan, np.nan]
    numbers = {key: _number(x) for key, x in zip(("figure", "low", "high"), (found[0], *ends), strict=True)}
    return {"work": work, "implementation": name, "unit": "share", **numbers, "samples": samples}


def _number(x: float) -> float | None:
    """None for nan, which JSON does not have."""
    return round(float(x), 5) if np.isfinite(x) else None


def measure(team: Team, variant: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one variant."""
    sizes = [min(args.eval_rows - at, args.eval_batch) for at in range(0, args.eval_rows, args.eval_batch)]
    batches = [make_trajectories((args.seed, HELD_OUT, at), size, shape_of(args)) for at, size in enumerate(sizes)]
    found = {}
    for scheme in SCHEMES:
        found[scheme.name] = answers(team, scheme, batches)
        print(f"{variant}: {scheme.name:24} {_shares(found[scheme.name])}", flush=True)
    alike = schemes.likeness(team, batches[0])
    print("  ".join(f"{name} {value:.3f}" for name, value in alike.items()), flush=True)
    return figures(found, variant, args.seed) + [
        {"work": f"{variant}, roles: {name}", "implementation": "isolated", "figure": round(value, 5), "unit": "share"}
        for name, value in alike.items()
    ]


def _shares(found: Answers) -> str:
    find, trace = found.right.sum(axis=0) / np.maximum(found.asked.sum(axis=0), 1)
    return f"find {find:.3f} trace {trace:.3f} all {found.right.sum() / found.asked.sum():.3f}"


# The command -------------------------------------------------------------------------------------------------


def shape_of(args: argparse.Namespace) -> Shape:
    return Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)})


def make_adapters(args: argparse.Namespace, variant: str, params: Params, config: ModelConfig) -> Adapters:
    """Train the variant's adapters and write them, or read those that are there. Float16 either way."""
    if args.adapters:
        return read_peft(args.adapters / variant, config)
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)})
    clock = Clock(args.minutes / len(args.variants), args.steps)
    cast = jax.tree.map(lambda x: x.astype(args.dtype), params)
    adapters = jax.device_get(train(cast, config, recipe, shape_of(args), clock, variant == "shared"))
    for number, role in enumerate(ROLES):
        write_peft(args.out / variant / role, adapters, number)
    (args.out / variant / "README.md").write_text(_readme(variant))
    return read_peft(args.out / variant, config)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of what is written")
    add("--minutes", type=float, default=6, help="wall time of the training of all variants; measuring comes on top")
    add("--steps", type=int, help="train each variant for this many steps instead")
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    add("--adapters", type=Path, help="train nothing, and measure what an earlier run wrote to this folder")
    add("--model", type=Path, default=RULER_TINY, help="Hugging Face directory of ruler-tiny")
    add("--dtype", default="bfloat16" if jax.default_backend() == "gpu" else "float32", help="of the training")
    add("--eval-rows", type=int, default=256, help="held-out trajectories")
    add("--eval-batch", type=int, default=64)
    for field in (*dataclasses.fields(Recipe), *dataclasses.fields(Shape)):
        add(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    """Returns the path of the results file."""
    args = parse(argv)
    checkpoint = HuggingFaceCheckpoint(args.model)
    params, config = checkpoint.load_params("float32", make_mesh(1)), checkpoint.config
    rows = []
    for variant in args.variants:
        team = Team(params, config, make_adapters(args, variant, params, config))
        rows += measure(team, variant, args)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str)}
    head = {"bench": "adapters", "model": "ruler-tiny"} | results.provenance() | {"settings": settings}
    return results.write_json(head | {"rows": rows}, args.out)


if __name__ == "__main__":
    main()
