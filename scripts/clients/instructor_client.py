"""instructor, in its modes of tools and of JSON schemas.

pip install instructor; python scripts/clients/instructor_client.py http://127.0.0.1:8000/v1 smollm2-135m-instruct
"""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


ASKED = [{"role": "user", "content": "Anna Varga is 44 years old. Who is she?"}]
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=sys.argv[1], api_key="-"), mode=mode)
    person = client.chat.completions.create(
        model=sys.argv[2], messages=ASKED, response_model=Person, max_tokens=200, temperature=0, max_retries=0
    )
    assert isinstance(person, Person)
    print(mode, person)
