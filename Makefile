.DEFAULT_GOAL := help
.PHONY: help setup check format test test-fast demo docs notebooks release bench chaos gpu
ROUNDS ?= 3

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-10s %s\n", $$1, $$2}'

setup:  ## Install everything, development tools included
	uv sync

check:  ## Format, lint, types and the direction of imports
	uv run ruff format --check .
	uv run ruff check .
	uv run ty check capray jobs
	uv run lint-imports

format:  ## Format and mend what can be mended
	uv run ruff format .
	uv run ruff check --fix .

test:  ## All tests
	uv run pytest

test-fast:  ## Tests without the slow ones
	uv run pytest -m "not slow"

demo:  ## Draw a data set, train, caption, evaluate, query: a few minutes
	uv run capray demo

docs:  ## Build the documentation into site/; a warning is an error
	uv run --group docs zensical build --strict --clean

release:  ## Build the wheel and run the demo with it alone, in an empty environment
	rm -rf dist && uv build
	cd $$(mktemp -d) && uv run --isolated --no-project --with $(CURDIR)/dist/*.whl capray demo

notebooks:  ## Execute the notebooks anew and keep what they print
	cd notebooks && rm -rf work && uv run jupyter execute --inplace *.ipynb

bench:  ## Print the benchmarks' figures beside their references
	uv run python benchmarks/captioning.py
	uv run python benchmarks/encoder.py
	uv run python benchmarks/beam.py
	uv run python benchmarks/writer.py
	uv run python benchmarks/planning.py
	uv run python benchmarks/streaming.py
	uv run python benchmarks/verification.py
	uv run python benchmarks/recipes.py
	uv run python benchmarks/training.py
	uv run python benchmarks/training.py --tutorial-sizes --batch-size 40 --repeats 2
	uv run python benchmarks/analysis.py
	uv run python benchmarks/serving.py
	uv run python benchmarks/memory.py
	uv run python benchmarks/first_caption.py
	uv run python benchmarks/through_ray.py

gpu:  ## Benchmarks and tests that need a CUDA device
	uv run python benchmarks/gpu.py
	uv run pytest -n0 -m gpu

chaos:  ## ROUNDS rounds of every kind of fault, each judged by the oracle
	uv run python -m tests.chaos --rounds $(ROUNDS)
