"""Makes the tables and plots of the documentation from the rows in docs/results."""
