"""transformers' Trainer, with guards that see each step and a correct end for a resumed run."""

import math
import sys
from pathlib import Path

import torch
import transformers

from longyarn.core.errors import UserError
from longyarn.core.files import write_json
from longyarn.training import deepspeed_setup
from longyarn.training.guards import Guards


def training_arguments(settings: dict, attempt: Path) -> transformers.TrainingArguments:
    """Return transformers' arguments for config section `training`.

    Also writes DeepSpeed's configuration into ``attempt``, the directory of this attempt.
    """
    deepspeed = deepspeed_setup.configuration(settings)
    if torch.distributed.get_rank() == 0:  # two processes must not write the same file
        write_json(attempt / "deepspeed.json", deepspeed)
    liger = settings["loss"] == "liger"
    return transformers.TrainingArguments(
        output_dir=str(attempt),
        max_steps=settings["steps"] or -1,
        num_train_epochs=settings["epochs"] or 1,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type=settings["scheduler"],
        warmup_steps=settings["warmup_steps"],
        weight_decay=settings["weight_decay"],
        adam_beta2=settings["adam_beta2"],
        max_grad_norm=settings["max_grad_norm"],
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_accumulation_steps=deepspeed["gradient_accumulation_steps"],
        activation_checkpointing=settings["gradient_checkpointing"],
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=settings["precision"] == "bf16",
        fp16=settings["precision"] == "fp16",
        use_cpu=not settings["gpus"],
        deepspeed=deepspeed,
        parallelism_config=sequence_parallelism(settings),
        use_liger_kernel=liger,
        liger_kernel_config={"fused_linear_cross_entropy": True} if liger else None,
        # The stage pack has shuffled the sequences already, with a seed of its own.
        train_sampling_strategy="sequential",
        seed=settings["seed"],
        logging_steps=settings["logging_steps"],
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=settings["save_steps"],
        save_total_limit=settings["save_total_limit"],
        dataloader_num_workers=0,
        dataloader_drop_last=True,
        disable_tqdm=not sys.stderr.isatty(),
        report_to=settings["report_to"],
    )


def sequence_parallelism(settings: dict):
    """Return accelerate's ParallelismConfig for DeepSpeed Ulysses; None if sp_size is 1."""
    if settings["sp_size"] == 1:
        return None
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    return ParallelismConfig(
        sp_size=settings["sp_size"],
        sp_backend="deepspeed",
        sp_handler=DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation=settings["attention"]
        ),
    )


class Intervals(transformers.TrainerCallback):
    """Logs and saves at the intervals of the current settings.

    A checkpoint stores the intervals that it was saved with, and transformers would keep those.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the intervals from the arguments."""
        state.compute_steps(args, state.max_steps)


class Trainer(transformers.Trainer):
    """transformers' Trainer; ``guards`` see each step's loss and gradient before anything is saved.

    The guards run before ``callbacks``.
    """

    def __init__(self, *, guards: Guards, callbacks=(), **kwargs) -> None:
        super().__init__(callbacks=[Intervals(), guards, *callbacks], **kwargs)
        self.guards = guards

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return no batch once training is over; a run resumed at its end would train one more step."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            self.control.should_save = (
                False  # left over from the checkpoint, which is saved already
            )
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Train on a micro-batch, and show its loss to the guards."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except Exception as error:  # DeepSpeed has no class of its own for this error
            if "loss scale already at minimum" not in str(error):
                raise
            raise UserError(
                f"gradients overflow fp16 at every scale by step {self.state.global_step + 1}; set "
                "training.precision to bf16 or fp32"
            ) from None
        self.guards.saw_loss(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the norm of the step's gradient, after the guards have checked it.

        transformers calls this once per step: after DeepSpeed's step (which skips a gradient that is
        not finite, but reports that only under fp16) and before any other optimizer's.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        self.guards.check_step(
            self.state.global_step + 1, self._gradient_is_bad(model, norm), self.args.device
        )
        return norm

    def _gradient_is_bad(self, model, norm) -> bool:
        if self.args.fp16:
            return False  # fp16 finds its loss scale by letting gradients overflow and skipping the step
        if norm is None:
            # DeepSpeed's stage 0 in fp32 reports no norm and has stepped already: look at the weights.
            norm = torch.nn.utils.get_total_norm(p for p in model.parameters() if p.requires_grad)
        return not math.isfinite(norm)
