"""The command line: its output, its JSON output, and its errors."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from adapter_files import random_tensors, write
from conftest import TALKING, report_of
from typer.testing import CliRunner

from sparsex_jax import Engine, ReuseConfig
from sparsex_jax.checkpoints import open_checkpoint, save_checkpoint
from sparsex_jax.cli import app, options, serve_options
from sparsex_jax.cli.demo import kl_divergence
from sparsex_jax.cli.documents import DOCUMENTS, PROMPT_ORDER
from sparsex_jax.cli.tokenmap import STYLES, legend, token_map, token_pieces
from sparsex_jax.errors import InvalidRequestError
from sparsex_jax.model.sharding import make_mesh
from sparsex_jax.model.weights import random_params
from sparsex_jax.reuse.prompt import TokenKind
from sparsex_jax.reuse.report import KINDS
from sparsex_jax.serving.access import Limits
from sparsex_jax.serving.methods import Cors

EMBEDDED = "smollm2-135m-instruct"
GOLDEN = Path(__file__).parent / "golden"
REPORT_FIELDS = {
    "prompt_tokens",
    "prefix_tokens",
    "approximate_prefix_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "fresh_tokens",
    "omitted_tokens",
    "probe_layers",
    "restored_tokens",
    "prefix_tier",
    "active_tokens",
    "boundary_layer",
    "segments",
    "computed_fraction",
    "confidence",
    "ttft_s",
}
NOTE = "The harbour opens at dawn and closes when the bells ring. Boats longer than ten metres need a pilot. "


def invoke(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def one_object(result):
    """The JSON object, which must be all of standard output."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def tokenizer():
    return open_checkpoint(EMBEDDED).tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """A small model with random weights and the embedded model's tokenizer."""
    target = tmp_path_factory.mktemp("cli") / "tiny"
    save_checkpoint(target, TALKING, random_params(TALKING, "float32", make_mesh(), seed=0), tokenizer)
    return target


@pytest.fixture
def note(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text(NOTE)
    return path


# Help and errors --------------------------------------------------------------------------------------------


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("generate", "demo", "convert", "cache"))


