"""Evaluating a variant: perplexity, passkey retrieval, tasks of lm_eval, and confidence intervals."""
