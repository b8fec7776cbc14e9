"""Fine-tune a checkpoint on chats with TRL, with a loss on the assistant's words only.

    python examples/finetune.py runs/demo/checkpoints/latest chats.jsonl runs/chat

A line of chats.jsonl is a chat:
{"messages": [{"role": "user", "content": ".."}, {"role": "assistant", "content": ".."}]}

The folder that it writes loads without lrnn-lm, and `transformers serve` answers chats with it.
Needs `pip install 'lrnn-lm[finetune]'`. On several GPUs: `accelerate launch examples/finetune.py ..`.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lrnn_lm.model.export import write_remote_code
from lrnn_lm.recipe import shipped

# How rows are filled. In each of them an example has the logits and the loss that it has alone.
WAYS = {
    "packed": {"packing": True},  # several chats a row of `--length` tokens
    "padding-free": {"padding_free": True, "max_length": None},  # a batch is one row, as long as its chats
    "padded": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("chats", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--way", choices=WAYS, default="packed")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row; longer chats are cut")
    parser.add_argument("--rows", type=int, default=8, help="rows a step and device (padding-free: chats)")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    tokenizer.chat_template = shipped("tokenizers/chat.jinja").read_text()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chats = [json.loads(line) for line in options.chats.read_text(encoding="utf-8").splitlines()]
    on_gpu = torch.cuda.is_available()
    settings = SFTConfig(
        output_dir=str(options.output),
        **{"max_length": options.length, **WAYS[options.way]},
        assistant_only_loss=True,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.rows,
        learning_rate=options.lr,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
        logging_steps=10,
        report_to=[],
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.checkpoint),
        args=settings,
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # and the tokenizer, with its chat template
    if not trainer.is_world_process_zero():
        return
    write_remote_code(options.output)
    prompt = tokenizer.apply_chat_template(
        chats[0]["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    written = model.generate(**prompt.to(model.device), max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{options.output} answers {chats[0]['messages'][0]['content']!r} with {answer!r}")


if __name__ == "__main__":
    main()
