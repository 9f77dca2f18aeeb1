"""Evaluate one variant on tasks of EleutherAI's lm-evaluation-harness (lm_eval).

    python scripts/harness.py --variant trained --model results/micro/merged.json \
        --base results/micro/base.json --rope results/micro/rope/yarn.json \
        --precision bf16 --attention sdpa --threads 2 --tasks niah_single_1 --lengths 4096 \
        --limit 20 --manifest results/micro/harness/trained.json

The model is loaded and its RoPE checked as in the other evaluations. The result is the manifest's facts.
"""

import argparse
import contextlib
import importlib.metadata
import sys
from pathlib import Path

from longyarn.config import derived
from longyarn.core import manifest
from longyarn.core.errors import program
from longyarn.evaluation import lm_eval_tasks, variant_model
from longyarn.models import loading


def main() -> None:
    arguments = parse_arguments()
    lengths = variant_model.lengths(arguments, arguments.lengths, derived.LEAST_HARNESS_LENGTH)
    settings = lm_eval_tasks.Settings(
        arguments.tasks, lengths, arguments.limit, arguments.num_fewshot
    )
    generated = set(arguments.tasks) <= set(lm_eval_tasks.GENERATED)
    with lm_eval_tasks.offline() if generated else contextlib.nullcontext():
        lm_eval_tasks.check_tasks(arguments.tasks)
        directory = variant_model.model_directory(arguments)
        remote_code = manifest.read_facts(arguments.model)["trust_remote_code"]
        if not remote_code and any(map(lm_eval_tasks.is_of_ruler, arguments.tasks)):
            lm_eval_tasks.check_no_code(directory)
        tokenizer = loading.load_tokenizer(directory, remote_code)
        model = variant_model.load(arguments)
        tasks = lm_eval_tasks.evaluate(model, tokenizer, directory, settings)
    variant_model.write(
        arguments,
        script=Path(__file__),
        settings=settings._asdict(),
        inputs={},
        facts={"lm_eval": importlib.metadata.version("lm_eval"), "tasks": tasks},
    )
    for name, entry in tasks.items():
        told = ", ".join(f"{metric} {one['value']:.4g}" for metric, one in entry["metrics"].items())
        print(f"harness of {arguments.variant}: {name} {told}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    variant_model.add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, help="tasks by their lm_eval names")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="lengths of RULER's prompts, in tokens"
    )
    variant_model.add_length_arguments(parser)
    parser.add_argument("--limit", type=int, help="examples per task and length; default: all")
    parser.add_argument("--num-fewshot", type=int, help="examples shown; default: the task's own")
    return parser.parse_args()


if __name__ == "__main__":
    program(main)()
