"""Continued pre-training with transformers' Trainer and DeepSpeed, and exports to other trainers."""
