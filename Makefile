# Needs Python 3.10 or newer with pip, and make. Everything else comes into .venv and .tools here.

PYTHON ?= python3
UV := PYTHONPATH=.tools $(PYTHON) -m uv
# As pip does: trust what the system trusts, such as the certificates of a company's own network.
export UV_SYSTEM_CERTS ?= true
RUN := .venv/bin/python
READY := .venv/.ready

REFERENCE := build/reference

.DEFAULT_GOAL := help
.PHONY: help demo test test-prefect-versions test-install test-all chaos bench reference screenshots lint format lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 23

demo: $(READY) ## Publish a dozen images to a local S3 server, twice; ARGS=--serve keeps the pages up
	@$(RUN) -m flux_prefect.cli demo --flow flows/nightly_table.py:nightly_table $(ARGS)

test: $(READY) ## Run the tests; ARGS go to pytest
	@$(RUN) -m pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder $(ARGS)

test-prefect-versions: $(READY) ## Run the core tests on the oldest Prefect that is allowed and on the newest
	@UV="$(UV)" $(RUN) tests/prefect_versions.py $(ARGS)

test-install: $(READY) ## Install the wheel without the lock on Python 3.10 and 3.13 and run the demo there
	@UV="$(UV)" $(RUN) tests/fresh_installs.py $(ARGS)

test-all: test test-prefect-versions test-install chaos ## Run everything: the tests, the ends of the allowed Prefects and Pythons, the long chaos

chaos: $(READY) ## Kill, stop, move and retry runs of 200 images 200 times and verify images and sums (about half an hour)
	@PYTHONPATH=. $(RUN) tests/chaos.py $(ARGS)

bench: $(READY) ## Measure time, memory and CPU (ten to fifteen minutes); ARGS=--help lists the benchmarks
	@$(RUN) -m tests.benchmarks $(ARGS)

reference: $(READY) ## Build the API reference in build/reference/index.html
	@$(RUN) -m pdoc --docformat google --no-show-source --template-directory .pdoc \
		--output-directory $(REFERENCE) \
		$$($(RUN) -c "from flux_prefect import _MODULES; print('flux_prefect.errors', *sorted(set(_MODULES.values())))")

screenshots: $(READY) ## Take the screenshots of the documentation again; needs Chromium
	@PYTHONPATH=tests $(RUN) -m browser.screenshots

lint: $(READY) ## Check style, format and types
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

format: $(READY) ## Format the code
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

lock: .tools/uv ## Update the lock files from pyproject.toml
	@$(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes --extra dev \
		--no-header --no-annotate pyproject.toml --output-file requirements.txt
	@echo uv | $(UV) pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes \
		--no-header --no-annotate - --output-file requirements-uv.txt

clean: ## Remove everything that make has built
	rm -rf .venv .tools .demo .sandbox build .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(READY): requirements.txt pyproject.toml .tools/uv
	@echo "Installing the locked packages into .venv (once; about 500 MB) ..."
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	@$(UV) pip sync --quiet --python $(RUN) --require-hashes requirements.txt
	@$(UV) pip install --quiet --python $(RUN) --no-deps --no-build-isolation --editable .
	@touch $@

.tools/uv: requirements-uv.txt
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade --target .tools --require-hashes -r $<
	@touch $@
