"""The bench of servers under load: its prompts, what it counts as good, and that it ends what it started."""

import asyncio
import importlib
import itertools
import json
import sys

import numpy as np
import pytest

SERVER = """
import http.server, json, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404); self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and asked["ignore_eos"] and asked["stream"] and asked["return_token_ids"]
        assert all(isinstance(token, int) for token in asked["prompt"])
        self.send_response(200); self.end_headers()
        for token in range(asked["max_tokens"]):
            chunk = {"choices": [{"index": 0, "text": "", "token_ids": [token]}]}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\n"); self.wfile.flush(); time.sleep(0.002)
        self.wfile.write(b"data: [DONE]\\n\\n")

    def log_message(self, *_): pass

assert json.load(open(sys.argv[1] + "/config.json"))["vocab_size"] == 128256
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
def bench():
    return importlib.import_module("bench_load")


def prompts_of(bench, name, number=30, seed=(1,)):
    return bench.make_prompts(name, number, 1000, seed, 15, bench.Lengths())


@pytest.mark.parametrize("name", ["chat", "rag", "agents"])
def test_the_same_seed_makes_the_same_prompts_and_another_one_shares_no_text(bench, name):
    once, again, other = (prompts_of(bench, name, seed=seed) for seed in ((1,), (1,), (2,)))
    assert once == again
    assert len(once) == 30
    assert not {tuple(prompt[:16]) for prompt in once} & {tuple(prompt[:16]) for prompt in other}
    assert max(map(len, once)) <= bench.longest(15, bench.Lengths())


def test_a_chat_goes_on_with_its_history(bench):
    prompts = bench.make_prompts("chat", 15, 1000, (1,), 15, bench.Lengths())
    for before, after in itertools.pairwise(prompts):
        assert after[: len(before)] == before


def test_documents_come_in_another_order_each_turn(bench):
    texts, lengths = bench.Texts(1000, [0]), bench.Lengths()
    library = texts.some(lengths.library, lengths.document)
    first, second = ([id(part) for part in parts] for parts in bench.rag(texts, 2, lengths, library))
    known = {id(document) for document in library}
    assert len(set(first) & known) == len(set(second) & known) == lengths.documents
    assert [part for part in first if part in known] != [part for part in second if part in known]


def test_agents_hear_all_that_was_said_in_orders_of_their_own(bench):
    parts = [[each.tobytes() for each in part] for part in bench.agents(bench.Texts(1000, [0]), 15, bench.Lengths())]
    assert [len(each) for each in parts] == list(range(3, 18))
    before, last = parts[-2], parts[-1]
    assert set(before[1:-1]) < set(last[1:-1])
    assert before[1:-1] != last[1:-2]
    assert parts[0][0] == parts[8][0], "eight agents take turns"


def test_what_is_late_or_cut_short_is_not_good(bench):
    good = bench.Timeline(0.0, came=[(0.5, 1), (0.54, 1)])
    late, slow = bench.Timeline(0.0, came=[(1.5, 1), (1.54, 1)]), bench.Timeline(0.0, came=[(0.5, 1), (0.6, 1)])
    short, failed = bench.Timeline(0.0, came=[(0.5, 1)]), bench.Timeline(0.0, error=ValueError("refused"))
    found = bench.figures([good, late, slow, short, failed], 2, (1.0, 0.05))
    assert found["good"] == (1 / 5, "of requests")
    assert found["failed"] == (2.0, "requests")
    assert found["goodput"] == (pytest.approx(1 / 1.54), "requests/s")
    with pytest.raises(RuntimeError, match="refused"):
        bench.figures([failed], 2, (1.0, 0.05))


def test_a_server_that_a_command_starts_is_measured_and_ended(bench, tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    command = f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}}"
    asked = ["--server", command, "--name", "fake", "--workloads", "chat", "rag", "--rates", "40", "--seconds", "0.5"]
    bench.main([*asked, "--new-tokens", "3", "--scale", "0.05", "--turns", "4"], tmp_path)
    (path,) = tmp_path.glob("load-llama-3.1-8b-*.json")
    rows = {row["work"]: row for row in json.loads(path.read_text())["rows"]}
    assert {row["implementation"] for row in rows.values()} == {"fake"}
    assert {"start", "chat, 40 requests a second: goodput", "rag, 40 requests a second: TTFT p50"} <= rows.keys()
    assert rows["chat, 40 requests a second: failed"]["figure"] == 0
    assert rows["chat, 40 requests a second: goodput"]["figure"] > 0


def test_a_server_that_does_not_start_is_an_error(bench):
    with pytest.raises(RuntimeError, match="ended with 3"), bench.running("sh -c 'exit 3'", "http://127.0.0.1:9", 9):
        pass


def test_commands_name_the_model_and_the_lengths(bench, tmp_path):
    ours, theirs = (bench.command_of(bench.parse(["--server", name]), tmp_path, 8123) for name in ("sparsex", "vllm"))
    assert "--serve --port 8123 --device-model llama-3.1-8b --method sparsex:" in ours
    assert bench.parse(ours.split("bench_load.py", 1)[1].replace("'", "").split()).serve
    assert f"serve {tmp_path} --load-format dummy --skip-tokenizer-init --enable-prefix-caching" in theirs


@pytest.mark.slow
def test_our_server_answers_token_ids_without_a_tokenizer(bench):
    from live import live_server, make_engine

    engine = make_engine()
    engine.tokenizer = None
    prompts = bench.make_prompts("chat", 4, engine.model.vocab_size, (0,), 4, bench.Lengths(16, 8, 8))
    with live_server(engine, model=bench.NAME) as live:
        timelines = asyncio.run(bench.play(live.url, prompts, np.zeros(4), 5))
    assert [one.error for one in timelines] == [None] * 4
    assert [sum(new for _, new in one.came) for one in timelines] == [5] * 4
