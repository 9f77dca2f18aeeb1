"""The configuration: filled with defaults and checked before the DAG is built."""

from pathlib import Path

import yaml

from longyarn.config import derived
from longyarn.config.checks import check
from longyarn.config.corpus_checks import collections
from longyarn.config.phases import configurations, within
from longyarn.config.thresholds import THRESHOLDS
from longyarn.config.training_checks import BESIDE_THE_ADAPTER, OF_THE_RUN, check_training
from longyarn.config.validation import validate, with_defaults
from longyarn.core.errors import UserError


def complete(config: dict, schema_path: Path) -> dict:
    """Return ``config`` with every default of the schema filled in, or raise one clear sentence."""
    schema = yaml.safe_load(Path(schema_path).read_text(encoding="utf-8"))
    filled = with_defaults(_with_dependent_defaults(config), schema)
    validate(filled, schema)
    filled = _derived(filled)
    check(filled)
    if filled["sweep"]["factors"] and filled["phases"]:
        raise UserError(
            "a sweep of a run in phases is not known; set phases to [], or sweep.factors to {}"
        )
    for name, part in configurations(filled).items():
        if name:
            try:
                _check_part(part, filled, schema)
            except UserError as error:
                raise UserError(f"{within(name)}{error}") from None
    return filled


def _with_dependent_defaults(config: dict) -> dict:
    """Return a config with the defaults that depend on what else it states.

    It is not validated yet, so a value of the wrong type stays as it is.
    """
    if config.get("gate", {}) is None:  # no threshold at all
        config = config | {"gate": dict.fromkeys(THRESHOLDS)}
    training = config.get("training")
    if not isinstance(training, dict):
        return config
    if training.get("epochs") is not None:
        training = {"steps": None} | training
    if training.get("mode") == "full" and isinstance(lora := training.get("lora", {}), dict):
        # Training of every weight includes these, so they are no additions to an adapter.
        training = training | {"lora": dict.fromkeys(BESIDE_THE_ADAPTER, False) | lora}
    return config | {"training": training}


def _derived(config: dict) -> dict:
    """Return a valid config with the values that follow from others in place of null.

    Lengths of the evaluation stay null: they follow from the model, which may not be downloaded yet.
    """
    corpus, evaluation = config["corpus"], config["evaluation"]
    counts, perplexity = corpus["held_out_documents"], evaluation["perplexity"]
    if counts is None:
        first = [] if corpus["held_out"] else collections(corpus)[:1]
        counts = dict.fromkeys(first, derived.HELD_OUT_DOCUMENTS)
    # A file layered on another takes a collection out with null.
    counts = {name: count for name, count in counts.items() if count is not None}
    if perplexity["tokens_per_document"] is None:
        perplexity = perplexity | {"tokens_per_document": 2 * config["rope"]["target_length"]}
    return config | {
        "corpus": corpus | {"held_out_documents": counts},
        "evaluation": evaluation | {"perplexity": perplexity},
    }


def _check_part(part: dict, run: dict, schema: dict) -> None:
    validate(part, schema)
    check_training(part)
    for key in OF_THE_RUN:
        if part["training"][key] != run["training"][key]:
            raise UserError(
                f"training.{key} is that of the whole run, {run['training'][key]}; take it out"
            )
