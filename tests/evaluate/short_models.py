"""Small models of this project trained at 16 tokens, and what they score by hand."""

import torch

from lrnn_lm import LRNNConfig, LRNNForCausalLM

WINDOW = 16
RECURRENT = {"type": "bd_lru", "num_blocks": 4, "block_size": 2}
HYBRID = [RECURRENT, {"type": "attention", "num_heads": 2}]
LONG = " she carried two buckets and a rope" * 12


def build(tokenizer, **settings):
    torch.manual_seed(0)
    config = LRNNConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3,
        **{"max_position_embeddings": WINDOW, **settings},
    )  # fmt: skip
    return LRNNForCausalLM(config).eval()


def by_hand(model, ids, asked):
    """Log-likelihood of the last `asked` ids after the others, and whether they are the greedy ones."""
    with torch.no_grad():
        logprobs = model(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)[-asked:]
    answer = torch.tensor(ids[-asked:])
    return float(logprobs.gather(1, answer[:, None]).sum()), bool((logprobs.argmax(-1) == answer).all())


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)
