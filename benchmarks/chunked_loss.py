"""Peak memory of one training step at 32,768 tokens with a vocabulary of 32,000, chunked against stock loss.

Each loss runs in its own process, on a model so small that nearly all memory is logits. The figure is how
much the step raises the process's peak resident memory. Prints JSON.
"""

import json
import resource
import subprocess
import sys

import paths  # noqa: F401

LENGTH, VOCABULARY = 32768, 32000


def step(kind: str) -> int:
    """Return how many bytes a forward and backward pass with this loss adds to the peak."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from longyarn.training import chunked_loss

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if kind == "chunked":
        chunked_loss.attach(model)
    tokens = torch.randint(VOCABULARY, (1, LENGTH))
    positions = torch.arange(LENGTH)[None]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model(input_ids=tokens, position_ids=positions, labels=tokens, use_cache=False).loss.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure() -> dict:
    """Return the bytes of both losses and their ratio."""
    found = {}
    for name, kind in (("ours", "chunked"), ("other", "stock")):
        command = [sys.executable, __file__, kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = int(done.stdout)
    return found | {"ratio": found["ours"] / found["other"]}


if __name__ == "__main__":
    print(step(sys.argv[1]) if len(sys.argv) > 1 else json.dumps(measure()))
