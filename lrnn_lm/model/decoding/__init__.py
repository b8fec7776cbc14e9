"""Text from a model: prompts read in segments, one fast step a token, and `generate`'s loop around it."""
