"""The model card: a README.md with metadata for the hub, made from report.json alone."""

import json
import re
from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.reporting.gate_outcome import missed
from longyarn.reporting.wording import between, count, percent, significant
from longyarn.rope import transformers4

HUB_DATASET = re.compile(r"([\w.-]+/[\w.-]+) at \S+")
METHODS = {"yarn": "YaRN", "linear": "linear interpolation", "ntk": "NTK-aware scaling"}


def default_name(report: dict) -> str:
    """Return the model's name: the last part of its base's name and the target length, such as 32k."""
    length = report["rope"]["target_length"]
    shown = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    return f"{base_name(report)}-{shown}"


def base_name(report: dict) -> str:
    """Return the last part of the base model's source."""
    return Path(report["model"]["source"]).name or "model"


def text(template: Path, report: dict, compared: list[dict], settings: dict) -> str:
    """Return the card: the template filled with the report.

    ``compared`` comes from ``gate_outcome.compare``; ``settings`` has ``name``, ``license`` and ``language``.
    """
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "figure": figure,
        "found": found,
        "percent": percent,
        "cell": lambda value: " ".join(str(value).split()).replace("|", "\\|"),
        "plain": lambda value: f"{value:,.6g}",
        "json": lambda value: json.dumps(value, indent=1, ensure_ascii=False),
    }
    try:
        return environment.from_string(template.read_text(encoding="utf-8")).render(
            front=metadata(report, settings).to_yaml(),
            report=report,
            settings=settings,
            base=base_name(report),
            method=METHODS.get(of_trained(report)["method"]),
            trained=how_trained(report),
            rope=of_trained(report),
            shown=[name for name in ("base", "trained") if name in report["perplexity"]],
            asked=[name for name in ("base", "trained") if name in report["passkey_by_length"]],
            compared=compared,
            missed=missed(compared),
            old_keys=transformers4.rope_keys(
                report["model"]["model_type"], of_trained(report)["rope_parameters"]
            ),
        )
    except (jinja2.TemplateError, OSError) as error:
        raise UserError(f"the template {template} cannot be filled: {error}; correct it") from error


def how_trained(report: dict) -> str:
    """Return on which length the model was trained, in words, or that it was trained elsewhere."""
    length, target = report["mix"]["sequence_length"], report["rope"]["target_length"]
    if report["training"]["source"]:
        return "elsewhere"
    return "at that length" if length == target else f"on sequences of {length:,} tokens"


def of_trained(report: dict) -> dict:
    """Return the RoPE of the trained model."""
    return report["rope"]["variants"][report["rope"]["trained"]]


def figure(one: dict) -> str:
    """Write a perplexity with its interval."""
    if one["low"] == one["high"]:
        return f"{significant(one['value'])} (one document, so no interval)"
    return f"{significant(one['value'])} ({between(one['low'], one['high'])})"


def found(cell: dict) -> str:
    """Write the number of passkeys found with the interval of their share."""
    return f"{count(cell)} ({between(cell['low'], cell['high'], percent)})"


def metadata(report: dict, settings: dict):
    """Return the metadata that the hub reads from the card, a ``ModelCardData``."""
    from huggingface_hub import ModelCardData

    model, method = report["model"], of_trained(report)["method"]
    tags = ["long-context", "rope"]
    tags += [] if method == "none" else [method]
    tags += ["lora"] if report["training"]["mode"] == "lora" else []
    # The hub cannot link to a base model that is a local directory.
    base = (
        {"base_model": model["source"], "base_model_relation": "finetune"}
        if model["revision"]
        else {}
    )
    return ModelCardData(
        **base,
        language=settings["language"],
        license=settings["license"] or "other",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=datasets(report) or None,
        model_name=settings["name"],
        eval_results=results(report) or None,
    )


def datasets(report: dict) -> list[str]:
    """Return the data sets of the hub that the corpus was made from."""
    sources = [one["source"] for one in report["corpus"]["collections"].values()]
    found = [match[1] for source in sources if (match := HUB_DATASET.fullmatch(source))]
    return list(dict.fromkeys(found))


def results(report: dict) -> list:
    """Return the trained model's perplexity and passkey rate at each length, in the hub's form."""
    from huggingface_hub import EvalResult

    task = {"task_type": "text-generation", "task_name": "Text Generation"}
    perplexity = [
        EvalResult(
            **task,
            dataset_type="held-out-documents",
            dataset_name="held-out documents",
            metric_type="perplexity",
            metric_name=f"perplexity at {int(length):,} tokens",
            metric_value=round(one["value"], 4),
        )
        for length, one in report["perplexity"].get("trained", {}).items()
    ]
    passkey = [
        EvalResult(
            **task,
            dataset_type="passkey-retrieval",
            dataset_name="passkey retrieval",
            metric_type="accuracy",
            metric_name=f"passkeys found at {int(length):,} tokens",
            metric_value=round(one["successes"] / one["trials"], 4),
        )
        for length, one in report["passkey_by_length"].get("trained", {}).items()
    ]
    return perplexity + passkey
