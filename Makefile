# Every target creates the environment when it is missing or when a pin has changed.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow coverage ui check schema architectures clean

demo: $(READY)  ## materialize the embedded demo through Dagster; print leaderboard and report path
	$(BIN)/taprobe demo

test: $(READY)  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-slow: $(READY)  ## run the tests of a minute: kills at random times, whole commands, twenty seeds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m slow

coverage: $(READY)  ## run both, and measure branches; tracing adds half to their time
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "slow or not slow" \
		--cov --cov-report=term:skip-covered --cov-fail-under=90

ui: $(READY)  ## open the Dagster UI of the demo on the loopback address
	$(BIN)/taprobe ui

check: $(READY)  ## lint, types, layers, definitions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/dagster definitions validate -w workspace.yaml

schema: $(READY)  ## regenerate studies/schema.json
	$(BIN)/python -m taprobe_core.study.schema > studies/schema.json

architectures: $(READY)  ## compare every causal model type with transformers; rewrite the page
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.architectures --jobs 2 --page docs/architectures.md

clean:  ## remove the environment; artifacts under .taprobe stay
	rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ui]"
	touch $@
