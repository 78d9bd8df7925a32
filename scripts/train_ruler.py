"""Train `ruler-tiny`, a small decoder that solves the generated tasks of `sparsex_jax.eval.tasks`.

    python scripts/train_ruler.py --out runs/ruler --minutes 9 --total-minutes 20 --export configs/ruler-tiny

Stops after `--minutes` and saves. The same command continues from there until all runs together have taken
`--total-minutes`; over that time the learning rate decays and the contexts grow. About 20 minutes on one H100.
`--export` writes a Hugging Face directory. Needs optax: it is in the group `dev` and the extra `train`.

A training row is one context and several questions about it, each with its answer. The loss is the cross-entropy of
the answers and, with a small weight, of all other tokens. Two things speed the training up:

- Drills are exercises that no benchmark asks: a list to repeat, words to look up, and assignments without text between
  them. The tasks need what the model learns from them.
- Hints: where a variable is mentioned, the hidden states of several layers must predict its value, and the first head
  of those layers must attend to where the variable was assigned. So the model learns to follow assignments while it
  reads the context, one hop a layer. Without the loss on the heads it never learned a second hop.

The forward pass consists of the engine's own functions, so the engine runs what was trained.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax.training import train_state

from sparsex_jax import ModelConfig
from sparsex_jax.checkpoints.huggingface import TENSORS, HuggingFaceCheckpoint
from sparsex_jax.eval import lexicon
from sparsex_jax.eval.samples import Question, Sample
from sparsex_jax.eval.tasks import TASKS, make_sample, numbered, tracked
from sparsex_jax.model import decoder as model
from sparsex_jax.model.decoder import Decoder, OneLayer
from sparsex_jax.model.ops import Ops
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import Layers, Params, describe, num_parameters, random_params
from sparsex_jax.reuse.plan import Rows
from sparsex_kernels.backend import prefer

BOS, EOS = (lexicon.vocabulary()[token] for token in ("<bos>", "<eos>"))
_EQUALS, _VAR = (lexicon.vocabulary()[token] for token in (" =", " VAR"))
PAD, CONTEXT, ANSWER = 0, 1, 2  # kinds of tokens; those of the answer to question i have the kind ANSWER + i
TRAINING, HELD_OUT, LENGTH = 0, 1, 2  # streams of random numbers
HINT_LAYERS = (4, 5, 6, 7, 8)  # of 12, counted from 1; later layers can use the values that these have found
RULER_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": -(-len(lexicon.vocabulary()) // 64) * 64,  # a multiple that matrix units like
    "hidden_size": 384,
    "intermediate_size": 704,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dtype": "bfloat16",
}
# Share of the training done -> how often each row length, and each task, is drawn until the next entry. Short contexts
# come first, because the model finds attention that looks things up much sooner there. No task is ever left out. 5120
# tokens hold a context of 4K and its questions.
LENGTHS = {
    0.0: {256: 1.0},
    0.06: {256: 0.4, 512: 0.6},
    0.18: {256: 0.1, 512: 0.3, 1024: 0.6},
    0.28: {512: 0.2, 1024: 0.3, 2048: 0.5},
    0.45: {512: 0.1, 1024: 0.15, 2048: 0.25, 5120: 0.5},
    0.85: {1024: 0.1, 2048: 0.2, 5120: 0.5, 8192: 0.2},
}
DRILLS = ("repeat", "recall", "track")
TASK_MIX = {
    0.0: {
        "repeat": 3,
        "recall": 3,
        "track": 4,
        "niah": 1,
        "mq_niah": 3,
        "vt": 3,
        "cwe": 1,
        "fwe": 0.5,
        "qa": 2,
        "chat": 0.5,
        "agents": 0.5,
    },
    0.12: {
        "repeat": 1,
        "recall": 1,
        "track": 4,
        "niah": 0.5,
        "mq_niah": 3,
        "vt": 4,
        "cwe": 1.5,
        "fwe": 0.7,
        "qa": 2,
        "chat": 0.5,
        "agents": 0.5,
    },
    0.4: {
        "repeat": 0.2,
        "recall": 0.3,
        "track": 1,
        "niah": 0.3,
        "mq_niah": 2,
        "vt": 4,
        "cwe": 2,
        "fwe": 1,
        "qa": 2,
        "chat": 0.3,
        "agents": 0.7,
    },
}
TRAINED = tuple(task for task in (*DRILLS, *TASKS) if task in TASK_MIX[0.0])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The options that decide the outcome, beside the model."""

    seed: int = 0
    batch_tokens: int = 65536
    learning_rate: float = 1.5e-3
    warmup: int = 200  # steps
    weight_decay: float = 0.1
    text_weight: float = 0.1  # of the loss on tokens outside the answers
    hint_weight: float = 0.5  # of the loss on the values of the hints
    look_weight: float = 0.2  # of the loss on the places of the hints
    digit_weight: float = 0.25  # of a digit after another digit of an answer: there are many, and they are easy soon
    max_length: int = 8192  # the schedule's longer rows are cut to this
    patience: float = 1.0  # above 1, contexts grow later
    tasks: tuple[str, ...] = TRAINED

    def rate(self, progress: float, step: int) -> float:
        """Linear warm-up over steps, then a cosine to zero."""
        decay = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * decay

    def lengths(self, progress: float) -> dict[int, float]:
        """Row length -> how often it is drawn."""
        mix: dict[int, float] = collections.defaultdict(float)
        for length, weight in _current(LENGTHS, progress**self.patience).items():
            mix[min(length, self.max_length)] += weight
        return dict(mix)

    def length(self, progress: float, step: int) -> int:
        """The row length of a step."""
        mix = self.lengths(progress)
        weights = np.array(list(mix.values()))
        rng = np.random.default_rng([self.seed, LENGTH, step])
        return int(rng.choice(list(mix), p=weights / weights.sum()))

    def task_weights(self, progress: float) -> dict[str, float]:
        mix = _current(TASK_MIX, progress**self.patience)
        return {task: mix[task] for task in self.tasks}


