PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SOURCES := pyproject.toml requirements-dev.txt $(wildcard setup.py torch_manual/csrc/*.[ch]*)

.PHONY: demo test sanitize benchmarks kernels lint types docs clean

demo: $(INSTALLED)  ## check every gradient, then train a character language model on real text
	$(BIN)/python -m torch_manual check
	$(BIN)/python examples/char_lm.py

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest

sanitize: $(INSTALLED)  ## the CPU kernel's tests under AddressSanitizer and UBSan
	sh tests/sanitize.sh $(BIN)/python $(SET)

benchmarks: $(INSTALLED)
	$(BIN)/python -m benchmarks

kernels: $(INSTALLED)  ## compile every Triton variant ahead of time, for four targets
	$(BIN)/python -m torch_manual kernels

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info site runs
