"""Pretraining on Accelerate: assembly, the loop, exact checkpoints."""
