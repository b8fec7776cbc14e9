"""Experiments behind the project's choices; each is a command that goes on where it was stopped."""
