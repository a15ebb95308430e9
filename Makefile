# All targets use .venv, which is created at the first use. constraints.txt pins torch's version for these targets only.
PYTHON ?= python3
VENV := .venv
RUN := runs/quickstart

.PHONY: demo test test-page test-gpu soak repeat lint docs clean

demo: $(VENV)/.quickstart
	$(VENV)/bin/nextscale quickstart --out $(RUN)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

# The demo's page in a browser: needs chromium, as `apt-get install chromium` installs it.
test-page: $(VENV)/.dev
	$(VENV)/bin/python -m pytest tests/test_demo_page.py -rs

test-gpu: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests/gpu -rs -s

soak: $(VENV)/.test
	NEXTSCALE_SOAK=24 $(VENV)/bin/python -m pytest tests/test_soak.py tests/test_independence.py tests/test_processes.py tests/test_neon.py tests/test_wheel.py -s
	NEXTSCALE_GPU_TESTS=cpu $(VENV)/bin/python -m pytest tests/gpu -s

# The suite ten times: as it is, on one thread, on a CPU without AVX-512, beside a busy loop on each core.
SUITE = $(VENV)/bin/python -m pytest -n 2 --dist loadfile
AVX2 = ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
repeat: $(VENV)/.test
	for run in 1 2 3 4 5; do $(SUITE) || exit 1; done
	for run in 1 2; do OMP_NUM_THREADS=1 $(SUITE) || exit 1; done
	for run in 1 2; do $(AVX2) $(SUITE) || exit 1; done
	busy=""; for core in $$(seq $$(nproc)); do (while :; do :; done) & busy="$$busy $$!"; done; \
	$(SUITE); status=$$?; kill $$busy; exit $$status

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The documentation site, in build/site. It fails for a broken link and for a public name without a docstring; with
# --quiet it would not see them.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "see build/site/index.html; \`$(VENV)/bin/python -m http.server --directory build/site\` serves it with its search"

# A file for each of the package's extras that are installed.
$(VENV)/.%: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "nextscale needs Python 3.11 or newer; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
