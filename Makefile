# Everything sets itself up: Python 3.10 or newer and make are enough. The second time is quick.
#   make demo    open the app with the bundled miniature
#   make test    the quick tests                       make slow    the slow ones
#   make check   lint, format and who imports whom     make browser the page's tests in Chromium
#   make sheet   the README's pictures again
#   make mini    train the miniature again from nothing (many hours; goes on where it stopped)
#   make reproduce   the paper's claim in the miniature, row by row (many hours; goes on likewise)
#   make bench   the miniature on 400 cases of test people, its table and figures (an hour; goes on likewise)
#
# Settings: PYTHON=python3.12   VENV=path   TORCH=cpu|default   JOBS=test processes   ARGS="more for the command"

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

OLD_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	"$$p" -c '$(OLD_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# torch of the constraints file; on Linux without an NVIDIA card the build without CUDA, which is ten times smaller.
TORCH ?= $(shell if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then echo cpu; else echo default; fi)
TORCH_PIN := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ "$$n" -gt 4 ] && echo 4 || echo "$$n")
ARGS ?=

.PHONY: help demo test slow browser check format mini reproduce sheet bench sweep tradeoff clean

help:
	@sed -n '2,11p' Makefile | sed 's/^# \{0,1\}//'

# -- set-up: one virtual environment, filled only when the lists of packages changed ------------------------------

$(VENV)/.made:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.10 or newer is needed: install it, or say which: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Making the environment in $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "Installing torch $(TORCH_PIN) ($(TORCH)) ..."
	@if [ "$(TORCH)" = cpu ]; then \
		$(PIP) install --retries 1 --timeout 30 --extra-index-url https://download.pytorch.org/whl/cpu \
			-c constraints.txt "torch==$(TORCH_PIN)+cpu" 2>/dev/null || $(PIP) install -c constraints.txt torch; \
	else $(PIP) install -c constraints.txt torch; fi
	@touch $@

$(VENV)/.app: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "Installing the packages of the app (a few minutes, once) ..."
	@$(PIP) install -c constraints.txt -e ".[app]"
	@$(call opencv_without_display)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.app
	@echo "Installing the packages for tests and training (once) ..."
	@$(PIP) install -c constraints.txt -e ".[app,train,dev]"
	@$(call opencv_without_display)
	@touch $@

# insightface asks for opencv-python, which needs a display library (libGL.so.1) that servers lack: there the headless
# build of the same version takes its place. `packages.txt` names the library for those who prefer to install it.
define opencv_without_display
$(BIN)/python -c "import cv2" 2>/dev/null || { \
	echo "opencv-python does not load here (no libGL): taking its headless build ..."; \
	version=$$($(PIP) list --format=freeze | sed -n 's/^opencv-python==//p'); \
	$(PIP) uninstall -y opencv-python; \
	$(PIP) install --no-deps "opencv-python-headless==$$version"; \
	$(BIN)/python -c "import cv2"; }
endef

# -- what people run ----------------------------------------------------------------------------------------------

demo: $(VENV)/.app
	$(BIN)/python app.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not browser and not gpu" $(ARGS)

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "slow and not browser and not gpu" --durations 10 $(ARGS)

# Chromium is Debian's: installed here if this is root on such a machine; else say where it is missing.
browser: $(VENV)/.dev
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing Chromium ..." && \
			{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null; } || \
		{ echo "Chromium is missing and cannot be installed here: apt-get install chromium, then make browser." >&2; exit 1; }
	@$(BIN)/python -c "import playwright" 2>/dev/null || $(PIP) install -c constraints.txt playwright
	$(BIN)/python -m pytest -q -m browser tests/test_browser.py --durations 5 $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_house.py $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

mini: $(VENV)/.dev
	$(BIN)/python -m withanyone.mini build $(ARGS)

reproduce: $(VENV)/.dev
	$(BIN)/python -m train.reproduce $(ARGS)

sheet: $(VENV)/.dev
	$(BIN)/python -m withanyone.mini people $(ARGS)

# The bench on the miniature. Cases of test people are for the figures that are told, those of validation people for
# choosing (the sweep of the sliders). Every step goes on where it stopped.
BENCH := $(BIN)/python -m withanyone.bench
BENCH_RUNS := runs/bench
MODEL ?= withanyone/mini/pretrained
COUNT ?= 400
# One candidate of a picture: what the weights do. By default the miniature draws four.
CANDIDATES ?= 1

tradeoff: $(VENV)/.dev
	$(BENCH) plot tradeoff --out figures/bench-tradeoff.png

bench: $(VENV)/.dev
	$(call drawn_cases,test,$(COUNT))
	for method in GT=target Ref=reference miniature=$(MODEL); do \
		name=$${method%%=*}; model=$${method#*=}; \
		$(BENCH) generate --cases $(BENCH_RUNS)/cases-test-$(COUNT) --model "$$model" --workers $(JOBS) \
			--candidates $(CANDIDATES) --out $(BENCH_RUNS)/pictures-test-$(COUNT)/$$name; \
		$(BENCH) score --cases $(BENCH_RUNS)/cases-test-$(COUNT) --judges mini --workers $(JOBS) --method $$name \
			--pictures $(BENCH_RUNS)/pictures-test-$(COUNT)/$$name --out $(BENCH_RUNS)/test-$(COUNT)-$$name.json; \
	done
	$(BENCH) table $(BENCH_RUNS)/test-$(COUNT)-{GT,Ref,miniature}.json --attributes --subset single \
		--out $(BENCH_RUNS)/tables.md
	$(BENCH) plot real $(BENCH_RUNS)/test-$(COUNT)-miniature.json --out figures/bench-real.png
	$(BENCH) plot cases $(BENCH_RUNS)/test-$(COUNT)-miniature.json --out figures/bench-cases.png
	$(BENCH) plot attributes $(BENCH_RUNS)/test-$(COUNT)-{GT,Ref,miniature}.json --subset single \
		--out figures/bench-attributes.png

sweep: COUNT = 24
sweep: $(VENV)/.dev
	$(call drawn_cases,validation,$(COUNT))
	$(BENCH) generate --cases $(BENCH_RUNS)/cases-validation-$(COUNT) --model $(MODEL) --sweep --workers $(JOBS) \
		--candidates 1 --out $(BENCH_RUNS)/pictures-sweep
	$(BENCH) score --cases $(BENCH_RUNS)/cases-validation-$(COUNT) --pictures $(BENCH_RUNS)/pictures-sweep \
		--judges mini --workers $(JOBS) --method miniature --out $(BENCH_RUNS)/sweep.json
	$(BENCH) plot sweep $(BENCH_RUNS)/sweep.json --out figures/bench-sweep.png

# Cases of one split, drawn once: $(call drawn_cases,SPLIT,COUNT)
define drawn_cases
[ -f $(BENCH_RUNS)/cases-$(1)-$(2)/.whole ] || { \
	$(BIN)/python -m withanyone.mini cases --out $(BENCH_RUNS)/cases-$(1)-$(2) --count $(2) --split $(1) && \
	touch $(BENCH_RUNS)/cases-$(1)-$(2)/.whole; }
endef

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
