# Each target sets up .venv by itself and does nothing twice.

PYTHON ?= $(shell command -v python3.11 || echo python3)
HOST ?= 0.0.0.0
PORT ?= 8000
DATA ?= data
NAME ?= cifar10
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help serve train evaluate test lint docs screenshot bench soak overload fuzz audit clean
help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

serve: .venv/serve  ## serve the bundled weights on PORT (8000) and HOST (0.0.0.0); ARGS="..." is passed on
	$(BIN)/python -m app --host $(HOST) --port $(PORT) $(ARGS)

train: .venv/train  ## train on DATA and write weights/NAME.safetensors; ARGS="..." is passed on
	$(BIN)/python -m training.train --data $(DATA) --out weights/$(NAME).safetensors $(ARGS)

evaluate: .venv/train  ## measure the bundled weights on DATA; ARGS="..." is passed on
	$(BIN)/python -m training.evaluate --data $(DATA) $(ARGS)

test: .venv/dev  ## the whole test suite; ARGS="..." is passed to pytest
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/dev  ## formatting, style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/serve  ## write the table of settings into the README
	$(BIN)/python -m scripts.settings_table

screenshot: .venv/dev  ## take the README's picture of the page anew; needs chromium
	$(BIN)/python -m scripts.screenshot

bench: .venv/train  ## the serving benchmark; ARGS="--data folder" takes CIFAR-10's own pictures
	$(BIN)/python -m benchmarks.serving $(ARGS)

soak: .venv/train  ## two minutes of mixed traffic; ARGS="--minutes 60" for an hour; fails where a request is lost
	$(BIN)/python -m benchmarks.soak $(ARGS)

overload: .venv/train  ## four times what the service can do, for a minute; fails where a promise breaks
	$(BIN)/python -m benchmarks.overload $(ARGS)

fuzz: .venv/dev  ## tens of thousands of hostile inputs to the decoder, the upload parser and the whole API
	$(BIN)/python -m tests.fuzz.decoding -runs=50000 -max_len=4096 -print_final_stats=1
	$(BIN)/python -m pytest --no-cov --hypothesis-profile=long --timeout=3600 tests/api/test_uploads.py
	$(BIN)/python -m tests.fuzz.api --max-examples=1000

audit: .venv/audit  ## look the pinned versions up in PyPI's advisories; says so where none can be reached
	$(BIN)/python .ci/audit.py

clean:  ## remove .venv and caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis .coverage

.venv/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed; name another one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed.")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/serve: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/train: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable '.[train]'
	@touch $@ .venv/serve

.venv/dev: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/train .venv/serve

.venv/audit: .venv/python pyproject.toml constraints.txt
	$(PIP) 'pip-audit>=2.7'
	@touch $@
