"""pydantic-ai: an agent whose output is a model, by a forced call and by a JSON schema.

pip install 'pydantic-ai-slim[openai]'; python scripts/clients/pydantic_ai_client.py http://127.0.0.1:8000/v1 MODEL
"""

import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


model = OpenAIChatModel(sys.argv[2], provider=OpenAIProvider(base_url=sys.argv[1], api_key="-"))
for output in (Person, NativeOutput(Person)):
    agent = Agent(model, output_type=output, model_settings={"max_tokens": 200, "temperature": 0})
    person = agent.run_sync("Anna Varga is 44 years old. Who is she?").output
    assert isinstance(person, Person)
    print(person)
