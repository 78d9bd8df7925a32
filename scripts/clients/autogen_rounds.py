"""AutoGen: agents who debate in rounds. All speak at once, and then hear the others, each in an order of its own.

pip install autogen-agentchat 'autogen-ext[openai]'
python scripts/clients/autogen_rounds.py http://127.0.0.1:8000/v1 MODEL

The requests of a round name it, so the server holds them until all are there and prefills them together.
"""

import asyncio
import json
import random
import secrets
import sys

import httpx
from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.messages import TextMessage
from autogen_core import CancellationToken
from autogen_ext.models.openai import OpenAIChatCompletionClient

AGENTS = {
    "Ada": "You are Ada, who builds houses. Say one or two short sentences about walls, roofs or cost.",
    "Boris": "You are Boris, who keeps the accounts of the town. Say one or two short sentences about money.",
    "Clara": "You are Clara, who teaches children. Say one or two short sentences about what the school needs.",
}
TASK = "The town wants to build a new school near the harbour. Where should it stand, and what should it have?"
ROUNDS = 3
WAIT_MS = 5000


class ClientInRounds(OpenAIChatCompletionClient):
    """A client whose requests are members of the round that is set.

    Attributes:
      round: what the server gets as the field `round`.
    """

    round: dict[str, object]

    async def create(self, messages, *, extra_create_args=None, **options):
        asked = {**(extra_create_args or {}), "extra_body": {"round": self.round}}
        return await super().create(messages, extra_create_args=asked, **options)


def make_client(http: httpx.AsyncClient, url: str, model: str) -> ClientInRounds:
    can = dict.fromkeys(("vision", "function_calling", "json_output", "structured_output"), False)
    return ClientInRounds(
        model=model,
        base_url=url,
        api_key="-",
        http_client=http,
        max_tokens=48,
        temperature=0,
        model_info=can | {"family": "unknown"},
    )


async def speak(agent: AssistantAgent, heard: list[TextMessage]) -> TextMessage:
    """What an agent says to what it heard."""
    answer = (await agent.on_messages(heard, CancellationToken())).chat_message
    return TextMessage(source=agent.name, content=answer.content)


async def debate(agents: list[AssistantAgent], client: ClientInRounds) -> None:
    """All rounds. A slow agent holds the others for `WAIT_MS` at most: the server says who was there in time."""
    name, said = secrets.token_hex(8), [TextMessage(source="user", content=TASK)]
    for number in range(ROUNDS):
        client.round = {"id": f"{name}-{number}", "size": len(agents), "wait_ms": WAIT_MS}
        heard = [[text for text in said if text.source != agent.name] for agent in agents]
        for texts in heard:
            random.shuffle(texts)
        said = await asyncio.gather(*map(speak, agents, heard))
        for text in said:
            print(f"{number + 1} {text.source}: {text.content}")


async def main(url: str, model: str) -> None:
    reports = []

    async def note(response: httpx.Response) -> None:
        reports.append(json.loads(await response.aread())["sparsex"])

    async with httpx.AsyncClient(event_hooks={"response": [note]}, timeout=300) as http:
        client = make_client(http, url, model)
        agents = [AssistantAgent(name, client, description=text, system_message=text) for name, text in AGENTS.items()]
        await debate(agents, client)
    for report in reports:
        found = report["prompt_tokens"] - report["fresh_tokens"]
        print(f"{report['round']}: {found} of {report['prompt_tokens']} tokens found")
    assert len(reports) == ROUNDS * len(AGENTS)
    assert all(report["round"]["members"] == len(AGENTS) for report in reports)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
