"""A run on disk: the names inside its folder, its checkpoints, and loading one of them as a model."""
