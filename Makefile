# Each target sets itself up in .venv: `make demo` needs nothing but Python 3.10+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,quantization
DEMO_FLAGS ?=
TEST_FLAGS ?= -n auto --dist worksteal

.PHONY: demo test lint type bench clean

demo: $(VENV)/installed-demo
	$(BIN)/scone demo $(DEMO_FLAGS)

test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest $(TEST_FLAGS)

lint: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/installed-$(EXTRAS)
	$(BIN)/mypy

bench: $(VENV)/installed-$(EXTRAS)
	for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench --quick || exit 1; done

# torch first and pinned: a later range would be free to fetch another build of it
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-$(EXTRAS): $(VENV)/installed-demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
