# Everything runs in .venv, which is brought up to date when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(PIP_CONSTRAINT)
# The build backend is installed by pip into an environment of its own, which reads its constraints from here.
export PIP_CONSTRAINT := constraints.txt
STAMP_RUN := .venv/installed
STAMP_DEV := .venv/installed-dev
STAMP_DOCS := .venv/installed-docs

.PHONY: help study test test-all core soak fuzz gpu sweep perf docs docs-serve notebooks gallery dist lint types format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

study: $(STAMP_RUN) ## train the paper's network four ways on the embedded digits, and write the report
	$(BIN)/batchnorm study

# Threads that wait must not take the processor from the other half of the tests.
TESTS = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --dist loadfile
test: $(STAMP_DEV) ## the tests without the slow ones: under five minutes on two cores once the kernels are compiled
	$(TESTS) -m "not slow"

test-all: test perf ## and the slow ones, and that no kernel lost its speed
	$(TESTS) --no-loadscope-reorder -m slow

perf: $(STAMP_DEV) ## ten cases against PyTorch's layers, compared with benchmarks/perf.json; PERF=--store stores them
	OMP_WAIT_POLICY=passive $(BIN)/python tools/perf.py $(PERF)

sweep: $(STAMP_DEV) ## 200 cases against PyTorch's layers, which none may lose: about eight minutes on an idle machine
	$(BIN)/python tools/sweep.py $(SWEEP)

PYTEST ?= $(BIN)/python -m pytest
core: ## the part of the tests that needs torch, numpy and llvmlite alone; PYTEST="... -m pytest" runs it elsewhere
	OMP_WAIT_POLICY=passive $(PYTEST) --numprocesses auto --dist loadfile -p no:cacheprovider -m "not slow" $(CORE)
CORE = tests/test_core.py tests/test_layers.py tests/test_functional.py tests/surgery/test_convert.py \
	tests/surgery/test_fold.py tests/variants/test_accumulate.py tests/variants/test_against_spec.py

soak: $(STAMP_DEV) ## what takes longer: a recording killed a hundred times, a page of eight million rows
	BATCHNORM_KILLS=100 $(BIN)/python -m pytest tests/recording/test_faults.py -k killed
	BATCHNORM_SCALE=300 $(BIN)/python -m pytest tests/report/test_watch_scale.py

fuzz: $(STAMP_DEV) ## random tests with a new seed, and damaged checkpoints into the readers for ten minutes
	BATCHNORM_SEED=random BATCHNORM_FUZZ_SECONDS=600 $(BIN)/python -m pytest tests/checks/readers/test_reader_fuzz.py $(RANDOM)
RANDOM = tests/test_layers_properties.py tests/test_moments.py tests/test_quantities.py tests/surgery/test_recalibrate.py \
	tests/surgery/test_programs.py tests/report/test_mixtures.py tests/kernels/test_cpu_plan.py

gpu: export PIP_CONSTRAINT := build/constraints-gpu.txt
gpu: build/constraints-gpu.txt $(STAMP_DEV) ## on a GPU: the contract suite, compute-sanitizer, the bench and the tuning; results in benchmarks/
	$(PIP) -e ".[dev,bench]"
	$(BIN)/python tools/gpu.py

build/constraints-gpu.txt: constraints.txt # where there is a GPU, torch itself says which Triton it is made for
	mkdir -p build
	grep -v '^triton==' $< > $@

# Without the variable the theme prints an advertisement.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP_DOCS) ## the documentation site into build/site; a broken link, a missing name or any warning is an error
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(STAMP_DOCS) ## the site at http://127.0.0.1:8000, up to date while you write
	$(BIN)/python -m mkdocs serve

gallery: $(STAMP_DOCS) ## make the pages of docs/gallery; DATA=FOLDER also those of MNIST and ResNet-20
	$(BIN)/python tools/gallery.py $(if $(DATA),--data-dir $(DATA))

dist: $(STAMP_RUN) ## wheel and sdist into dist/, checked; the wheel has at most 1 MB
	rm -rf dist
	$(PIP) -e ".[release]"
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	test "$$(cat dist/batchnorm-*.whl | wc -c)" -lt 1000000

lint: $(STAMP_DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP_DEV) ## mypy, strict
	$(BIN)/mypy

format: $(STAMP_DEV) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP_DEV) ## execute the tutorials and store their outputs
	OMP_WAIT_POLICY=passive $(BIN)/python tools/notebooks.py

clean: ## remove .venv and the caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

$(STAMP_RUN): pyproject.toml constraints.txt
	@echo "setting up .venv (once; torch is large) ..."
	$(PYTHON) -m venv .venv
	$(PIP) -e ".[tools]"
	@touch $@

$(STAMP_DOCS): $(STAMP_RUN)
	@echo "installing the tools for the site ..."
	$(PIP) -e ".[docs]"
	@touch $@

$(STAMP_DEV): $(STAMP_RUN)
	@echo "installing the tools for tests ..."
	$(PIP) -e ".[dev]"
	@touch $@
