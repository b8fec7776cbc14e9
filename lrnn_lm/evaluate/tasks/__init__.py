"""The tasks that need no network, as lm-eval loads them, and the names of all tasks."""
