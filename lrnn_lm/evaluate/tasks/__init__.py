"""The project's own lm-eval tasks, which need no network, and the names of all tasks."""