def test_version():
    assert invoke("--version").stdout.startswith("sparsex 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "hi", "--model", "no-such-model"], "no-such-model"),
        (["generate", "hi", "--recompute-ratio", "1.5"], "recompute_ratio=1.5"),
        (["generate", "hi", "--temperature", "-1"], "temperature=-1.0"),
        (["generate", "hi", "--adapter", "sql"], "adapter='sql' must be NAME=PATH"),
        (["generate", "hi", "--adapter", "a=b", "--adapter", "a=c"], "there is another adapter of the name 'a'"),
        (["generate", "hi", "--adapter", "a=b", "--adapter", "b=c"], "2 are named for 1 prompts"),
        (["generate", "hi", "--adapter", "a=no-such-folder"], "'no-such-folder' is no directory of an adapter"),
        (["serve", "--port", "0", "--adapter", f"{EMBEDDED}=a"], f"adapter={EMBEDDED!r} is the model's name too"),
        (["generate", "", "--json"], "prompt is empty"),
        (["generate", "hi", "", "--json"], "prompt is empty"),
        (["cache", "hi", "--store-tokens", "0", "--json"], "store_tokens=0"),
        (["demo", "--model", "no-such-model", "--json"], "no-such-model"),
        (["convert", "no-such-model", "unused-target"], "no-such-model"),
        (["convert", EMBEDDED, "unused-target", "--tensor-parallel", "0"], "tensor_parallel=0"),
    ],
)
def test_errors_are_one_line_on_stderr(arguments, said):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--method", "guess", "method='guess'"), ("--boundary-layer", "7", "at most 6"), ("--namespace", "", "namespace")],
)
def test_errors_that_need_a_model(tiny, option, value, said):
    for command in (["generate", "hi", "--store-tokens", "512"], ["cache", "hi", "--json"]):
        result = invoke(*command, "--model", tiny, option, value)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert said in result.stderr


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "image.bin"
    path.write_bytes(b"\xff\xfe\x00")
    result = invoke("cache", "hi", "--remember", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is not UTF-8" in result.stderr


# cache ------------------------------------------------------------------------------------------------------


def test_cache_shows_what_would_be_reused(tiny, note, tokenizer):
    found = one_object(invoke("cache", f"First this:\n{NOTE}When?", "--remember", note, "--model", tiny, "--json"))
    assert set(found) == REPORT_FIELDS | {"entries", "stats", "probe"}
    stored = len(tokenizer(NOTE)["input_ids"])
    (segment,) = found["segments"]
    assert segment["donor_start"] == 0
    assert stored - 1 <= segment["length"] <= stored  # the note's last space joins the word behind it
    assert found["reused_tokens"] + found["recomputed_tokens"] == segment["length"]
    assert found["reused_tokens"] >= segment["length"] * 3 // 4  # all but the overflow, an eighth on each side
    assert sum(found[f"{kind}_tokens"] for kind in KINDS) == found["prompt_tokens"]
    (entry,) = found["entries"]
    assert (entry["name"], entry["num_tokens"], entry["uses"]) == ("note.txt", stored, 1)
    assert found["stats"]["lookups"] == 2
    assert (found["ttft_s"], found["probe"]) == (None, None)  # a single text is not left out


@pytest.fixture
def notes(tmp_path):
    paths = []
    for name in ("ash", "birch", "cedar"):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(" ".join(f"{name}{number}" for number in range(30)) + ".")
    return paths


def test_cache_shows_what_a_probe_decides_about(tiny, notes, tokenizer):
    prompt = "Read.\n" + "\n".join(path.read_text() for path in notes) + "\nWhich tree is the last?"
    remembered = [word for path in notes for word in ("--remember", path)]
    arguments = ("cache", prompt, *remembered, "--model", tiny, "--method", "excerpt:keep_ratio=0.5")
    found = one_object(invoke(*arguments, "--json"))
    probe, length = found["probe"], found["prompt_tokens"]
    assert (probe["pieces"], probe["first_layer"], probe["end_layer"]) == (3, 2, 4)
    assert probe["tokens"] == found["omitted_tokens"] == 2 * probe["least_tokens"]
    assert sum(found[f"{kind}_tokens"] for kind in KINDS) == length
    looking, answering = found["fresh_tokens"] * 4 / 6, found["fresh_tokens"] + probe["least_tokens"]
    assert found["computed_fraction"] == pytest.approx((looking + answering) / length)
    assert found["confidence"] is None
    whole = one_object(invoke(*arguments[:-1], "excerpt:coverage=1", "--json"))
    assert whole["probe"]["least_tokens"] == probe["tokens"]
    shown = " ".join(invoke(*arguments).stdout.split())
    assert f"keep some of the {probe['tokens']} omitted tokens, in 3 pieces, {probe['least_tokens']} at least" in shown


def test_a_method_is_named_with_options(tiny):
    refused = invoke("cache", "hi", "--model", tiny, "--method", "excerpt:coverage=2")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "coverage=2 must be" in refused.stderr
    typed = options.Reuse(method="sparsex:tail_tokens=3:boundary_layer=1", boundary_layer=2)
    assert typed.options() == {"method": "sparsex", "tail_tokens": 3, "boundary_layer": 2}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--method", "nothing"], "method='nothing' is unknown; there are: full, prefix"),
        (["--method", "prefix", "--boundary-layer", "3"], "boundary_layer=3 has no meaning for method 'prefix'"),
        (
            ["--method", "excerpt", "--recompute-ratio", "0.3"],
            "recompute_ratio=0.3 has no meaning for method 'excerpt'",
        ),
        (["--method", "sparsex", "--keep-ratio", "0.3"], "keep_ratio=0.3 has no meaning for method 'sparsex'"),
        (["--keep-ratio", "0.3", "--recompute-ratio", "0.2"], "no method has all of these options: recompute_ratio"),
        (["--coverage", "2"], "coverage=2.0 must be a number from 0 to 1"),
        (["--method", "sparsex:coverage=0.5", "--max-ratio", "0.1"], "max_ratio=0.1 must be at least recompute_ratio"),
        (["--boundary-layer", "99"], "boundary_layer=99"),
        (["--method", "excerpt:end_layer=99"], "end_layer=99"),
        (["--kv-dtype", "int8"], "kv_dtype='int8' must be one of auto, fp8"),
        (["--tensor-parallel", "9"], "tensor_parallel=9 must be from 1 to 8, the number of devices"),
        (["--tensor-parallel", "3"], "does not divide over the mesh's tensor=3"),
    ],
)
def test_serve_refuses_options_by_name_before_it_loads_weights(tiny, typed, said, monkeypatch):
    monkeypatch.setattr(
        "sparsex_jax.checkpoints.orbax.OrbaxCheckpoint.load_params", lambda *_: pytest.fail("it loaded")
    )
    refused = invoke("serve", tiny, "--port", "0", *typed)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert said in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    "command",
    [["generate", "Hello", "--model"], ["demo", "--model"], ["calibrate"], ["bench", "quality", "--model"], ["serve"]],
    ids=lambda command: command[0],
)
def test_every_command_that_computes_takes_the_number_of_devices(tiny, command, monkeypatch):
    def loaded(*_, mesh, **__):
        raise InvalidRequestError(f"it would load on {mesh.size}")

    monkeypatch.setattr(Engine, "from_pretrained", loaded)
    many = "tensor_parallel=9 must be from 1 to 8, the number of devices. A processor is one device, or as many as"
    for number, said in (("9", many), ("4", "it would load on 4")):
        refused = invoke(*command, tiny, "--tensor-parallel", number)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert said in " ".join(refused.stderr.split())


