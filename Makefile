# `make demo` converts a speech model and recovers it on this machine, `make test` runs all tests. Both make their own environment first.
# Needed: Python 3.10 or newer with venv, and make.
PYTHON   ?= python3
VENV     ?= .venv
# Passed to `pip install`: for instance the index of CPU builds of torch (see README)
PIP_ARGS ?=
# Where `make demo` writes its table and figures
OUT      ?= runs/demo
BIN      := $(VENV)/bin
SPEC     := settings.ini setup.py pyproject.toml constraints.txt
PROGRESS := runs/progress.log
CELLS    := {seeds: [0], tasks: [intent], modes: [standard, unguided, "target, aligned"]}

.PHONY: help demo test clean-venv

help:
	@echo "make demo   a standard, an unguided and a recovered speech model, one seed, written to $(OUT)/"
	@echo "make test   all notebooks and tests"
	@echo "Variables:  PYTHON=$(PYTHON) VENV=$(VENV) OUT=$(OUT) PIP_ARGS='$(PIP_ARGS)'"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SPEC) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[demo]"
	@touch $@

$(VENV)/.dev: $(SPEC) | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[demo,dev]"
	@touch $(VENV)/.demo $@

# papermill shows which cell it is at; what remains to be trained comes from the progress log of the run store
demo: $(VENV)/.demo
	@mkdir -p runs && touch $(PROGRESS)
	@tail -n 0 -f $(PROGRESS) & log=$$!; trap 'kill $$log' EXIT; \
	$(BIN)/papermill nbs/05_speech.ipynb runs/05_speech.ipynb -p out $(OUT) -p table demo -y '$(CELLS)'
	@echo; echo "Three models, this machine, one seed ($(OUT)/demo.md):"; echo; cat $(OUT)/demo.md
	@echo; echo "Table and figures: $(OUT)/    the notebook with its outputs: runs/05_speech.ipynb"
	@echo "The whole table: . $(VENV)/bin/activate && cald reproduce table3 --seeds 1"

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup tests

clean-venv:
	rm -rf $(VENV)
