# The doorway; the README shows the plain commands behind each target.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The CPU build of torch, taken on Linux machines without an NVIDIA driver; others get PyPI's build.
TORCH_CPU ?= 2.13.0+cpu
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

QUICKSTART ?= quickstart
QUICKSTART_CORPUS ?= $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_path('stdlib'))")
QUICKSTART_OVERRIDES ?=
QUICKSTART_EXCLUDE := --exclude site-packages --exclude dist-packages --exclude test --exclude tests \
	--exclude idlelib --exclude lib2to3

.PHONY: install quickstart test test-all lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if [ "$$(uname -s)" = Linux ] && [ ! -e /dev/nvidiactl ] && ! $(BIN)/python -c "import torch" 2>/dev/null; then \
		$(BIN)/pip install -q "torch==$(TORCH_CPU)" \
		|| $(BIN)/pip install -q "torch==$(TORCH_CPU)" --extra-index-url $(TORCH_CPU_INDEX); \
	fi
	$(BIN)/pip install -q -e '.[test]'
	$(BIN)/python tools/doctor.py --list
	touch $@

quickstart: install
	$(BIN)/python tools/train_tokenizer.py $(QUICKSTART_CORPUS) $(QUICKSTART_EXCLUDE) \
		--vocab-size 4096 --output data/$(QUICKSTART)/tokenizer.json
	$(BIN)/python data_prep/tokenize.py $(QUICKSTART_CORPUS) $(QUICKSTART_EXCLUDE) \
		--tokenizer data/$(QUICKSTART)/tokenizer.json --output data/$(QUICKSTART)/shards \
		--config configs/quickstart.yaml
	$(BIN)/deepspeed --num_gpus 2 launch/train.py --config configs/quickstart.yaml $(QUICKSTART_OVERRIDES)
	$(BIN)/python tools/evaluate.py runs/$(QUICKSTART) --baselines --max-sequences 64
	$(BIN)/python tools/generate.py runs/$(QUICKSTART) --prompt "def " --max-new-tokens 120 --temperature 0.8

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests that start no ranks share the cores; each of the others has them to itself.
SHARING := $(addprefix tests/,checkpoint config data inference model ops telemetry)

test: install
	$(BIN)/python -m pytest -n logical --dist loadfile $(SHARING)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(SHARING))

test-all: install
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 1800

clean:
	rm -rf $(VENV) data runs
