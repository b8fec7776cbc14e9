"""The project's own model through the harness: documents read from BOS, text generated from a checkpoint."""

import math

import pytest
import torch
from short_models import RECURRENT, build

from lrnn_lm.evaluate import evaluate, generate
from lrnn_lm.evaluate.tasks import heldout


@pytest.fixture(scope="module")
def lrnn(make_run, tokenizer):
    """The checkpoint of a run with a tiny random LRNN."""
    return make_run("lrnn", 3, build(tokenizer, mixer=RECURRENT, max_position_embeddings=512))


def test_scores_equal_direct_log_softmax_from_bos(lrnn, documents, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lrnn)
    out = evaluate(lrnn, ["heldout_bits_per_byte", "heldout_cloze"], device="cpu", batch_size=3)

    def nats(text, skipped=0):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return -sum(logprobs[i - 1, ids[i]].item() for i in range(1 + skipped, len(ids)))

    bits = sum(nats(text) for text in documents) / math.log(2) / len("".join(documents).encode())
    scores = out["results"]
    assert scores["heldout_bits_per_byte"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    rows = heldout.cloze_dataset(pretrained=str(lrnn))["test"]
    words = [
        nats(row["context"] + row["answer"], len(tokenizer.encode(row["context"], add_special_tokens=False)))
        for row in rows
    ]
    perplexity = math.exp(sum(words) / len(words))
    assert scores["heldout_cloze"]["perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    assert out["settings"]["max_length"] == 512
    assert out["settings"]["truncated_requests"] == 0


def test_text_comes_from_a_run(lrnn, capsys):
    text = generate(lrnn, "The river", max_new_tokens=6, seed=0, device="cpu")
    assert text.startswith("The river")
    assert capsys.readouterr().out == text + "\n"
