"""smolagents: a ToolCallingAgent, whose every step is a forced call.

pip install 'smolagents[openai]'; python scripts/clients/smolagents_client.py http://127.0.0.1:8000/v1 MODEL
"""

import sys

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def age_of(name: str) -> int:
    """The age of a person.

    Args:
        name: of the person
    """
    return 44


model = OpenAIServerModel(model_id=sys.argv[2], api_base=sys.argv[1], api_key="-", temperature=0, max_tokens=200)
agent = ToolCallingAgent(tools=[age_of], model=model, max_steps=2)
print(agent.run("How old is Anna Varga?"))
assert any(step.tool_calls for step in agent.memory.steps if getattr(step, "tool_calls", None))
