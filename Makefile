# make demo       search a bundled emoji gallery on http://127.0.0.1:8000  (PORT=, HOST=, DOMAIN=openmoji)
# make test       tests of all installed parts, in JOBS=3 processes           (ARGS="-k name" for some)
# make check      lint, format, types, import direction, sizes
# make size       tokens of code by folder, those of packages against their budgets
# make test-plugins  the plug-ins, installed into the same environment, and their tests    (ARGS= as above)
# make coverage   all tests, with the coverage of the packages and its floor     (ARGS= as above)
# make mutants    share of changes of critical code that tests notice; hours   (ARGS="index_jobs.index.filters*" for some)
# make reference  generated pages of docs, openapi.json, and the client's models
# make docs       the documentation as a site in site/
# make install    set-up only: searching and indexing                         (EXTRAS=torch,ray for more parts)
#                 LOCK=requirements.lock installs the versions and hashes of a lock file
# All but install, demo, docs and size add the extras dev and torch.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
DOMAIN ?= twemoji
EXTRAS ?=
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin

# Without compiled modules on disk, each process that imports PyTorch compiles it, which takes longer than its import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-plugins check size coverage mutants reference docs
comma := ,
space := $(subst ,, )
PARTS := $(sort $(subst $(comma), ,$(EXTRAS)) $(if $(filter-out install demo docs size,$(MAKECMDGOALS)),dev torch))
UNLOCKED := $(VENV)/.installed$(subst $(space),,$(PARTS:%=-%))
INSTALLED := $(UNLOCKED)$(if $(LOCK),-$(notdir $(LOCK)))

install: $(INSTALLED)

# A venv that was interrupted, or failed because python3-venv is missing, lacks pip and `activate`, and is made again. One of uv
# lacks pip alone, and gets it.
$(INSTALLED): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with PYTHON="; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || if test -f $(BIN)/activate && $(BIN)/python -c '' 2>/dev/null; \
	then $(BIN)/python -m ensurepip; else $(PYTHON) -m venv $(VENV); fi
	@test -z "$(LOCK)" || $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --requirement $(LOCK)
	$(if $(filter torch,$(PARTS)),@echo "PyTorch for Linux is a download of several GB without an index of CPU builds in PIP_EXTRA_INDEX_URL")
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable '.$(if $(PARTS),[$(subst $(space),$(comma),$(PARTS))])'
	@touch $(VENV)/.installed $(UNLOCKED) $@

demo: install
	@$(BIN)/dcar demo --host $(HOST) --port $(PORT) --domain $(DOMAIN)

test: install
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=10 $(ARGS)

test-plugins: $(VENV)/.plugins
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal plugins $(ARGS)

$(VENV)/.plugins: $(wildcard plugins/*/pyproject.toml) | install
	$(BIN)/python -m pip install --disable-pip-version-check $(foreach file,$(wildcard plugins/*/pyproject.toml),--editable './$(dir $(file))[test]')
	@touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(BIN)/python scripts/size.py

size:
	@$(PYTHON) scripts/size.py

reference: install
	$(BIN)/python scripts/generate_reference.py
	$(BIN)/python scripts/generate_models_page.py
	$(BIN)/python scripts/generate_client_models.py

docs: install
	@$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

coverage: install
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov --cov-report=term:skip-covered $(ARGS)

mutants: install
	@$(BIN)/python -m mutmut --version >/dev/null 2>&1 || $(BIN)/python -m pip install --disable-pip-version-check --no-compile --editable '.[mutants]'
	$(BIN)/python -m mutmut run --max-children $(JOBS) $(ARGS)
	@$(BIN)/python -m mutmut export-cicd-stats >/dev/null
	@$(BIN)/python -c 'import json; found = json.load(open("mutants/mutmut-cicd-stats.json")); killed = found["killed"] + found["timeout"]; \
	tried = killed + found["survived"]; print(f"{killed} of {tried} noticed, {killed / tried:.0%}; list the others with: mutmut results")'
