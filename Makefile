# make run: the main job, end to end.  make test: every check.  make check: the quick ones.  Each sets up what it needs first.
# PYTHON=…            the Python (3.11 or newer) that makes the virtual environment
# ARGS="-p rank=8"    more arguments for `make run`
SHELL := /bin/bash
CANDIDATES := python3 python3.11 python3.12 python3.13
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python
INSTALL = $(PYTHON) tests/tools/install.py
LESSONS := $(sort $(wildcard notebooks/[0-9]*.ipynb)) $(sort $(wildcard notebooks/exercises/*_solutions.ipynb))
EXECUTE := $(PY) -m jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False

.PHONY: setup run check test lint unit notebooks-test exercises lab app book browser images notebooks needs lock bench audit canary soak clean

setup: $(VENV)/.ready

# What each command needs comes when it is first asked for: jobs (.ready), JupyterLab and Voila (.lab), the book (.book), all tests (.dev).
$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer was found: install one, or say make PYTHON=/path/to/python"; exit 2; }
	@$(INSTALL) && touch $@

$(VENV)/.lab: $(VENV)/.ready
	@$(INSTALL) lab && touch $@

$(VENV)/.book: $(VENV)/.ready
	@$(INSTALL) book && touch $@

$(VENV)/.dev: $(VENV)/.ready
	@$(INSTALL) lab book dev && touch $@ $(VENV)/.lab $(VENV)/.book

run: setup
	@$(PY) -m helpers.jobs run sql $(ARGS)

# The everyday loop: lint and the unit tests named here, two files at a time. Which files of helpers/ it covers is not measured.
QUICK := project size install data evaluation base_models practice api_drift plots
check: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

test: lint unit notebooks-test

lint: $(VENV)/.dev
	$(PY) -m ruff check helpers tests notebooks
	$(PY) notebooks/exercises/make_exercises.py --check
	$(PY) notebooks/practice/make_practice.py --check

# Two files at a time, of one thread each; then, alone, those whose browser waits for a page.
BROWSED := tests/test_browser.py tests/test_book.py
unit: $(VENV)/.dev browser
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -n 2 --dist loadfile $(BROWSED:%=--ignore=%)
	$(PY) -m pytest -q $(BROWSED)

# A Chromium for the browser tests of the panel and of the book, if there is none: Debian's where we may install it, else Playwright's own.
browser: $(VENV)/.dev
	@if command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  ls $${PLAYWRIGHT_BROWSERS_PATH:-$$HOME/.cache/ms-playwright}/chromium-* 2>/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1; then \
	  echo "Chromium was installed for the browser tests."; \
	elif $(PY) -m playwright install chromium >/dev/null 2>&1; then echo "Playwright's Chromium was installed for the browser tests."; \
	else echo "NOTE: no Chromium is here and none could be installed: the browser tests will be SKIPPED, which is not a pass."; fi

# Every notebook runs and its stored outputs are compared; README's 'For contributors' says what is compared.
notebooks-test: $(VENV)/.dev
	CUSTOM_LORA_ADAPTERS_DIR=$$(mktemp -d) $(PY) -m pytest --nbval --nbval-cell-timeout=1800 --timeout=3600 -q $(LESSONS)

exercises: setup
	$(PY) notebooks/exercises/make_exercises.py

# JupyterLab listens on this machine only and asks for the token that it prints.
lab: $(VENV)/.lab
	$(PY) -m jupyterlab --ServerApp.ip=127.0.0.1 --notebook-dir=notebooks

# The panel as a web page: on this machine only, at the address with the token that it prints. Ctrl-C ends it.
# KEEP=300 ARGS="--port=8866"   A tab's kernel ends KEEP seconds after its tab. (It is looked for, because the message
# that Voila's page sends when it is closed is refused where there is a token.)
KEEP := 300
app: $(VENV)/.lab
	@$(PY) -m voila notebooks/app/task_explorer.ipynb --Voila.ip=127.0.0.1 --token --no-browser \
	  --MappingKernelManager.cull_idle_timeout=$(KEEP) --MappingKernelManager.cull_interval=30 $(ARGS)

# The notebooks, this page and all others as one web site for reading: no kernel, no network. A warning is an error.
book: $(VENV)/.book
	@$(PY) tests/tools/book.py $(ARGS)

# Pictures of the real panel, in a real browser, with the shipped adapters.
images: browser
	$(PY) tests/tools/pictures.py

notebooks: $(VENV)/.lab exercises
	@for notebook in $(LESSONS); do $(EXECUTE) $$notebook || exit 1; done

# Runs every notebook (half an hour): what each needs, for notebooks/needs.json and README's table.
needs: setup
	$(PY) tests/tools/needs.py $(ARGS)

lock: $(VENV)/.dev
	@{ echo "# The exact versions that the tests ran with (Python 3.11, CPU). Made by: make lock"; \
	  $(PY) -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt.tmp && mv constraints.txt.tmp constraints.txt

# Known vulnerabilities of the pinned packages. Where the database is out of reach it says NOT AUDITED, which is no pass.
audit:
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && \
	  $(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1; }
	@$(VENV)-audit/bin/python tests/tools/audit.py

# The newest releases that pyproject.toml allows, in an environment of their own: which library broke what.
canary: setup
	$(PY) tests/tools/canary.py $(ARGS)

# Long runs: 1,000 swaps and generations; 50 kill-and-resume cycles.
soak: $(VENV)/.dev
	$(PY) tests/tools/soak.py $(ARGS)

# Benchmarks, each interleaved in one run, on a machine that does nothing else; JSON goes to runs/.
bench: setup
	@mkdir -p runs
	$(PY) tests/benchmarks/training.py --json runs/bench-training.json
	$(PY) tests/benchmarks/swap.py --out runs/bench-swap.json
	$(PY) tests/benchmarks/decode.py --json runs/bench-decode.json
	$(PY) tests/benchmarks/growth.py --json runs/bench-growth.json

clean:
	rm -rf $(VENV) $(VENV)-audit $(VENV)-canary .pytest_cache .ruff_cache .hypothesis
