"""LangChain: `with_structured_output`, by a JSON schema and by a function.

pip install langchain-openai; python scripts/clients/langchain_client.py http://127.0.0.1:8000/v1 MODEL
"""

import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


model = ChatOpenAI(base_url=sys.argv[1], api_key="-", model=sys.argv[2], temperature=0, max_tokens=200)
for method in ("json_schema", "function_calling"):
    person = model.with_structured_output(Person, method=method).invoke("Anna Varga is 44 years old. Who is she?")
    assert isinstance(person, Person)
    print(method, person)
