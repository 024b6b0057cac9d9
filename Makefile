# Every target sets up what it needs (.venv, ComfyUI) and is quick when that is there.
PYTHON ?= python3
BIN := .venv/bin
# glibc gives large blocks back to the system after every use; keeping them makes torch on a CPU much faster.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 4000000000

# The other releases of ComfyUI that the runtime part of the tests must pass on; the oldest is requires-comfyui.
MATRIX := 0.16.3 0.18.2 0.26.0

.PHONY: help setup demo test test-matrix bench lint toy

help:
	@echo "make demo          distil the toy model's guidance and sample it through ComfyUI: demo_out/"
	@echo "make test          the whole test suite, real ComfyUI runtime and server included"
	@echo "make test-matrix   its runtime part on older ComfyUI releases: $(MATRIX)"
	@echo "make bench         what a step costs, unguided, with CFG and with AGD, at true sizes (20 minutes)"
	@echo "make lint          ruff, check and format"
	@echo "make toy           train the toy model's committed weights again (about an hour)"

setup:
	@$(PYTHON) tools/setup.py

demo: setup
	@$(BIN)/python -m comfyui_agd.examples.toy demo

test: setup
	@$(BIN)/pytest

test-matrix:
	@$(PYTHON) tools/setup.py $(MATRIX)
	@passed=; failed=; for release in $(MATRIX); do \
	  echo "ComfyUI $$release"; \
	  if COMFYUI_PATH=$(CURDIR)/.comfyui/ComfyUI-$$release $(BIN)/pytest tests/comfy tests/server; \
	  then passed="$$passed $$release"; else failed="$$failed $$release"; fi; \
	done; \
	echo "ComfyUI releases that passed:$${passed:- none}; that failed:$${failed:- none}"; test -z "$$failed"

bench: setup
	@$(BIN)/python benchmarks/inference.py

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

toy: setup
	@$(BIN)/python -m comfyui_agd.examples.toy train vae base cooldown judge
	@$(BIN)/python -m comfyui_agd.examples.toy measure
