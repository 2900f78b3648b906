# The commands for newcomers and CI; each target installs what it needs into .venv.
PYTHON ?= python3
BIN := .venv/bin
# Worker processes for tests: on two cores one more, because tests on the Slurm cluster mostly wait.
WORKERS ?= 3

.PHONY: quickstart test test-slow test-gpu fuzz lint bench scale soak ablations plots wheel clean

quickstart: .venv/quickstart
	$(BIN)/mc2 quickstart

test: .venv/dev lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow --timeout 3600

test-gpu: .venv/dev
	$(BIN)/python -m pytest -m gpu

# Sends 2,000 damaged inputs of every kind through every command; under ten minutes on two idle cores.
fuzz: .venv/dev
	$(BIN)/python -m tests.fuzz.lane --inputs 2000 --jobs 2 --json benchmarks/results/fuzz.json

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev
	$(BIN)/mc2 bench train --json benchmarks/results/train.json
	$(BIN)/mc2 bench contrastive --json benchmarks/results/contrastive.json
	$(BIN)/mc2 bench distillation --json benchmarks/results/distillation.json
	$(BIN)/mc2 bench loader --json benchmarks/results/loader.json
	$(BIN)/mc2 bench curation --json benchmarks/results/curation.json
	$(BIN)/mc2 bench fetch --json benchmarks/results/fetch.json
	$(BIN)/mc2 bench dedup --json benchmarks/results/dedup.json
	$(BIN)/mc2 bench plan --json benchmarks/results/plan.json
	$(BIN)/mc2 bench train_less --json benchmarks/results/train_less.json
	$(BIN)/mc2 bench checkpoint --json benchmarks/results/checkpoint.json
	$(BIN)/mc2 bench faults --json benchmarks/results/faults.json
	$(BIN)/mc2 bench eval --json benchmarks/results/eval.json
	$(BIN)/mc2 bench tune --json benchmarks/results/tune.json
	$(BIN)/mc2 bench kernels --json benchmarks/results/kernels.json
	$(MAKE) plots

scale: .venv/dev
	$(BIN)/python -m benchmarks.scale_curation --json benchmarks/results/scale_curation.json
	$(MAKE) plots

soak: .venv/dev
	$(BIN)/python -m benchmarks.soak --minutes 30 --json benchmarks/results/soak.json

# DATA: folder with CIFAR-10 and the Babel-ImageNet labels (docs/ablations.md).
ablations: .venv/dev
	$(BIN)/python -m benchmarks.ablations $(DATA) --json benchmarks/results/ablations.json
	$(BIN)/mc2 quickstart
	$(BIN)/python -m benchmarks.ablations --quickstart runs/quickstart --json benchmarks/results/digits_ablations.json
	$(MAKE) plots

plots: .venv/dev
	$(BIN)/python -m benchmarks.plot

wheel: .venv/dev
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip

.venv/quickstart: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/pip install --quiet -e '.[quickstart]'
	touch $@

.venv/dev: pyproject.toml setup.py | .venv/bin/python
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info runs
