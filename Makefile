# Every target runs on one machine with two cores: one thing after another.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help install install-test demo demo-model test test-fast test-containers check bench lock clean

PYTHON ?= python3
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
DEVICE ?= cpu
BIN := .venv/bin
# in the order of the folders: files of whole processes take longest and come first, so that none is left over at the end
PYTEST = $(BIN)/pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## make .venv with everything that zimage needs
	$(PYTHON) scripts/install.py

install-test:
	@$(PYTHON) scripts/install.py --group test

demo: install ## start the server with a small model and draw a picture
	$(BIN)/zimage demo

demo-model: install-test ## train the demo model anew (hours on a CPU, minutes on CUDA: DEVICE=cuda), and measure it
	$(BIN)/python -m demo_model train --work-dir build/demo-model --output-dir build/demo-model/checkpoints --device $(DEVICE)
	$(BIN)/python -m demo_model evaluate --model build/demo-model/checkpoints/z-image \
		--vision build/demo-model/checkpoints/qwen3-vl --device $(DEVICE)

test: check ## run all checks, then all tests (PYTEST_ARGS goes to pytest, PYTEST_WORKERS of them at once)
	$(PYTEST) $(PYTEST_ARGS)

test-fast: install-test ## run the quick checks and the quick tests
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-containers: install-test ## build the images and test them with Docker, in Compose and in a swarm
	$(BIN)/pytest tests/containers -o timeout=2400 $(PYTEST_ARGS)

check: install-test ## look at style, layers, dependencies and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/deptry .
	$(BIN)/mypy
	$(BIN)/mypy scripts/install.py scripts/lock.py

bench: install-test ## measure, and write down what came out
	$(BIN)/python -m benchmarks

lock: ## choose the newest versions anew and write the lock files (needs uv)
	$(PYTHON) scripts/lock.py

clean: ## remove .venv, caches and what builds left behind; a training of the demo model stays
	test ! -d build || find build -mindepth 1 -maxdepth 1 ! -name demo-model -exec rm -rf {} +
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
