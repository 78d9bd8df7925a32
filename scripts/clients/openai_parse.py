"""openai: `chat.completions.parse` with a pydantic model, and a forced call.

pip install openai; python scripts/clients/openai_parse.py http://127.0.0.1:8000/v1 smollm2-135m-instruct
"""

import json
import sys

from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


ASKED = [{"role": "user", "content": "Anna Varga is 44 years old. Who is she?"}]
client = OpenAI(base_url=sys.argv[1], api_key="-")
options = {"model": sys.argv[2], "messages": ASKED, "max_tokens": 200, "temperature": 0}
person = client.chat.completions.parse(response_format=Person, **options).choices[0].message.parsed
assert isinstance(person, Person)
tool = {"type": "function", "function": {"name": "store", "parameters": Person.model_json_schema()}}
answer = client.chat.completions.create(tools=[tool], tool_choice="required", parallel_tool_calls=False, **options)
[call] = answer.choices[0].message.tool_calls
print(person, Person(**json.loads(call.function.arguments)))
