# Longyarn. `make` sets everything up and runs the embedded default. `make help` lists the targets.
SHELL := bash
PYTHON ?= python3
VENV := .venv
CORES ?= 2
CONFIG ?=
PROFILE ?=
TORCH_INDEX_URL ?=
ifneq ($(CONFIG),)
ifeq ($(wildcard $(CONFIG)),)
$(error config file $(CONFIG) is missing; fix CONFIG)
endif
endif
ifneq ($(PROFILE),)
ifeq ($(wildcard $(PROFILE)/config.yaml),)
$(error profile $(PROFILE) has no config.yaml; fix PROFILE)
endif
endif
LAYERED := $(if $(PROFILE),--workflow-profile $(PROFILE)) $(if $(CONFIG),--configfile $(CONFIG))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PYTHONNOUSERSITE := 1

.PHONY: help run setup setup-dev setup-slurm setup-harness test test-slurm lint bench micro-base plan reference prefetch preflight lock image sif test-containers accept verify bundle clean clean-work

run: setup ## Set up, then run the default, or CONFIG=mine.yaml
	snakemake --cores $(CORES) $(LAYERED)

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.* ## (.*)/\1|\2/p' Makefile | awk -F '|' '{printf "make %-16s %s\n", $$1, $$2}'
	@echo "Variables: CONFIG=mine.yaml PROFILE=profiles/slurm CORES=2 PYTHON=python3 TORCH_INDEX_URL=…"

setup: $(VENV)/.run ## Create .venv with what envs/ locks
setup-dev: $(VENV)/.dev ## Add what tests and linters need
setup-slurm: $(VENV)/.slurm ## Add Snakemake's SLURM plugin
setup-harness: $(VENV)/.harness ## Add lm_eval, for evaluation.harness

# torch comes first, so that pip's configuration (or TORCH_INDEX_URL) chooses the build. Everything else is
# then installed from complete lists with hashes, so that nothing unpinned gets in.
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

# Not part of setup, because every Snakemake starts most of a second later with this plugin.
$(VENV)/.slurm: $(VENV)/.run envs/slurm.txt
	python -m pip install --quiet --require-hashes --no-deps -r envs/slurm.txt
	python -m pip check
	touch $@

# Not part of setup, because most runs do without lm_eval's many packages.
$(VENV)/.harness: $(VENV)/.run envs/harness.txt
	python -m pip install --quiet --require-hashes --no-deps --no-build-isolation -r envs/harness.txt
	python -m pip check
	touch $@

# Suites that need Debian packages skip without them, and say so. Each of the two processes runs whole suites,
# in the order of tests/conftest.py.
test: setup-dev setup-slurm setup-harness ## Run all tests
	python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slurm: setup-dev setup-slurm ## Install SLURM (as root) and run its tests
	tests/slurm/install
	python -m pytest tests/test_slurm.py

test-containers: setup-dev ## Install container tools (as root) and run their tests
	tests/containers/install
	python -m pytest tests/test_containers.py

lint: setup-dev ## Run all linters
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules resources
	snakemake --lint

ROWS ?=
bench: setup-dev ## Run the benchmarks, or some: ROWS="noop_vs_version merge_time_vs_peft"
	python benchmarks/run.py $(ROWS)

# docs/cluster.md
prefetch: setup ## Download everything that the run of CONFIG needs
preflight: setup ## Make the checks that come before the first job of CONFIG
prefetch preflight:
	snakemake --cores $(CORES) $(LAYERED) -- $@

# From the configuration alone (docs/planning.md).
plan: setup ## Print what the run of CONFIG will cost; refuse what cannot fit
	python scripts/plan.py $(if $(PROFILE),--profile $(PROFILE)) $(if $(CONFIG),--configfile $(CONFIG))

micro-base: setup ## Train the micro base model again; it is committed, so nobody needs to
	snakemake -s resources/micro-base/training/Snakefile --cores $(CORES)
	cp results/micro/micro_base/* resources/micro-base/

reference: setup ## Write the reference of all keys in docs/configuration.md from the schema
	PYTHONPATH=scripts python -m longyarn.config.reference

lock: setup-dev ## Write the hash-locked requirements from envs/*.in
	python envs/lock.py

# containers/README.md
IMAGE ?= cpu
REGISTRY ?=
BUILD = python containers/build.py --image $(IMAGE) $(if $(TORCH_INDEX_URL),--torch-index-url $(TORCH_INDEX_URL))
image: setup ## Build and push the image IMAGE=cpu or cuda to REGISTRY=…
	$(BUILD) push --registry "$(REGISTRY)"
sif: setup ## Build the image IMAGE=cpu or cuda as one file, without root
	$(BUILD) sif $(if $(CONFIG),--config $(CONFIG))

accept: setup ## Declare that changed code changes no result; see docs/reruns.md first
	snakemake --touch --cores 1 $(LAYERED)

# docs/provenance.md
RUN ?=
verify: setup ## Compare the files of RUN=results/micro with its seal
	$(if $(RUN),,$(error no run is named; say `make verify RUN=results/micro`))
	@python scripts/verify.py "$(RUN)"

bundle: setup ## Pack a finished run and its workflow into one archive
	snakemake --cores $(CORES) $(LAYERED) -- bundle

# WORK is paths.work of the configuration.
WORK ?= work
DELETE ?=
clean-work: setup ## List the training directories that no run will resume; DELETE=1 removes them
	python scripts/clean_work.py --work $(WORK) $(if $(DELETE),--delete)

clean: ## Remove results, training directories and Snakemake's records
	rm -rf results work .snakemake
