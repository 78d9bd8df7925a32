"""Conversations of many turns, and the bench that compares methods on them."""

import argparse
import itertools
import json

import bench_conversations
import pytest
from live import make_engine
from views import VIEWS

from sparsex_jax import InvalidRequestError, ReuseConfig
from sparsex_jax.eval.conversations import (
    CONVERSATIONS,
    ConversationSize,
    make_conversation,
    next_request,
    scripted_requests,
)
from sparsex_jax.reuse.report import KINDS

METHODS = {name: ReuseConfig(name) for name in ("prefix", "sparsex")}


def requests(name, seed=0, **size):
    """All requests of a conversation."""
    return list(scripted_requests(name, ConversationSize(**size), seed))


def answered(name, text):
    """All requests of a conversation in which each answer is the text with its number."""
    conversation = make_conversation(name, ConversationSize(), 0).requests
    found = [next_request(conversation, None)]
    while found[-1] is not None:
        found.append(next_request(conversation, text.format(len(found) - 1)))
    return found[:-1]


def texts(request):
    return [message["content"] for message in request.messages]


every = pytest.mark.parametrize("name", CONVERSATIONS)


@every
def test_the_same_seed_gives_the_same_conversation(name):
    assert requests(name, 1) == requests(name, 1) != requests(name, 2)
    found = requests(name)
    assert len(found) >= 15
    assert all(text.strip() for request in found for text in texts(request))


@every
def test_answers_come_back_and_change_nothing_else(name):
    """All answers are in later requests, but the last one, and a manager's."""
    some, others = answered(name, "alpha {}."), answered(name, "omega {}.")
    for request, other in zip(some, others, strict=True):
        assert [text.replace("alpha", "omega") for text in texts(request)] == texts(other)
        assert request.speaker == other.speaker
    for number, request in enumerate(some[:-2]):
        later = itertools.chain.from_iterable(texts(each) for each in some[number + 1 :])
        assert any(f"alpha {number}." in text for text in later) == (request.speaker != "manager")


@every
def test_a_scale_makes_prompts_longer(name):
    plain, scaled = requests(name), requests(name, scale=3)
    assert sum(map(len, texts(scaled[-1]))) > 1.2 * sum(map(len, texts(plain[-1])))
    assert len(plain) == len(scaled)


def test_wrong_sizes_are_refused():
    with pytest.raises(InvalidRequestError, match="turns=0 must be at least 1"):
        ConversationSize(turns=0)


def test_a_clock_ticks_and_files_come_back():
    found = requests("coding")
    first_lines = [request.messages[0]["content"].partition("\n")[0] for request in found]
    assert len(set(first_lines)) == len(found)
    assert len({request.messages[0]["content"].partition("\n")[2] for request in found}) == 1
    shown = [text for text in texts(found[-1]) if '"""Helpers' in text]
    assert len(set(shown)) < len(shown) or any(text.startswith("Changed") for text in shown)


def test_documents_come_back_in_another_order():
    found = requests("tools")
    returned = [[m["content"] for m in request.messages if m["role"] == "tool"] for request in found]
    assert len(set(itertools.chain.from_iterable(returned))) == 6
    assert len({tuple(some) for some in returned}) > 10


@pytest.fixture(scope="module")
def bench():
    engine = make_engine()
    return bench_conversations.Bench(engine, engine.tokenizer, ConversationSize(turns=5, new_tokens=3), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["full", "own"])
def test_methods_play_the_same_conversation(bench, answers):
    played = bench.compare("round_robin_3", answers, METHODS, passes=1)
    for turns in played.values():
        assert len(turns) == 9, "three for each agent"
        for turn in turns:
            assert turn["prompt_tokens"] == sum(turn[f"{kind}_tokens"] for kind in KINDS)
            assert turn["ttft_s"] > 0
    if answers == "full":
        prefix, sparsex = played.values()
        assert [turn["prompt_tokens"] for turn in prefix] == [turn["prompt_tokens"] for turn in sparsex]
        assert all(own["work"] <= other["work"] for own, other in zip(sparsex[1:], prefix[1:], strict=True))
    assert max(turn["kl"] for turn in played["prefix"]) < 1e-3
    assert {turn["agreement"] for turn in played["prefix"]} == ({None} if answers == "full" else {1.0})


def turn(work, ttft_s, kl, agreement=None):
    tokens = {f"{kind}_tokens": 0 for kind in KINDS} | {"fresh_tokens": 10}
    return {"speaker": "a", "prompt_tokens": 10, **tokens, "work": work, "ttft_s": ttft_s, "kl": kl, "top1": 1.0,
            "agreement": agreement}  # fmt: skip


SCRIPTED = {
    "prefix": [turn(40, 1.0, 0.0), turn(20, 0.5, 0.0), turn(20, 0.5, 0.0)],
    "sparsex": [turn(44, 1.5, 0.1), turn(10, 0.52, 0.2), turn(21, 0.6, 0.3)],
}


def test_figures_compare_with_the_prefix_cache_behind_the_first_turn():
    found = bench_conversations.summary(SCRIPTED["sparsex"], SCRIPTED["prefix"], num_layers=4)
    assert {name: figure for name, (figure, _) in found.items()} == pytest.approx(
        {
            "turns": 3,
            "prompt": 30,
            "work": 75 / 120,
            "TTFT sum": 2.62,
            "dearer": 1,
            "slower": 1,
            "KL, first third": 0.1,
            "KL, last third": 0.3,
            "top-1": 1.0,
            "agreement": None,
        }
    )


def test_a_file_and_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_conversations, "RESULTS", tmp_path)
    about = {"model": "tiny", "note": None, "methods": ["prefix", "sparsex"], "turns": 3, "heal": False}
    options = argparse.Namespace(**about, tensor_parallel=1)
    bench_conversations.save(options, {("rag", "full"): SCRIPTED}, num_layers=4)
    (path,) = tmp_path.glob("conversations-tiny-*.json")
    content = json.loads(path.read_text())
    shown = VIEWS["conversations"](content)
    assert "| rag | `sparsex` | 3 | 0.62 | 2.62 | 1 | 1 | 0.100 / 0.300 | 1.00 | - |" in shown
    assert "| rag | `sparsex` | 110 25 52 |" in shown
    headline = VIEWS["conversations_headline"](content)
    assert "| rag | 3 | 0.67 | 0.62 | 2.00 | 2.62 | 1 / 1 | 0.100 / 0.300 | - |" in headline
