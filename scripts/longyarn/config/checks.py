"""Checks for settings that contradict each other across keys."""

import difflib
import re
from pathlib import Path

from longyarn.config import derived, thresholds, variants
from longyarn.core.errors import UserError

# Of section training; a phase or a cell has no machines of its own.
OF_THE_RUN = ("nodes", "gpus", "threads")

# Of section training.lora: what is trained whole beside the adapter.
BESIDE_THE_ADAPTER = ("train_embeddings", "train_norms", "train_output_head")


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
        raise UserError(f"evaluation.passkey.haystack {haystack} is no file; mend the path")
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


def check_corpus(corpus: dict) -> None:
    """Refuse a corpus without a source or without held-out documents, and what contradicts itself."""
    entries = corpus["files"] + corpus["datasets"]
    sources = collections(corpus)
    if not sources:
        raise UserError("corpus is empty; state corpus.packages, corpus.files or corpus.datasets")
    names = set(sources)
    for entry in entries:
        if sources.count(entry["collection"]) > 1:
            raise UserError(
                f"two sources of corpus have the collection {entry['collection']!r}; give one another name"
            )
        asked, answered = entry["instruction_column"], entry["answer_column"]
        if bool(asked) != bool(answered) or (entry["input_column"] and not asked):
            raise UserError(
                f"collection {entry['collection']!r} of corpus has part of an instruction set; state "
                "instruction_column and answer_column, or neither"
            )
        if entry["messages_column"] and asked:
            raise UserError(
                f"collection {entry['collection']!r} of corpus states messages_column and "
                "instruction_column; leave one null"
            )
    for name in corpus["held_out"]:
        if name.partition("/")[0] not in names:
            raise UserError(
                f"corpus.held_out names {name!r}, but no source has the collection "
                f"{name.partition('/')[0]!r}; mend it, or set corpus.held_out to [] for none"
            )
    counts = corpus["held_out_documents"]
    for unknown in sorted(counts.keys() - names):
        raise UserError(
            f"corpus.held_out_documents names the collection {unknown!r}, which no source has; the "
            f"corpus has {_near(unknown, names)}, and null takes a name out that another file put in"
        )


def collections(corpus: dict) -> list[str]:
    """Return the collection of each source of a corpus; a package names one as often as it likes."""
    packages = [rule["collection"] for source in corpus["packages"] for rule in source["documents"]]
    return [
        *dict.fromkeys(packages),
        *(entry["collection"] for entry in corpus["files"] + corpus["datasets"]),
    ]


def _near(name: str, known: set[str]) -> str:
    """Return the known name that is most like another, or the first few."""
    return ", ".join(difflib.get_close_matches(name, known, n=1) or sorted(known)[:3])


def check_training(config: dict) -> None:
    """Refuse what contradicts itself in the sections that a phase can change."""
    rope, target = config["rope"], config["rope"]["target_length"]
    length = derived.sequence_length(config)
    if rope["method"] == "none" and config["mix"]["sequence_length"] is None:
        raise UserError(
            "rope.method none keeps the model's own length, so sequences have none to follow from; set "
            "mix.sequence_length"
        )
    if length > target:
        raise UserError(
            f"mix.sequence_length {length} is longer than rope.target_length {target}; lower it, or "
            "leave it null"
        )
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
    if training["source"]:
        check_mix(config)
        return
    if (training["steps"] is None) == (training["epochs"] is None):
        raise UserError("state either training.steps or training.epochs, and leave the other null")
    derived.accumulation(training)
    check_mix(config)
    if not training["gpus"] and training["precision"] == "fp16":
        raise UserError("training.precision fp16 needs a GPU; on the CPU choose bf16 or fp32")
    check_sharing(config)
    if (
        config["mix"]["document_masks"]
        and training["attention"] == "flash_attention_2"
        and training["micro_batch_size"] > 1
    ):
        # transformers would let the documents of such a batch see one another, without a word.
        raise UserError(
            f"mix.document_masks with training.attention flash_attention_2 needs micro_batch_size 1, not "
            f"{training['micro_batch_size']}; set it, which changes nothing else"
        )
    if training["loss"] == "liger" and not training["gpus"]:
        raise UserError("training.loss liger needs a GPU; on the CPU choose chunked")
    if training["offload"] == "all" and training["zero_stage"] != 3:
        raise UserError("training.offload all shards the weights; set training.zero_stage to 3")
    if training["offload"] == "optimizer" and not training["zero_stage"]:
        raise UserError("training.offload needs ZeRO; set training.zero_stage to 1, 2 or 3")
    if training["activation_offload"] and not training["gradient_checkpointing"]:
        raise UserError(
            "training.activation_offload keeps what checkpointing keeps; set gradient_checkpointing to "
            "true"
        )
    if training["early_stopping"] and not training["held_out_steps"]:
        raise UserError(
            "training.early_stopping counts held-out losses; set training.held_out_steps to measure them"
        )


