# make simulate: a federation of 50 clients on this machine.  make test: the tests.  Both make .venv first.
PYTHON ?= python3

.PHONY: simulate test lint

simulate: .venv/installed
	.venv/bin/fedlora simulate --clients 50

test: .venv/installed
	.venv/bin/python -m pytest

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The exact versions that were run. A torch that is installed already is kept where it satisfies them.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,dev]'
	touch .venv/installed
