"""Reading prompts with equal beginnings: keys and values of a shared beginning are computed once.

In a causal model with static RoPE, a token's keys and values depend only on the tokens up to it. So a
prompt can reuse them up to the first token where it differs from the prompt read before it.
"""

import copy
import itertools

# Tokens of each prompt in a forward pass. The mask has a column for every earlier token.
PIECE = 512


class Reader:
    """Reads prompts with a model, and keeps the keys and values of each prompt for the next.

    RoPE must not depend on the length of the input; patch_rope refuses models whose RoPE does.
    """

    def __init__(self, model) -> None:
        from transformers import DynamicCache

        self.model = model
        self.obstacle = obstacle(model)
        self.cache = None if self.obstacle else DynamicCache(config=model.config)
        self.tokens: list[int] = []

    def logits(self, prompts: list[list[int]], last: int):
        """Return the logits at each prompt's ``last`` positions, (prompts, last, vocabulary).

        The prompts must have equal lengths. Several prompts get copies of the cache of their shared
        beginning. A single prompt extends the cache itself, which is cropped before the next one.
        """
        import torch

        rows = torch.tensor(prompts, device=self.model.device)
        with torch.inference_mode():
            if self.obstacle:
                return self.model(input_ids=rows, use_cache=False, logits_to_keep=last).logits
            shared = min(common_length(prompts), rows.shape[1] - last)
            self._read(prompts[0][:shared], rows[:1])
            cache = self.cache
            if len(prompts) > 1:
                cache = copy.deepcopy(cache)
                cache.batch_repeat_interleave(len(prompts))
            return self._forward(rows[:, shared:], cache, last)

    def _read(self, tokens: list[int], row) -> None:
        """Make the cache hold exactly these tokens, the first of ``row``; keep what it has of them."""
        known = common_length([self.tokens, tokens])
        self.cache.crop(known - self.cache.get_seq_length())
        if known < len(tokens):
            self._forward(row[:, known : len(tokens)], self.cache, 1)
        self.tokens = tokens

    def _forward(self, rows, cache, last: int):
        """Return the logits at the ``last`` of these tokens, which follow the tokens in the cache."""
        whole, rest = divmod(rows.shape[1], PIECE)
        # The short piece comes first, so that the last piece has all the positions that are asked for.
        sizes = [rest] * (rest > 0) + [PIECE] * whole
        for piece in rows.split(sizes, dim=1):
            logits = self.model(
                input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=last
            ).logits
        return logits


def obstacle(model) -> str | None:
    """Return why a model cannot reuse the beginning of a prompt, or None if it can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if not type(model).__module__.startswith("transformers."):
        return "its code came with the model, and may keep more than keys and values"
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    # Other layers, such as a sliding window or a recurrent state, forget what a crop would need.
    others = sorted(kind.__name__ for kind in kinds - {DynamicLayer})
    return f"its cache has a {others[0]}, which cannot be cut back" if others else None


def common_length(sequences: list[list[int]]) -> int:
    """Return how many tokens at the beginning all sequences share."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
