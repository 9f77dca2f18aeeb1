"""How a batch is split: figures that the config check, the plan and training must agree on."""

from longyarn.core.errors import UserError

LOSS_CHUNK = 1024  # positions whose logits the chunked loss holds at once


def sequence_length(config: dict) -> int:
    """Return the tokens of a training sequence."""
    return config["mix"]["sequence_length"] or config["rope"]["target_length"]


def processes(training: dict) -> int:
    """Return the number of training processes: one a GPU, or one a machine without GPUs."""
    return training["nodes"] * max(1, training["gpus"])


def accumulation(training: dict) -> int:
    """Return the forward passes a step: batch_size / (micro_batch_size × replicas), which must divide.

    A replica is the sp_size processes that share each sequence.
    """
    count, sharing = processes(training), training["sp_size"]
    if count % sharing:
        raise UserError(
            f"training.sp_size {sharing} does not divide the {count} processes (nodes × gpus); choose "
            "a divisor"
        )
    count //= sharing
    what = "processes" if sharing == 1 else f"groups of {sharing} processes"
    per_pass = training["micro_batch_size"] * count
    if training["batch_size"] % per_pass:
        raise UserError(
            f"training.batch_size {training['batch_size']} cannot be divided by micro_batch_size "
            f"{training['micro_batch_size']} × {count} {what}; choose a multiple of {per_pass}"
        )
    steps = training["batch_size"] // per_pass
    stated = training["gradient_accumulation_steps"]
    if stated and stated != steps:
        raise UserError(
            f"training.gradient_accumulation_steps {stated} contradicts batch_size / (micro_batch_size × "
            f"{what}) = {steps}; leave it null or mend the batch"
        )
    return steps


def require_enough(sequences: int, length: int, wanted: int, allow_repeats: bool) -> None:
    """Stop when training would read packed sequences again that are to be read once.

    ``wanted``: the tokens that training will read.
    """
    if wanted > sequences * length and not allow_repeats:
        raise UserError(
            f"training.steps × batch_size × sequence length reads {wanted} tokens, but the pack holds "
            f"{sequences * length}: {wanted - sequences * length} tokens are missing; bring more "
            "documents, lower training.steps, or set mix.allow_repeats to true"
        )
