# make demo   a virtual environment, then train, merge and compare small models (about three minutes after installing)
# make quick  methods, recipes, codecs and house rules, without torch: for whoever writes a method
# make test   the test suite
# make check  what CI runs besides: lint, types, docs
#
# PYTHON=python3.12 chooses the interpreter; TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" the build of torch.

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo quick test check docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch by itself first: whatever else needs it is then content with this build
$(VENV)/installed-test: $(BIN)/python pyproject.toml constraints.txt $(wildcard src/stockpot/engine/native/*.c src/stockpot/engine/native/*.inc)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_ARGS) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed-test
	$(BIN)/python examples/demo.py demo-output

QUICK := test_house test_cutoffs test_masks test_weighting test_files test_quick
$(VENV)-quick/installed: pyproject.toml constraints.txt $(wildcard src/stockpot/engine/native/*.c src/stockpot/engine/native/*.inc)
	$(PYTHON) -m venv $(VENV)-quick
	$(VENV)-quick/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest pytest-xdist hypothesis matplotlib
	touch $@

quick: $(VENV)-quick/installed
	$(VENV)-quick/bin/python -m pytest -q -n auto --maxprocesses 4 $(QUICK:%=tests/%.py)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/installed-dev
	$(BIN)/python docs/methods_page.py
	$(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) $(VENV)-quick demo-output site .pytest_cache .mypy_cache .ruff_cache
