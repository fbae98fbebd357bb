PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint types tests speed clean

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/continual study reports/demo/study.yaml --workers 2 --out runs/demo --report reports/demo/report.html
	cp runs/demo/report.md reports/demo/report.md

test: lint types tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

speed: $(STAMP)
	$(BIN)/python reports/speed/all.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache
