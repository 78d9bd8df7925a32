"""lm-eval: log-likelihoods of choices and generated answers, by its own `local-completions` and a task in a file.

uv pip install 'lm_eval[api]' transformers; python scripts/clients/lm_eval_client.py http://127.0.0.1:8000/v1 MODEL
"""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""
CHOICES = """
task: choices
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATED = """
task: generated
output_type: generate_until
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
DOCS = [
    {"question": "What is the capital of France?", "choices": ["Paris", "Berlin", "Madrid"], "right": 0},
    {"question": "Which is an animal?", "choices": ["a stone", "a horse", "a cup"], "right": 1},
]

with tempfile.TemporaryDirectory() as name:
    directory = Path(name)
    file = directory / "docs.jsonl"
    file.write_text("\n".join(json.dumps(doc) for doc in DOCS))
    (directory / "choices.yaml").write_text(TASK.format(file=file) + CHOICES)
    (directory / "generated.yaml").write_text(TASK.format(file=file) + GENERATED)
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=f"model={sys.argv[2]},base_url={sys.argv[1]}/completions,max_length=2048",
        tasks=["choices", "generated"],
        task_manager=TaskManager(include_path=name, include_defaults=False),
        bootstrap_iters=0,
    )
print(found["results"])
assert found["results"]["choices"]["acc,none"] == 1.0
assert len(found["samples"]["generated"]) == len(DOCS)
