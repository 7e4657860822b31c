# Two commands do everything on a fresh machine with Python 3.10+: `make demo` and `make test`.
# `make test-floor` runs the tests with the lowest versions that pyproject.toml declares, and `make test-torch-trt` those that
# build with Torch-TensorRT, which has a torch of its own: each in an environment of its own. `make audit` looks for known
# vulnerabilities of the installed packages, `make sbom` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# onnxruntime or onnxruntime-gpu, never both: EXTRAS=gpu,rtx,... on a machine with an NVIDIA GPU.
EXTRAS ?= cpu,rtx,timm,demo,dev
# A process for each core, four at most since each takes 1.5 GB, and one thread in each; the tests of a file stay together,
# and files keep their order: sorted by the number of tests, the few long ones would come last and be waited for.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# Packages of which 95 % of the lines must be run by the tests: what decides over right and wrong cuts.
COVERED := channels grouping slimming tracing
FLOOR := .venv-floor
TORCH_TRT := .venv-torch-trt
AUDIT := .venv-audit
# The lowest Python where it is installed, otherwise the one that runs everything else.
PYTHON_FLOOR ?= $(shell python3.10 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))

.PHONY: demo environments test test-floor test-torch-trt lint audit sbom clean

demo: $(VENV)/installed
	$(BIN)/passdeploy prune --recipe mobilenetv2.yaml
	$(BIN)/passdeploy export --trt --flavour rtx
	$(BIN)/passdeploy profile

test: $(VENV)/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --cov --cov-report=
	for package in $(COVERED); do $(BIN)/coverage report --include "passdeploy/$$package/*" --fail-under 95 || exit 1; done

test-floor: $(FLOOR)/installed
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python $(PYTEST)

test-torch-trt: $(TORCH_TRT)/installed
	$(TORCH_TRT)/bin/python -m pytest -m torch_trt tests/export/test_torch_trt_real.py

# Known vulnerabilities of the installed packages: asks the advisory database, so it needs the network.
audit: $(VENV)/installed $(AUDIT)/installed
	$(BIN)/python -m benchmarks.audit $(AUDIT)/bin/pip-audit "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# The software bill of materials of the installed packages (CycloneDX).
sbom: $(VENV)/installed $(AUDIT)/installed
	mkdir -p dist
	$(AUDIT)/bin/cyclonedx-py environment --output-reproducible --output-file dist/sbom.cdx.json $(BIN)/python

# Of `make test` and `make test-torch-trt`; `make -j2 environments lint` makes both at the same time.
environments: $(VENV)/installed $(TORCH_TRT)/installed

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[$(EXTRAS)]'
	touch $@

$(FLOOR)/installed: pyproject.toml
	$(PYTHON_FLOOR) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --upgrade pip uv
	$(FLOOR)/bin/uv pip install --quiet --compile-bytecode --python $(FLOOR)/bin/python --resolution lowest-direct --editable '.[$(EXTRAS)]'
	touch $@

$(TORCH_TRT)/installed: pyproject.toml
	$(PYTHON) -m venv $(TORCH_TRT)
	$(TORCH_TRT)/bin/python -m pip install --quiet --upgrade pip uv
	$(TORCH_TRT)/bin/uv pip install --quiet --compile-bytecode --python $(TORCH_TRT)/bin/python --editable '.[torch-trt-rtx,cpu,timm]' 'pytest>=8'
	touch $@

$(AUDIT)/installed:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet 'pip-audit>=2.7' 'cyclonedx-bom>=5' || \
		{ echo 'error: pip-audit and cyclonedx-bom could not be installed; they need the network once' >&2; exit 3; }
	touch $@

clean:
	rm -rf $(VENV) $(FLOOR) $(TORCH_TRT) $(AUDIT) dist .mypy_cache .ruff_cache .pytest_cache
