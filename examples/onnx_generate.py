"""Writes text with an ONNX export of a checkpoint: onnxruntime, tokenizers and numpy, no PyTorch.

lrnn export runs/demo/checkpoints/latest demo-onnx --format onnx
python examples/onnx_generate.py demo-onnx "Return the" 40
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from tokenizers import Tokenizer

folder, prompt, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
facts = json.loads((folder / "onnx.json").read_text())
graphs = {name: InferenceSession(folder / f"{name}.onnx") for name in ("prefill", "token")}
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
ids = [facts["bos_token_id"], *tokenizer.encode(prompt, add_special_tokens=False).ids]
states = [np.zeros((1, *shape), np.float32) for shape in facts["states"]]

done = 0
while count > 0 and ids[-1] != facts["eos_token_id"]:
    name = "prefill" if len(ids) - done >= facts["prefill"] else "token"
    part = ids[done : done + (facts["prefill"] if name == "prefill" else 1)]
    names = [given.name for given in graphs[name].get_inputs()]
    logits, *states = graphs[name].run(None, dict(zip(names, [np.array([part]), *states], strict=True)))
    done += len(part)
    if done == len(ids):
        ids.append(int(logits[0, -1].argmax()))  # the likeliest next token
        count -= 1
print(tokenizer.decode(ids, skip_special_tokens=True))
