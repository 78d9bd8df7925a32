"""Clients as their users have them, against a live server. They are in the dependency group `clients`."""

import asyncio
import json
import runpy
from pathlib import Path

import httpx
import pytest
from live import live_server

SCRIPTS = Path(__file__).parent.parent / "scripts/clients"
AGENTS = {
    "Ada": "You are Ada, who builds houses. Say one short sentence about walls, roofs or cost.",
    "Boris": "You are Boris, who keeps the accounts of the town. Say one short sentence about money.",
    "Clara": "You are Clara, who teaches children. Say one short sentence about what the school needs.",
}
TASK = "The town wants to build a new school near the harbour. Where should it stand, and what should it have?"


@pytest.fixture(scope="module")
def teams():
    return pytest.importorskip("autogen_agentchat.teams", reason="AutoGen is not here: uv sync --group clients")


def group_chat(teams, kind, client, turns):
    """A team of `AGENTS`."""
    from autogen_agentchat.agents import AssistantAgent

    agents = [
        AssistantAgent(name, client, description=text, system_message=text, model_client_stream=False)
        for name, text in AGENTS.items()
    ]
    if kind == "selector":
        return teams.SelectorGroupChat(agents, client, max_turns=turns, max_selector_attempts=1)
    return teams.RoundRobinGroupChat(agents, max_turns=turns)


async def talk(teams, kind, url, turns, **body):
    """Runs a group chat. Returns its messages, and the report of every request it made."""
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    reports = []

    async def note(response):
        reports.append(json.loads(await response.aread())["sparsex"])

    async with httpx.AsyncClient(event_hooks={"response": [note]}, timeout=300) as http:
        client = OpenAIChatCompletionClient(
            model="smollm",
            base_url=f"{url}/v1",
            api_key="none",
            http_client=http,
            max_tokens=24,
            temperature=0,
            extra_body=body,
            model_info=dict.fromkeys(("vision", "function_calling", "json_output", "structured_output"), False)
            | {"family": "unknown"},
        )
        done = await group_chat(teams, kind, client, turns).run(task=TASK)
    return done.messages, reports


def computed(reports):
    """The share of token-layers computed in all requests behind the first."""
    later = reports[1:]
    work = sum(report["computed_fraction"] * report["prompt_tokens"] for report in later)
    return work / sum(report["prompt_tokens"] for report in later)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "turns"), [("round robin", 15), ("selector", 9)])
def test_a_group_chat_of_autogen_costs_no_more_than_with_a_prefix_cache(teams, smollm, kind, turns, record_property):
    shares = {}
    with live_server(smollm, model="smollm") as live:
        for name, reuse in {"default": {}, "prefix": {"reuse": {"method": "prefix"}}}.items():
            messages, reports = asyncio.run(
                talk(teams, kind, live.url, turns, cache_salt=f"autogen, {kind}, {name}", **reuse)
            )
            assert len(messages) == turns + 1, "the task, and what was said"
            assert len(reports) == turns * (2 if kind == "selector" else 1)
            shares[name] = computed(reports)
            record_property(name, shares[name])
            print(f"{kind}, {name}: {shares[name]:.3f} of the token-layers behind the first request computed;",
                  " ".join(f"{report['computed_fraction']:.2f}" for report in reports))  # fmt: skip
    assert shares["default"] <= shares["prefix"]


@pytest.mark.slow
def test_agents_of_autogen_speak_in_rounds(teams, smollm, monkeypatch):
    with live_server(smollm, model="smollm") as live:
        monkeypatch.setattr("sys.argv", ["autogen_rounds", f"{live.url}/v1", "smollm"])
        runpy.run_path(str(SCRIPTS / "autogen_rounds.py"), run_name="__main__")


@pytest.mark.slow
def test_the_scripts_of_clients_that_tests_have_pass(smollm, monkeypatch):
    with live_server(smollm, model="smollm") as live:
        for script in ("openai_parse", "anthropic_client"):
            monkeypatch.setattr("sys.argv", [script, f"{live.url}/v1", "smollm"])
            runpy.run_path(str(SCRIPTS / f"{script}.py"))
