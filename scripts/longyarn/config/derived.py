"""Values that follow from other settings, on which the checks, the plan and the stages must agree."""

from longyarn.core.errors import UserError

HELD_OUT_DOCUMENTS = 10  # of the first collection, where the configuration names none
LEAST_HARNESS_LENGTH = (
    1024  # in fewer tokens, lm_eval can search forever for a prompt of ruler_vt that fits
)
LOSS_CHUNK = 1024  # positions whose logits the chunked loss holds at once


def evaluation_lengths(
    stated: list[int] | None, original: int | None, target: int, least: int = 1
) -> list[int]:
    """Return the lengths, in tokens, at which an instrument evaluates.

    Either the ``stated`` ones or ``original``, the model's original length, doubled up to ``target``. Of the
    latter, only ``target`` can be below ``least``. If the original length is None, it is ``target`` alone.
    """
    if stated:
        return stated
    found, length = [], original or target
    while length < target:
        found.append(length)
        length *= 2
    return [length for length in found if length >= least] + [target]


def evaluation(config: dict, original: int | None) -> dict:
    """Return config section `evaluation` with the lengths of every instrument filled in, for the plan.

    ``original`` is the model's max_position_embeddings, None if it is unknown.
    """
    section, rope = config["evaluation"], config["rope"]
    original = rope["original_max_position_embeddings"] or original
    least = {"perplexity": 1, "passkey": 1, "harness": LEAST_HARNESS_LENGTH}
    filled = {
        name: section[name]
        | {
            "lengths": evaluation_lengths(
                section[name]["lengths"], original, rope["target_length"], shortest
            )
        }
        for name, shortest in least.items()
    }
    return section | filled


def sequence_length(config: dict) -> int:
    """Return the tokens of a training sequence."""
    return training_length(config["mix"]["sequence_length"], config["rope"]["target_length"])


def training_length(stated: int | None, target: int) -> int:
    """Return the tokens of a training sequence: mix.sequence_length or, if it is null, the target."""
    return stated or target


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
            f"{what}) = {steps}; leave it null or fix the batch"
        )
    return steps


def require_enough(sequences: int, length: int, wanted: int, allow_repeats: bool) -> None:
    """Stop when training would read packed sequences again that are to be read once.

    ``wanted``: the tokens that training will read.
    """
    if wanted > sequences * length and not allow_repeats:
        raise UserError(
            f"training.steps × batch_size × sequence length reads {wanted} tokens, but the pack holds "
            f"{sequences * length}: {wanted - sequences * length} tokens are missing; add more "
            "documents, lower training.steps, or set mix.allow_repeats to true"
        )
