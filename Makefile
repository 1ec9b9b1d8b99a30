# Each target makes its environment in .venv when it is missing; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo sweep test check

demo: $(VENV)/.stamp-run  ## Answer questions about rendered videos with the embedded model.
	$(BIN)/python jobs/videoqa.py

sweep: $(VENV)/.stamp-run  ## Compare all pruning methods on rendered videos (minutes); writes output/sweep/report.html.
	$(BIN)/python jobs/sweep.py --methods all vitcop:key_score=profile --keep-ratios 0.5 0.25 0.1 --seeds 1 --workers 2

test: $(VENV)/.stamp-test  ## Run every test.
	$(BIN)/python -m pytest

check: $(VENV)/.stamp-test  ## Format, lint, types and the quick tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that a build chosen by the user (CPU, CUDA) is kept by everything after it.
$(VENV)/.stamp-run: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

$(VENV)/.stamp-test: $(VENV)/.stamp-run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
