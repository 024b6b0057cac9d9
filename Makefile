# Every target sets up what it needs (.venv, ComfyUI) and is quick when that is there.
PYTHON ?= python3
BIN := .venv/bin
# glibc gives large blocks back to the system after every use; keeping them makes torch on a CPU much faster.
export MALLOC_MMAP_MAX_ = 0
export MALLOC_TRIM_THRESHOLD_ = 4000000000

.PHONY: help setup demo test lint toy

help:
	@echo "make demo    distil the toy model's guidance and sample it through ComfyUI: demo_out/"
	@echo "make test    the whole test suite, real ComfyUI runtime and server included"
	@echo "make lint    ruff, check and format"
	@echo "make toy     train the toy model's committed weights again (about an hour)"

setup:
	@$(PYTHON) tools/setup.py

demo: setup
	@$(BIN)/python -m comfyui_agd.examples.toy demo

test: setup
	@$(BIN)/pytest

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

toy: setup
	@$(BIN)/python -m comfyui_agd.examples.toy train vae base cooldown judge
	@$(BIN)/python -m comfyui_agd.examples.toy measure
