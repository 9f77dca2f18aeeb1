"""What the stages share: configuration, manifests, RoPE, packing, models, statistics."""
