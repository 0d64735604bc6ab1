# Everything a user, a developer or CI runs. `make quickstart` runs the main job, `make test` the tests,
# `make soak` those that take minutes: a run killed a hundred times.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test soak check clean

# A stamp file per set of extras: pip runs again only when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

quickstart: $(VENV)/.installed-all
	$(BIN)/autoslim run configs/quickstart.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m soak

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
