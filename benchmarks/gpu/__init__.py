"""What is measured on a GPU by a script of its own."""
