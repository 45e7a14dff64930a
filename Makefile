# make demo and make test are the two commands; make help lists all. Each target makes or reuses .venv and installs this
# checkout into it. The text after ## is what make help prints.

PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= runs/demo
BENCH_OUT ?= bench/results
GPU_OUT ?= runs/gpu
# Test processes that run side by side; each takes its share of the cores.
JOBS ?= auto
BIN := $(VENV)/bin
# Under another name than MAKE, so that `make -n` prints a line that contains it, and does not run it.
SUBMAKE := $(MAKE) --no-print-directory
# A test process that ends without a word ends the run: xdist may wait forever for what its successor was to do.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Everything that decides what is installed or built; a change reinstalls.
SOURCES := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f '(' -name '*.[ch]' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cmake' -o -name '*.def' ')')
STAMP := $(VENV)/.installed-dev
BYTECODE_STAMP := $(VENV)/.bytecode-dev

# What processes of the tests import beside this checkout: its bytecode is written once, as containers often set
# PYTHONDONTWRITEBYTECODE, under which each of a hundred processes would compile torch for seconds. Bytecode of all that
# pip installs takes minutes.
BYTECODE := torch._dynamo torch._inductor.compile_fx torch.distributed.run torch.utils.tensorboard matplotlib.pyplot \
  sklearn.datasets tyro optuna openai fastapi uvicorn prometheus_client diffusers transformers accelerate \
  torchmetrics triton hypothesis pytest xdist mkdocs
define IMPORT_ALL
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"warning: {name} cannot be imported; what needs it will fail: {type(error).__name__}: {error}", file=sys.stderr)
endef
export IMPORT_ALL

# What '.[dev]' requires, a line each: pip cannot be asked for it without this project itself.
define REQUIREMENTS
import tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
def required(requirements):
    for requirement in requirements:
        name, _, extras = requirement.rstrip("]").partition("[")
        if name == project["name"]:
            for extra in extras.split(","):
                yield from required(project["optional-dependencies"][extra])
        else:
            yield requirement
print(*required([*project["dependencies"], "tdc_fast[dev]"]), sep="\n")
endef
export REQUIREMENTS

.PHONY: help install dependencies checkout demo test test-fast lint style types docs bench gpu clean
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

$(BIN)/python:
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) | $(BIN)/python
	@echo "==> installing tdc_fast and what its tests, demo and benches need into $(VENV) (torch is large; the native core builds in a minute, with nvcc in four)"
	@$(SUBMAKE) -j2 dependencies checkout
	@touch $(STAMP)

# The two halves of `pip install -e '.[dev]'`, of which the second compiles for minutes: install runs them side by side.
dependencies: | $(BIN)/python ## the packages that this checkout needs, which is one half of install
	@mkdir -p build && $(BIN)/python -c "$$REQUIREMENTS" > build/requirements.txt
	@$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -r build/requirements.txt

checkout: | $(BIN)/python ## this checkout alone, with its native core, which is the other half
	@$(BIN)/python -m pip install --quiet --no-compile --no-deps -e .

$(BYTECODE_STAMP): $(STAMP)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "$$IMPORT_ALL" $(BYTECODE)
	@$(BIN)/python -m compileall -q tdc_fast kernels bench
	@touch $(BYTECODE_STAMP)

install: $(BYTECODE_STAMP) ## install this checkout, with what its tests, demo and benches need

demo: $(BYTECODE_STAMP) ## the demo: train, prune, fine-tune, sample and compare on real images -> runs/demo/report.html
	@echo "==> running the demo on scikit-learn's digits (about 4 minutes on 2 cores) -> $(DEMO_OUT)"
	@$(BIN)/python -m tdc_fast.demo --out $(DEMO_OUT)

lint: style types ## ruff, mypy and clang-format

style: $(STAMP) ## ruff and clang-format
	@echo "==> ruff and clang-format"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(shell find csrc tdc_fast/ops/host_sources -name '*.cpp' -o -name '*.h' -o -name '*.cuh')

types: $(STAMP) ## mypy, which finds kernels/ under its installed name
	@mkdir -p build/mypy/tdc_fast && ln -sfn ../../../kernels build/mypy/tdc_fast/kernels
	@$(BIN)/mypy

# mypy, which takes a minute, runs while bytecode is written (by one process) and the tests begin; a wrong type fails the
# run after them.
test: style ## all tests and lint
	@echo "==> mypy and pytest"
	@mkdir -p build; $(SUBMAKE) types > build/types.log 2>&1 & types=$$!; \
	$(SUBMAKE) --silent $(BYTECODE_STAMP) && $(PYTEST); tests=$$?; \
	wait $$types || { cat build/types.log; exit 1; }; exit $$tests

test-fast: $(BYTECODE_STAMP) ## the tests of the inner loop, in two minutes
	@echo "==> pytest, without the tests marked slow"
	@$(PYTEST) -m "not slow"

docs: $(BYTECODE_STAMP) ## the documentation, with the API reference -> build/site/index.html
	@echo "==> mkdocs, where a warning is an error -> build/site"
	@$(BIN)/mkdocs build --quiet --strict

bench: $(BYTECODE_STAMP) ## throughput suites -> bench/results/
	@echo "==> throughput suites -> $(BENCH_OUT)"
	@$(BIN)/python -m bench --out $(BENCH_OUT)

gpu: $(STAMP) ## everything that needs an NVIDIA GPU, tests and measurements, in an hour -> runs/gpu/
	@echo "==> tests and measurements on the GPU -> $(GPU_OUT)"
	@$(BIN)/python -m bench.gpu_all --out $(GPU_OUT)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) build *.egg-info tdc_fast/_native*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
