#!/bin/sh
# guidellm: four streamed chats of synthetic text, two at once. Its own tokenizer is read from a directory.
# uv pip install guidellm; scripts/clients/guidellm_load.sh http://127.0.0.1:8000/v1 MODEL TOKENIZER_DIRECTORY
set -e
OUT=$(mktemp -d)
HF_HUB_OFFLINE=1 guidellm run --backend "kind=openai_http,target=${1%/v1},model=$2" \
  --profile kind=concurrent,streams=2 --constraint kind=max_requests,count=4 \
  --tokenizer "kind=huggingface_auto,model=$3" --data kind=synthetic_text,prompt_tokens=64,output_tokens=16 \
  --output "kind=json,path=$OUT/report.json" --disable-progress >"$OUT/log" 2>&1 || { cat "$OUT/log"; exit 1; }
python3 - "$OUT/report.json" <<'END'
import json, sys

[benchmark] = json.load(open(sys.argv[1]))["benchmarks"]
requests = benchmark["requests"]
assert len(requests["successful"]) == 4 and not requests["errored"], requests
assert all(request["output_metrics"]["text_tokens"] == 16 for request in requests["successful"])
print("4 requests of 16 tokens")
END
