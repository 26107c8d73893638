# `make up` starts everything a newcomer needs; `make test` is all that CI runs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SITE := _site
DOCS_PORT ?= 8000

.PHONY: up down lean install lint check chromium docs docs-check test test-pythons test-failover soak bench clean

up: lean
	$(BIN)/millpond up

down: lean
	$(BIN)/millpond down

INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

# What users need. `install` adds the tools of developers to the same environment, so it is enough for users, too.
lean: $(VENV)/.lean

install: $(VENV)/.installed

# Installed again when the requirements change.
$(VENV)/.lean: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) '.[local,emqx,otel]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) '.[local,emqx,otel,docs,dev]'
	touch $(VENV)/.lean $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What a change needs before every commit, in about a minute: no simulation, no coverage, nothing started.
check: lint
	$(BIN)/pytest tests/unit --numprocesses auto --quiet

# Strict: a broken link, or a document that no index lists, fails.
docs-check: install
	$(BIN)/sphinx-build -W --keep-going -q -b html docs $(SITE)

docs: docs-check
	@echo 'The documentation is at http://127.0.0.1:$(DOCS_PORT)/ until Ctrl-C.'
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) $(DOCS_PORT)

# The web page is tested in a real browser, which is in no package registry: Debian's.
chromium:
	@command -v chromium >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { \
			echo 'The tests need chromium on the PATH. On Debian: sudo apt-get install chromium' >&2; exit 1; }; \
		apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; }

# Files whose tests take long begin first, or all would wait for them in the end.
LONGEST := cli/test_stack worker/test_faults web/test_web emqx/test_durable_producer test_readme emqx/test_rule_events \
	worker/test_rebuild worker/test_pubsub_crowd worker/test_queue_crowd worker/test_replay

# The unit tests on the other Pythons that this machine has, on the PATH or by pyenv.
test-pythons:
	@for version in 3.12 3.13; do \
		python=; \
		for each in python$$version $$(ls -d $$(pyenv root 2>/dev/null)/versions/$$version.*/bin/python 2>/dev/null); do \
			if $$each -c '' 2>/dev/null; then python=$$each; fi; \
		done; \
		if [ -z "$$python" ]; then echo "Python $$version is not installed: its tests do not run" >&2; continue; fi; \
		directory=$(VENV)-$$version; \
		echo "Python $$version"; \
		$$python -m venv $$directory && \
		$$directory/bin/python $(INSTALL) '.[local,emqx,otel,dev]' && \
		$$directory/bin/pytest tests/unit --numprocesses auto --quiet || exit 1; \
	done

test: lint docs-check chromium test-pythons
	$(BIN)/pytest tests/unit tests/simulation --numprocesses auto --cov --cov-report=term-missing:skip-covered
	$(BIN)/python -m tests.simulation --agent queue --first 1000 --seeds 600
	$(BIN)/pytest $(LONGEST:%=tests/system/%.py) tests/contracts tests/system \
		--numprocesses 3 --dist loadfile --no-loadscope-reorder

# Sentinel, a Redis Cluster, three Kafka brokers: servers with redundancy fail under load, for some minutes.
test-failover: install
	$(BIN)/pytest tests/failover

# Long simulations, and failovers: more than CI has time for.
soak: install test-failover
	$(BIN)/python -m tests.simulation

bench: install
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) $(VENV)-* $(SITE) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage
