"""Document masks without a mask tensor: each document of a packed sequence attends only within itself.

transformers' sdpa hides documents from one another with a dense mask of all pairs of positions. At 32k it
takes 1 GiB, and the kernel computes the hidden pairs too, even the half that causality hides. Here the same
kernel is called once per document, causal, so that no hidden pair is computed.
"""

from itertools import pairwise

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from longyarn.core.errors import UserError

NAME = "sdpa_by_document"  # the attn_implementation


def forward(module, query, key, value, attention_mask, *, position_ids=None, **kwargs):
    """Return ``(output, None)`` as transformers' sdpa does, output (batch, length, heads, head_dim).

    ``query``: (batch, heads, length, head_dim). ``position_ids``: (batch, length), or (1, length) for all
    sequences; 0 where a document begins. Raises ``UserError`` for a model whose documents it cannot see, or
    that attends within a shorter sliding window.
    """
    if attention_mask is not None or position_ids is None:
        raise UserError(
            f"a model of type {module.config.model_type} does not pass its attention the beginnings of "
            "documents; set training.attention to eager, or mix.document_masks to false"
        )
    found = document_lengths(position_ids)
    window = kwargs.get("sliding_window")
    if window and window < max(max(lengths) for lengths in found):
        raise UserError(
            f"the model attends within a sliding window of {window} tokens, which training.attention sdpa "
            "does not support with mix.document_masks; set eager, or rope.sliding_window to full"
        )
    rows = [slice(row, row + 1) for row in range(len(found))] if len(found) > 1 else [slice(None)]
    outputs = []
    for row, lengths in zip(rows, found, strict=True):
        parts = zip(
            *(tensor[row].split(lengths, dim=2) for tensor in (query, key, value)), strict=True
        )
        outputs.append(
            _joined(
                [
                    sdpa_attention_forward(module, *part, None, is_causal=True, **kwargs)[0]
                    for part in parts
                ],
                dim=1,
            )
        )
    return _joined(outputs, dim=0), None


def document_lengths(position_ids: torch.Tensor) -> list[list[int]]:
    """Return the lengths of each sequence's documents.

    All layers get the same tensor, so the lengths are kept on it: reading them from a GPU makes it wait.
    """
    if not hasattr(position_ids, "document_lengths"):
        begins = [(row == 0).nonzero().flatten().tolist() for row in position_ids]
        edges = [sorted({0, *row, position_ids.shape[1]}) for row in begins]
        position_ids.document_lengths = [
            [end - begin for begin, end in pairwise(row)] for row in edges
        ]
    return position_ids.document_lengths


def _joined(tensors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


AttentionInterface.register(NAME, forward)
