"""What is made of finished runs: tables, pictures, the model card."""
