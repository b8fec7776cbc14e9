"""The tables and pictures of the documentation, made from the rows in docs/results."""
