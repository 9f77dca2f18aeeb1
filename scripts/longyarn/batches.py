"""How a batch is split: one figure that the config check and training must agree on."""

from longyarn.cli import UserError


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
