# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
# pip is told not to compile every module, which takes a minute. `lrnn info` compiles what commands import; Python must keep that.
unexport PYTHONDONTWRITEBYTECODE
PIP := -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# A new environment with a new pip: that of Python 3.11 takes 30 s longer to find the versions.
environment = $(PYTHON) -m venv $(1) && $(1)/bin/python $(PIP) pip

.PHONY: install demo test test-all test-fresh test-slurm test-torchao lint site clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	$(call environment,.venv)
	$(BIN)/python $(PIP) --editable '.[all,dev,onnx,site,tensorboard]'
	@$(BIN)/lrnn info recipes/demo.yaml > /dev/null
	@touch $@

demo: install
	$(BIN)/lrnn info recipes/demo.yaml
	$(BIN)/lrnn prepare recipes/demo.yaml
	$(BIN)/lrnn train recipes/demo.yaml
	$(BIN)/lrnn report runs/demo
	$(BIN)/lrnn generate runs/demo/checkpoints/latest --prompt "Return the" --max-new-tokens 60 --seed 0

# Three processes for two cores (tests/conftest.py), four at most: a process holds up to 1 GB. Those that are done
# take tests from the others.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
test: install
	$(PYTEST) -m "not slow"

# The wide sweeps too (marked slow): every model through every case. Before a release, or after a change to many mixers.
test-all: install
	$(PYTEST)

# An exported checkpoint in a new environment that has torch, transformers and lm-eval but not this package.
test-fresh: install build/fresh/.installed
	$(BIN)/lrnn train recipes/demo.yaml name=fresh train.tokens=8K eval.tasks=[]
	tests/fresh_venv.sh runs/fresh/checkpoints/latest build/fresh
	rm -r build/fresh

build/fresh/.installed: constraints.txt
	$(call environment,build/fresh)
	build/fresh/bin/python $(PIP) torch transformers lm-eval accelerate
	@touch $@

# 8-bit AdamW and integer weights. torchao is not in .venv, as transformers would import it in every command: 0.8 s and two
# lines about libraries that it does not find.
test-torchao: install build/torchao/.installed
	PYTHONPATH=build/torchao $(BIN)/python -c "import torchao"
	PYTHONPATH=build/torchao $(BIN)/python -m pytest -m "not slow" -k "8_bit or 8bit or int8 or integers" \
		tests/train/test_train_optimizers.py tests/export/test_export_folder.py tests/hf/test_hf_training.py

build/torchao/.installed: constraints.txt | .venv/.installed
	$(BIN)/python $(PIP) --no-deps --upgrade --target build/torchao torchao
	@touch $@

# `lrnn submit` on a SLURM of this machine alone, installed if root and apt-get are there; else skipped, saying why.
test-slurm: install
	$(BIN)/python -m pytest -rs tests/slurm/jobs.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The documentation in build/site; a broken link is an error.
site: install
	$(BIN)/python -m sphinx -q -W --keep-going -c site docs build/site

clean:
	rm -rf .venv build dist *.egg-info
