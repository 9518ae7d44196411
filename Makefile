# Two commands do everything on a machine with Python 3.11+, git and make: `make book` and `make test`.
# Each target sets up .venv by itself, again only when the lock changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# all threads that a library may start; kernels side by side share the cores out further (tiltlib/runner.py)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: book html refresh test lab clean setup model lock help
.DEFAULT_GOAL := help

help:
	@echo "make book     set up, execute every chapter at its default size, build the HTML in _build/html"
	@echo "make test     set up, run all tests"
	@echo "make html     render the outputs that are stored in the notebooks"
	@echo "make refresh  execute stale chapters and store their outputs (CHAPTERS='a b' for these)"
	@echo "make lab      open JupyterLab"
	@echo "make lock     write requirements.txt anew from pyproject.toml"
	@echo "make clean    remove _build and .venv"

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@echo "setting up $(VENV): about 200 packages, minutes on a first run"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv: on Debian, apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

setup: $(READY)

model: $(READY)
	@$(BIN)/python -m tiltlib.worlds.language_model fetch

book: $(READY) model
	@$(BIN)/python -m tiltlib.book book

html: $(READY)
	@$(BIN)/python -m tiltlib.book html

refresh: $(READY) model
	@$(BIN)/python -m tiltlib.book refresh $(CHAPTERS)

test: $(READY) model
	@$(BIN)/python -m tests

lab: $(READY)
	@$(BIN)/jupyter lab book

# uv resolves for every platform at once; what torch needs for CUDA comes with a CUDA build of torch, never from here
lock: $(READY)
	@$(BIN)/python -m pip install --quiet uv
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate pyproject.toml \
	  $$($(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate pyproject.toml \
	     | grep -oE '^(nvidia|cuda|triton)[a-z0-9-]*' | sort -u | sed 's/^/--no-emit-package /') -o requirements.txt

clean:
	rm -rf _build $(VENV)
