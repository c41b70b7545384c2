PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH ?= 2.13.0
CONSTRAINTS ?= constraints.txt
CLIENTS = .clients
OLDEST = .venv-oldest

# The editable install links every file; when files come or go, the list's checksum changes and the links are renewed.
FILES := $(shell find schemas stages pipeline -type f ! -path '*/__pycache__/*' | LC_ALL=C sort | cksum | cut -d' ' -f1)
LINKED = $(VENV)/linked-$(FILES)

.PHONY: help install demo check lint types test test-slow torture
.PHONY: check-browser check-buckets check-clients check-ray check-vllm check-kernels check-gpu check-oldest
.PHONY: bench-buckets bench-data bench-eval bench-extract bench-gpu bench-inspect bench-scale bench-store bench-train
.PHONY: bench-variants target demo-data format
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

install: $(LINKED) ## set up .venv with everything pinned in constraints.txt

demo: $(LINKED) ## set up, then run the whole pipeline on the target that ships with the package
	$(BIN)/dflash demo --out demo

check: lint types test ## what CI runs: lint, types, tests; no GPU, no network beyond the set-up

lint: $(LINKED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(LINKED)
	$(BIN)/mypy
	$(BIN)/mypy tests/benchmarks $(LOOSE)

# Benchmarks run seldom, so that calls of what has changed would break unseen; their own tables and lambdas may be loose.
LOOSE = --no-warn-unused-ignores $(addprefix --disable-error-code=,\
  arg-type assignment call-overload func-returns-value index misc operator return-value var-annotated)

# What needs no more than this repository and its environment.
HERE = not gpu and not kernels and not clients and not vllm and not buckets and not ray and not browser

test: $(LINKED)
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not torture and $(HERE)"

test-slow: $(LINKED) ## the tests that take minutes
	$(BIN)/pytest -m "slow and not torture and $(HERE)"

torture: $(LINKED) ## kill and resume twenty times and more; the result must be the same
	$(BIN)/pytest -m torture

bench-train: $(LINKED) ## a step against a straightforward one, and streaming against memory
	$(BIN)/python tests/benchmarks/bench_train.py
	OMP_NUM_THREADS=2 $(BIN)/python tests/benchmarks/bench_stream.py --rounds 40
	OMP_NUM_THREADS=2 $(BIN)/python tests/benchmarks/bench_stream.py --lean
	OMP_NUM_THREADS=2 MALLOC_ARENA_MAX=2 $(BIN)/python tests/benchmarks/bench_stream.py --limit-mib 900

bench-gpu: $(LINKED) ## time a training step on a GPU at the shapes of a draft for Qwen3-8B
	$(BIN)/python tests/benchmarks/bench_gpu.py

format: $(LINKED) ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check-browser: $(LINKED) $(VENV)/browser ## open the pages in a real headless Chromium of the system's packages
	$(BIN)/pytest -m browser

# Chromium and its driver come from the system's packages; where they are missing, root or sudo can install them here.
$(VENV)/browser: | $(LINKED)
	$(BIN)/pip install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[browser]"
	sh tests/pages/install_chromium.sh
	touch $@

CLIENT_STAMPS = $(CLIENTS)/dflash $(CLIENTS)/transformers/installed $(CLIENTS)/speculators/installed

check-clients: $(LINKED) $(CLIENT_STAMPS) ## compare with the real serving clients, run in processes of their own
	DFLASH_ZLAB=$(CURDIR)/$(CLIENTS) DFLASH_TRANSFORMERS=$(CURDIR)/$(CLIENTS)/transformers \
	  DFLASH_SPECULATORS=$(CURDIR)/$(CLIENTS)/speculators $(BIN)/pytest -m clients

check-vllm: $(LINKED) $(CLIENTS)/vllm/installed $(CLIENTS)/triton/installed ## serve drafts by a real vLLM on the CPU, and compare every round
	DFLASH_VLLM=$(CURDIR)/$(CLIENTS)/vllm DFLASH_TRITON=$(CURDIR)/$(CLIENTS)/triton $(BIN)/pytest -m vllm

check-buckets: $(LINKED) $(CLIENTS)/moto/installed ## kill workers that fill a cache on a real S3 server, and let the server fail
	DFLASH_MOTO=$(CURDIR)/$(CLIENTS)/moto $(BIN)/pytest -m buckets

check-ray: $(LINKED) $(CLIENTS)/ray/installed ## workers on a Ray cluster of this machine: nodes come and go, the command is killed
	DFLASH_RAY=$(CURDIR)/$(CLIENTS)/ray $(BIN)/pytest -m ray

$(CLIENTS)/ray/installed: | $(LINKED)
	$(BIN)/pip install -q --upgrade --target $(@D) ray==2.60.0
	touch $@

$(CLIENTS)/moto/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install -q "moto[server]==5.2.5"
	touch $@

$(CLIENTS)/dflash: | $(LINKED)
	$(BIN)/pip download -q --no-deps -d $(CLIENTS) dflash==0.1.0
	$(BIN)/python -m zipfile -e $(CLIENTS)/dflash-0.1.0-py3-none-any.whl $(CLIENTS)

check-kernels: $(LINKED) $(CLIENTS)/torch-triton/installed ## what the compiler makes of a step for an H100, without one; needs g++
	DFLASH_TRITON=$(CURDIR)/$(CLIENTS)/torch-triton $(BIN)/pytest -m kernels

check-gpu: $(LINKED) ## on a GPU: flex attention's gradients, compiled steps, extract and train
	$(BIN)/pytest -m gpu

# Folders of packages that only the clients' processes search, before the project's own: torch is the project's, for it
# is large and no client is particular about it.
$(CLIENTS)/transformers/installed: | $(LINKED)
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) transformers==5.23.0
	touch $@