def _current(schedule: dict[float, Any], progress: float) -> Any:
    return schedule[max(start for start in schedule if start <= progress)]


# Data: made by worker processes with NumPy -------------------------------------------------------------------


def make_row(
    task: str, rng: np.random.Generator, length: int, num_questions: int | None = None
) -> tuple[np.ndarray, ...]:
    """A training row: <bos>, instruction, segments, then question, answer and <eos> in turn, as many as fit.

    The segments stand in random order half of the time.

    Returns:
      Token ids, their kinds, and the two arrays of `make_hints`, `[length]` each.

    Raises:
      ValueError: the row has no room for even one question.
    """
    wanted = num_questions or int(rng.integers(4, 13) if length > 512 else rng.integers(3, 7))
    num_segments = int(rng.integers(1, min(8, max(length // 128, 1)) + 1))
    room = length * rng.uniform(0.75, 1.0)
    while room > 1:
        sample = draw_sample(task, rng, max(int(room) - 24 * wanted, 32), num_segments, wanted)
        segments = list(sample.segments)
        if rng.random() < 0.5:
            rng.shuffle(segments)
        context = np.append(BOS, lexicon.encode(sample.instruction + "".join(segments)))
        asked = _fitting(sample.questions, length - len(context))
        if asked:
            return _padded([context, *asked], length)
        room *= 0.8
    raise ValueError(f"a sample of {task} does not fit into {length} tokens")


def _fitting(questions: tuple[Question, ...], room: int) -> list[np.ndarray]:
    """Tokens of question, answer, question, ...: the first questions that fit into `room` tokens."""
    pieces: list[np.ndarray] = []
    for question in questions:
        asked, answer = lexicon.encode(question.text), np.append(lexicon.encode(question.reference), EOS)
        room -= len(asked) + len(answer)
        if room < 0:
            break
        pieces += [asked, answer]
    return pieces


def draw_sample(task: str, rng: np.random.Generator, num_tokens: int, num_segments: int, num_questions: int) -> Sample:
    """A sample of a task or a drill."""
    if task not in DRILLS:
        return make_sample(task, rng, num_tokens, num_segments, num_questions)
    words = rng.permutation([*lexicon.THINGS, *lexicon.VARIABLES, *lexicon.TOWNS, *lexicon.JOBS]).tolist()
    if task == "repeat":
        some = " ".join(words[: max(num_tokens // (1 + num_questions), 4)])
        return Sample(task, "", (f"{lexicon.WORD_LIST}{some}.\n",), (Question("Words:", (some,)),) * num_questions)
    if task == "track":
        told, questions = tracked(rng, max(num_tokens // 28, 4), num_questions)
        return Sample(task, "", (f"{lexicon.WORD_LIST}{' '.join(told)}\n",), tuple(questions))
    pairs = list(zip(words[::2], words[1::2], strict=False))[: max(num_tokens // 5, 4)]
    body = " ".join(f"{key} is: {value}." for key, value in pairs)
    asked = [[pairs[i] for i in rng.permutation(len(pairs))[: rng.integers(1, 5)]] for _ in range(num_questions)]
    questions = tuple(Question(*numbered("Words: {keys}? Answer:", some)) for some in asked)
    return Sample(task, "", (f"{lexicon.WORD_LIST}{body}\n",), questions)


def _padded(pieces: list[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
    """The arrays of a row that consists of context, question, answer, question, answer, ..."""
    kinds = [ANSWER + i // 2 - 1 if i > 0 and i % 2 == 0 else CONTEXT for i in range(len(pieces))]
    tokens, kind = np.full(length, PAD, np.uint16), np.full(length, PAD, np.uint8)
    flat = np.concatenate(pieces)
    tokens[: len(flat)] = flat
    kind[: len(flat)] = np.repeat(kinds, [len(piece) for piece in pieces])
    return tokens, kind, *make_hints(tokens)


def make_hints(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token that mentions a variable with a value: that value's token, and the place to look it up.

    The place is the right side of the variable's assignment. The arrays are `[length]`; other tokens have PAD and 0.
    """
    hints, places = np.full(len(tokens), PAD, np.uint16), np.zeros(len(tokens), np.uint16)
    values: dict[int, tuple[int, int]] = {}  # variable -> value and place
    assigned = 0
    row = tokens.tolist()
    for place in np.flatnonzero(_variables()[tokens]).tolist():
        name = row[place]
        if row[place + 1 : place + 2] == [_EQUALS]:
            assigned = name
            if row[place + 2] != _VAR:
                values[name] = row[place + 2], place + 2
        elif name in values:
            hints[place], places[place] = values[name]
            if row[place - 2 : place] == [_EQUALS, _VAR]:
                values[assigned] = values[name][0], place
    return hints, places


@functools.cache
def _variables() -> np.ndarray:
    """Which tokens of the vocabulary are names of variables."""
    return np.array([token.strip() in lexicon.VARIABLES for token in lexicon.vocabulary()])


def make_batch(
    key: tuple[int, ...], rows: int, length: int, weights: dict[str, float], num_questions: int | None = None
) -> tuple[np.ndarray, ...]:
    """`make_row`'s arrays for many rows, and the number of each row's task. The same key gives the same batch.

    Each task gets its share of the rows, rounded; only the rounding is random. So batches are alike.
    """
    rng = np.random.default_rng(key)
    edges = np.cumsum(list(weights.values()))
    tasks = np.searchsorted(edges, (np.arange(rows) + rng.random()) / rows * edges[-1], side="right")
    names = list(weights)
    drawn = [make_row(names[task], rng, length, num_questions) for task in tasks]
    numbers = np.array([(*DRILLS, *TASKS).index(names[task]) for task in tasks])
    return *(np.stack(part) for part in zip(*drawn, strict=True)), numbers


class Feed:
    """Batches in order, made ahead by worker processes. Without workers, `batch` makes each one itself."""

    def __init__(self, recipe: Recipe, workers: int, step: int, progress: Callable[[int], float]) -> None:
        """
        Args:
          step: the step of the first batch.
          progress: estimates, when a batch is ordered, the share of the training done at its step.
        """
        self._recipe, self._next, self._progress = recipe, step, progress
        # Spawn, not fork: a forked child would inherit the parent's threads and device in a broken state.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context) if workers else None
        self._ahead = 3 * workers
        self._queue: collections.deque[Any] = collections.deque()

    def batch(self) -> tuple[np.ndarray, ...]:
        if self._pool is None:
            return make_batch(*self._order())
        while len(self._queue) <= self._ahead:
            self._queue.append(self._pool.submit(make_batch, *self._order()))
        return self._queue.popleft().result()

    def _order(self) -> tuple[Any, ...]:
        step, self._next = self._next, self._next + 1
        recipe, progress = self._recipe, self._progress(step)
        length = recipe.length(progress, step)
        rows = recipe.batch_tokens // length
        return (recipe.seed, TRAINING, step), rows, length, recipe.task_weights(progress)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


# Model and optimiser -----------------------------------------------------------------------------------------


class Trace(NamedTuple):
    """What the losses read of each layer of a forward pass."""

    hidden: jax.Array  # [layers, batch, length, hidden]
    query: jax.Array  # [layers, batch, length, head_dim], of the first head
    key: jax.Array


def forward(params: Params, config: ModelConfig, tokens: jax.Array) -> Trace:
    """Run sequences `[batch, length]` that do not see each other."""
    batch, length = tokens.shape
    flat = jnp.asarray(tokens, jnp.int32).reshape(-1)
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    rows = Rows(flat, position, jnp.repeat(jnp.arange(batch), length), jnp.arange(flat.size))
    decoder = Decoder(config, Ops.on(make_mesh(1)))

    def run_layer(hidden: jax.Array, weights: Layers) -> tuple[jax.Array, Trace]:
        only = jax.tree.map(lambda weight: weight[None], weights)  # a stack of one layer
        return forward_layer(OneLayer(decoder, only, jnp.int32(0)), hidden, rows, (batch, length))

    # A product in place of `model.embed`'s look-up: its gradient is a product too, not a slow scatter.
    hidden = jax.nn.one_hot(flat, config.vocab_size, dtype=params.embed.dtype) @ params.embed
    return jax.lax.scan(run_layer, hidden, params.layers)[1]


def forward_layer(layer: OneLayer, hidden: jax.Array, rows: Rows, shape: tuple[int, int]) -> tuple[jax.Array, Trace]:
    """One layer for the rows of `[batch, length]` sequences, with attention that has gradients and needs no store."""
    fused: Literal["cudnn"] | None = "cudnn" if jax.default_backend() == "gpu" else None
    new = model.keys_values(layer, hidden, rows)
    heads = (model.queries(layer, hidden, rows), new.keys, new.values)
    q, k, v = (x.reshape(*shape, *x.shape[1:]) for x in heads)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=fused)
    hidden = hidden + jnp.einsum("rnd,ndh->rh", attended.reshape(heads[0].shape), layer.layers.wo[0])
    hidden = hidden + model.mlp(layer, hidden, rows)
    return hidden, Trace(hidden.reshape(*shape, -1), q[:, :, 0], k[:, :, 0])


def losses(
    params: Params, config: ModelConfig, recipe: Recipe, dtype: str, rows: tuple[jax.Array, ...]
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """The losses on a batch.

    Args:
      rows: token ids, kinds, hints and places, `[batch, length]` each.

    Returns:
      The mean cross-entropies of answers, other text, hints and places; the share of hints that is right at each layer
      of `HINT_LAYERS`; and `[batch, length]`: 1 where the next token belongs to an answer and is predicted, 0 where it
      belongs to an answer and is not predicted, -1 elsewhere.
    """
    tokens, kind, hints, places = rows
    kind, targets = following(kind), following(tokens).astype(jnp.int32)
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    trace = forward(params, config, tokens)
    final = logits(params, config, trace.hidden[-1])
    surprise, answer = cross_entropy(final, targets), kind >= ANSWER
    in_number = is_digit()[tokens] & is_digit()[targets]
    hint, look, hinted = hint_losses(params, config, trace, hints.astype(jnp.int32), places.astype(jnp.int32))
    means = {
        "answer": mean(surprise, jnp.where(in_number, recipe.digit_weight, 1.0) * answer),
        "text": mean(surprise, kind == CONTEXT),
        "hint": hint,
        "look": look,
    }
    return means, hinted, jnp.where(answer, final.argmax(-1) == targets, -1)


def hint_losses(
    params: Params, config: ModelConfig, trace: Trace, hints: jax.Array, places: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean over `HINT_LAYERS` of the hints' cross-entropies, and the share of values that is right at each layer.

    The first is the cross-entropy of the values, the second that of the first head's attention to their places.
    """
    length = hints.shape[1]
    some = functools.partial(
        jnp.nonzero, size=-(-length // 5), fill_value=length - 1
    )  # at most one mention in 6 tokens
    (at,) = jax.vmap(some)(hints > PAD)
    hints, places = (jnp.take_along_axis(x, at, axis=1) for x in (hints, places))
    there, causal = hints > PAD, jnp.arange(length) <= at[..., None]
    values, looks, right = [], [], []
    for layer in (min(layer, config.num_layers) - 1 for layer in HINT_LAYERS):
        scores = logits(params, config, jnp.take_along_axis(trace.hidden[layer], at[..., None], axis=1))
        query = jnp.take_along_axis(trace.query[layer], at[..., None], axis=1)
        attention = jnp.einsum("bmd,bld->bml", query, trace.key[layer], preferred_element_type=jnp.float32)
        attention = jnp.where(causal, attention * config.head_dim**-0.5, -1e9)
        values.append(mean(cross_entropy(scores, hints), there))
        looks.append(mean(cross_entropy(attention, places), there))
        right.append(mean(scores.argmax(-1) == hints, there))
    return sum(values) / len(values), sum(looks) / len(looks), jnp.stack(right)


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """The logits of hidden states `[..., hidden]`."""
    return model.logits(params, config, hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:-1], -1)


def cross_entropy(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """The target's score is picked by a product: it fuses, and its gradient is not a scatter."""
    return jax.nn.logsumexp(scores, axis=-1) - jnp.sum(scores * jax.nn.one_hot(targets, scores.shape[-1]), axis=-1)


def mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean; 0 where no weight is above 0."""
    return jnp.sum(x * weights) / jnp.maximum(jnp.sum(weights), 1)


def is_digit() -> jax.Array:
    """Which tokens of the vocabulary are digits."""
    return jnp.array([token.strip().isdigit() for token in lexicon.vocabulary()])


def following(x: jax.Array) -> jax.Array:
    """The next element of each row of `[batch, length]`; 0, which is PAD, after the last."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


class TrainState(train_state.TrainState):
    """flax's state of a training: parameters, optimiser, and the state of the optimiser.

    Its step takes a learning rate, which follows the clock and not the number of steps.
    """

    def apply_gradients(self, *, grads: Params, rate: jax.Array) -> TrainState:
        directions, opt_state = self.tx.update(grads, self.opt_state, self.params)
        params = optax.apply_updates(self.params, jax.tree.map(lambda direction: -rate * direction, directions))
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


def make_state(params: Params, config: ModelConfig, recipe: Recipe) -> TrainState:
    """The state before the first step, on the device that trains."""
    # Not by `TrainState.create`, which takes parameters in dictionaries only.
    optimizer = make_optimizer(config, recipe)
    state = TrainState(
        step=jnp.int32(0), apply_fn=losses, params=params, tx=optimizer, opt_state=optimizer.init(params)
    )
    return jax.device_put(state, jax.devices()[0])  # as steps return it, else the second one compiles again


@functools.cache  # it is a part of the key of the compiled step
def make_optimizer(config: ModelConfig, recipe: Recipe) -> optax.GradientTransformation:
    """AdamW for a learning rate of 1: `TrainState` scales its updates. Norms and embeddings do not decay."""
    decays = jax.tree.map(lambda weight: weight.stacked and weight.fan_in > 0, describe(config))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(recipe.weight_decay, decays),
    )


def init_params(config: ModelConfig, seed: int) -> Params:
    """Random float32 weights. What the layers add to the residual stream starts small beside the embeddings."""
    params = random_params(config, "float32", make_mesh(), seed)
    scale = (2 * config.num_layers) ** -0.5
    layers = params.layers
    layers = dataclasses.replace(layers, wo=layers.wo * scale, w_down=layers.w_down * scale)
    return dataclasses.replace(params, layers=layers)


@functools.partial(jax.jit, static_argnames=("config", "recipe", "dtype"), donate_argnames="state")
def train_step(
    state: TrainState, rows: tuple[jax.Array, ...], rate: jax.Array, config: ModelConfig, recipe: Recipe, dtype: str
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the state, and what to log of it."""

    def loss(params: Params) -> tuple[jax.Array, tuple[Any, ...]]:
        means, hinted, right = state.apply_fn(params, config, recipe, dtype, rows)
        weights = {"text": recipe.text_weight, "hint": recipe.hint_weight, "look": recipe.look_weight}
        weighted = means["answer"] + sum(weight * means[name] for name, weight in weights.items())
        return weighted, (means, hinted, right)

    grads, (means, hinted, right) = jax.grad(loss, has_aux=True)(state.params)
    metrics = {f"{name}_loss": value for name, value in means.items()} | {
        "hinted": hinted,
        "right": jnp.sum(right == 1) / jnp.maximum(jnp.sum(right >= 0), 1),
        "gradient": optax.tree.norm(grads),
    }
    return state.apply_gradients(grads=grads, rate=rate), metrics


# Evaluation --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("config", "recipe", "dtype"))
def predicted(
    params: Params, rows: tuple[jax.Array, ...], config: ModelConfig, recipe: Recipe, dtype: str
) -> jax.Array:
    """Which tokens of answers are predicted: the third result of `losses`."""
    return losses(params, config, recipe, dtype, rows)[2]


@functools.cache
def held_out(recipe: Recipe, length: int) -> list[tuple[np.ndarray, ...]]:
    """Batches with one question a context and as much of each task. Longer rows make more batches."""
    weights = dict.fromkeys(recipe.tasks, 1.0)
    rows = max(recipe.batch_tokens // length, 1)
    keys = [(recipe.seed, HELD_OUT, length, i) for i in range(max(4, length // 256))]
    return [make_batch(key, rows, length, weights, num_questions=1) for key in keys]


def evaluate(params: Params, config: ModelConfig, recipe: Recipe, dtype: str, length: int) -> dict[str, Any]:
    """Task -> the share of answers, and of answers' tokens, that are predicted from the true tokens before them."""
    whole: dict[int, list[bool]] = collections.defaultdict(list)
    single: dict[int, list[bool]] = collections.defaultdict(list)
    for *rows, tasks in held_out(recipe, length):
        right = np.asarray(predicted(params, tuple(rows), config, recipe, dtype))
        for row, task in zip(right, tasks.tolist(), strict=True):
            whole[task].append(row[row >= 0].all())
            single[task].extend(row[row >= 0])
    shares = {task: {"answers": float(np.mean(whole[task])), "tokens": float(np.mean(single[task]))} for task in whole}
    return {(*DRILLS, *TASKS)[task]: shares[task] for task in sorted(shares)}


# Checkpoints, log and export ---------------------------------------------------------------------------------


class Storage:
    """`checkpoints/` (orbax: the state and the time spent), `log.json` and `loss.png` in one directory."""

    def __init__(self, directory: Path) -> None:
        import orbax.checkpoint as ocp

        self.directory = directory.absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._args = ocp.args
        # Not asynchronous, because the next step donates the buffers that are being written.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory / "checkpoints", options=options)
        self.log: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}

    def restore(self, state: TrainState) -> tuple[TrainState, int, float]:
        """State, step and seconds of the last checkpoint; without one, the given state and zeros."""
        step = self._manager.latest_step()
        if step is None:
            return state, 0, 0.0
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        args = self._args.Composite(state=self._args.StandardRestore(target), meta=self._args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        if (self.directory / "log.json").is_file():
            log = json.loads((self.directory / "log.json").read_text())
            self.log = {kind: [line for line in lines if line["step"] <= step] for kind, lines in log.items()}
        return restored["state"], step, restored["meta"]["seconds"]

    def save(self, state: TrainState, step: int, seconds: float) -> None:
        self._write_log()
        if self._manager.latest_step() != step:
            state, meta = self._args.StandardSave(state), self._args.JsonSave({"seconds": seconds})
            self._manager.save(step, args=self._args.Composite(state=state, meta=meta))

    def close(self) -> None:
        self._manager.close()
        self._write_log()
        _plot(self.log, self.directory / "loss.png")

    def _write_log(self) -> None:
        (self.directory / "log.json").write_text(json.dumps(self.log, indent=1) + "\n")


def _plot(log: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot the losses, and the share of right answers by task and length, if matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lengths = sorted({line["length"] for line in log["eval"]})
    figure, axes = plt.subplots(1, 1 + len(lengths), figsize=(5 * (1 + len(lengths)), 4))
    axes = np.atleast_1d(axes)
    for name in ("answer_loss", "text_loss", "hint_loss", "look_loss"):
        axes[0].plot([line["step"] for line in log["train"]], [line[name] for line in log["train"]], label=name)
    axes[0].set(xlabel="step", title="cross-entropy", yscale="log")
    axes[0].legend()
    for axis, length in zip(axes[1:], lengths, strict=True):
        lines = [line for line in log["eval"] if line["length"] == length]
        for task in lines[-1]["tasks"]:
            axis.plot([x["step"] for x in lines], [x["tasks"][task]["answers"] for x in lines], label=task)
        axis.set(xlabel="step", title=f"answers right, {length} tokens", ylim=(0, 1.02))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def export(directory: Path, raw: dict[str, Any], params: Params, command: str, max_shard: int = 15_500_000) -> None:
    """Write the model as transformers does: configuration, tokenizer, and bfloat16 weights in shards."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("model*.safetensors*"):
        old.unlink()
    shards = _in_shards(hf_tensors(ModelConfig.from_hf(raw), params), max_shard)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, directory / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    lexicon.ruler_tokenizer().save_pretrained(directory)
    size = f"{num_parameters(ModelConfig.from_hf(raw)) / 1e6:.1f} M parameters"
    (directory / "README.md").write_text(
        f"ruler-tiny: {size}, trained on the tasks of `sparsex_jax.eval.tasks` by\n\n    {command}\n"
    )


def _in_shards(tensors: Iterator[tuple[str, np.ndarray]], max_bytes: int) -> list[dict[str, np.ndarray]]:
    """Consecutive tensors together, as many as `max_bytes` hold."""
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    return shards


def hf_tensors(config: ModelConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bfloat16 array of each tensor as transformers stores it: layers apart, linear weights `[out, in]`."""

    def stored(array: np.ndarray, fan_in: int) -> np.ndarray:
        matrix = array.reshape(fan_in, -1).T if fan_in else array
        return np.ascontiguousarray(matrix.astype(ml_dtypes.bfloat16))

    weights = jax.tree.map(np.asarray, params)
    yield TENSORS["embed"], weights.embed.astype(ml_dtypes.bfloat16)
    for layer in range(config.num_layers):
        for name, weight in vars(describe(config).layers).items():
            if weight is not None:
                yield TENSORS[name].format(layer), stored(getattr(weights.layers, name)[layer], weight.fan_in)
    yield TENSORS["final_norm"], stored(weights.final_norm, 0)


# The training loop -------------------------------------------------------------------------------------------


class Trainer:
    """The state of a training and what drives it."""

    def __init__(self, config: ModelConfig, recipe: Recipe, args: argparse.Namespace) -> None:
        self._started = time.monotonic()
        self.config, self.recipe, self._args = config, recipe, args
        self.storage = Storage(args.out)
        if args.init:
            params = HuggingFaceCheckpoint(args.init).load_params("float32", make_mesh())
        else:
            params = init_params(config, recipe.seed)
        # `step` counts on the host what `state.step` counts on the device: to read that would wait for the step.
        self.state, self.step, self._seconds_before = self.storage.restore(make_state(params, config, recipe))
        self._feed = Feed(recipe, args.workers, self.step, self.progress)

    @property
    def spent(self) -> float:
        """Seconds that this run has taken."""
        return time.monotonic() - self._started

    @property
    def seconds(self) -> float:
        """Seconds that all runs together have taken."""
        return self._seconds_before + self.spent

    def progress(self, step: int) -> float:
        """Share of the training done: by steps, else by time."""
        if self._args.total_steps:
            return min(step / self._args.total_steps, 1.0)
        return min(self.seconds / (60 * self._args.total_minutes), 1.0)

    def run(self) -> None:
        """Train until the time of this run is over or the whole training is done."""
        evaluated = saved = self.spent
        while self.progress(self.step) < 1 and self.spent < 60 * self._args.minutes:
            self._log(*self._train_for(10.0))
            if self.spent - evaluated > self._args.eval_seconds:
                self._evaluate()
                evaluated = self.spent
            if self.spent - saved > 60 * self._args.save_minutes:
                self.save()
                saved = self.spent
        self.save()
        self._evaluate()

    def _train_for(self, seconds: float) -> tuple[list[dict[str, jax.Array]], int, float]:
        """Train for some seconds: the metrics of each step, the number of tokens, and the seconds it took."""
        begin, history, tokens = self.spent, [], 0
        while self.spent - begin < seconds and self.progress(self.step) < 1:
            size, metrics = self.train()
            tokens += size
            history.append(metrics)
            jax.block_until_ready(history[-3:][0])  # the device is at most two steps behind
        return jax.device_get(history), tokens, self.spent - begin

    def train(self) -> tuple[int, dict[str, jax.Array]]:
        """One step: its number of tokens, and its metrics."""
        *rows, _ = self._feed.batch()
        rate = self.recipe.rate(self.progress(self.step), self.step)
        self.state, metrics = train_step(self.state, tuple(rows), rate, self.config, self.recipe, self._args.dtype)
        self.step += 1
        return rows[0].size, metrics

    def _log(self, history: list[dict[str, jax.Array]], tokens: int, seconds: float) -> None:
        """Log the mean metrics of some steps."""
        line: dict[str, Any] = {
            name: np.mean([metrics[name] for metrics in history], axis=0).tolist() for name in history[0]
        }
        line |= {
            "step": self.step,
            "minutes": self.seconds / 60,
            "progress": self.progress(self.step),
            "rate": self.recipe.rate(self.progress(self.step), self.step),
            "tokens_per_second": tokens / seconds,
        }
        self.storage.log["train"].append(line)
        print(describe_line(line), flush=True)

    def _evaluate(self) -> None:
        for length in sorted(self.recipe.lengths(self.progress(self.step))):
            tasks = evaluate(self.state.params, self.config, self.recipe, self._args.dtype, length)
            self.storage.log["eval"].append({"step": self.step, "length": length, "tasks": tasks})
            shares = "  ".join(f"{task} {s['answers']:.2f} ({s['tokens']:.2f})" for task, s in tasks.items())
            print(f"  held out, {length:4} tokens, answers (tokens) right: {shares}", flush=True)

    def save(self) -> None:
        self.storage.save(self.state, self.step, self.seconds)

    def close(self) -> None:
        self._feed.close()
        self.storage.close()


def describe_line(line: dict[str, Any]) -> str:
    """A line of the log, to read while the training runs."""
    return (
        f"{line['minutes']:5.1f} min {line['progress']:4.0%} step {line['step']:6} | "
        f"answers {line['answer_loss']:.3f} text {line['text_loss']:.3f} right {line['right']:.3f} "
        f"hints {line['hint_loss']:.3f} right {' '.join(f'{share:.2f}' for share in line['hinted'])} | "
        f"look {line['look_loss']:.3f} | "
        f"gradient {line['gradient']:.2f} "
        f"rate {line['rate']:.1e} | {line['tokens_per_second'] / 1e3:.0f}K tokens/s"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of checkpoints and log; a run continues what is there")
    add("--minutes", type=float, default=9, help="wall time of this run")
    add("--total-minutes", type=float, default=20, help="wall time of all runs together, which the schedule spans")
    add("--total-steps", type=int, help="span the schedule over steps instead, so that it can be repeated exactly")
    add("--eval-seconds", type=float, default=60)
    add("--save-minutes", type=float, default=4)
    add("--init", type=Path, help="start from the weights of a Hugging Face directory, such as an earlier export")
    add("--export", type=Path, help="write the model here, as a Hugging Face directory, when the run ends")
    workers = max(min((os.cpu_count() or 2) - 2, 8), 1)
    add("--workers", type=int, default=workers, help="processes that make batches; 0: this one makes them")
    add("--dtype", default="bfloat16" if jax.default_backend() == "gpu" else "float32", help="dtype of the computation")
    add("--model", type=json.loads, default={}, help="JSON object of config.json fields that differ from ruler-tiny's")
    add("--tasks", nargs="+", choices=TRAINED, default=TRAINED)
    for field in dataclasses.fields(Recipe):
        if isinstance(field.default, (int, float)):
            add(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def make_trainer(args: argparse.Namespace) -> Trainer:
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**fields | {"tasks": tuple(args.tasks)})
    return Trainer(ModelConfig.from_hf(RULER_TINY | args.model), recipe, args)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not jax.config.jax_compilation_cache_dir:  # a run that continues an earlier one need not compile again
        jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))
    with prefer("xla"):  # the only kernels that have gradients
        train(args, argv)


def train(args: argparse.Namespace, argv: list[str] | None) -> None:
    trainer = make_trainer(args)
    size = num_parameters(trainer.config) / 1e6
    print(f"{size:.1f} M parameters, from step {trainer.step}, {jax.devices()[0].device_kind}", flush=True)
    try:
        trainer.run()
        if args.export:
            command = "python scripts/train_ruler.py " + " ".join(sys.argv[1:] if argv is None else argv)
            export(args.export, RULER_TINY | args.model, trainer.state.params, command)
    finally:
        trainer.close()


if __name__ == "__main__":
    main()
