"""The causal language-modeling loss over chunks of the sequence: in float32, never all logits at once.

The stock loss holds three float32 copies of the logits of every position: 12 bytes × vocabulary × length.
Here the output head itself gets the labels. It returns the sum of the cross entropies and computes the
gradients along the way, one chunk at a time, so the backward pass only scales them. It is still a call of
the head, because that is where ZeRO-3 gathers the head's weight. DeepSpeed's TiledFusedLogitsLoss would not
do: it adds up the head's gradient during the forward pass, before the loss is divided by its count.
"""

import functools
import types

import torch

from longyarn.config.derived import LOSS_CHUNK
from longyarn.core.errors import UserError
from longyarn.data.packed_dataset import IGNORED
from longyarn.models.logits import after_the_head


class SummedCrossEntropy(torch.autograd.Function):
    """The sum of the cross entropies of ``hidden @ weight.T + bias`` at the labels, float32 ().

    ``hidden``: (positions, hidden_size). ``labels``: (positions,); a label of ``IGNORED`` is not scored.
    ``chunk``: positions at a time. The gradient of a position's logits is softmax minus one-hot.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk, with_gradients):
        """Return the sum, and keep the gradients of the inputs that need them."""
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if wanted[0] else None
        # These are sums over chunks, so they are in float32 whatever the model's type is.
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        for begin in range(0, len(hidden), chunk):
            part, target = hidden[begin : begin + chunk], labels[begin : begin + chunk, None]
            scored = target != IGNORED
            target = target.masked_fill(~scored, 0)
            logits = torch.nn.functional.linear(part, weight, bias).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += (normaliser - logits.gather(1, target)).masked_fill(~scored, 0).sum()
            if not any(wanted):
                continue
            slope = logits.sub_(normaliser).exp_()
            slope.scatter_add_(1, target, -torch.ones_like(normaliser)).mul_(scored)
            if wanted[2]:
                of_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            if wanted[0]:
                torch.mm(slope, weight, out=of_hidden[begin : begin + chunk])
            if wanted[1]:
                of_weight += slope.T @ part
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    def backward(ctx, scale):
        """Return the kept gradients, scaled by the gradient of the sum."""
        gradients = (
            None if gradient is None else (gradient * scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        )
        return *gradients, None, None, None


def attach(model, chunk: int = LOSS_CHUNK) -> None:
    """Make a transformers causal language model compute its loss over chunks whenever labels are passed.

    Its output then has no logits, only the loss. Without labels nothing changes. Attach a PEFT adapter
    before, because PEFT may train its own copy of the head. Raises ``UserError`` for a model that changes
    its logits after the head.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    for key in after_the_head(model.config.get_text_config()):
        raise UserError(
            f"the model's {key} changes its logits, which training.loss chunked does not support; set stock"
        )
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        head = head.modules_to_save["default"]
    plain_model, plain_head = model.forward, type(head).forward
    labels_at_hand: list[torch.Tensor] = []

    @functools.wraps(plain_model)
    def forward(*args, labels=None, **kwargs):
        if labels is None:
            return plain_model(*args, **kwargs)
        labels_at_hand.append(next_tokens(labels, kwargs.get("shift_labels")))
        try:
            return plain_model(*args, labels=labels, **kwargs)
        finally:
            labels_at_hand.clear()

    def head_forward(self, hidden):
        if not labels_at_hand:
            return plain_head(self, hidden)
        labels = labels_at_hand[0].reshape(-1).to(hidden.device)
        return SummedCrossEntropy.apply(
            hidden.reshape(len(labels), -1), self.weight, self.bias, labels, chunk,
            torch.is_grad_enabled(),
        )  # fmt: skip

    model.forward = forward
    head.forward = types.MethodType(head_forward, head)
    model.loss_function = normalise


def next_tokens(labels, shift_labels=None):
    """Return the label of each position, the next token: (batch, length), ``IGNORED`` at the end."""
    if shift_labels is not None:  # sequence parallelism shifts them before it splits the sequence
        return shift_labels
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def normalise(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **_):
    """Return the mean loss from the sum that the head returned, which transformers passes as ``logits``.

    ``num_items_in_batch``: the number of labels in the whole accumulated batch, as the Trainer counts it.
    """
    if logits.ndim:
        raise RuntimeError(
            "the chunked loss got logits: the model uses another head than the one it changed"
        )
    if num_items_in_batch is not None:
        # A batch may have no label at all: part of a conversation without an answer.
        return logits / max(num_items_in_batch, 1)
    return logits / (next_tokens(labels, shift_labels) != IGNORED).sum().clamp(min=1)
