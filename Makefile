# Each target sets itself up in .venv: `make demo` needs nothing but Python 3.10+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,quantization
DEMO_FLAGS ?=
TEST_FLAGS ?= -n auto --dist worksteal

.PHONY: demo test lint type bench docs wheel licences faults clean

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

docs: $(VENV)/installed-dev,docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the wheel, installed into an empty environment and used there
wheel: $(VENV)/installed-demo
	PYTHON=$(PYTHON) bash .ci/test_wheel

licences: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python deploy/licences.py

# kills, full disks, two runs at once …: for minutes to hours; stopped and started again it goes on
faults: $(VENV)/installed-$(EXTRAS)
	nice -n 19 $(BIN)/python benchmarks/fault_injection.py --json docs/results/fault_injection.json

# torch first and pinned: a later range would be free to fetch another build of it
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-%: $(VENV)/installed-demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
