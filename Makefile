# All commands of nbgpu; `make` alone lists them. The work is done by the small programs in tools/.
PYTHON ?= python3
PORT ?= 8000
ARGS ?=
IN_VENV = PATH="$(CURDIR)/.venv/bin:$(CURDIR)/node_modules/.bin:$$PATH" VIRTUAL_ENV="$(CURDIR)/.venv"
VPY = $(IN_VENV) .venv/bin/python
PYTEST = NBGPU_HUB55_PYTHON="$(CURDIR)/.nbgpu/hub55/bin/python" $(VPY) -m pytest

.PHONY: help run setup test test-fast bench bench-hardware pictures lint format wheel soak clean
.DEFAULT_GOAL := help

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

run: ## set everything up and start JupyterHub at http://127.0.0.1:8000 (another port: make run PORT=9000)
	@$(PYTHON) tools/setup.py run
	@exec env $(IN_VENV) .venv/bin/python tools/run.py --port $(PORT)

setup: ## the set-up alone
	@$(PYTHON) tools/setup.py run

test: ## every test that this machine can run; says which it could not (one folder: make test ARGS=tests/hub)
	@$(PYTHON) tools/setup.py test
	@$(PYTEST) -m "not soak" $(ARGS)

test-fast: ## the tests to run all the time: under a minute, no hubs, no browser, no cluster
	@$(PYTHON) tools/setup.py test
	@$(PYTEST) -q -n 3 -m "not slow and not soak and not browser and not gpu" tests/unit tests/model tests/limiter tests/lab $(ARGS)

soak: ## the long kill storms and soaks, whole
	@$(PYTHON) tools/setup.py test
	@$(PYTEST) -m "soak" $(ARGS)

bench: ## the benchmarks, quick, with their baselines
	@$(PYTHON) tools/setup.py test
	@$(VPY) tools/bench.py $(ARGS)

pictures: ## the pictures of the docs, of JupyterLab and of the hub's pages, in both themes (needs Chromium; three minutes)
	@$(PYTHON) tools/setup.py test
	@$(VPY) tools/pictures.py $(ARGS)

bench-hardware: ## on a real GPU: is what the design takes for granted so; shares, limits, costs, kills (ten minutes; writes a report)
	@$(PYTHON) tools/setup.py run
	@$(VPY) bench/hardware.py $(ARGS)

lint: ## ruff, pyright, eslint, prettier, clang-format, C warnings as errors
	@$(PYTHON) tools/setup.py lint
	@$(VPY) tools/lint.py

format: ## let ruff, prettier and clang-format write what lint would ask for
	@$(PYTHON) tools/setup.py lint
	@$(VPY) tools/lint.py --write

wheel: ## the wheels that users install, into dist/
	@$(PYTHON) tools/setup.py run
	@$(VPY) tools/wheel.py

clean: ## remove all that the set-up made
	rm -rf .venv node_modules labextension/node_modules labextension/lib labextension/nbgpu_lab/labextension labextension/nbgpu_lab/monitor/monitor.js nodeagent/nbgpu_agent/_lib .nbgpu dist
