"""LlamaIndex: a chat, a stream of it, `structured_predict` by a call and by a JSON schema, and the calls of an agent.

pip install llama-index-llms-openai-like; python scripts/clients/llama_index_client.py http://127.0.0.1:8000/v1 MODEL
"""

import sys

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


def age_of(name: str) -> int:
    """The age of a person."""
    return len(name)


options = {"api_base": sys.argv[1], "api_key": "-", "model": sys.argv[2], "temperature": 0, "max_tokens": 200}
ASKED = "Anna Varga is 44 years old. Who is she?"
for by_call in (True, False):
    model = OpenAILike(
        is_chat_model=True, is_function_calling_model=by_call, should_use_structured_outputs=not by_call, **options
    )
    person = model.structured_predict(Person, PromptTemplate("{asked}"), asked=ASKED)
    assert isinstance(person, Person)
    print("call" if by_call else "schema", person)

model = OpenAILike(is_chat_model=True, is_function_calling_model=True, **options)
assert model.chat([ChatMessage(role="user", content=ASKED)]).message.content
assert [part.delta for part in model.stream_chat([ChatMessage(role="user", content=ASKED)])]

tool = FunctionTool.from_defaults(age_of)
asked = ChatMessage(role="user", content="How old is Anna?")
answer = model.chat_with_tools([tool], chat_history=[asked], tool_required=True, allow_parallel_tool_calls=False)
[call] = model.get_tool_calls_from_response(answer)
result = ChatMessage(role="tool", content="44", additional_kwargs={"tool_call_id": call.tool_id})
print(call.tool_name, call.tool_kwargs, "->", model.chat([asked, answer.message, result]).message.content)
