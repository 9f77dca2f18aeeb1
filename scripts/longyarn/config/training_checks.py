"""Checks of the sections rope, mix and training, which phases and cells of a sweep can change."""

from longyarn.config import derived
from longyarn.config.corpus_checks import collections, near
from longyarn.core.errors import UserError

# Of section training: a phase or a cell has no machines of its own.
OF_THE_RUN = ("nodes", "gpus", "threads")

# Of section training.lora: weights that are trained whole, in addition to the adapter.
BESIDE_THE_ADAPTER = ("train_embeddings", "train_norms", "train_output_head")


def check_training(config: dict) -> None:
    """Refuse settings that contradict each other in the sections that a phase can change."""
    check_rope(config)
    training = config["training"]
    if training["source"]:
        check_mix(config)
        return
    if (training["steps"] is None) == (training["epochs"] is None):
        raise UserError("state either training.steps or training.epochs, and leave the other null")
    derived.accumulation(training)
    check_mix(config)
    check_sharing(config)
    check_kernels(config)
    check_offload(training)
    if training["early_stopping"] and not training["held_out_steps"]:
        raise UserError(
            "training.early_stopping counts held-out losses; set training.held_out_steps to measure them"
        )


def check_rope(config: dict) -> None:
    """Refuse RoPE settings and sequence lengths that contradict each other."""
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
            "leave rope.factor null or fix the lengths"
        )
    if rope["beta_fast"] <= rope["beta_slow"]:
        raise UserError(
            f"rope.beta_fast {rope['beta_fast']:g} must be larger than rope.beta_slow "
            f"{rope['beta_slow']:g}; 32 and 1 are the paper's"
        )


def check_kernels(config: dict) -> None:
    """Refuse a precision, an attention or a loss that cannot run as configured."""
    training = config["training"]
    if not training["gpus"] and training["precision"] == "fp16":
        raise UserError("training.precision fp16 needs a GPU; on the CPU choose bf16 or fp32")
    if (
        config["mix"]["document_masks"]
        and training["attention"] == "flash_attention_2"
        and training["micro_batch_size"] > 1
    ):
        # transformers would let the documents of such a batch see one another, without an error.
        raise UserError(
            f"mix.document_masks with training.attention flash_attention_2 needs micro_batch_size 1, not "
            f"{training['micro_batch_size']}; set it to 1, which changes nothing else"
        )
    if training["loss"] == "liger" and not training["gpus"]:
        raise UserError("training.loss liger needs a GPU; on the CPU choose chunked")


def check_offload(training: dict) -> None:
    """Refuse an offload to host memory without what it builds on."""
    if training["offload"] == "all" and training["zero_stage"] != 3:
        raise UserError("training.offload all shards the weights; set training.zero_stage to 3")
    if training["offload"] == "optimizer" and not training["zero_stage"]:
        raise UserError("training.offload needs ZeRO; set training.zero_stage to 1, 2 or 3")
    if training["activation_offload"] and not training["gradient_checkpointing"]:
        raise UserError(
            "training.activation_offload moves what checkpointing keeps; set gradient_checkpointing to "
            "true"
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
            f"mix.shares sum to {sum(shares.values()):g}; fix them so that they sum to 1"
        )
    known = set(collections(config["corpus"]))
    for key in ("shares", "short_from"):
        for name in mix[key] or []:
            if name not in known:
                raise UserError(
                    f"mix.{key} names the collection {name!r}, which no source has; the corpus has "
                    f"{near(name, known)}"
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
