# `make demo` and `make test` are all one needs; both make .venv first.
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)

.PHONY: demo test test-slow conformance lint types coverage clean

demo: $(STAMP)
	$(BIN)/python tools/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m slow

# Half an hour on two cores; after Ctrl-C `make conformance RESUME=--resume` goes on.
conformance: $(STAMP)
	mkdir -p build
	$(BIN)/graphopt conformance --mode eager --mode compiled --mode roundtrip --suite node --suite simple --suite light \
	    -o build/conformance.jsonl $(RESUME) --markdown docs/onnx-coverage.md --passing tests/tools/onnx_passing.txt

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy -p graphopt
	$(BIN)/mypy tests

coverage: $(STAMP)
	$(BIN)/python -m pytest -q --cov --cov-report=term-missing:skip-covered

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench,onnx]"
	rm -f .venv/.installed-*
	touch $@

clean:
	rm -rf build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
