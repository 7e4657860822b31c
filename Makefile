# Two commands do everything on a fresh machine with Python 3.10+: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# onnxruntime or onnxruntime-gpu, never both: EXTRAS=gpu,rtx,... on a machine with an NVIDIA GPU.
EXTRAS ?= cpu,rtx,timm,demo,dev

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/passdeploy prune --recipe mobilenetv2.yaml
	$(BIN)/passdeploy export --trt --flavour rtx
	$(BIN)/passdeploy profile

test: $(VENV)/installed lint
	$(BIN)/pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache
