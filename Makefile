# All targets use .venv, which is created at the first use. constraints.txt pins torch's version for these targets only.
PYTHON ?= python3
VENV := .venv
RUN := runs/quickstart

.PHONY: demo test soak lint clean

demo: $(VENV)/.demo
	$(VENV)/bin/nextscale quickstart --out $(RUN)

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

soak: $(VENV)/.ready
	NEXTSCALE_SOAK=24 $(VENV)/bin/python -m pytest tests/test_soak.py tests/test_independence.py tests/test_processes.py tests/test_neon.py -s

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

$(VENV)/.demo $(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "nextscale needs Python 3.11 or newer; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(if $(findstring demo,$@),quickstart,test)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