$(CLIENTS)/speculators/installed: | $(LINKED)
	$(BIN)/pip install -q --upgrade --target $(@D) "datasets>=4,<=5.1.0" "openai>=2" "loguru<=0.7.3" pydantic-settings aiohttp
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) speculators==0.9.0 hs-connectors==0.9.0 transformers==5.19.0
	touch $@

# The one that this torch is built with, while vLLM has another; its CPU build does without.
$(CLIENTS)/torch-triton/installed: | $(LINKED)
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) triton==3.7.1
	touch $@

# All that vLLM imports to serve text, and nothing that would bring another torch: 1 GB.
$(CLIENTS)/vllm/installed: tests/clients/vllm.txt | $(LINKED)
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) -r $<
	touch $@

# By itself, for vLLM takes its newer model runner wherever it finds Triton.
$(CLIENTS)/triton/installed: | $(LINKED)
	$(BIN)/pip install -q --no-deps --upgrade --target $(@D) triton==3.8.0
	touch $@

bench-eval: $(LINKED) $(CLIENTS)/dflash | demo/eval.json ## time decoding against z-lab's client, generate and the target alone
	DFLASH_ZLAB=$(CURDIR)/$(CLIENTS) $(BIN)/python tests/benchmarks/bench_eval.py

demo/eval.json:
	$(MAKE) demo

check-oldest: ## run the tests on the oldest torch and transformers that are supported
	$(MAKE) test VENV=$(OLDEST) TORCH=2.11.0 CONSTRAINTS=constraints-oldest.txt

bench-store: $(LINKED) ## the feature store's size, error and speed beside other formats (minutes)
	$(BIN)/python tests/benchmarks/bench_store.py

bench-buckets: $(LINKED) ## reading and opening a cache from a slow server, beside a folder (minutes)
	$(BIN)/python tests/benchmarks/bench_buckets.py

bench-scale: $(LINKED) ## memory and time of plans of a million and of ten million samples (half an hour)
	PYTHONPATH=tests/benchmarks $(BIN)/python -m large.scale

bench-inspect: $(LINKED) ## `dflash inspect` on a plan of a million samples in 20,000 shards: time and memory
	$(BIN)/python tests/benchmarks/bench_inspect.py

bench-data: $(LINKED) ## planning beside the bare tokenizer on two cores, and memory at ten times the rows (half an hour)
	$(BIN)/python tests/benchmarks/bench_data.py

bench-extract: $(LINKED) ## extraction's rate beside the forward alone; on a GPU: make bench-extract ARGS=--gpu
	$(BIN)/python tests/benchmarks/bench_extract.py $(ARGS)

bench-variants: $(LINKED) ## what the draft's variants are worth, on two targets and by five seeds (hours; goes on where it ended)
	PYTHONPATH=tests $(BIN)/python tests/benchmarks/bench_variants.py --out variants-run

target: $(LINKED) ## train the embedded target again, into target-run/ (about an hour)
	PYTHONPATH=tests $(BIN)/python -m embedded_target.train_target --out target-run/first --steps 3200 --seed 0
	PYTHONPATH=tests $(BIN)/python -m embedded_target.train_target --out target-run/target --steps 2600 --seed 1 \
	  --init target-run/first --rate-scale 0.5

DATA = demo-data
EMBEDDED = pipeline/embedded
REFERENCES = PYTHONPATH=tests $(BIN)/python -m embedded_target.conversations
ANSWER = $(BIN)/dflash regenerate --target $(EMBEDDED)/target --max-new-tokens 256

# Another processor may round otherwise where two words all but tie, and then differ in a few answers.
demo-data: $(LINKED) ## make the demo's conversations again, into demo-data/, and compare (minutes)
	$(REFERENCES) --out $(DATA)/references/conversations.jsonl --num 3000 --split train --seed 1
	$(REFERENCES) --out $(DATA)/references/prompts.jsonl --num 240 --split heldout --seed 2
	$(ANSWER) $(DATA)/references/conversations.jsonl --out $(DATA)/conversations.jsonl
	$(ANSWER) $(DATA)/references/prompts.jsonl --out $(DATA)/prompts.jsonl
	cmp $(DATA)/conversations.jsonl $(EMBEDDED)/conversations.jsonl
	cmp $(DATA)/prompts.jsonl $(EMBEDDED)/prompts.jsonl

# Without a GPU a CPU build of torch is taken wherever one can be had: from pip's own sources, or by uv, which knows
# where PyTorch keeps them; only failing both, the default build with its CUDA packages.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$(TORCH)')" 2>/dev/null \
	  || if command -v nvidia-smi >/dev/null; then $(BIN)/pip install -q torch==$(TORCH); else \
	    $(BIN)/pip install -q torch==$(TORCH)+cpu 2>/dev/null \
	    || { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu torch==$(TORCH); } \
	    || $(BIN)/pip install -q torch==$(TORCH); fi
	$(BIN)/pip install -q -c $(CONSTRAINTS) setuptools wheel
	$(BIN)/pip install -q -c $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	touch $@

$(LINKED): $(VENV)/installed
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	rm -f $(VENV)/linked-*
	touch $@
