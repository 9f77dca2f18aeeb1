"""Measuring a variant: losses over windows, passkey prompts, and confidence intervals."""
