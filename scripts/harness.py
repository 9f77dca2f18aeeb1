"""Tasks of EleutherAI's lm-evaluation-harness (lm_eval) on one variant.

The model is loaded, and its RoPE checked, as for the other instruments; tasks, prompts and metrics are
lm_eval's. RULER's tasks (Hsieh et al., arXiv 2404.06654) are made at each of the lengths; others, such as
HellaSwag, tell what is left of what the base could do at short context.
"""

import argparse
import contextlib
import difflib
import importlib.metadata
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import read_json
from longyarn.evaluation import variant_model
from longyarn.models import loading

# These tasks of RULER make their examples by themselves. All others download them from the hub.
MADE_HERE = (
    "niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe",
)  # fmt: skip
ROOM = (
    512  # tokens beyond the longest length: lm_eval would cut prompts to leave room for an answer
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    variant_model.add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, help="tasks by lm_eval's names")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="of RULER's prompts")
    parser.add_argument("--limit", type=int, help="examples of each task and length; default: all")
    parser.add_argument("--num-fewshot", type=int, help="examples shown; default: the task's own")
    arguments = parser.parse_args()
    with without_network() if set(arguments.tasks) <= set(MADE_HERE) else contextlib.nullcontext():
        check_tasks(arguments.tasks)
        tasks = evaluate(arguments)
    variant_model.write(
        arguments,
        script=Path(__file__),
        settings={
            "tasks": arguments.tasks,
            "lengths": arguments.lengths,
            "limit": arguments.limit,
            "num_fewshot": arguments.num_fewshot,
        },
        inputs={},
        facts={"lm_eval": importlib.metadata.version("lm_eval"), "tasks": tasks},
    )
    for name, entry in tasks.items():
        told = ", ".join(f"{metric} {one['value']:.4g}" for metric, one in entry["metrics"].items())
        print(f"harness of {arguments.variant}: {name} {told}", file=sys.stderr)


def check_installed() -> None:
    """Stop where lm_eval, which is an extra, is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation.harness.tasks needs lm_eval, which is not installed; run `make setup-harness`, or "
            "leave tasks empty"
        )


def check_tasks(names: list[str]) -> None:
    """Stop at a task that lm_eval does not have, with the names that are near."""
    check_installed()
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            mend = f"near are {', '.join(near)}" if near else "`lm_eval ls tasks` lists them"
            raise UserError(
                f"evaluation.harness.tasks has {name!r}, which lm_eval "
                f"{importlib.metadata.version('lm_eval')} does not know; {mend}"
            )


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Keep lm_eval from looking for anything elsewhere.

    Its module of RULER's needles downloads NLTK's sentence splitter as soon as it is imported, unless a
    directory of that name is there. The tasks made here split no sentences, so an empty one will do.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        os.environ |= {"NLTK_DATA": directory, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        yield


def is_of_ruler(task: str) -> bool:
    """Tell whether a task, or group, is of RULER: its examples are made at a length in tokens."""
    return task.startswith(("niah_", "ruler"))


def evaluate(arguments: argparse.Namespace) -> dict[str, dict]:
    """Return each task's version, shots and metrics."""
    from lm_eval.models.huggingface import HFLM

    directory = variant_model.model_directory(arguments)
    remote_code = manifest.read_facts(arguments.model)["trust_remote_code"]
    tokenizer = loading.load_tokenizer(directory, remote_code)
    # Without a length, lm_eval would keep the end of a prompt that is longer than the base's context.
    longest = max(arguments.lengths) + ROOM
    lm = HFLM(pretrained=variant_model.load(arguments), tokenizer=tokenizer, max_length=longest)
    others = [task for task in arguments.tasks if not is_of_ruler(task)]
    ruler = [task for task in arguments.tasks if is_of_ruler(task)]
    if ruler and not remote_code:
        check_no_code(directory)
    found = results(lm, others, arguments) if others else {}
    # One length after the other: a limit takes the first examples, and those are of the first length.
    for length in arguments.lengths if ruler else []:
        try:
            at_length = results(lm, ruler, arguments, length)
        except ZeroDivisionError:  # lm_eval divides by the answers of an example that has none
            raise UserError(
                f"evaluation.harness.lengths has {length}, too short for the words that {', '.join(ruler)} "
                "would have the model find, with this tokenizer; RULER's own lengths begin at 4096"
            ) from None
        for task, entry in at_length.items():
            found.setdefault(task, entry)["metrics"] |= entry["metrics"]
    return found


def check_no_code(model_directory: Path) -> None:
    """Stop where RULER's tasks would run code that came with the tokenizer: they load it trusting it."""
    file = model_directory / "tokenizer_config.json"
    if file.is_file() and read_json(file).get("auto_map"):
        raise UserError(
            f"{file} names code of its own (auto_map), which lm_eval's tasks of RULER would run; read it "
            "and set model.trust_remote_code to true, or take these tasks out of evaluation.harness.tasks"
        )


def results(lm, tasks: list[str], arguments, length: int | None = None) -> dict[str, dict]:
    """Return what lm_eval finds, task by task; ``length`` is that of RULER's prompts."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tokenizer = str(variant_model.model_directory(arguments))
    made_with = {"tokenizer": tokenizer, "max_seq_lengths": [length]} if length else {}
    said = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=TaskManager(metadata=made_with),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
    )
    if length:
        # Each task by itself: the mean that lm_eval gives of RULER is over its own lengths alone.
        metrics = {task: score_at(length, samples) for task, samples in said["samples"].items()}
    else:
        # Of a group, such as mmlu, the mean over its tasks; a tag has none, so there all of its tasks.
        whole = set(tasks) <= said["results"].keys()
        metrics = {
            task: scores(entry, said["n-samples"].get(task, {}).get("effective"))
            for task, entry in said["results"].items()
            if task in tasks or not whole
        }
    return {
        task: {
            "version": said["versions"].get(task),
            "num_fewshot": said["n-shot"].get(task),
            "metrics": found,
        }
        for task, found in metrics.items()
    }


def score_at(length: int, samples: list[dict]) -> dict[str, dict]:
    """Return the metric of a task of RULER, named by its length, with the error of the mean."""
    from lm_eval.api.metrics import mean_stderr

    values = [sample[str(length)] for sample in samples]
    error = mean_stderr(values) if len(values) > 1 else None
    return {
        str(length): {
            "value": sum(values) / len(values),
            "stderr": error,
            "examples": len(values),
        }
    }


def is_number(value: object) -> bool:
    """Tell whether a value is a number that JSON can hold."""
    return isinstance(value, int | float) and math.isfinite(value)


def scores(entry: dict, examples: int | None) -> dict[str, dict]:
    """Return a task's metrics, each with its standard error, None where lm_eval gives none."""
    found = {}
    for key, value in entry.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not is_number(value):
            continue
        error = entry.get(f"{metric}_stderr,{filtered}")
        found[metric if filtered == "none" else f"{metric} ({filtered})"] = {
            "value": float(value),
            "stderr": float(error) if is_number(error) else None,
            "examples": examples,
        }
    return found


if __name__ == "__main__":
    program(main)()
