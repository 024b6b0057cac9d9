# Every target sets up what it needs (.venv, ComfyUI) and is quick when that is there.
PYTHON ?= python3
BIN := .venv/bin
# The base of the demo: toy, a UNet, or toy-dit, a transformer.
MODEL = toy
# glibc gives large blocks back to the system after every use; keeping them makes torch on a CPU much faster.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 4000000000

# The other releases of ComfyUI that the runtime part of the tests must pass on; the oldest is requires-comfyui.
MATRIX := 0.16.3 0.18.2 0.26.0

# A worker for each core, and each file's tests in one of them, for what its fixtures made.
PYTEST := $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# All of the unit tests, and of every other folder what is quickest.
FAST := tests/unit \
  tests/comfy/test_architectures.py tests/comfy/test_sampling.py tests/comfy/test_solvers.py tests/comfy/test_step_cost.py \
  tests/comfy/compatibility/test_table.py::test_the_documented_table_is_what_is_tested \
  tests/toy/test_toy.py tests/server/test_server.py::test_the_pack_loads_without_complaint

.PHONY: help setup demo test test-fast test-browser test-matrix bench screenshots lint package toy

help:
	@echo "make demo          distil the toy model's guidance and sample it through ComfyUI: demo_out/"
	@echo "                   MODEL=toy-dit: of a small transformer like SD3.5, instead of the UNet"
	@echo "make test-fast     the unit tests and the quickest of the others, in under two minutes: while working"
	@echo "make test          the whole test suite, real ComfyUI runtime and server included: before a commit"
	@echo "make test-browser  the tests of the editor in Chromium, if it is installed; part of make test"
	@echo "make test-matrix   its runtime part on older ComfyUI releases, $(MATRIX), and torch.compile's own backend"
	@echo "make bench         what a step costs, unguided, with CFG and with AGD, at true sizes (20 minutes)"
	@echo "make screenshots   the pictures of the editor in docs/ and of the templates, by Chromium"
	@echo "make lint          ruff, check and format; mypy"
	@echo "make package       the archive that the registry serves: build/"
	@echo "make toy           train the toy models' committed weights again (about an hour)"

setup:
	@$(PYTHON) tools/setup.py

demo: setup
	@$(BIN)/python -m comfyui_agd.examples.toy demo --model $(MODEL)

test: setup
	@$(PYTEST)

test-fast: setup
	@$(PYTEST) -m "not slow and not matrix" $(FAST)

test-browser: setup
	@$(BIN)/pytest tests/browser

test-matrix:
	@$(PYTHON) tools/setup.py $(MATRIX)
	@$(BIN)/pytest -m matrix tests/comfy
	@passed=; failed=; for release in $(MATRIX); do \
	  echo "ComfyUI $$release"; \
	  if COMFYUI_PATH=$(CURDIR)/.comfyui/ComfyUI-$$release $(PYTEST) -m "" tests/comfy tests/server; \
	  then passed="$$passed $$release"; else failed="$$failed $$release"; fi; \
	done; \
	echo "ComfyUI releases that passed:$${passed:- none}; that failed:$${failed:- none}"; test -z "$$failed"

bench: setup
	@$(BIN)/python benchmarks/inference.py

screenshots: setup
	@$(BIN)/pytest tests/browser --screenshots -k "shows_its or is_whole"
	@$(BIN)/python tools/thumbnails.py

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@mkdir -p .venv/typed && ln -sfn "$(CURDIR)" .venv/typed/comfyui_agd && MYPYPATH=.venv/typed $(BIN)/mypy

package:
	@$(PYTHON) tools/package.py

toy: setup
	@$(BIN)/python -m comfyui_agd.examples.toy train vae base cooldown judge dit
	@$(BIN)/python -m comfyui_agd.examples.toy measure
	@$(BIN)/python -m comfyui_agd.examples.toy measure --model toy-dit
