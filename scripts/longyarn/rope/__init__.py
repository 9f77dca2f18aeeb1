"""RoPE: its settings, its frequencies, and its extension to a longer context."""
