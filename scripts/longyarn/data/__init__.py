"""The corpus: reading documents, turning them into tokens, and packing tokens into sequences."""
