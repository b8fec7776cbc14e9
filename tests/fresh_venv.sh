#!/usr/bin/env bash
# Shows that an exported checkpoint needs nothing of this package: a virtual environment with torch,
# transformers and lm-eval alone loads it, writes text and scores it on held-out documents.
#
#     tests/fresh_venv.sh CHECKPOINT ENVIRONMENT
#
# CHECKPOINT: a checkpoint folder of a run. ENVIRONMENT: the folder of the virtual environment; `make test-fresh`
# makes a new one. LRNN: the command line that exports (.venv/bin/lrnn).
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
checkpoint=$(realpath "$1") environment=$(realpath "$2")
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
heldout=$(dirname "$(dirname "$checkpoint")")/heldout.jsonl
[ -f "$heldout" ] || { echo "$heldout is missing: give a checkpoint of a run"; exit 2; }
step() { printf '\n== %s\n' "$*"; }

step "export"
${LRNN:-$here/.venv/bin/lrnn} export "$checkpoint" "$work/model"

step "the environment"
python=$environment/bin/python
unset PYTHONDONTWRITEBYTECODE # Python compiles what it imports, and keeps that
# From here on nothing of the repository is in reach: another folder, no PYTHONPATH, no network, caches of its own.
unset PYTHONPATH
export HF_HOME=$work/hf HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
cd "$work"
"$python" - <<'PYTHON'
import importlib.metadata, importlib.util, sys
assert importlib.util.find_spec("lrnn_lm") is None, "lrnn_lm is installed here"
print(sys.version.split()[0], *(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "lm_eval")))
print("lrnn_lm: absent; triton:", "there" if importlib.util.find_spec("triton") else "absent")
PYTHON

step "load and generate"
cd model # as the model card has it: folder = "."
"$python" - <<'PYTHON'
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
print(type(model), f"{model.num_parameters():,} parameters")
inputs = tokenizer("Return the", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))
PYTHON
cd ..

step "lm_eval"
# The tasks are YAML files and one module of functions, which the repository's copy takes from the package.
cp -r "$here/eval/tasks/heldout" tasks
cp "$here/lrnn_lm/evaluate/tasks/heldout.py" tasks/functions.py
cp "$heldout" heldout.jsonl
score() { # TASK MODEL_ARGUMENT: the table, and lm-eval's log if it fails
    "$environment/bin/lm_eval" --model hf --device "${DEVICE:-cpu}" --batch_size 8 \
        --model_args "pretrained=model,trust_remote_code=True$2" \
        --include_path tasks --tasks "$1" --metadata '{"data": "heldout.jsonl"}' \
        --output_path scores 2> lm_eval.log || { cat lm_eval.log; exit 1; }
}
# Documents began with BOS in training. Of itself lm-eval puts it before a whole document, not before a context.
score heldout_bits_per_byte ""
score heldout_cloze ",add_bos_token=True"
ls scores/*
step "done"
