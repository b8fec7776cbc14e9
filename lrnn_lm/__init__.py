"""A pretraining stack for language models built on linear recurrent networks."""
