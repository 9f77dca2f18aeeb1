"""Prompts with equal beginnings: the same logits as reading each whole, with fewer tokens read."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from longyarn.evaluation import shared_prefixes

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 128,
    "initializer_range": 0.3,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
FULL = {
    "llama": LlamaConfig(**SIZES),
    "yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral without a window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
LAST = 4


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def trials() -> list[list[list[int]]]:
    """Batches of prompts that leave a common text at different places; the last shares nothing."""
    torch.manual_seed(1)
    common = torch.randint(50, (100,)).tolist()
    rest = lambda count: torch.randint(50, (count,)).tolist()  # noqa: E731
    return [
        [common[:20] + rest(30) for _ in range(3)],
        [common[:60] + rest(13)],
        [common[:60] + rest(40) for _ in range(2)],
        [common[:40] + rest(7) for _ in range(2)],
        [common],
        [rest(50)],
    ]


def whole(model, prompts: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(prompts), use_cache=False).logits[:, -LAST:]


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("piece", [16, 512])
def test_logits_equal_those_of_whole_prompts(name, piece, monkeypatch):
    monkeypatch.setattr(shared_prefixes, "PIECE", piece)
    model = make(FULL[name])
    reader = shared_prefixes.Reader(model)
    assert reader.obstacle is None
    for prompts in [*trials(), *reversed(trials())]:
        ours, expected = reader.logits(prompts, LAST), whole(model, prompts)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        assert torch.equal(ours.argmax(-1), expected.argmax(-1))


def tokens_read(model, reader, batches) -> int:
    """Return how many tokens the model reads for all batches."""
    count = 0

    def see(module, arguments, named):
        nonlocal count
        count += named["input_ids"].numel()

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    for prompts in batches:
        reader.logits(prompts, LAST)
    handle.remove()
    return count


def test_what_prompts_share_is_read_once():
    model = make(FULL["llama"])
    first, second, third = [0] * 50, [0] * 40 + [1] * 20, [0] * 40 + [2] * 20
    reader = shared_prefixes.Reader(model)
    assert tokens_read(model, reader, [[first]]) == 50
    assert tokens_read(model, reader, [[second, third]]) == 2 * 20
    assert tokens_read(model, reader, [[third]]) == 20
    assert tokens_read(model, reader, [[third]]) == LAST


@pytest.mark.parametrize("window", [16, 512])
def test_a_sliding_window_is_read_whole_and_says_so(window):
    model = make(MistralConfig(**SIZES, sliding_window=window))
    reader = shared_prefixes.Reader(model)
    assert "a DynamicSlidingWindowLayer, which cannot be cut back" in reader.obstacle
    for prompts in trials():
        torch.testing.assert_close(reader.logits(prompts, LAST), whole(model, prompts))
    assert tokens_read(model, reader, [[[0] * 50]] * 2) == 100


def test_code_that_came_with_a_model_is_read_whole():
    class Remote(type(make(FULL["llama"]))):
        """A class with the module name that transformers gives to remote code."""

    Remote.__module__ = "transformers_modules.owner.name"
    torch.manual_seed(0)
    assert "its code came with the model" in shared_prefixes.Reader(Remote(FULL["llama"])).obstacle