def test_serve_starts_with_its_options_of_reuse_and_its_devices(tmp_path, tokenizer, monkeypatch):
    model, served = dataclasses.replace(TALKING, num_kv_heads=2), []
    save_checkpoint(tmp_path / "two", model, random_params(model, "float32", make_mesh(), seed=0), tokenizer)
    monkeypatch.setattr("sparsex_jax.cli.serve.run", lambda choice, *_, **__: served.append(choice))
    typed = ["--tensor-parallel", "2", "--coverage", "0.5", "--keep-ratio", "0.1", "--kv-dtype", "fp8"]
    assert invoke("serve", tmp_path / "two", "--port", "0", *typed).exit_code == 0
    engine = served[0].load()
    assert (engine.mesh.size, engine.config.store_tokens) == (2, 32768)
    assert engine.runner.store.dtype == "float8_e4m3fn"
    assert engine.reuse == ReuseConfig("excerpt", coverage=0.5, keep_ratio=0.1)
    assert str(served[0].defaults(model)) == (
        "Reuse by default: excerpt:coverage=0.5:keep_ratio=0.1 (as given, on top of excerpt, built in; no calibration "
        "of this model is known)"
    )


def test_cache_without_a_chat_template_finds_a_prefix(tiny, note):
    arguments = ["cache", "-", "--model", tiny, "--remember", note, "--no-chat", "--json"]
    found = one_object(invoke(*arguments, stdin=f"{NOTE}And when?"))
    assert found["prefix_tokens"] > 16
    assert found["segments"] == []
    full = one_object(invoke(*arguments, "--method", "full", stdin=f"{NOTE}And when?"))
    assert (full["prefix_tokens"], full["computed_fraction"]) == (0, 1.0)


def test_cache_prints_tables_and_the_prompt(tiny, note):
    result = invoke("cache", f"Question: {NOTE} [bold]When?[/bold]", "--model", tiny, "--remember", note)
    assert result.exit_code == 0, result.output
    for part in ("note.txt", "segment", "recomputed", "[bold]When?[/bold]", "computed"):
        assert part in result.stdout


# generate, demo, convert ------------------------------------------------------------------------------------


def test_generate_prints_one_object(smollm, monkeypatch):
    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", lambda choice: smollm)
    alone = ("--namespace", "cli")
    found = one_object(invoke("generate", "What is the capital of France?", "--max-new-tokens", "12", *alone, "--json"))
    assert set(found) == REPORT_FIELDS | {"text", "token_ids", "finish_reason"}
    assert found["text"] == "The capital of France is Paris."
    assert found["finish_reason"] == "stop"
    assert found["fresh_tokens"] == found["prompt_tokens"]
    round_ = one_object(invoke("generate", "Hello?", "Hi!", "--max-new-tokens", "1", *alone, "--json"))["answers"]
    assert [(each["finish_reason"], each["round"]["members"]) for each in round_] == [("length", 2)] * 2


