# make results · make test · make study · make publish · make fresh (and make clean-study, make clean)
SHELL := /bin/bash
PYTHON ?= python3.11
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Numbers must not depend on how many cores a library finds.
export OMP_NUM_THREADS := 1
INSTALLED := .venv/installed
# Which job runs, how far it is, and the log of one that fails; `--quiet rules` and `all` would hide that log.
BRIEF := --quiet reason host
# The study that `make results` builds.
QUICK ?= quick
# Facts about the published study, checked: status 2 and one line where config/config.yaml has a fault.
PUBLISHED := python workflow/scripts/published.py

.PHONY: results test study publish fresh lint clean-study clean

# The quick study from a fresh clone: figures in results/quick/figures, the page in results/quick/report.
results: $(INSTALLED)
	snakemake --config study=$(QUICK) $(BRIEF)
	@mkdir -p logs
	snakemake --config study=$(QUICK) $(BRIEF) --report logs/$(QUICK)-report.html
	@echo "Open results/$(QUICK)/report/report.html; figures are in results/$(QUICK)/figures."

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

# The published study's artifacts into DVC, DVC's store and Git. All else is in a commit before.
ARTIFACTS := dvc.lock dvc-store results
publish: $(INSTALLED)
	@other=$$(git status --porcelain --untracked-files=all -- . $(ARTIFACTS:%=':!%')) || exit 2; \
	[ -z "$$other" ] || \
		{ echo "publish: $$(sed 's/^...//;q' <<< "$$other"): differs from HEAD: commit it first" >&2; exit 2; }
	@said=$$(snakemake --dry-run --quiet all 2>&1) || { echo "$$said" >&2; exit 2; }; \
	[[ $$said == *"Nothing to be done"* ]] || \
		{ echo "publish: results are stale: run make study first" >&2; exit 2; }
	@study=$$($(PUBLISHED) name) && gradnoise run provenance --check --study "$$study" || exit 2; \
	before=$$(du -sk dvc-store 2>/dev/null | cut -f1); \
	dvc commit --force --quiet && dvc push --quiet && \
	after=$$(du -sk dvc-store | cut -f1) && \
	echo "dvc-store grew by $$((after - $${before:-0})) kB to $$after kB" && \
	git add -- $(ARTIFACTS) && \
	{ git diff --cached --quiet -- $(ARTIFACTS) || \
		git commit --quiet --message "Publish the artifacts of study $$study" -- $(ARTIFACTS); }

# Whether the published study is what the code gives: status 0 if so. `dvc pull` comes first.
fresh: $(INSTALLED)
	@.ci/fresh

# Everything that was built of the published study, also its files that Git tracks (git checkout results brings
# those back). DVC's store, its cache, other studies and the environment stay.
clean-study:
	@built=$$($(PUBLISHED) built) && [ -n "$$built" ] || exit 2; \
	echo "rm -rf $$built"; rm -rf $$built

clean: clean-study
	rm -rf .venv

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	# torch first and apart: its CPU and CUDA builds are different files under one version.
	python -m pip install --quiet torch==2.13.0
	python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
