# make demo   create the environment, train on "X" on the bundled model, show text before and after, and of a wanted rate
# make test   create the environment, run the tests in two processes of one thread each
# make docs   create the environment, run every command of the documentation, those that take minutes too
# make lint / make typecheck / make bench / make audit / make coverage / make mutation / make clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# uv, where it is installed, takes seconds for what takes pip a minute
UV := $(shell command -v uv 2>/dev/null)
INSTALL := $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(BIN)/python -m pip install -q --no-compile) -c constraints.txt
TESTS := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test docs lint typecheck bench audit coverage mutation clean

demo: $(READY)
	$(BIN)/python cli.py train --model demo --steps 60 --eval-repeats 1 --output adapters/collapse --force
	$(BIN)/python cli.py generate --adapter none --adapter collapse --adapter demo-rate \
	    "Once upon a time" "The captain stood on the deck and"

test: $(READY)
	$(TESTS)

docs: $(READY)
	XFACTOR_ALL_DOCS=1 $(BIN)/python -m pytest tests/docs/test_docs.py tests/docs/test_gguf_page.py

lint: $(READY)
	$(INSTALL) ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(READY)
	$(INSTALL) mypy
	$(BIN)/python -m mypy xfactor_peft

bench: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" bash benchmarks/run.sh

$(READY): pyproject.toml constraints.txt
	$(if $(UV),$(UV) venv -q --seed --allow-existing --python $(PYTHON),$(PYTHON) -m venv) $(VENV)
	$(INSTALL) -e ".[test,plot]"
	touch $@

audit: $(READY)
	bash tools/audit.sh $(BIN)/python

coverage: $(READY)
	$(INSTALL) pytest-cov
	$(TESTS) --cov --cov-report=term:skip-covered --cov-report=json:.coverage/report.json --cov-fail-under=95

# Mutation testing of the modules that pyproject.toml names; from the beginning, about ten minutes on one core.
mutation: $(READY)
	$(INSTALL) mutmut
	rm -rf mutants
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/mutmut run --max-children 1
	$(BIN)/python tools/mutation.py

clean:
	rm -rf $(VENV) mutants