@pytest.mark.slow
def test_generate_reuses_a_file(tiny, note):
    prompt = f"Read:\n{NOTE}When?"
    arguments = ["generate", prompt, "--model", tiny, "--remember", note, "--max-new-tokens", "2", "--method", "naive"]
    result = invoke(*arguments, "--store-tokens", "4096")
    assert result.exit_code == 0, result.output
    assert " reused, " in result.stdout
    assert "; 1 segments; " in result.stdout


@pytest.mark.slow
def test_generate_with_an_adapter_for_each_prompt(tiny, note, tmp_path):
    kinds = ["q_proj", "v_proj", "o_proj", "down_proj"]
    for seed, name in enumerate(("a", "b")):
        tensors = random_tensors(TALKING, kinds, rank=20, seed=seed)
        write(tmp_path / name, tensors, r=20, lora_alpha=80, target_modules=kinds)
    alike = ["--model", tiny, "--max-new-tokens", "4", "--method", "prefix", "--no-chat", "--json"]
    typed = [*alike, "--remember", note, "--store-tokens", "4096"]
    named = ["--adapter", f"a={tmp_path / 'a'}"], ["--adapter", f"b={tmp_path / 'b'}"]
    prompt = f"{NOTE}And when?"
    both = one_object(invoke("generate", prompt, prompt, *typed, *named[0], *named[1]))["answers"]
    assert [each["adapter"]["name"] for each in both] == ["a", "b"]
    assert all(each["prefix_tokens"] > 16 for each in both), "the file is remembered under each"
    alone = [one_object(invoke("generate", prompt, *typed, *each)) for each in (*named, [])]
    assert [each["token_ids"] for each in both] == [each["token_ids"] for each in alone[:2]]
    assert len({tuple(each["token_ids"]) for each in alone}) == 3
    assert "adapter" not in alone[2]


def test_a_server_without_options_has_the_limits_of_the_package():
    assert serve_options.LimitOptions().limits() == Limits()
    assert serve_options.Scripts().cors() == Cors()


def test_serve_makes_room_for_adapters(tiny, tmp_path, monkeypatch):
    """As many slots as are named, and of their ranks; eight, where requests may load others."""
    choices = []

    def load(choice):
        choices.append(choice)
        raise InvalidRequestError("enough")

    monkeypatch.setattr("sparsex_jax.cli.choice.EngineChoice.load", load)
    for number, rank in enumerate((4, 20)):
        write(tmp_path / str(number), random_tensors(TALKING, rank=rank), r=rank)
    one, two = (["--adapter", f"{number}={tmp_path / str(number)}"] for number in "01")
    for typed in ([*one], [*one, *two], ["--allow-adapter-updates"], [*one, "--max-adapters", "3"]):
        assert "enough" in invoke("serve", tiny, "--port", "0", *typed).stderr
    slots = [choice.adapter_slots for choice in choices]
    assert slots == [(1, 16), (2, 24), (8, 16), (3, 16)]
    refused = {
        "max_adapters=0 must be 1 at least": {"max_adapters": 0},
        "adapter '0' has rank 4, and max_adapter_rank=3": {"max_adapter_rank": 3},
    }
    for message, changes in refused.items():
        with pytest.raises(InvalidRequestError, match=message):
            _ = dataclasses.replace(choices[0], **changes).adapter_slots
    write(tmp_path / "0", random_tensors(TALKING), r=129)
    with pytest.raises(InvalidRequestError, match="adapter '0' has rank 129, and max_adapter_rank=128 is the limit"):
        _ = choices[0].adapter_slots


