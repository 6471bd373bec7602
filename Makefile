# make quickstart   set everything up, then prune a real model
# make serve        set everything up, then serve pruning jobs on http://127.0.0.1:8321
# make test         set everything up, then lint, types and all tests
# make lint types pytest older constraints clean   the single steps

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDER := .venv-4
OLDER_READY := $(OLDER)/.ready

.PHONY: quickstart serve test lint types pytest older constraints clean

quickstart: $(READY)
	$(BIN)/llmprune run recipes/quickstart.yaml

serve: $(READY)
	$(BIN)/llmprune serve --allow-tasks eval/tasks

test: lint types pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy eval/benchmarks

# Every process takes whole files, so that what a file's tests share is made once. One process more than there are
# cores, for many tests wait for processes of their own.
PYTEST_ARGS ?= -n $(shell $(PYTHON) -c 'import os; print(1 + (os.cpu_count() or 1))') --dist loadfile

pytest: $(READY) $(OLDER_READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# uv installs torch in seconds where pip takes minutes, so pip only brings uv.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("llmprune needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[demo,dev]'
	touch $(READY)

# transformers 4.x, to load pruned models with. Its environment has what that version needs otherwise and finds the
# rest, torch above all, in the other one: a path in a .pth file comes after its own packages.
older: $(OLDER_READY)

$(OLDER_READY): $(READY) constraints-4.txt
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(OLDER)
	$(BIN)/uv pip install --quiet --compile-bytecode --no-deps --python $(OLDER)/bin/python --requirements constraints-4.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(OLDER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	touch $(OLDER_READY)

# Names and versions only, of everything that the tests ran with.
constraints: $(READY)
	$(BIN)/uv pip freeze --quiet --python $(BIN)/python --exclude-editable | grep -v -e ' @ ' -e '^uv==' > constraints.txt

clean:
	rm -rf $(VENV) $(OLDER) .mypy_cache .ruff_cache .pytest_cache
