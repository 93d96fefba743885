# byokeep: `make help` lists what there is. Needs Python >= 3.11 and nothing else.
SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
# Tests start hundreds of processes, which need not compile their modules each anew.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
PYTEST_ARGS ?=
# Many tests wait for processes: more workers than cores.
WORKERS ?= 3
export BENCH_SECONDS
export ROUNDS

BIN := .venv/bin
VENV := .venv/.stamp
PACKAGE := clients/python/src/byokeep
STUBS := $(PACKAGE)/common/v1/options_pb2.py
PROTOS := $(shell find protos -name '*.proto') protos/generate.py
LINTED := services deploy docs tests clients/python/src/byokeep protos
LOCKED := keyvault aws_kms orchestrator llm_runner
# What no service runs on: images tools and all-in-one, and what builds images.
LOCKED_TOO := tools local images
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-header --no-emit-index-url --no-emit-package byokeep

.PHONY: help run prove up down status clean test test-deep test-integration test-clients chaos test-observability mutants lint bench simulate docs protos lock setup

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  DIFF=FILE         make run: review this git diff instead of the one shipped"
	@echo "  LIVE=1            make run, make up: real provider hosts, with your own key"
	@echo "  PORTS='NAME=N …'  make up: listen there, such as orchestrator=50051 emulator-control=8081"
	@echo "  ONLY=NAME         make prove: this attack alone; ONLY=list names them"
	@echo "  BYOKEEP_STATE=DIR make up, down, status, clean: where the stack lives"
	@echo "  PYTEST_ARGS=...   make test: arguments for pytest"
	@echo "  WORKERS=N         make test: processes that run tests (3)"
	@echo "  BYOKEEP_TEST_VAULT=openbao  make test-integration: on OpenBao, not on Vault"
	@echo "  ROUNDS=N          make chaos: kills, each at another step or of another process (20)"
	@echo "  BENCH_SECONDS=N   make bench: seconds per measurement"
	@echo "  PYTHON=python3.x  the Python >= 3.11 that .venv is made with"

run: $(VENV) $(STUBS) ## show byokeep: throwaway stack, a key, a review, its custody trail
	@$(BIN)/python -m deploy.local run $(if $(DIFF),--diff "$(DIFF)") $(if $(LIVE),--live)

up: $(VENV) $(STUBS) ## start a stack that stays, with tenant demo and a profile for .venv/bin/byokeep
	@$(BIN)/python -m deploy.local up $(if $(LIVE),--live) $(PORTS:%=--port=%)

# What was never set up does not run: it need not be set up to be told so. 3: it is down.
down: ## stop it; its data stays
	@if [ -e $(STUBS) ] && [ -e $(VENV) ]; then $(BIN)/python -m deploy.local down; \
	else echo "nothing runs: there is no .venv"; fi

status: ## say which of its processes run and serve
	@if [ -e $(STUBS) ] && [ -e $(VENV) ]; then $(BIN)/python -m deploy.local status || [ $$? -eq 3 ]; \
	else echo "down: there is no .venv"; fi

prove: $(VENV) $(STUBS) ## attack a throwaway stack, show how each attack is stopped; fail if one gets through
	@$(BIN)/python -m deploy.local prove $(if $(filter list,$(ONLY)),--list,$(if $(ONLY),--only "$(ONLY)"))

clean: ## stop the stack; erase its data, .venv, build and generated stubs
	@if [ -e $(STUBS) ] && [ -e $(VENV) ]; then $(BIN)/python -m deploy.local clean; fi
	rm -rf .venv .byokeep build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf $(PACKAGE)/common $(PACKAGE)/keyvault $(PACKAGE)/orchestrator $(PACKAGE)/runner $(PACKAGE)/_buf
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# In the order of the folders, the many quick unit tests last: they fill up the end.
test: $(VENV) $(STUBS) ## unit, component and security tests, on a real PostgreSQL and real processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not deep" $(PYTEST_ARGS)

test-deep: $(VENV) $(STUBS) ## the long rounds: memory scans, kill -9, a million fuzzed inputs; ATTACKS=2000
	BYOKEEP_FUZZ_INPUTS=1000000 BYOKEEP_ATTACK_EXAMPLES="$(or $(ATTACKS),2000)" \
		$(BIN)/python -m pytest -n $(WORKERS) --dist load \
		-m "deep or fuzz" $(PYTEST_ARGS)

test-clients: $(VENV) $(STUBS) ## the packages as others install them: wheels, Go, TypeScript, byokeep.testing, CI
	$(BIN)/python -m pytest tests/clients --timeout 600 $(PYTEST_ARGS)

