"""The configuration: filled with defaults and checked before the DAG is built."""

import difflib
from pathlib import Path

import jsonschema
import yaml

from longyarn.cli import UserError


def complete(config: dict, schema_path: Path) -> dict:
    """Return ``config`` with every default of the schema filled in, or raise one clear sentence."""
    schema = yaml.safe_load(Path(schema_path).read_text(encoding="utf-8"))
    filled = _with_defaults(config, schema)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(filled)
    error = jsonschema.exceptions.best_match(errors)
    if error is not None:
        raise UserError(_sentence(error))
    check(filled)
    return filled


def _with_defaults(value, schema: dict):
    if isinstance(value, dict) and "properties" in schema:
        filled = dict(value)
        for key, sub in schema["properties"].items():
            if key in filled:
                filled[key] = _with_defaults(filled[key], sub)
            elif "default" in sub:
                filled[key] = _with_defaults(sub["default"], sub)
        return filled
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(item, schema["items"]) for item in value]
    return value


def _sentence(error: jsonschema.ValidationError) -> str:
    """Say a schema violation in one sentence that names the key and the mend."""
    where = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        unknown = sorted(set(error.instance) - set(known), key=str)[0]
        name = f"{where}.{unknown}" if where else str(unknown)
        near = difflib.get_close_matches(str(unknown), known, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"config key {name!r} is unknown; {mend}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        name = f"{where}.{missing}" if where else missing
        return f"config key {name!r} is missing; {_purpose(error.schema['properties'][missing])}"
    value = repr(error.instance)
    hint = ""
    if isinstance(error.instance, str) and error.validator == "type":
        try:
            float(error.instance)
            hint = "; YAML reads 1e-4 as text, so write 1.0e-4, and numbers without quotes"
        except ValueError:
            pass
    rule = {
        "type": lambda v: f"must be of type {' or '.join(v) if isinstance(v, list) else v}",
        "enum": lambda v: f"must be one of {', '.join(map(str, v))}",
        "minimum": lambda v: f"must be at least {v}",
        "maximum": lambda v: f"must be at most {v}",
        "exclusiveMinimum": lambda v: f"must be more than {v}",
        "exclusiveMaximum": lambda v: f"must be less than {v}",
        "pattern": lambda v: f"must match {v}",
        "minItems": lambda v: "must not be empty",
        "minLength": lambda v: "must not be empty",
        "uniqueItems": lambda v: "must not repeat an entry",
    }.get(error.validator, lambda v: error.message)(error.validator_value)
    purpose = _purpose(error.schema)
    return f"config key {where!r} is {value}, but it {rule}{hint}" + (
        f" ({purpose})" if purpose else ""
    )


def _purpose(schema: dict) -> str:
    return schema.get("description", "").rstrip(".")


def check(config: dict) -> None:
    """Refuse what contradicts itself across keys; what needs the model is checked by its stage."""
    target = config["rope"]["target_length"]
    for instrument in ("perplexity", "passkey"):
        for length in config["evaluation"][instrument]["lengths"]:
            if length > target:
                raise UserError(
                    f"evaluation.{instrument}.lengths has {length}, beyond rope.target_length {target}; "
                    "lower it or raise the target"
                )
    perplexity = config["evaluation"]["perplexity"]
    if perplexity["stride"] and perplexity["stride"] > min(perplexity["lengths"]):
        raise UserError(
            f"evaluation.perplexity.stride {perplexity['stride']} is larger than the shortest length "
            f"{min(perplexity['lengths'])}, so tokens would go unscored; lower it"
        )
    if perplexity["tokens_per_document"] < max(perplexity["lengths"]):
        raise UserError(
            f"evaluation.perplexity.tokens_per_document {perplexity['tokens_per_document']} is less than "
            f"the longest length {max(perplexity['lengths'])}; raise it"
        )
    rope = config["rope"]
    stated, factor = rope["original_max_position_embeddings"], rope["factor"]
    if stated and factor and abs(stated * factor - target) > 0.5:
        raise UserError(
            f"rope.factor {factor:g} contradicts rope.target_length {target} / "
            f"rope.original_max_position_embeddings {stated} = {target / stated:g}; "
            "leave rope.factor null or mend the lengths"
        )
    if rope["beta_fast"] <= rope["beta_slow"]:
        raise UserError(
            f"rope.beta_fast {rope['beta_fast']:g} must be larger than rope.beta_slow "
            f"{rope['beta_slow']:g}; 32 and 1 are the paper's"
        )
    training = config["training"]
    if (training["steps"] is None) == (training["epochs"] is None):
        raise UserError("state either training.steps or training.epochs, and leave the other null")
    accumulation(training)
    if not training["gpus"] and training["precision"] == "fp16":
        raise UserError("training.precision fp16 needs a GPU; on the CPU choose bf16 or fp32")
    lora = training["lora"]
    extra = [key for key in ("train_embeddings", "train_norms", "train_output_head") if lora[key]]
    if training["mode"] == "full" and extra:
        raise UserError(
            f"training.lora.{extra[0]} belongs to training.mode lora; full trains every weight anyway"
        )


def accumulation(training: dict) -> int:
    """Return the forward passes a step: batch_size / (micro_batch_size × processes), which must divide."""
    processes = max(1, training["gpus"])
    per_pass = training["micro_batch_size"] * processes
    if training["batch_size"] % per_pass:
        raise UserError(
            f"training.batch_size {training['batch_size']} cannot be divided by micro_batch_size "
            f"{training['micro_batch_size']} × {processes} processes; choose a multiple of {per_pass}"
        )
    steps = training["batch_size"] // per_pass
    stated = training["gradient_accumulation_steps"]
    if stated and stated != steps:
        raise UserError(
            f"training.gradient_accumulation_steps {stated} contradicts batch_size / (micro_batch_size × "
            f"processes) = {steps}; leave it null or mend the batch"
        )
    return steps
