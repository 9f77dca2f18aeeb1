"""How a batch is split: one figure that the config check and training must agree on."""

from longyarn.cli import UserError


def processes(training: dict) -> int:
    """Return the number of training processes: one a GPU, or one a machine without GPUs."""
    return training["nodes"] * max(1, training["gpus"])


def accumulation(training: dict) -> int:
    """Return the forward passes a step: batch_size / (micro_batch_size × processes), which must divide."""
    count = processes(training)
    per_pass = training["micro_batch_size"] * count
    if training["batch_size"] % per_pass:
        raise UserError(
            f"training.batch_size {training['batch_size']} cannot be divided by micro_batch_size "
            f"{training['micro_batch_size']} × {count} processes; choose a multiple of {per_pass}"
        )
    steps = training["batch_size"] // per_pass
    stated = training["gradient_accumulation_steps"]
    if stated and stated != steps:
        raise UserError(
            f"training.gradient_accumulation_steps {stated} contradicts batch_size / (micro_batch_size × "
            f"processes) = {steps}; leave it null or mend the batch"
        )
    return steps
