# Thin names for what scripts/ and the tools of .venv do.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-ascend quality style

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: ## Make .venv for CPU
	@bash scripts/setup_cpu.sh

demo: ## Edit SmolLM2, serve it and ask it something
	@bash scripts/demo.sh

test: ## Everything that CI runs; SUITE=quality, unit, integration, ascend or e2e for a part
	@bash scripts/test.sh $(SUITE)

test-ascend: ## The Ascend side, without an NPU; SUITE=backend or kernels for a part
	@bash scripts/test_ascend.sh $(SUITE)

quality: ## Lint, format check, types; changes nothing
	@bash scripts/test.sh quality

style: setup ## Mend what ruff can mend, then format
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
