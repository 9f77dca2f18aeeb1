"""Computes a model's logits from its hidden states, with the extra step of some model families."""

from longyarn.core.errors import UserError

# Settings of Granite, Cohere and Gemma: the value that has no effect, and the effect of another one.
AFTER_THE_HEAD = {
    "logits_scaling": (1, lambda logits, value: logits / value),
    "logit_scale": (1, lambda logits, value: logits * value),
    "final_logit_softcapping": (None, lambda logits, value: (logits / value).tanh() * value),
}


def after_the_head(config) -> dict[str, float]:
    """Return the settings, with values, by which a model changes its logits after the output head."""
    values = {key: getattr(config, key, None) for key in AFTER_THE_HEAD}
    return {k: v for k, v in values.items() if v not in (None, AFTER_THE_HEAD[k][0])}


def logits(model, states):
    """Return the model's logits (…, vocab_size) of hidden states (…, hidden_size), in float32."""
    found = model.get_output_embeddings()(states).float()
    for key, value in after_the_head(model.config.get_text_config()).items():
        found = AFTER_THE_HEAD[key][1](found, value)
    return found


def check_logits(model) -> None:
    """Stop if the model changes its logits in a way that ``logits`` does not know."""
    import torch

    tokens = torch.arange(1, 17, device=model.device)[None]
    with torch.inference_mode():
        own = model(input_ids=tokens, use_cache=False).logits.float()
        states = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        found = logits(model, states).to(own.device)
    if not torch.allclose(found, own, rtol=0.02, atol=0.02 * float(own.abs().max())):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head in a way that Longyarn does "
            "not know, so its perplexity would be wrong; choose another model"
        )
