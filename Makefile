# Every target sets up what it needs: a virtual environment in .venv from the pins in
# requirements.lock, and nothing outside this folder. Python 3.11 or newer and make are enough.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

HOST ?= 127.0.0.1
PORT ?= 8080

.PHONY: serve test test-slow test-gpu check measure clean

serve: $(INSTALLED)  ## serve the model on http://HOST:PORT
	@$(RUN) -m serve --host $(HOST) --port $(PORT)

test: $(INSTALLED) check  ## what CI runs
	$(RUN) -m pytest -m "not gpu and not slow" --cov --cov-report=term:skip-covered --cov-fail-under=85

test-slow: $(INSTALLED)  ## soaks, long fuzzing, compile matrix: minutes to hours
	$(RUN) -m pytest -m "slow and not gpu" --timeout=3600

test-gpu:  ## on a machine with a CUDA device, with that machine's own python and packages
	$(PYTHON) -m pytest -m gpu --timeout=900 -p no:cacheprovider tests/gpu

check: $(INSTALLED)  ## format, lint, types, layers
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

measure: $(INSTALLED)  ## the figures of the README: start-up, unattributed time, memory
	$(RUN) -m bench.figures

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=...") if sys.version_info < (3, 11) else None'
	@echo "setting up $(VENV): about a gigabyte of packages, once"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:  ## remove everything that was set up or built here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
