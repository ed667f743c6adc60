# Each target makes the environments that it needs, .venv or .venv-*. Another interpreter:
# make test PYTHON=python3.12
PYTHON ?= python3

.PHONY: demo check test test-newest test-oldest lint bench docs dist
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: .venv/.experiments
	.venv/bin/python -m experiments.digits --workdir runs/digits

# The tests that notice most for their time: rules of the source, every cell by hand, one
# network, energy, conversion, a step, a checkpoint, batches, flags.
CHECK = design words surrogate neurons unroll encode losses norm trace split frames \
	recipe step checkpoint nir_layers vgg cli hlo

check: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/python -m pytest -q -n 2 --dist worksteal $(CHECK:%=tests/test_%.py)

test: .venv/.dev
	.venv/bin/python -m pytest -q -n 2 --dist worksteal

test-newest: .venv-newest/.dev
	.venv-newest/bin/python -m pytest -q -n 2 --dist worksteal

test-oldest: .venv-oldest/.test
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal

bench: .venv/.experiments .venv-peers/.peers
	.venv/bin/python -m benchmarks.versus --workdir runs/bench \
		--peers .venv-peers/bin/python

docs: .venv/.docs
	.venv/bin/mkdocs build --strict

# The wheel as a user has it: in an empty environment, away from the source.
dist: .venv-build/.build
	rm -rf dist .venv-dist
	.venv-build/bin/python -m build
	$(call install,.venv-dist,dist/*.whl -c constraints.txt)
	cd .venv-dist && bin/python -c 'import spikejax; print(spikejax.__file__)'
	$(call install,.venv-dist,"$$(echo dist/*.whl)[experiments]" -c constraints.txt)
	cd .venv-dist && bin/python -m experiments.digits --neuron lif --steps 20 \
		--workdir digits

lint: .venv/.dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright --pythonpath .venv/bin/python

.venv/.experiments: pyproject.toml constraints.txt
	$(call install,.venv,-e '.[experiments]' -c constraints.txt)

.venv/.dev: pyproject.toml constraints.txt
	$(call install,.venv,-e '.[dev]' -c constraints.txt)

.venv-newest/.dev: PYTHON = python3.13
.venv-newest/.dev: pyproject.toml constraints.txt
	$(call install,.venv-newest,-e '.[dev]' -c constraints.txt)

.venv/.docs: pyproject.toml constraints.txt
	$(call install,.venv,-e '.[docs]' -c constraints.txt)

.venv-build/.build:
	$(call install,.venv-build,build)

.venv-oldest/.test: pyproject.toml constraints-oldest.txt
	$(call install,.venv-oldest,-e '.[experiments]' pytest pytest-xdist \
		hypothesis lz4 zstandard \
		-c constraints-oldest.txt)

# SpikingJelly asks for more than it imports: torchvision, tensorboard and others.
.venv-peers/.peers: constraints-peers.txt
	$(call install,.venv-peers,torch snntorch spyx loguru tqdm \
		-c constraints-peers.txt)
	$(call install,.venv-peers,--no-deps spikingjelly -c constraints-peers.txt)

# $(call install,environment,arguments of pip)
define install
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"spikejax needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing into $(1) (a minute or two)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check $(2)
	@touch $@
endef
