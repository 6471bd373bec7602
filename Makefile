PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDER := .venv-4
OLDER_READY := $(OLDER)/.ready
LLAMA_CPP := .venv-gguf
LLAMA_CPP_READY := $(LLAMA_CPP)/.ready
SITE := llmprune/service/web/site
EDITOR := llmprune/service/web/built

# The tests start many processes: they find the package compiled, whatever this machine is set to.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help quickstart serve check test lint client types docs editor pytest slow bench-gpu older llama-cpp wheel wheel-test release constraints clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-12s %s\n", $$1, $$2}'

quickstart: $(READY)  ## set everything up, then prune a real model
	$(BIN)/llmprune run recipes/quickstart.yaml

serve: $(READY)  ## set everything up, then serve pruning jobs on http://127.0.0.1:8321
	@test -f $(EDITOR)/editor.js || $(MAKE) editor || echo 'The pages have a plain text field as editor.'
	$(BIN)/llmprune serve --allow-tasks eval/tasks

# The rooms whose tests are short and need no service and no model hub; together they take about a minute.
QUICK := $(addprefix tests/,recipe data criteria sparsity layerwise score cut prune results report) $(wildcard tests/test_*.py)

check: lint types  ## lint, types and the quick tests: what you run while you work
	$(BIN)/python -m pytest -n auto --dist loadfile $(QUICK)

# The types are checked beside the tests, of which many wait.
test: $(READY) $(LLAMA_CPP_READY)  ## lint, documentation, recipe editor, types and tests
	$(MAKE) --no-print-directory --jobs=2 lint docs editor
	$(MAKE) --no-print-directory --jobs=2 types pytest

lint: $(READY)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

client: $(READY)  ## make the blocking client of the service from the asynchronous one
	$(BIN)/python .ci/sync_client.py

types: $(READY)  ## check types
	$(BIN)/mypy

docs: $(READY)  ## build the documentation, which the service serves at /docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Documentation: $(SITE)/index.html"

editor: $(READY)  ## bundle the recipe editor of the service's pages from npm packages
	$(BIN)/python .ci/editor.py

# Every process takes whole files, so that what a file's tests share is made once, in the order of collection
# (tests/conftest.py). One process more than there are cores, for many tests wait for processes of their own.
PYTEST_ARGS ?= -n $(shell $(PYTHON) -c 'import os; print(1 + (os.cpu_count() or 1))') --dist loadfile --no-loadscope-reorder -m "not slow"

pytest: $(READY) $(LLAMA_CPP_READY)  ## run the tests; PYTEST_ARGS="-x tests/recipe" chooses
	$(BIN)/python -m pytest $(PYTEST_ARGS)

slow: $(READY) $(OLDER_READY) $(LLAMA_CPP_READY)  ## run the tests that take longest, which make test leaves out
	$(BIN)/python -m pytest -m slow

bench-gpu: $(READY)  ## on a machine with a GPU: its tests and benchmarks, in at most 8 minutes; BENCH_ARGS="--minutes 4"
	$(BIN)/python eval/benchmarks/gpu.py $(BENCH_ARGS)

# uv installs torch in seconds where pip takes minutes, so pip only brings uv.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("llmprune needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --group docs --group editor --editable '.[demo,dev]'
	touch $(READY)

# transformers 4.x, to load pruned models with. Its environment has what that version needs otherwise and finds the
# rest, torch above all, in the other one: a path in a .pth file comes after its own packages.
older: $(OLDER_READY)  ## set up transformers 4, which some tests load pruned models with

$(OLDER_READY): $(READY) constraints-4.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(OLDER)
	$(BIN)/uv pip install --quiet --compile-bytecode --no-deps --python $(OLDER)/bin/python --requirements constraints-4.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(OLDER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	touch $(OLDER_READY)

llama-cpp: $(LLAMA_CPP_READY)  ## set up llama.cpp, with which some tests write and read GGUF files

$(LLAMA_CPP_READY): $(READY) .ci/llama_cpp
	.ci/llama_cpp $(LLAMA_CPP) $(VENV)

wheel: docs editor  ## build the source distribution and the wheel into dist/
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	@ls dist

wheel-test: wheel  ## install the wheel in a fresh environment and run the quickstart there
	$(BIN)/python .ci/release.py wheel-test

release: $(READY)  ## check, build, test and tag a release: make release VERSION=0.2.0; pushes nothing
	$(BIN)/python .ci/release.py check "$(VERSION)"
	$(MAKE) test slow wheel-test
	$(BIN)/python .ci/release.py tag "$(VERSION)"

# Names and versions only, of everything that the tests ran with.
constraints: $(READY)  ## write the installed versions into constraints.txt
	$(BIN)/uv pip freeze --quiet --python $(BIN)/python --exclude-editable | grep -v -e ' @ ' -e '^uv==' > constraints.txt

clean:  ## remove environments, caches and built files
	rm -rf $(VENV) $(OLDER) $(LLAMA_CPP) $(SITE) $(EDITOR) dist .mypy_cache .ruff_cache .pytest_cache
