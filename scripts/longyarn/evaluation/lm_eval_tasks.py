"""Tasks of EleutherAI's lm-evaluation-harness (lm_eval), evaluated on a loaded model.

Tasks, prompts and metrics are those of lm_eval. The tasks of RULER (Hsieh et al., arXiv 2404.06654) are
generated at each length. Other tasks, such as HellaSwag, show how much of the base's ability at short
context is left.
"""

import contextlib
import difflib
import importlib.metadata
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from longyarn.core.errors import UserError
from longyarn.core.files import read_json

# These tasks of RULER generate their examples. All other tasks download theirs from the hub.
GENERATED = (
    "niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe",
)  # fmt: skip
ROOM = 512  # tokens beyond the longest length; lm_eval would truncate prompts to make room for an answer


class Settings(NamedTuple):
    """What to evaluate. ``None`` takes all examples, or the task's own number of shots."""

    tasks: list[str]
    lengths: list[int]
    limit: int | None
    num_fewshot: int | None


def check_installed() -> None:
    """Raise ``UserError`` if lm_eval, which is optional, is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation.harness.tasks needs lm_eval, which is not installed; run `make setup-harness`, or "
            "leave tasks empty"
        )


def check_tasks(names: list[str]) -> None:
    """Raise ``UserError`` if lm_eval lacks a task; the message suggests similar names."""
    check_installed()
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = (
                f"similar names are {', '.join(near)}" if near else "`lm_eval ls tasks` lists all"
            )
            raise UserError(
                f"evaluation.harness.tasks has {name!r}, which lm_eval "
                f"{importlib.metadata.version('lm_eval')} does not know; {hint}"
            )


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep lm_eval from using the network.

    When its module of RULER's needles is imported, it downloads NLTK's sentence splitter, unless a
    directory of that name exists. The generated tasks split no sentences, so an empty directory suffices.
    """
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        os.environ |= {"NLTK_DATA": directory, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        yield


def is_of_ruler(task: str) -> bool:
    """Tell whether a task or group is of RULER, whose examples are generated at a length in tokens."""
    return task.startswith(("niah_", "ruler"))


def evaluate(model, tokenizer, directory: Path, settings: Settings) -> dict[str, dict]:
    """Return each task's version, shots and metrics.

    ``directory`` holds the tokenizer's files, from which lm_eval loads the tokenizer again.
    """
    from lm_eval.models.huggingface import HFLM

    # Without max_length, lm_eval would keep only the end of prompts longer than the base's context.
    longest = max(settings.lengths) + ROOM
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=longest)
    others = [task for task in settings.tasks if not is_of_ruler(task)]
    ruler = [task for task in settings.tasks if is_of_ruler(task)]
    found = results(lm, directory, others, settings) if others else {}
    # Each length is evaluated separately: a limit takes the first examples, all of the first length.
    for length in settings.lengths if ruler else []:
        try:
            at_length = results(lm, directory, ruler, settings, length)
        # lm_eval divides by an example's number of answers, which is 0 in too short prompts.
        except ZeroDivisionError:
            raise UserError(
                f"evaluation.harness.lengths has {length}, too short for the prompts of {', '.join(ruler)} "
                "with this tokenizer; raise it (RULER's own lengths begin at 4096)"
            ) from None
        for task, entry in at_length.items():
            found.setdefault(task, entry)["metrics"] |= entry["metrics"]
    return found


def check_no_code(directory: Path) -> None:
    """Raise ``UserError`` if the tokenizer has code of its own, which RULER's tasks would run."""
    file = directory / "tokenizer_config.json"
    if file.is_file() and read_json(file).get("auto_map"):
        raise UserError(
            f"{file} names code of its own (auto_map), which lm_eval's tasks of RULER would run; read it "
            "and set model.trust_remote_code to true, or remove these tasks from evaluation.harness.tasks"
        )


def results(
    lm, directory: Path, tasks: list[str], settings: Settings, length: int | None = None
) -> dict[str, dict]:
    """Return lm_eval's results by task. ``length`` is the length of RULER's prompts."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    made_with = {"tokenizer": str(directory), "max_seq_lengths": [length]} if length else {}
    output = lm_eval.simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=TaskManager(metadata=made_with),
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
    )
    if length:
        # From the samples, because lm_eval averages RULER over its own lengths only.
        metrics = {task: score_at(length, samples) for task, samples in output["samples"].items()}
    else:
        # A group, such as mmlu, has a mean over its tasks. A tag has none, so all of its tasks count.
        whole = set(tasks) <= output["results"].keys()
        metrics = {
            task: scores(entry, output["n-samples"].get(task, {}).get("effective"))
            for task, entry in output["results"].items()
            if task in tasks or not whole
        }
    return {
        task: {
            "version": output["versions"].get(task),
            "num_fewshot": output["n-shot"].get(task),
            "metrics": found,
        }
        for task, found in metrics.items()
    }


def score_at(length: int, samples: list[dict]) -> dict[str, dict]:
    """Return the metric of a task of RULER, named by its length, with the mean's standard error."""
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
    """Tell whether a value is a finite number, which JSON can hold."""
    return isinstance(value, int | float) and math.isfinite(value)


def scores(entry: dict, examples: int | None) -> dict[str, dict]:
    """Return a task's metrics, each with its standard error, or None if lm_eval gives no error."""
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
