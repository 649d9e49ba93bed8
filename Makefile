# Every target sets up what it needs: a virtual environment in .venv from the pins in
# requirements.lock, and nothing outside this folder. Python 3.11 or newer and make are enough.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

HOST ?= 127.0.0.1
PORT ?= 8080

.PHONY: serve test test-slow test-gpu check measure bench bench-gpu clean

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

bench: $(INSTALLED)  ## scenarios of the demo model that fit 5 minutes, into bench/results/
	$(RUN) -m bench run --device cpu --model demo --requests 20 --seconds-limit 290 \
	  --results bench/results || test $$? -eq 75

# From a bare checkout with that machine's own python and packages, and without a network. In pieces
# of under 8 minutes that go on with the day's file in bench/results/: PIECES=1 does one. A piece that
# is cut off (SIGTERM: 143) costs what it was getting ready, and the next tries that once more.
PIECES ?= 20
BENCH_GPU := run --device cuda --model random:sdxl-base --shape 1024x1024 --steps 30 --requests 10 \
  --seconds-limit 430 --results bench/results \
  $(if $(COMMIT),--commit $(COMMIT)) $(if $(SCENARIOS),--scenario $(SCENARIOS))
bench-gpu:  ## every scenario at 1024x1024 on one GPU, in resumable pieces, into bench/results/
	@for piece in $$(seq $(PIECES)); do \
	  echo "piece $$piece"; \
	  timeout -k 10 470 $(PYTHON) -m bench $(BENCH_GPU); status=$$?; \
	  case $$status in 75|143|124|137) ;; *) exit $$status ;; esac; \
	done; echo "not everything is measured yet: make bench-gpu goes on"

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=...") if sys.version_info < (3, 11) else None'
	@echo "setting up $(VENV): about a gigabyte of packages, once"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:  ## remove everything that was set up or built here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
