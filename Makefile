# Each target creates .venv as needed. An up-to-date .venv is not touched.

PYTHON ?= $(shell command -v python3.11 || echo python3)
HOST ?= 127.0.0.1
PORT ?= 8000
DATA ?= data
NAME ?= cifar10
RECIPE ?=
ARGS ?=
VARIANT ?= cuda
# Not empty: the service gets torch, which it needs on a GPU. By default it does where an NVIDIA driver is present.
GPU ?= $(if $(wildcard /proc/driver/nvidia/version /usr/lib/wsl/lib/libcuda.so.1)$(shell command -v nvidia-smi),1)

BIN := .venv/bin
INSTALL := python -m pip install --quiet --disable-pip-version-check
PIP := $(BIN)/$(INSTALL) --constraint constraints.txt
IMAGE = thirtytwo:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' app/__init__.py)
# More than two cores: tests of processes wait most of the time.
TEST_PROCESSES ?= 4
FAST := not slow and not e2e and not browser and not cluster

.PHONY: help serve train evaluate test test-fast test-lowest lint docs screenshot bench gpu-check soak overload fuzz image audit clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 13

serve: .venv/$(if $(GPU),cuda,serve)  ## serve the bundled weights on HOST (127.0.0.1) and PORT (8000); passes ARGS="..."
	$(BIN)/python -m app --host $(HOST) --port $(PORT) $(ARGS)

train: .venv/train  ## train on DATA and write weights/NAME.safetensors; RECIPE=cifar10 trains a cascade; passes ARGS="..."
	$(BIN)/python -m training.$(if $(RECIPE),chain $(RECIPE),train) --data $(DATA) --out weights/$(NAME).safetensors $(ARGS)

evaluate: .venv/train  ## evaluate the bundled weights on DATA; passes ARGS="..."
	$(BIN)/python -m training.evaluate --data $(DATA) $(ARGS)

test: .venv/test  ## run all tests; passes ARGS="..." to pytest
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

test-fast: .venv/dev  ## run the unmarked tests, in under a minute; passes ARGS="..." to pytest
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-cov -m "$(FAST)" $(ARGS)

test-lowest: .venv-lowest/dev  ## run the unmarked tests on the lowest allowed versions; passes ARGS="..." to pytest
	.venv-lowest/bin/python -m pytest --no-cov -m "$(FAST)" $(ARGS)

lint: .venv/dev  ## check format, style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/serve  ## write the settings table into docs/configuration.md
	$(BIN)/python -m scripts.settings_table

screenshot: .venv/test  ## take the README's screenshot; needs Chromium
	$(BIN)/python -m scripts.screenshot

bench: .venv/$(if $(findstring --data,$(ARGS)),train,serve)  ## run the serving benchmark; ARGS="--data FOLDER" uses CIFAR-10's images
	$(BIN)/python -m benchmarks.serving $(ARGS)

gpu-check: .venv/train  ## check the GPU and measure engine, service and training on it; ARGS="--data FOLDER --parts serve"
	$(BIN)/python -m benchmarks.gpu $(ARGS)

soak: .venv/serve  ## send two minutes of mixed traffic, ARGS="--minutes 60" an hour; fails on lost requests and leaks
	$(BIN)/python -m benchmarks.soak $(ARGS)

overload: .venv/serve  ## offer four times the peak load for a minute; fails on lost requests and low goodput
	$(BIN)/python -m benchmarks.overload $(ARGS)

fuzz: .venv/test  ## send tens of thousands of hostile inputs to the decoder, the upload parser and the API
	$(BIN)/python -m tests.fuzz.decoding -runs=50000 -max_len=4096 -print_final_stats=1
	$(BIN)/python -m pytest --no-cov --hypothesis-profile=long --timeout=3600 tests/api/test_uploads.py
	$(BIN)/python -m tests.fuzz.api --max-examples=1000

image:  ## build the image; VARIANT=cpu leaves torch out
	docker build --build-arg VARIANT=$(VARIANT) --build-arg VERSION=$(lastword $(subst :, ,$(IMAGE))) \
		--build-arg REVISION=$(shell git rev-parse HEAD) --tag $(IMAGE)$(if $(filter cpu,$(VARIANT)),-cpu) $(ARGS) .

audit: .venv/audit  ## look up the pinned versions in PyPI's advisories
	$(BIN)/python .ci/audit.py

clean:  ## remove virtual environments and caches
	rm -rf .venv .venv-lowest build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis .coverage

%/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is required; PYTHON=... names one." >&2; exit 2; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required.")'
	$(PYTHON) -m venv $*
	@touch $@

.venv/serve: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

.venv/cuda: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable '.[cuda]'
	@touch $@ .venv/serve

.venv/train: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable '.[train]'
	@touch $@ .venv/cuda .venv/serve

.venv/dev: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/train .venv/cuda .venv/serve

.venv/test: .venv/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev,e2e,deploy,fuzz,private]'
	@touch $@ .venv/dev .venv/train .venv/cuda .venv/serve

.venv/audit: .venv/python pyproject.toml constraints.txt
	$(PIP) 'pip-audit>=2.7'
	@touch $@

.venv-lowest/dev: .venv-lowest/python pyproject.toml constraints-lowest.txt
	.venv-lowest/bin/$(INSTALL) --constraint constraints-lowest.txt --editable '.[dev]'
	@touch $@
