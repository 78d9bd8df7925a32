"""Models by their names on a hub: what is fetched, what comes from the cache, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import COMMIT, Hub, Repository, files_of, running
from huggingface_hub import constants

from sparsex_jax.checkpoints import find_model, open_checkpoint
from sparsex_jax.checkpoints.names import HubName, as_name, model_title
from sparsex_jax.errors import HubError, UnknownModelError, UnsupportedModelError

GOLDEN = Path(__file__).parent / "golden"
QWEN = files_of(GOLDEN / "qwen2")
SHARDS = {name for name in QWEN if name.endswith(".safetensors")}
QUANTISED = [
    *("Tiny-Q4_K_M.gguf", "Tiny-Q8_0-00001-of-00002.gguf", "Tiny-Q8_0-00002-of-00002.gguf"),
    *("UD-Q4_K_XL/Tiny-UD-Q4_K_XL.gguf", "mmproj-F16.gguf", "README.md"),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub, with an empty cache. The current directory is empty too."""
    stray = dict.fromkeys(["README.md", "pytorch_model.bin", "original/params.json", "consolidated.safetensors"], b"{}")
    repositories = {
        "Qwen/Tiny": Repository(QWEN | stray),
        "Qwen/Tiny-GGUF": Repository({name: name.encode() for name in QUANTISED}),
        "Google/Gated": Repository(QWEN, gated=True),
        "Me/Nothing": Repository({"README.md": b""}),
    }
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with running(Hub(repositories)) as hub:
        use_endpoint(monkeypatch, hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield hub


def use_endpoint(monkeypatch, url):
    """As HF_ENDPOINT does, which is read when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_only_what_is_read_is_fetched_and_only_once(hub, monkeypatch):
    opened = open_checkpoint("Qwen/Tiny")
    assert opened.config == open_checkpoint(GOLDEN / "qwen2").config
    read = {"config.json", "generation_config.json", "model.safetensors.index.json", *SHARDS}
    assert sorted(hub.fetched) == sorted(read)
    open_checkpoint("hf://Qwen/Tiny@main")
    assert len(hub.fetched) == len(read)
    go_offline(monkeypatch)
    answers = hub.answers
    assert open_checkpoint("Qwen/Tiny").config == opened.config
    assert hub.answers == answers


def test_one_file_wins_over_others_where_there_is_no_index(hub):
    files = files_of(GOLDEN / "llama") | {"tokenizer.json": b"{}", "chat_template.jinja": b"x", "zz.safetensors": b""}
    hub.repositories["Me/Llama"] = Repository(files)
    find_model("Me/Llama")
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert set(hub.fetched) == wanted


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub):
    other = COMMIT[::-1]
    hub.repositories["Qwen/Tiny"].revisions = {"main": COMMIT, "refs/pr/1": other}
    assert find_model("Qwen/Tiny@refs/pr/1").name == other
    assert find_model(f"Qwen/Tiny@{COMMIT}").name == find_model("Qwen/Tiny").name == COMMIT
    with pytest.raises(UnknownModelError, match="Qwen/Tiny has no revision 'v9'"):
        find_model("Qwen/Tiny@v9")


@pytest.mark.parametrize(
    ("quantisation", "files"),
    [
        ("q4_k_m", ["Tiny-Q4_K_M.gguf"]),
        ("Q8_0", ["Tiny-Q8_0-00001-of-00002.gguf", "Tiny-Q8_0-00002-of-00002.gguf"]),
        ("UD-Q4_K_XL", ["UD-Q4_K_XL/Tiny-UD-Q4_K_XL.gguf"]),
    ],
)
def test_a_quantisation_names_one_file_or_its_parts(hub, quantisation, files):
    found = find_model(f"Qwen/Tiny-GGUF:{quantisation}")
    assert sorted(hub.fetched) == files
    assert found.as_posix().endswith(files[0])


def test_what_is_not_there_is_one_error(hub):
    there_are = "q4_k_m, q8_0, ud-q4_k_xl"
    for name, message in {
        "Qwen/Tiny-GGUF:q5_0": f"Qwen/Tiny-GGUF has no GGUF model of that quantisation; it has: {there_are}",
        "Qwen/Tiny-GGUF": f"Qwen/Tiny-GGUF has several GGUF models; name one .*{there_are}",
        "Qwen/Tiny:q4_k_m": "Qwen/Tiny has no GGUF file",
        "Me/Nothing": "Me/Nothing has no config.json and no GGUF file",
        "Qwen/Typo": "no such file or directory here, and no such model on http://127",
    }.items():
        with pytest.raises(UnknownModelError, match=message):
            find_model(name)
    assert hub.fetched == []


def test_refused_access_says_what_to_do(hub, monkeypatch):
    with pytest.raises(HubError, match=r"access to Google/Gated is restricted.*HF_TOKEN"):
        find_model("Google/Gated")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert find_model("Google/Gated").is_dir()
    hub.broken = 403
    with pytest.raises(HubError, match=r"refuses access \(403\); set HF_TOKEN"):
        find_model("Qwen/Tiny")


def test_what_is_not_in_the_cache_needs_the_hub(hub, monkeypatch):
    find_model("Qwen/Tiny-GGUF:q4_k_m")
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert find_model("Qwen/Tiny-GGUF:q4_k_m").is_file()
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached, and the model is not in the cache"):
        find_model("Qwen/Tiny")
    go_offline(monkeypatch)
    for name in ("Qwen/Tiny-GGUF:q8_0", "Qwen/Tiny"):
        with pytest.raises(HubError, match=f"{name}: HF_HUB_OFFLINE is set, and the model is not in the cache"):
            find_model(name)


def test_a_hub_that_is_down_is_no_unknown_model(hub):
    hub.broken = 503
    with pytest.raises(HubError, match="Qwen/Tiny: "):
        find_model("Qwen/Tiny")


def test_a_path_that_exists_wins_and_one_with_a_mistake_is_no_name(hub):
    here = Path("Qwen/Tiny")
    here.mkdir(parents=True)
    assert find_model("Qwen/Tiny") == here
    with pytest.raises(UnknownModelError, match=r"though there is a directory 'Qwen' here.*hf://Qwen/T"):
        find_model("Qwen/Tinny")
    assert find_model("hf://Qwen/Tiny").name == COMMIT
    for source in (
        "./Me/x",
        "../x/y",
        "/x/y",
        "~/x",
        "x/y/z",
        "Me/x.gguf",
        "Me\\x",
        "x",
        "Me/x/",
        Path("Me/Nothing"),
    ):
        with pytest.raises(UnknownModelError, match=r"nor a name on the hub, OWNER/NAME\[@REVISION\]"):
            find_model(source)


def test_an_index_beside_other_weights_is_ambiguous(hub):
    hub.repositories["Qwen/Both"] = Repository(QWEN | {"model.safetensors": b""})
    with pytest.raises(UnsupportedModelError, match="names other files; nothing says which"):
        find_model("Qwen/Both")


def test_names_are_called_as_they_are_written(hub):
    assert as_name("Qwen/Tiny@v1:q8_0") == HubName("Qwen/Tiny", "v1", "q8_0")
    assert model_title("hf://Qwen/Tiny-GGUF:q4_k_m") == "Qwen/Tiny-GGUF:q4_k_m"
    assert model_title("/models/tiny.gguf") == "tiny.gguf"
    Path("Qwen/Tiny").mkdir(parents=True)
    assert model_title("Qwen/Tiny") == "Tiny"


@pytest.mark.slow
def test_commands_take_names_and_the_environment_sets_the_hub(hub, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "sparsex_jax.cli", "convert", "Qwen/Tiny", "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert open_checkpoint("out").config == open_checkpoint(GOLDEN / "qwen2").config
    again = subprocess.run(
        [*command, "--dtype", "float32"], env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    offline = environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    refused = subprocess.run([*command[:-1], "out2"], env=offline, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert "HF_HUB_OFFLINE is set" in refused.stderr
