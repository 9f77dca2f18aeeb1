"""Attention within documents: what a dense mask gives, for every family, without the mask."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from longyarn.core.errors import UserError
from longyarn.training import document_attention

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, grouped": LlamaConfig(**SIZES, num_key_value_heads=2),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
# The first sequence holds three documents, the second is one.
LENGTHS = [[5, 1, 18], [24]]
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_under_a_dense_mask(family, again):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa").train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(97, POSITIONS.shape)
    found = {}
    for name in ("sdpa", document_attention.NAME):
        model.set_attn_implementation(name)
        model.zero_grad()
        loss = model(
            input_ids=tokens, position_ids=POSITIONS.clone(), labels=tokens, use_cache=False
        ).loss
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[name] = loss.detach(), gradients
    for ours, dense in zip(found[document_attention.NAME], found["sdpa"], strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


def test_a_sliding_window_below_a_document_is_refused():
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=document_attention.NAME)
    tokens = torch.zeros_like(POSITIONS)
    with pytest.raises(UserError, match="sliding window of 8 tokens"):
        model(input_ids=tokens, position_ids=POSITIONS.clone(), use_cache=False)


def test_the_documents_of_a_sequence():
    assert document_attention.document_lengths(POSITIONS.clone()) == LENGTHS
    assert document_attention.document_lengths(torch.arange(7)[None] + 3) == [[7]]


def test_a_model_that_gives_no_positions_is_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"], attn_implementation="sdpa")
    part = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UserError, match="of type llama does not pass its attention"):
        document_attention.forward(model, part, part, part, None)
