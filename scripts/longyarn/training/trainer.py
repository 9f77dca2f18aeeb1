"""transformers' Trainer, which shows each step to the guards and knows when a resumed run is over."""

import math

import torch
import transformers

from longyarn.core.errors import UserError
from longyarn.training.guards import Guards


class Intervals(transformers.TrainerCallback):
    """Logs and saves as often as the settings say.

    A checkpoint brings along the intervals of the settings that it was made with, and transformers
    would go on with those.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Take the intervals from the arguments."""
        state.compute_steps(args, state.max_steps)


class Trainer(transformers.Trainer):
    """transformers' Trainer; ``guards`` see each step's loss and gradient before anything is saved.

    They come before ``callbacks``.
    """

    def __init__(self, *, guards: Guards, callbacks=(), **kwargs) -> None:
        super().__init__(callbacks=[Intervals(), guards, *callbacks], **kwargs)
        self.guards = guards

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Give no batch once training is over, or a run resumed at its end would train a step more."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            self.control.should_save = False  # left over from the checkpoint, which has been saved
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Train on a micro-batch, and show its loss to the guards."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except Exception as error:  # DeepSpeed raises nothing more special
            if "loss scale already at minimum" not in str(error):
                raise
            raise UserError(
                f"gradients overflow fp16 at every scale by step {self.state.global_step + 1}; set "
                "training.precision to bf16 or fp32"
            ) from None
        self.guards.saw_loss(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Return the norm of the step's gradient, once the guards have seen it.

        Called once a step, after DeepSpeed has stepped (it skips a step whose gradient is not finite,
        but says so only under fp16) and before any other optimiser does.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        self.guards.check_step(
            self.state.global_step + 1, self._gradient_is_bad(model, norm), self.args.device
        )
        return norm

    def _gradient_is_bad(self, model, norm) -> bool:
        if self.args.fp16:
            return False  # its loss scale is found by letting gradients overflow, and skipping the step
        if norm is None:
            # DeepSpeed's stage 0 in fp32 tells no norm and has stepped, so the weights tell.
            norm = torch.nn.utils.get_total_norm(p for p in model.parameters() if p.requires_grad)
        return not math.isfinite(norm)
