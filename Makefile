# make demo   the main job on example images, with all its set-up
# make test   build and run all tests, with all their set-up
#
# Both work in .venv, which sees a torch that PYTHON already has and otherwise gets its own.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py ninja_build.py cuda_toolkit.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test lint docs wheels sanitize arm cuda-compile gpu-check parity bench clean

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-deps -r tests/reference-requirements.txt
	$(BIN)/python -m pip install --quiet "lpips-fast[export,openvino,coreml]"
	$(BIN)/pytest -m "not export_runtime"
	$(BIN)/pytest -m export_runtime

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$')

# A wheel in dist/ as it would be published, audited, and used where there is no compiler. With
# WHEEL=--audit-if-there also where the tools for the audit cannot be had, saying so.
wheels: $(VENV)/.built
	$(BIN)/python -m pip install --quiet "lpips-fast[wheels]" || echo "pip cannot install the tools"
	$(BIN)/python scripts/make_wheel.py $(WHEEL)

sanitize: $(VENV)/.built
	$(BIN)/python scripts/sanitize.py

docs: $(VENV)/.built
	$(BIN)/python -m pip install --quiet "lpips-fast[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: site/index.html"

arm: $(VENV)/.built
	$(BIN)/python scripts/check_arm.py || [ $$? -eq 77 ]  # 77: no cross compiler or no emulator

cuda-compile: $(VENV)/.built
	$(BIN)/python scripts/check_cuda_compile.py || [ $$? -eq 77 ]  # 77: there is no CUDA toolkit

gpu-check:  # with the torch that PYTHON has; it downloads nothing
	$(PYTHON) scripts/gpu_check.py --whole

parity: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-deps -r tests/reference-requirements.txt
	$(BIN)/python tests/parity.py --page docs/parity.md

bench: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-deps -r tests/reference-requirements.txt
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/tables.py

$(VENV)/.torch:
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python scripts/install_torch.py
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel pybind11 ninja numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site demo_output *.egg-info lpips_fast/kernels/*.so