def check_added_weights(training: dict) -> None:
    """Refuse weights to train beside the adapter where there is no adapter."""
    extra = [key for key in BESIDE_THE_ADAPTER if training["lora"][key]]
    if training["mode"] == "full" and extra and not training["source"]:
        raise UserError(
            f"training.lora.{extra[0]} belongs to training.mode lora; full trains every weight anyway"
        )


def check_mix(config: dict) -> None:
    """Refuse a mix that contradicts itself; what the corpus holds is known to the stage pack."""
    mix, training = config["mix"], config["training"]
    shares = mix["shares"]
    if shares is not None and abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(
            f"mix.shares sum to {sum(shares.values()):g}; mend them so that they sum to 1"
        )
    known = set(collections(config["corpus"]))
    for key in ("shares", "short_from"):
        for name in mix[key] or []:
            if name not in known:
                raise UserError(
                    f"mix.{key} names the collection {name!r}, which no source has; the corpus has "
                    f"{_near(name, known)}"
                )
    for entry in config["corpus"]["files"] + config["corpus"]["datasets"]:
        if mix["packing"] == "concat" and (entry["messages_column"] or entry["instruction_column"]):
            raise UserError(
                f"mix.packing concat would cut the conversations of {entry['collection']!r}, so that "
                "answers lose their questions; set it to best_fit"
            )
    for name in mix["short_from"] or []:
        if shares is not None and not shares.get(name):
            raise UserError(
                f"mix.short_from names the collection {name!r}, to which mix.shares gives nothing; give "
                "it a share or take it out"
            )
    if mix["token_budget"] and training["steps"] and not training["source"]:
        length = derived.sequence_length(config)
        derived.require_enough(
            mix["token_budget"] // length,
            length,
            training["steps"] * training["batch_size"] * length,
            mix["allow_repeats"],
        )


def check_sharing(config: dict) -> None:
    """Refuse sequences shared by processes (sp_size) where what runs would not be what is meant."""
    training, length = config["training"], derived.sequence_length(config)
    count, attention = training["sp_size"], training["attention"]
    if count == 1:
        return
    if attention not in ("sdpa", "flash_attention_2"):
        raise UserError(
            f"training.attention {attention} cannot share sequences (training.sp_size {count}); choose "
            "flash_attention_2 or sdpa"
        )
    if config["mix"]["document_masks"] and attention != "flash_attention_2":
        # DeepSpeed Ulysses drops every mask without a word.
        raise UserError(
            f"mix.document_masks with training.sp_size {count} needs training.attention "
            "flash_attention_2; with sdpa the masks would be lost, so set one or the other"
        )
    if training["zero_stage"] != 3:
        # Seen: DeepSpeed's lower stages sum the gradients of the processes that share a sequence where
        # they should take the mean, so gradients are sp_size times too large, and are clipped so.
        raise UserError(
            f"training.sp_size {count} needs training.zero_stage 3; the lower stages give gradients that "
            "are sp_size times too large"
        )
    if length % count:
        raise UserError(
            f"sequences of {length} tokens cannot be shared by training.sp_size {count}; choose a divisor"
        )
