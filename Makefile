# make test    everything: lint, then all tests against real Prefect servers and engines
# make lint    ruff and mypy
# make torture kills agents at every failpoint and 200 times at random; SEED=n, KILLS=n, MINUTES=n
# make units   the packages and units on booted Debians, each system with each form of the binary; needs root
# make packages .deb, .rpm and .tar.gz in dist/
# make release all that the page of a release holds in dist/release/, and a table of it
# make generate completions and agent.toml(5) after a change of commands or docs/configuration.md
# make bench   flow-agent beside the real Prefect worker and agent, in one session, as ratios in docs/benchmarks.md; ROUNDS=n
# make scale   what 500 live runs cost the agent, and what 2,000 leave behind in it
# make binary  dist/flow-agent and dist/onedir/: what people download, and what the packages hold
# make demo    a Prefect server, the agent and three flow runs, shown live and removed again
#
# Nothing is installed outside .venv and the test cache (~/.cache/flow-agent-tests, or $FLOW_AGENT_TEST_CACHE).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: bench scale binary demo test torture units lint envs machines packages release generate

SERVERS := 3.8.8 2.20.26
ENGINES := 3.4.25 3.6.29
DEMO := 3.8.8
# One more than cores: half of a test is waiting for a server or an engine.
JOBS ?= $(shell echo $$(( $$(nproc) + 1 )))

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input

test:
	@$(MAKE) --no-print-directory --jobs 4 lint envs machines binary  # at once: much of it is waiting for the network
	$(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal --durations=15

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

torture: envs $(VENV)/.dev
	$(VENV)/bin/python -m tests.torture --jobs $(JOBS) $(if $(SEED),--seed $(SEED)) $(if $(KILLS),--kills $(KILLS)) $(if $(MINUTES),--minutes $(MINUTES))

units: envs machines
	FLOW_AGENT_ALL_UNITS=1 $(VENV)/bin/python -m pytest --numprocesses 2 -rP tests/test_units.py

binary: $(VENV)/.dev
	$(VENV)/bin/python packaging/binary/build.py

packages: binary
	$(VENV)/bin/python packaging/build.py

release: binary
	$(VENV)/bin/python packaging/release.py

generate: $(VENV)/.dev
	$(VENV)/bin/python packaging/generate.py

demo: $(VENV)/.installed
	$(VENV)/bin/flow-agent demo --python "$$($(VENV)/bin/python tests/envs.py $(DEMO))"

bench: binary envs
	$(VENV)/bin/python -m benchmarks $(if $(ROUNDS),--rounds $(ROUNDS))

scale: envs
	$(VENV)/bin/python -m benchmarks.scale

envs: $(VENV)/.dev  # two at a time: some of it is waiting for the network
	@printf '%s\n' $(SERVERS) $(ENGINES) | xargs -P 2 -n 1 $(VENV)/bin/python tests/envs.py >/dev/null

machines: $(VENV)/.dev
	@printf '%s\n' bookworm trixie | xargs -P 2 -n 1 $(VENV)/bin/python -m tests.machines >/dev/null

# An older pip does not know dependency groups, so a new one comes first.
$(VENV)/.installed: pyproject.toml
	@if [[ -z "$(PYTHON)" ]]; then echo "cannot find Python 3.11 or later; on Debian and Ubuntu: apt install python3" >&2; exit 1; fi
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "cannot make a virtual environment: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --quiet --group dev --group release
	@touch $@
