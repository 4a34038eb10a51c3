# make results · make test · make study · make publish (and make clean-study, make clean)
SHELL := /bin/bash
PYTHON ?= python3.11
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Numbers must not depend on how many cores a library finds.
export OMP_NUM_THREADS := 1
INSTALLED := .venv/installed

.PHONY: results test study publish lint clean-study clean

# The quick study from a fresh clone: figures in results/quick/figures, the page in results/quick/report.
results: $(INSTALLED)
	snakemake --config study=quick --quiet rules
	snakemake --config study=quick --quiet all --report logs/quick-report.html
	@echo "Open results/quick/report/report.html; figures are in results/quick/figures."

# Linters and all tests.
test: lint
	python -m pytest

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	mypy
	snakemake --lint

# The published study, the one that config/config.yaml names.
study: $(INSTALLED)
	snakemake

# The published study's artifacts into DVC, DVC's store and Git.
publish: $(INSTALLED)
	@snakemake --dry-run --quiet all | grep -q "Nothing to be done" || \
		{ echo "publish: results are stale: run make study first" >&2; exit 2; }
	@before=$$(du -sk dvc-store 2>/dev/null | cut -f1); \
	dvc commit --force --quiet && dvc push --quiet && \
	after=$$(du -sk dvc-store | cut -f1) && \
	echo "dvc-store grew by $$((after - $${before:-0})) kB to $$after kB" && \
	git add dvc.lock dvc-store results && \
	{ git diff --cached --quiet || git commit --quiet --message "Publish the artifacts of study $$(sed -n 's/^study: *//p' config/config.yaml)"; }

# Everything that was built of the published study; DVC's store and the environment stay.
clean-study:
	rm -rf results/$$(sed -n 's/^study: *//p' config/config.yaml) scratch logs .snakemake

clean: clean-study
	rm -rf .venv

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	# torch first and apart: its CPU and CUDA builds are different files under one version.
	python -m pip install --quiet torch==2.13.0
	python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