test-integration: $(VENV) $(STUBS) ## tests on a real Vault or OpenBao; a Vault is built the first time (five minutes)
	$(BIN)/python -m tests.harness.vault_binary
	$(BIN)/python -m pytest tests/integration --timeout 300 $(PYTEST_ARGS)

chaos: $(VENV) $(STUBS) ## kill each process at each step of a review and of a key, and count; ROUNDS=n
	$(BIN)/python -m tests.chaos

# Containers and clusters.
.PHONY: images test-images compose-up compose-down test-kubernetes policies

images: $(VENV) $(STUBS) ## build the images of all zones with `docker`; TAG=dev
	@$(BIN)/python -m deploy.docker build --tag "$(or $(TAG),dev)"

test-images: $(VENV) $(STUBS) ## build the images; look at what is in them (starts a Docker engine where none runs)
	$(BIN)/python -m pytest tests/images $(PYTEST_ARGS)

test-kubernetes: $(VENV) $(STUBS) ## deploy overlay dev on a one-node cluster; kill, roll, rotate, drain, try each edge
	$(BIN)/python -m tests.kubernetes.cluster
	$(BIN)/python -m pytest tests/kubernetes $(PYTEST_ARGS)

compose-up: $(VENV) $(STUBS) ## build the images and start them with Compose: OpenBao, PostgreSQL, tenant demo
	@$(BIN)/python -m deploy.docker build >/dev/null
	@$(BIN)/python -m deploy.compose up $(if $(LIVE),--live)

compose-down: $(VENV) $(STUBS) ## stop them; VOLUMES=1 erases their data
	@$(BIN)/python -m deploy.compose down $(if $(VOLUMES),--volumes)

policies: $(VENV) ## make the NetworkPolicies and the document's table of edges anew
	@$(BIN)/python -m deploy.kubernetes.policies

test-observability: $(VENV) $(STUBS) ## alert rules, dashboard and metrics with the real Prometheus, from Debian
	$(BIN)/python -m pytest tests/observability --timeout 240 $(PYTEST_ARGS)

mutants: $(VENV) $(STUBS) ## remove each protection in a copy; its test must fail (half an hour)
	$(BIN)/python -m tests.mutants

lint: $(VENV) $(STUBS) build/image.binpb ## ruff, mypy --strict, import-linter, sizes, buf
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy services deploy docs $(PACKAGE)
	$(BIN)/lint-imports
	$(BIN)/python -m tests.sizes
	$(BIN)/buf lint build/image.binpb --config protos/buf.yaml
	$(BIN)/buf breaking build/image.binpb --against protos/baseline.binpb --config protos/buf.yaml

bench: $(VENV) $(STUBS) ## measure; writes build/bench/results.json
	$(BIN)/python -m tests.bench

simulate: $(VENV) ## where byokeeps of some sizes bend: docs/scaling.md's table and picture
	@$(BIN)/python -m docs.scaling

docs: $(VENV) $(STUBS) ## build the documentation as a site, into build/site
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/docs.txt
	@$(BIN)/python -m docs.site

protos: $(STUBS) ## make the Python stubs from protos/
	@:

lock: $(VENV) ## pin and hash requirements/*.txt anew from the pyproject files
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-emit-index-url --no-annotate requirements/bootstrap.in -o requirements/bootstrap.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-emit-index-url --no-annotate requirements/openbao.in -o requirements/openbao.txt
	for service in $(LOCKED) $(LOCKED_TOO); do \
		$(COMPILE) --extra $$service pyproject.toml -o requirements/$$service.txt || exit 1; done
	$(COMPILE) --extra docs pyproject.toml -o requirements/docs.txt
	$(COMPILE) $(foreach extra,$(LOCKED) local dev,--extra $(extra)) pyproject.toml \
		-o requirements/dev.txt

setup: $(VENV) $(STUBS) ## only make .venv and the stubs
	@:

$(VENV): requirements/bootstrap.txt requirements/dev.txt pyproject.toml clients/python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "byokeep needs Python >= 3.11; say which with PYTHON=..."; exit 1; }
	@echo "setting up .venv"
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/bootstrap.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e clients/python
	@touch $@

$(STUBS): $(VENV) $(PROTOS)
	@mkdir -p build
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python protos/generate.py >build/protos.log 2>&1 || \
		{ cat build/protos.log; exit 1; }
	@touch $@

build/image.binpb: $(VENV) $(PROTOS)
	@mkdir -p build
	@$(BIN)/python protos/generate.py --image $@
