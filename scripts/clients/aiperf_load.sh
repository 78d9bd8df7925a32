#!/bin/sh
# aiperf: four streamed requests, two at once, to each of four endpoints; tokens are counted by the server.
# uv pip install aiperf; scripts/clients/aiperf_load.sh http://127.0.0.1:8000/v1 MODEL TOKENIZER_DIRECTORY
set -e
for endpoint in chat completions responses messages; do
  OUT=$(mktemp -d)
  aiperf profile -m "$2" -u "${1%/v1}" --endpoint-type $endpoint --streaming --tokenizer "$3" --use-server-token-count \
    --concurrency 2 --request-count 4 --isl 64 --osl 16 --output-artifact-dir "$OUT" --ui none \
    >"$OUT/log" 2>&1 || { cat "$OUT/log"; exit 1; }
  python3 - "$OUT/profile_export_aiperf.json" $endpoint <<'END'
import json, sys

report = json.load(open(sys.argv[1]))
assert report["request_count"]["avg"] == 4 and "error_request_count" not in report, report
print(sys.argv[2], report["request_count"]["avg"], "requests")
END
done
