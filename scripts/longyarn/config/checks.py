"""Checks for settings that contradict each other across keys."""

import re
from pathlib import Path

from longyarn.config import thresholds, variants
from longyarn.config.corpus_checks import check_corpus
from longyarn.config.training_checks import check_added_weights, check_training
from longyarn.core.errors import UserError


def instruments(evaluation: dict) -> list[str]:
    """Return the instruments that a run looks at each variant with, from the section `evaluation`."""
    return ["perplexity", "passkey"] + ["harness"] * bool(evaluation["harness"]["tasks"])


def check(config: dict) -> None:
    """Refuse what contradicts itself across keys; what needs the model is checked by its stage."""
    model = config["model"]
    if model["locked"] and not re.fullmatch("[0-9a-f]{40}", model["revision"] or "0" * 40):
        raise UserError(
            f"model.revision {model['revision']} is a branch or a tag, which can move, and model.locked is "
            "true; write the commit's 40 hexadecimal digits, which the manifest base.json of an earlier "
            "run has"
        )
    check_source(config)
    target = config["rope"]["target_length"]
    for instrument in instruments(config["evaluation"]):
        for length in config["evaluation"][instrument]["lengths"] or []:
            if length > target:
                raise UserError(
                    f"evaluation.{instrument}.lengths has {length}, beyond rope.target_length {target}; "
                    "lower it or raise the target"
                )
    check_perplexity(config["evaluation"]["perplexity"], target)
    haystack = config["evaluation"]["passkey"]["haystack"]
    if haystack and not Path(haystack).is_file():
        raise UserError(f"evaluation.passkey.haystack {haystack} is not a file; correct the path")
    corpus = config["corpus"]
    check_corpus(corpus)
    if not corpus["held_out"] and not corpus["held_out_documents"]:
        raise UserError(
            "nothing is held out for evaluation; name documents in corpus.held_out, or how many of a "
            "collection in corpus.held_out_documents"
        )
    check_training(config)
    check_added_weights(config["training"])
    variants.check(config)
    check_gate(config)


def check_source(config: dict) -> None:
    """Refuse a model trained elsewhere where it has no meaning or would be replaced, and a revision that
    says nothing.
    """
    source, revision = config["training"]["source"], config["training"]["revision"]
    named = any("source" in phase.get("training", {}) for phase in config["phases"])
    if config["phases"] and (source or named):
        raise UserError(
            "training.source is a model trained elsewhere, in which this run has no part, so it has no "
            "phases; set phases to [] and training.source in section training"
        )
    if source and config["sweep"]["factors"]:
        raise UserError(
            "training.source is a model trained elsewhere, so there is nothing to sweep; set sweep.factors "
            "to {}"
        )
    if revision and not source:
        raise UserError("training.revision is that of training.source, which is null; set both")
    run = Path(config["paths"]["results"], config["run"])
    if source and Path(source).expanduser().resolve().is_relative_to(run.resolve()):
        raise UserError(
            f"training.source {source} lies in {run}, which this run writes and replaces; move it out of "
            "there, and name where it is then"
        )
    moves = revision and not re.fullmatch("[0-9a-f]{40}", revision)
    if moves and config["model"]["locked"]:
        raise UserError(
            f"training.revision {revision} is a branch or a tag, which can move, and model.locked is true; "
            "write the commit's 40 hexadecimal digits"
        )


def check_gate(config: dict) -> None:
    """Refuse a threshold whose figure would not be measured.

    The original length is the model's, known before training (scripts/check_evaluation.py) where the
    config does not state it.
    """
    evaluation, rope = config["evaluation"], config["rope"]
    thresholds.check_variants(config["gate"], evaluation["variants"])
    known = {"target": rope["target_length"], "original": rope["original_max_position_embeddings"]}
    lengths = {name: evaluation[name]["lengths"] for name in ("perplexity", "passkey")}
    if rope["method"] != "none":
        known = {name: length for name, length in known.items() if length}
        thresholds.check_lengths(config["gate"], lengths, known)


def check_perplexity(perplexity: dict, target: int) -> None:
    """Refuse protocols of perplexity that cannot be made from the documents that `tiled` reads."""
    longest = max(perplexity["lengths"] or [target])
    limit = perplexity["tokens_per_document"]
    if limit < longest:
        raise UserError(
            f"evaluation.perplexity.tokens_per_document {limit} is less than the longest length "
            f"{longest}; raise it"
        )
    for name in ("truncate", "sliding"):
        lengths = (perplexity[name] or {}).get("lengths") or []
        if lengths and max(lengths) > longest:
            raise UserError(
                f"evaluation.perplexity.{name}.lengths has {max(lengths)}, beyond the longest of "
                f"evaluation.perplexity.lengths {longest}, by which documents are chosen; add it there"
            )
    sliding = perplexity["sliding"]
    if sliding and sliding["stride"] >= min(sliding["lengths"]):
        raise UserError(
            f"evaluation.perplexity.sliding.stride {sliding['stride']} is not below the shortest length "
            f"{min(sliding['lengths'])}, so windows would not overlap; lower it"
        )
    by_position = perplexity["by_position"]
    if by_position and 2 * by_position["buckets"] > longest:
        raise UserError(
            f"evaluation.perplexity.by_position.buckets {by_position['buckets']} divides windows of "
            f"{longest} tokens into parts of less than 2; lower it"
        )
