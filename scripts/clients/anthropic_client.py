"""The Anthropic client: a message, a stream, `messages.parse`, a forced call with its result, and `count_tokens`.

pip install anthropic; python scripts/clients/anthropic_client.py http://127.0.0.1:8000/v1 MODEL
"""

import sys

from anthropic import Anthropic
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


ASKED = [{"role": "user", "content": "Anna Varga is 44 years old. Who is she?"}]
STORE = {"name": "store", "description": "Stores a person.", "input_schema": Person.model_json_schema()}
client = Anthropic(base_url=sys.argv[1].removesuffix("/v1"), api_key="-")
options = {"model": sys.argv[2], "max_tokens": 200, "extra_body": {"temperature": 0}}

message = client.messages.create(messages=ASKED, system="Answer briefly.", **options)
counted = client.messages.count_tokens(model=sys.argv[2], messages=ASKED, system="Answer briefly.").input_tokens
usage = message.usage
assert counted == usage.input_tokens + usage.cache_read_input_tokens + (usage.cache_creation_input_tokens or 0)

with client.messages.stream(messages=ASKED, system="Answer briefly.", **options) as stream:
    assert "".join(stream.text_stream) == message.content[0].text

forced = {"tools": [STORE], "tool_choice": {"type": "tool", "name": "store", "disable_parallel_tool_use": True}}
called = client.messages.create(messages=ASKED, **forced, **options)
[call] = called.content
result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "stored"}]}
told = [*ASKED, {"role": "assistant", "content": called.content}, result]
last = client.messages.create(messages=told, tools=[STORE], tool_choice={"type": "none"}, **options)
print(Person(**call.input), "->", last.content[0].text)

person = client.messages.parse(messages=ASKED, output_format=Person, **options).parsed_output
assert isinstance(person, Person)
print(person)
