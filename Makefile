# Run
#   make run         ablate the shipped concepts on the embedded model and make the report (the first call also makes .venv)
#   make report      make the report again from the results that are there
#   make check       check the config, the table and all prompts; run nothing
#   make status      show which rows are done, running, ended or failed (WATCH=1: again every few seconds)
#   make demo        a page on this machine that draws any prompt by finished rows (PORT=7860; installs gradio)
#   make gc          list files that no row refers to (REMOVE=1: remove them)
#   make clean       remove results and caches, keep .venv
#   make embedded    train the embedded models again (hours)
# Test
#   make test        all tests that need no cluster and no GPU
#   make lint        ruff, snakefmt, snakemake --lint;  make format  mend what can be mended
#   make test-world  every kind of row on the embedded model (about 15 minutes)
#   make sweep       45 concepts that nobody tuned, by the defaults: how many come out (hours; bench/sweep.py has other ways)
#   make compare     13 concepts by each of the seven methods, at equal erasure: a table and a figure (hours; bench/compare.py)
#   make fuzz        thousands of malformed tables and configs
#   make chaos       kills, a full disk, damaged files (as root; half an hour)
#   make slurm-test  rows on a SLURM cluster that is started on this machine (as root; about 7 minutes)
#   make test-s3     results in a bucket: installs and starts an S3 server on this machine (about 5 minutes)
#   make page-test   the report in a browser: installs Debian's chromium if it is missing (as root; about a minute)
#   make demo-test   the page of make demo in a browser (installs as page-test does, and gradio)
# Everything runs in .venv. CORES=4 limits the cores; PYTHON=python3.12 picks the interpreter that makes .venv.
PYTHON ?= python3
CORES ?= all
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run check status gc test test-world slurm-test test-s3 page-test demo demo-test chromium sweep compare fuzz chaos lint format report embedded clean install
.DEFAULT_GOAL := run

install: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

run: .venv/.installed
	snakemake --cores $(CORES)

report: .venv/.installed
	snakemake --cores $(CORES) --forcerun aggregate_scores --until render_report

check: .venv/.installed
	python -m concept_ablation check

status: .venv/.installed
	python -m concept_ablation status $(if $(WATCH),--watch)

demo: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev,demo]'
	python -m concept_ablation demo $(if $(PORT),--port $(PORT))

gc: .venv/.installed
	python -m concept_ablation gc $(if $(REMOVE),--remove)

test: .venv/.installed
	OMP_NUM_THREADS=1 pytest --numprocesses auto --dist loadfile

test-world: .venv/.installed
	OMP_NUM_THREADS=1 pytest -m world

sweep: .venv/.installed
	python bench/sweep.py

compare: .venv/.installed
	snakemake --cores $(CORES) --configfile bench/compare.yaml
	python bench/compare.py

slurm-test: .venv/.installed
	OMP_NUM_THREADS=1 pytest -m slurm tests/slurm

test-s3: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev,s3-test]'
	OMP_NUM_THREADS=1 pytest -m s3

page-test: .venv/.installed chromium
	$(BIN)/pip install --quiet --editable '.[dev,page-test]'
	OMP_NUM_THREADS=1 pytest -m browser tests/test_page.py

demo-test: .venv/.installed chromium
	$(BIN)/pip install --quiet --editable '.[dev,page-test,demo]'
	OMP_NUM_THREADS=1 pytest -m demo tests/test_demo_page.py

chromium:
	[ -n "$$CHROMIUM" ] || command -v chromium || [ "$$(id -u)" != 0 ] || { apt-get -qq update && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core; }

fuzz: .venv/.installed
	pytest -m fuzz tests/test_fuzz.py

chaos: .venv/.installed
	OMP_NUM_THREADS=1 pytest -s -m chaos tests/chaos

lint: .venv/.installed
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	snakemake --lint

format: .venv/.installed
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow

embedded: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev,embedded]'
	python -m embedded.build

clean:
	rm -rf results .snakemake .pytest_cache .ruff_cache
