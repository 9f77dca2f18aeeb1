"""Continued pre-training with transformers' Trainer and DeepSpeed, and the guards around it."""
