"""LiteLLM: a JSON schema of a pydantic model.

pip install litellm; python scripts/clients/litellm_client.py http://127.0.0.1:8000/v1 smollm2-135m-instruct
"""

import sys

import litellm
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=120)


answer = litellm.completion(
    model=f"hosted_vllm/{sys.argv[2]}",
    api_base=sys.argv[1],
    api_key="-",
    messages=[{"role": "user", "content": "Anna Varga is 44 years old. Who is she?"}],
    response_format=Person,
    max_tokens=200,
    temperature=0,
)
print(Person.model_validate_json(answer.choices[0].message.content))
