PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# one thread a process is fastest for models this small, and makes runs repeat bit for bit
RUN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

.PHONY: help install quickstart test torture check browser format bench bench-learning clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## a virtual environment in .venv with everything that tests need

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[test]'
	touch $(STAMP)

quickstart: $(STAMP)  ## train the shipped tiny model against the shipped reward model
	$(RUN) $(BIN)/llm-dqn train quickstart

test: $(STAMP)  ## all tests that this machine can run
	$(RUN) $(BIN)/python -m pytest

torture: $(STAMP)  ## 200 times kill -9 and --resume, and 100 times one of two processes; half an hour
	$(RUN) $(BIN)/python -m tests.torture --kills 200 --output benchmarks/results/torture.json
	$(RUN) $(BIN)/python -m tests.torture_processes --kills 100 --output benchmarks/results/torture_processes.json

check: $(STAMP)  ## format, lint, types, and which file may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

browser:  ## Chromium for the tests of HTML pages, on Debian and Ubuntu as root
	if ! { command -v chromium && command -v chromedriver; } > /dev/null; then \
		timeout 120 apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive timeout 400 apt-get install -qq -y --no-install-recommends chromium chromium-driver; \
	fi

format: $(STAMP)  ## rewrite the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## the fast benchmarks: updates, rollouts, replay, where time goes, and every textbook switch
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench]'
	$(RUN) $(BIN)/python -m benchmarks.update --quick
	$(RUN) $(BIN)/python -m benchmarks.head_only --quick
	$(RUN) $(BIN)/python -m benchmarks.scaling
	$(RUN) $(BIN)/python -m benchmarks.rollout --quick
	$(RUN) $(BIN)/python -m benchmarks.replay --quick
	$(RUN) $(BIN)/python -m benchmarks.profile
	$(RUN) $(BIN)/python -m benchmarks.textbook --quick

bench-learning: $(STAMP)  ## the short learning benchmark: what a reward call teaches, beside TRL's GRPO and plain SFT
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench]'
	$(RUN) $(BIN)/python -m benchmarks.learning quick --fresh --workers 2

clean:  ## remove what was built; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
