#!/bin/sh
# llm: `llm --schema`. Usage: pip install llm; scripts/clients/llm_schema.sh http://127.0.0.1:8000/v1 MODEL
set -e
LLM_USER_PATH=$(mktemp -d)
export LLM_USER_PATH
cat > "$LLM_USER_PATH/extra-openai-models.yaml" <<END
- model_id: here
  model_name: $2
  api_base: $1
  supports_schema: true
END
llm -m here --key - --no-stream -o temperature 0 -o max_tokens 200 \
  --schema '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer"}}, "required": ["name", "age"], "additionalProperties": false}' \
  'Anna Varga is 44 years old. Who is she?' | python3 -c 'import json, sys; print(json.load(sys.stdin)["age"])'
