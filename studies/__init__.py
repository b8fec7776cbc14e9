"""Experiments behind the project's choices: each is one command that continues where it was stopped."""
