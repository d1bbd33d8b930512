# make demo      set everything up, then the main job: ammonia from i-PI to two spectra
# make test      set everything up, then the tests
# make test-all  also the slow tests and those that need other programs
# make lint      ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
MODEL := examples/ammonia/models/small/ammonia-small.nequip.zip

.PHONY: demo test test-all lint bench clean

# torch first and pinned: whatever asks for it later is then satisfied.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/nnqmd run ipi_inputs/ammonia-solid-trpmd/input.xml --model $(MODEL) --out $(DEMO) --force
	$(BIN)/nnqmd spectrum ins $(DEMO) --skip 200
	$(BIN)/nnqmd spectrum ir $(DEMO) --skip 200
	@echo "The pictures: $(DEMO)/ins.png, $(DEMO)/ir.png; everything on one page: $(DEMO)/report.html"

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

test-all: $(VENV)/.ready
	$(BIN)/pytest -m ''

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/step_overhead.py

clean:
	rm -rf runs build dist
