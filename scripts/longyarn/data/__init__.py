"""The corpus: documents, tokens, and packed training sequences."""
