"""lm-evaluation-harness on a relay model: accuracy, likelihoods, and the forwards that generation took.

python examples/evaluate_harness.py                                       # a tiny random model and two local tasks
python examples/evaluate_harness.py --model PATH_OR_ID --tasks gsm8k      # yours, with tasks of the harness

Needs `pip install 'relay-hf[eval]'`. The command line of the harness does the same: see docs/evaluation.md.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from relay_hf.evaluation.harness import RelayLM
from relay_hf.testing import byte_tokenizer, tiny_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="checkpoint to load, with its tokenizer")
parser.add_argument("--tasks", nargs="+", default=["capital", "spell"])
parser.add_argument("--limit", type=int, help="documents per task")
arguments = parser.parse_args()


def write_tasks(folder: Path) -> None:
    """Two tasks in the harness' own format (YAML, of which JSON is a part), with their documents beside them."""
    documents = [
        {"question": "The capital of France is", "choices": ["Paris", "Rome", "Oslo"], "answer": 0},
        {"question": "The capital of Norway is", "choices": ["Paris", "Rome", "Oslo"], "answer": 2},
        {"question": "The capital of Italy is", "choices": ["Paris", "Rome", "Oslo"], "answer": 1},
    ]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "documents.jsonl"), "cache_dir": str(folder / "cache")},
        "test_split": "train",
        "doc_to_text": "{{question}}",
    }
    capital = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    spell = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for name, task in {"capital": capital, "spell": spell}.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}))


logging.getLogger("lm_eval").setLevel(logging.ERROR)
with tempfile.TemporaryDirectory() as name:
    write_tasks(Path(name))
    if arguments.model:
        harness_model = RelayLM(arguments.model, batch_size=8)
    else:
        tokenizer = byte_tokenizer()
        model = tiny_model(tokenizer, block_size=16, token_shift=True, relay_init="ones")
        model.generation_config.unmasking_threshold = 0.1  # a random model is never sure
        harness_model = RelayLM(model, tokenizer=tokenizer, batch_size=8)
    # Only with tasks of the harness is it worth reading its 15 000 files.
    own = {"capital", "spell"}
    tasks = TaskManager(include_path=name, include_defaults=not own.issuperset(arguments.tasks))
    results = simple_evaluate(
        harness_model, tasks=arguments.tasks, limit=arguments.limit, task_manager=tasks, bootstrap_iters=100
    )

print(make_table(results))
for task, costs in results["config"]["generation_forwards"].items():
    print(f"{task}: {', '.join(f'{cost:.4g} {name}' for name, cost in costs.items())}")
