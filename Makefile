# gemb: `make demo` shows it, `make test` and `make lint` check it, `make bench` measures it.
# PYTHON chooses the interpreter: make demo PYTHON=python3.12
# On Linux with a CPU only: make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# -n 2 workers with one thread each keep a machine of two cores busy and no busier.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-install test-slow lint docs bench clean

demo: $(VENV)/minilm.installed
	$(BIN)/gemb demo

test: $(VENV)/test.installed
	$(PYTEST) -q -n 2

# The wheel with all it needs in a fresh environment; a minute or two, most of it torch.
test-install: $(VENV)/test.installed
	$(PYTEST) -q -m slow tests/test_packaging.py

test-slow: $(VENV)/test.installed
	$(PYTEST) -q -m slow

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_cli.py --check

docs: $(VENV)/test.installed
	$(BIN)/python docs/generate_cli.py

bench: $(VENV)/bench.installed
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist gemb.egg-info demo .coverage* .mypy_cache .ruff_cache .pytest_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per set of extras: nothing is installed again until pyproject.toml or a pin changes.
$(VENV)/%.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing gemb and its pinned packages into $(VENV) (once; torch is large)"
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$*]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
