"""Windows over documents: which tokens each window scores, their losses, and the memory used."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from stages import MICRO_BASE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from longyarn.core.errors import UserError
from longyarn.data import python_packages
from longyarn.evaluation import window_losses as module
from longyarn.evaluation.window_losses import Window, batches, window_losses, windows
from longyarn.models.logits import check_logits


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def naive(model, ids, length, stride):
    """Compute each loss in its own forward pass, with exactly the context that its window gives."""
    losses = np.full(len(ids), np.nan)
    begin = 0
    while begin < len(ids):
        end = min(begin + length, len(ids))
        for at in range(begin + 1, end):
            if np.isnan(losses[at]):
                with torch.no_grad():
                    logits = model(torch.tensor([ids[begin:at].tolist()])).logits[0, -1]
                losses[at] = -torch.log_softmax(logits.double(), -1)[ids[at]]
        if end == len(ids):
            break
        begin += stride or length
    return losses[~np.isnan(losses)]


@pytest.mark.parametrize("at_once", [8, 64], ids=["alone", "batched"])
@pytest.mark.parametrize(("length", "stride"), [(8, None), (32, None), (16, 4), (8, 3), (12, 5)])
def test_losses_equal_the_direct_computation(model, length, stride, at_once, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", at_once)
    generator = np.random.default_rng(0)
    texts = {
        name: generator.integers(0, 50, size=size).astype(np.int32)
        for name, size in (("a", 64), ("b", 37))
    }
    found = window_losses(model, texts, length, stride, "test")
    for name, ids in texts.items():
        losses = np.concatenate(found[name])
        np.testing.assert_allclose(losses, naive(model, ids, length, stride), atol=1e-5)
        assert len(losses) == len(ids) - (1 if stride else -(-len(ids) // length))


def of_family(family: str, **settings):
    """Return a small random model of a family that changes its logits after the output head."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64, "head_dim": 16,
        "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    made = AutoConfig.for_model(family, **sizes | settings)
    return AutoModelForCausalLM.from_config(made).eval()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_logits_are_the_models_own(family, settings):
    changed = of_family(family, **settings)
    check_logits(changed)
    ids = np.arange(40, dtype=np.int32)
    found = np.concatenate(window_losses(changed, {"a": ids}, 40, None, "test")["a"])
    with torch.no_grad():
        logits = changed(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.arange(1, 40), reduction="none")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_else_a_model_does_to_its_logits_is_refused(model, monkeypatch):
    own = type(model).forward

    def forward(self, *given, **named):
        output = own(self, *given, **named)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UserError, match="changes its logits after the output head"):
        check_logits(model)


def test_windows_of_equal_length_share_a_forward_pass(monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 16)
    every = [
        *windows("a", 21, 8), *windows("b", 16, 8), *windows("c", 32, 32)
    ]  # fmt: skip
    groups = batches(every)
    assert [window for group in groups for window in group] == every
    assert [[window.length for window in group] for group in groups] == [[8, 8], [5], [8, 8], [32]]
    assert windows("a", 21, 8, 5)[-1] == Window("a", 15, 21, 18)


def extended(length: int, dtype: torch.dtype):
    """Return the micro base with YaRN to a length."""
    config = AutoConfig.from_pretrained(MICRO_BASE)
    config.rope_parameters = config.rope_parameters | {
        "rope_type": "yarn", "factor": length / 512, "original_max_position_embeddings": 512,
    }  # fmt: skip
    config.max_position_embeddings = length
    return AutoModelForCausalLM.from_pretrained(MICRO_BASE, config=config, dtype=dtype).eval()


def held_out_tokens() -> dict[str, np.ndarray]:
    """Return the first 8,192 tokens of each held-out book of the test configuration."""
    corpus = yaml.safe_load((ROOT / "tests" / "config.yaml").read_text())["corpus"]
    (package,) = corpus["packages"]
    rules = [{"format": "text", "exclude": []} | rule for rule in package["documents"]]
    books = python_packages.read(package | {"documents": rules}, ROOT / ".cache" / "packages")
    texts = {book["id"]: book["text"] for book in books if book["id"] in corpus["held_out"]}
    tokenizer = AutoTokenizer.from_pretrained(MICRO_BASE)
    return {
        name: np.asarray(tokenizer(text)["input_ids"][:8192], np.int32)
        for name, text in texts.items()
    }


def test_bf16_and_float32_agree_to_a_thousandth():
    texts = held_out_tokens()
    assert [len(tokens) for tokens in texts.values()] == [8192, 8192]
    means = []
    for dtype in (torch.float32, torch.bfloat16):
        losses = window_losses(extended(4096, dtype), texts, 4096, None, "test")
        means.append(np.concatenate([part for parts in losses.values() for part in parts]).mean())
    assert np.exp(means[1] - means[0]) == pytest.approx(1, abs=1e-3)


PEAK = """
import json, resource, sys
sys.path[:0] = sys.argv[1:3]
import numpy as np, torch
from longyarn.evaluation.window_losses import window_losses
from test_windows import extended

length = int(sys.argv[3])
model = extended(length, torch.float32)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ids = np.random.default_rng(0).integers(2048, size=length, dtype=np.int32)
window_losses(model, {"warm": ids[:64]}, 64, None, "test")
before = peak()
(losses,) = window_losses(model, {"long": ids}, length, None, "test")["long"]
print(json.dumps([len(losses), peak() - before]))
"""


def test_the_memory_of_a_long_window_is_less_than_its_logits():
    """A window of 32,768 tokens never holds all logits, attention scores or caches at once."""
    length, vocabulary = 32768, 2048
    command = [sys.executable, "-c", PEAK, ROOT / "tests", ROOT / "scripts", str(length)]
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(2**20)
    }  # return freed memory to the system
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    scored, grown = json.loads(done.stdout)
    assert scored == length - 1
    assert grown < 4 * length * vocabulary
