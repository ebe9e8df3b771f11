# `make demo` and `make test` are all the set-up there is; both create what they need and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.saccade-installed
SINGLE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

ENGINE := $(wildcard src/saccade/kernels/cpu/*.[chi]pp src/saccade/kernels/cpu/*.inl)

.PHONY: demo test check lint bench sanitize clean

$(STAMP): pyproject.toml setup.py $(ENGINE)
	@echo "[1/3] Python environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"saccade needs Python >= 3.11, {sys.executable} is {sys.version.split()[0]}; set PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "[2/3] PyTorch"
	@$(BIN)/python -m pip install torch==2.13.0
	@echo "[3/3] Saccade and what it is tested with"
	@$(BIN)/python -m pip install -e '.[dev]'
	@$(BIN)/python tools/engine.py
	@touch $@

demo: $(STAMP)
	@$(BIN)/saccade tune smollm2 --context 8192 --out saccade-out/demo

test: check
	@echo "tests"
	@$(SINGLE) $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(STAMP) lint
	@echo "quick tests"
	@$(SINGLE) $(BIN)/python -m pytest -q -n 2 -m quick

lint: $(STAMP)
	@echo "lint, types, import rules, docstrings"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/pydoclint --quiet src
	@$(BIN)/python tools/check_tests.py tests
	@$(BIN)/python tools/make_docs.py --check

bench: $(STAMP)
	@$(BIN)/saccade bench ops

# A slice of the tests under AddressSanitizer and UndefinedBehaviorSanitizer; needs GCC.
sanitize: $(STAMP)
	@$(BIN)/python tools/sanitize.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache saccade-out