def test_adapters_that_an_engine_would_not_take_are_refused_before_weights_are_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsex_jax.checkpoints.orbax.OrbaxCheckpoint.load_params", pytest.fail)
    large = write(tmp_path / "large", random_tensors(TALKING, rank=20), r=20)
    small = write(tmp_path / "small", random_tensors(TALKING))
    for adapters, limits, message in (
        ({"large": large}, {}, "'large' has rank 20, and max_adapter_rank=16 is the limit"),
        ({"a": small, "b": small}, {"max_adapters": 1}, "'b' has no room: max_adapters=1"),
        ({" a": small}, {}, "without spaces at its ends"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            Engine.from_pretrained(tiny, adapters=adapters, **limits)


def check_demo(found):
    assert {"model", "documents", "methods"} <= set(found)
    assert {document["name"] for document in found["documents"]} >= set(DOCUMENTS)
    assert list(found["methods"]) == ["full", "prefix", "naive", "sparsex", "excerpt"]
    assert list(found["follow_up"]["methods"]) == ["full", "prefix", "sparsex", "excerpt"]
    for method in found["methods"].values():
        assert set(method) == REPORT_FIELDS | {"text", "kl"}
    full, prefix, naive, sparsex = (found["methods"][name] for name in ("full", "prefix", "naive", "sparsex"))
    assert full["kl"] == 0
    assert abs(prefix["kl"]) < 1e-3
    assert prefix["prefix_tokens"] > 0
    assert len(naive["segments"]) == len(DOCUMENTS)
    assert naive["active_tokens"] < sparsex["active_tokens"] < full["active_tokens"]
    check_follow_up(found["follow_up"]["methods"], full["prompt_tokens"])
    assert found["methods"]["excerpt"]["probe_layers"] > 0


def check_follow_up(methods, first_prompt):
    """The first turn is a prefix of the second, so that it costs what is new."""
    full, prefix, sparsex = (methods[name] for name in ("full", "prefix", "sparsex"))
    assert full["kl"] == 0
    assert full["prompt_tokens"] == prefix["prompt_tokens"] == sparsex["prompt_tokens"] > first_prompt
    assert abs(prefix["kl"]) < 1e-3
    assert max(sparsex["computed_fraction"], prefix["computed_fraction"]) < 0.2


def test_demo_prints_one_object(tiny):
    check_demo(one_object(invoke("demo", "--model", tiny, "--max-new-tokens", "2", "--json")))


@pytest.mark.slow
def test_demo_shows_that_an_excerpt_keeps_the_answer():
    found = one_object(invoke("demo", "--json"))
    check_demo(found)
    first, second = found["methods"], found["follow_up"]["methods"]
    assert first["excerpt"]["text"] == first["full"]["text"] == "The access code of the signal box is 6407."
    assert "6407" not in first["naive"]["text"]
    assert second["excerpt"]["text"] == second["full"]["text"] == "The access code of the flour store is 7540."
    for methods in (first, second):
        assert methods["excerpt"]["omitted_tokens"] > methods["full"]["prompt_tokens"] / 2
        assert methods["excerpt"]["computed_fraction"] < 0.4


def test_demo_has_every_document_in_another_order():
    assert sorted(PROMPT_ORDER) == sorted(DOCUMENTS)
    assert list(PROMPT_ORDER) != list(DOCUMENTS)


def test_convert(tmp_path):
    result = invoke("convert", GOLDEN / "llama", tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(GOLDEN / "llama").config
    again = invoke("convert", GOLDEN / "llama", tmp_path / "out")
    assert again.exit_code == 2


# The parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a naïve café", "日本語 and 🦜🦜!", "  two  spaces\n\n", "broken \ufffd end"])
def test_pieces_of_tokens_make_up_the_text(tokenizer, text):
    tokens = tokenizer(text)["input_ids"]
    pieces = list(token_pieces(tokenizer, tokens))
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text


def test_a_report_is_printed_on_one_line_without_what_is_known_of_each_token():
    said = repr(report_of([TokenKind.FRESH] * 700, [True] * 700))
    assert "fresh_tokens=700" in said
    assert "layers=(ComputedLayers(start=0, end=1),)" in said
    assert "array" not in said
    assert len(said) < 600


def test_colours_follow_kind_and_active(tokenizer):
    kind = [getattr(TokenKind, name) for name in ("PREFIX", "APPROXIMATE", "REUSED", "REUSED", "FRESH", "OMITTED")]
    report = report_of(kind, [False, False, False, True, True, False])
    text = token_map(tokenizer, tokenizer("one two three four five six")["input_ids"], report)
    assert text.plain == "one two three four five six"
    assert [str(span.style) for span in text.spans] == list(STYLES.values())
    assert (
        legend(report).plain
        == " prefix  1    approximate prefix  1    reused  1    recomputed  1    fresh  1    omitted  1"
    )


def test_kl_divergence():
    reference, other = np.array([0.0, np.log(3)], np.float32), np.zeros(2, np.float32)
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert kl_divergence(reference, other) == pytest.approx(expected)
    assert kl_divergence(reference, reference + 50) == pytest.approx(0, abs=1e-6)
