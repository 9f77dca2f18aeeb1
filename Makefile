# Longyarn. `make` sets everything up and runs the embedded default; `make test` tests; see README.md.
SHELL := bash
PYTHON ?= python3
VENV := .venv
CORES ?= 2
CONFIG ?=
PROFILE ?=
TORCH_INDEX_URL ?=
ifneq ($(CONFIG),)
ifeq ($(wildcard $(CONFIG)),)
$(error config file $(CONFIG) is missing; mend CONFIG)
endif
endif
ifneq ($(PROFILE),)
ifeq ($(wildcard $(PROFILE)/config.yaml),)
$(error profile $(PROFILE) has no config.yaml; mend PROFILE)
endif
endif
LAYERED := $(if $(PROFILE),--workflow-profile $(PROFILE)) $(if $(CONFIG),--configfile $(CONFIG))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONNOUSERSITE := 1

.PHONY: run setup setup-dev setup-slurm setup-harness test test-slurm lint bench micro-base plan prefetch preflight lock image sif test-containers accept verify bundle clean clean-work

run: setup
	snakemake --cores $(CORES) $(LAYERED)

setup: $(VENV)/.run
setup-dev: $(VENV)/.dev
setup-slurm: $(VENV)/.slurm
setup-harness: $(VENV)/.harness

# torch alone first, so that pip's configuration (or TORCH_INDEX_URL) decides on the build; then all
# the rest, complete and hash-checked, so that nothing unpinned can come along.
$(VENV)/.run: envs/torch.txt envs/build.txt envs/run.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 13) else \
	"error: Longyarn is locked for Python 3.11 and 3.12; run `make PYTHON=python3.11`")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) -r envs/torch.txt
	python -m pip install --quiet --require-hashes --no-deps -r envs/build.txt
	python -m pip install --quiet --require-hashes --no-deps --no-build-isolation -r envs/run.txt
	python -m pip check
	touch $@

$(VENV)/.dev: $(VENV)/.run envs/dev.txt
	python -m pip install --quiet --require-hashes --no-deps -r envs/dev.txt
	touch $@

# What submits to SLURM. Not part of setup: every Snakemake then starts most of a second later.
$(VENV)/.slurm: $(VENV)/.run envs/slurm.txt
	python -m pip install --quiet --require-hashes --no-deps -r envs/slurm.txt
	python -m pip check
	touch $@

# lm_eval, for evaluation.harness. Not part of setup: most runs do without its many packages.
$(VENV)/.harness: $(VENV)/.run envs/harness.txt
	python -m pip install --quiet --require-hashes --no-deps --no-build-isolation -r envs/harness.txt
	python -m pip check
	touch $@

# Suites that need Debian packages skip without them, and say so; test-slurm installs SLURM, as root.
# In two processes, each with whole suites, in the order of tests/conftest.py.
test: setup-dev setup-slurm setup-harness
	python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slurm: setup-dev setup-slurm
	tests/slurm/install
	python -m pytest tests/test_slurm.py

test-containers: setup-dev
	tests/containers/install
	python -m pytest tests/test_containers.py

lint: setup-dev
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint

# All rows, or some: make bench ROWS="noop_vs_version passkey_vs_generate".
ROWS ?=
bench: setup-dev
	python benchmarks/run.py $(ROWS)

# What needs the network; and what can be checked before the first job (docs/cluster.md).
prefetch preflight: setup
	snakemake --cores $(CORES) $(LAYERED) -- $@

# What the run would cost, from the config alone; it refuses a plan that cannot fit (docs/planning.md).
plan: setup
	python scripts/plan.py $(if $(PROFILE),--profile $(PROFILE)) $(if $(CONFIG),--configfile $(CONFIG))

# Train the micro base model anew, from the same books. It is committed, so nobody needs to.
micro-base: setup
	snakemake --cores $(CORES) micro_base
	cp results/micro/micro_base/* resources/micro-base/

# Write the hash-locked requirements from the short .in files.
lock: setup-dev
	python envs/lock.py

# The image of the stages, cpu or cuda (containers/README.md): pushed, or as one file without root.
IMAGE ?= cpu
REGISTRY ?=
BUILD = python containers/build.py --image $(IMAGE) $(if $(TORCH_INDEX_URL),--torch-index-url $(TORCH_INDEX_URL))
image: setup
	$(BUILD) push --registry "$(REGISTRY)"
sif: setup
	$(BUILD) sif $(if $(CONFIG),--config $(CONFIG))

# Declare that changed code makes no difference to results; docs/reruns.md says when that is right.
accept: setup
	snakemake --touch --cores 1 $(LAYERED)

# Whether a finished run is what was sealed, file by file (docs/provenance.md).
RUN ?=
verify: setup
	$(if $(RUN),,$(error no run is named; say `make verify RUN=results/micro`))
	@python scripts/verify.py "$(RUN)"

# One archive of a finished run, to verify and to evaluate it elsewhere.
bundle: setup
	snakemake --cores $(CORES) $(LAYERED) -- bundle

# What training left in the work directory that no run will go on from; DELETE=1 removes it.
# WORK is paths.work of the config.
WORK ?= work
DELETE ?=
clean-work: setup
	python scripts/clean_work.py --work $(WORK) $(if $(DELETE),--delete)

clean:
	rm -rf results work .snakemake
