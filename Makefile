# Every target first sets up what it needs, once, in a virtual environment inside the checkout.
# `make help` lists the targets. Variables:
#   PYTHON=python3.12     the Python to use (3.10 or newer)
#   TORCH=torch==2.12.0   the torch to use, any pip requirement for torch >= 2.10
#   CUDA=1                make wheel: with the CUDA kernels too, whatever torch there is
#   CUDA_ARCH="9.0;10.0"  make cuda-extension, make wheel: the GPUs to build for
#   ARGS="-k codec"       arguments for the program that the target runs (make gpu: for the tests)
#   BENCH_ARGS=...        make gpu: arguments for benchmarks.step
#   STAGES="3 6"          make gpu: only these stages (tools/gpu/stages.py lists them)
#   LIMIT=300             make gpu: seconds after which it ends, with a summary
#   OUT=folder            make gpu: where the results go (runs/gpu-<date>-<time>)
#   MAX_JOBS=4            number of parallel compilations
#   TEST_JOBS=4           number of parallel test processes (0: one process, for a debugger)
#   PORTABLE_TESTS=...    make test: the tests that run again in PyTorch operators, as pytest takes them
#   PORTABLE_FILES=...    make test-all: the same, as names of files
# Each choice of PYTHON and TORCH has its own environment, .venv-<choice>.

PINNED_TORCH := torch==2.13.0
TORCH ?= $(PINNED_TORCH)
PYTHON ?= python3
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export MAX_JOBS
TEST_JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# A requirement or a path as part of a file name: torch==2.12.0 -> torch-2.12.0
name_of = $(shell printf '%s' '$(1)' | sed -e 's/==/-/g; s/>/gt/g; s/</lt/g; s/=/eq/g' -e 's/[^A-Za-z0-9._+~-]/_/g')
TORCH_NAME := $(call name_of,$(TORCH))
SUFFIX :=
ifneq ($(TORCH),$(PINNED_TORCH))
SUFFIX := $(SUFFIX)-$(TORCH_NAME)
endif
ifneq ($(PYTHON),python3)
SUFFIX := $(SUFFIX)-$(call name_of,$(PYTHON))
endif

VENV := .venv$(SUFFIX)
VPYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VPYTHON) -m pip install
BUILD := build/env$(SUFFIX)
FOR_GPUS := $(if $(CUDA_ARCH),TORCH_CUDA_ARCH_LIST='$(CUDA_ARCH)')
# torch and `build` look up the compilers that they start in PATH.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

VENV_READY := $(VENV)/.ready
TORCH_READY := $(VENV)/.has-$(TORCH_NAME)
EXTENSION_READY := $(BUILD)/extension.ready
tools = $(addprefix $(VENV)/.has-tools-,$(1))

CSRC := $(shell find csrc 2>/dev/null)
CXX_FILES = $(shell find csrc test benchmarks -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

say = @printf '==> %s\n' '$(1)'

.PHONY: help demo demo-fsdp2 choose test test-all test-slow test-clients gpu bench lint format build cuda-extension wheel release clean distclean FORCE
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo 'make demo       train a small GPT with 8-bit Adam and compare (tutorials/train_gpt.py)'
	@echo 'make demo-fsdp2 train it sharded on 2 processes, go on with 3 (tutorials/train_fsdp2.py)'
	@echo 'make choose     measure which optimizer to take, and how many bits (tutorials/choose_an_optimizer.py)'
	@echo 'make test       run the tests of every promise and every optimizer, in minutes'
	@echo 'make test-all   run the tests that make test leaves out: combinations, mutants of the kernels'
	@echo 'make test-slow  run the tests that need much time or memory'
	@echo 'make test-clients  train with transformers, accelerate, Lightning and others (test/clients)'
	@echo 'make gpu        load or build, test and time on the GPU, in stages, with the installed torch; no network'
	@echo 'make bench      time a step against other libraries (benchmarks/step)'
	@echo 'make docs       build the documentation, with warnings as errors, into build/docs (open index.html)'
	@echo 'make lint       ruff, clang-format and mypy'
	@echo 'make format     format Python and C++'
	@echo 'make build      build the extension in place'
	@echo 'make cuda-extension  build the CUDA kernels in place, without a GPU and with any torch, and check their ABI'
	@echo 'make wheel      build dist/*.whl and check its ABI (CUDA=1: with the CUDA kernels)'
	@echo 'make release    build the sdist and the wheel in dist, check them, install the wheel and train; uploads nothing'
	@echo 'make clean      remove what was built (distclean: also the environments)'
	@echo 'Variables:'; sed -n 's/^#   /  /p' Makefile

demo: $(call tools,demo) $(EXTENSION_READY)
	$(call say,training a small GPT)
	$(VPYTHON) tutorials/train_gpt.py $(ARGS)

TORCHRUN := $(VPYTHON) -m torch.distributed.run --standalone
demo-fsdp2: export OMP_NUM_THREADS ?= 1
demo-fsdp2: $(call tools,demo) $(EXTENSION_READY)
	$(call say,training a sharded GPT on 2 processes and then on 3)
	$(TORCHRUN) --nproc-per-node 2 tutorials/train_fsdp2.py --steps 40 $(ARGS)
	$(TORCHRUN) --nproc-per-node 3 tutorials/train_fsdp2.py --steps 80 $(ARGS)

choose: $(EXTENSION_READY)
	$(call say,training a tiny GPT with several optimizers)
	$(VPYTHON) tutorials/choose_an_optimizer.py $(ARGS)

# Each test process computes on one thread, unless a test sets more.
PYTEST := OMP_NUM_THREADS=1 $(VPYTHON) -m pytest -n $(TEST_JOBS) --dist worksteal
# The same tests on the implementation for devices without kernels. make test runs those of the rules,
# of what the ops refuse, clipping, inference mode, whole compiled steps and ranks, which takes about a
# minute; make test-all runs the files with most of the promises.
PORTABLE := TORCHAO8_CPU=portable TORCHAO8_CUDA=portable TORCHAO8_COMPILE=0
tests_in = $(addprefix test/test_,$(1))
PORTABLE_TESTS ?= $(call tests_in,bad_gradients.py op_errors.py inference_mode.py clipping.py \
	trust_ratio.py optim.py::test_each_step_is_that_of_the_oracle \
	optim.py::test_a_bad_gradient_stays_where_it_is optim.py::test_training_follows_torch_optim \
	tensor_scale.py::test_each_step_is_that_of_the_oracle param_rounding.py::test_every_optimizer \
	compile.py::test_a_whole_train_step_in_one_graph \
	sharded_training.py::test_real_training_under_fsdp2) \
	$(addprefix --deselect=,$(call tests_in,clipping.py::test_sharding_changes_nothing \
	trust_ratio.py::test_few_collectives))
PORTABLE_FILES ?= optim optim_contract adam_op tensor_scale param_rounding scalar_state state_dict conversion \
	compile sharded_training sharded_checkpoints format_promises
comma := ,
test: $(call tools,test demo) $(EXTENSION_READY)
	$(call say,running the tests)
	$(PYTEST) $(ARGS)
	$(if $(ARGS),,$(call say,tests of optimizers again$(comma) in PyTorch operators))
	$(if $(ARGS),,$(PORTABLE) $(PYTEST) $(PORTABLE_TESTS))

test-all: $(call tools,test demo) $(EXTENSION_READY)
	$(call say,running the tests that make test leaves out)
	$(PYTEST) -m 'thorough and not slow' $(ARGS)
	$(if $(ARGS),,$(call say,more tests of optimizers again$(comma) in PyTorch operators))
	$(if $(ARGS),,$(PORTABLE) $(PYTEST) $(PORTABLE_FILES:%=test/test_%.py))

test-slow: $(call tools,test demo) $(EXTENSION_READY)
	$(call say,running the slow tests)
	$(VPYTHON) -m pytest -m slow $(ARGS)

# A package that is missing has its tests skipped, each with a line that names it.
test-clients: $(call tools,test clients) $(EXTENSION_READY)
	$(call say,training with other packages)
	$(PYTEST) test/clients $(ARGS)

# Uses the machine as it is: makes no environment and installs nothing. tools/gpu/stages.py has the
# stages. The arguments go through the environment, where they may have quotes.
gpu: export GPU_ARGS = $(ARGS)
gpu: export GPU_BENCH_ARGS = $(BENCH_ARGS)
gpu:
	@$(PYTHON) tools/gpu/run.py $(if $(filter-out python3,$(PYTHON)),--python '$(PYTHON)') \
		$(if $(OUT),--out '$(OUT)') $(if $(STAGES),--stages '$(STAGES)') \
		$(if $(LIMIT),--limit '$(LIMIT)') --args="$$GPU_ARGS" --bench-args="$$GPU_BENCH_ARGS"

bench: $(call tools,bench) $(EXTENSION_READY)
	$(call say,timing a step)
	$(VPYTHON) -m benchmarks.step $(ARGS)

# Sphinx reads all pages again (-E): what it kept of an earlier build would hide their warnings.
.PHONY: docs
docs: $(call tools,docs test) $(EXTENSION_READY)
	$(call say,building the documentation)
	$(VPYTHON) -m sphinx -q -E -W --keep-going -b html docs build/docs
	$(call say,checking what was built)
	DOCS_ARE_BUILT=1 $(VPYTHON) -m pytest -q test/test_docs_site.py $(ARGS)

lint: $(call tools,lint)
	$(call say,checking style and types)
	@status=0; run() { echo "$$@"; "$$@" || status=1; }; \
	run $(VPYTHON) -m ruff check .; \
	run $(VPYTHON) -m ruff format --check .; \
	run $(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES); \
	run $(VPYTHON) -m mypy; \
	exit $$status

format: $(call tools,lint)
	$(VPYTHON) -m ruff check --fix-only .
	$(VPYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

build: $(EXTENSION_READY)

# Needs nvcc. The file works where torch has CUDA of the same major release as nvcc.
cuda-extension: export TORCHAO8_BUILD_CUDA := only
cuda-extension: $(call tools,build)
	$(call say,building the CUDA kernels$(if $(CUDA_ARCH), for $(CUDA_ARCH)))
	$(IN_VENV) $(FOR_GPUS) $(VPYTHON) setup.py build_ext --inplace --build-temp $(BUILD)/cuda --build-lib $(BUILD)/lib
	$(VPYTHON) tools/check_abi.py torchao8/_C_cuda.abi3.so

# Removes build/lib first: files of an earlier state of the package there would go into the wheel.
wheel: $(call tools,build)
	$(call say,building the wheel)
	rm -rf build/lib* build/bdist.* dist/torchao8-*.whl
	$(IN_VENV) $(FOR_GPUS) $(if $(filter 1,$(CUDA)),TORCHAO8_BUILD_CUDA=1 TORCHAO8_LABEL=1) $(VPYTHON) -m build --wheel --no-isolation
	$(VPYTHON) tools/check_abi.py dist/torchao8-*.whl

# The wheel is built from the unpacked sdist, away from the checkout, so that a file that the sdist
# lacks is noticed. auditwheel gives the wheel its tag, or says which symbols are too new for it. The
# libraries it leaves out come with torch. With a torch that has CUDA, the wheel has the CUDA kernels,
# and +cu130 or the like in its name; the files are then in dist-<the choice of torch>.
DIST := dist$(SUFFIX)
PLATFORM := manylinux_2_28_$(shell uname -m)
release: $(call tools,build release)
	$(call say,building the sdist and from it the wheel)
	rm -rf build/release $(DIST)
	mkdir -p build/release/source $(DIST)
	$(IN_VENV) $(VPYTHON) -m build --sdist --no-isolation --outdir $(DIST)
	tar -xzf $(DIST)/*.tar.gz -C build/release/source --strip-components=1
	$(IN_VENV) TORCHAO8_LABEL=1 $(VPYTHON) -m build --wheel --no-isolation \
		--outdir build/release build/release/source
	$(VPYTHON) tools/check_abi.py build/release/*.whl
	$(IN_VENV) auditwheel repair --plat $(PLATFORM) --only-plat --exclude 'libtorch*.so' \
		--exclude 'libcudart.so.*' --wheel-dir $(DIST) build/release/*.whl
	$(call say,checking the sdist and the wheel)
	$(VPYTHON) -m twine check --strict $(DIST)/*
	$(VPYTHON) tools/check_abi.py $(DIST)/*.whl
	$(VPYTHON) tools/check_release.py $(DIST)
	$(VPYTHON) tools/check_install.py --torch '$(TORCH)' $(DIST)/*.whl

clean:
	rm -rf build dist dist-* torchao8.egg-info torchao8/_C*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find torchao8 test tools tutorials benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-*

# --- set-up -------------------------------------------------------------------------------------

# An existing environment is kept, whoever made it.
$(VENV_READY):
	@if [ ! -x $(VPYTHON) ]; then \
	  command -v $(PYTHON) >/dev/null || { echo '$(PYTHON) not found; name a Python >= 3.10: make PYTHON=...'; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "torchao8 needs Python >= 3.10, and $(PYTHON) is $$($(PYTHON) -V); name another: make PYTHON=..."; exit 1; }; \
	  echo "==> making $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV); \
	elif ! $(VPYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	  echo "torchao8 needs Python >= 3.10, and $(VENV) is $$($(VPYTHON) -V); remove it or name another: make PYTHON=..."; exit 1; \
	fi
	@$(VPYTHON) -m pip --version >/dev/null 2>&1 || $(VPYTHON) -m ensurepip
	@$(VPYTHON) -c 'import pathlib, sysconfig; \
	  pathlib.Path(sysconfig.get_path("purelib"), "torchao8-checkout.pth").write_text("$(CURDIR)\n")'
	@touch $@

# Installs torch first. Every later installation names it again, so that no tool replaces it.
$(TORCH_READY): $(VENV_READY)
	$(call say,installing $(TORCH) into $(VENV))
	$(PIP_INSTALL) '$(TORCH)'
	@touch $@

$(VENV)/.has-tools-%: pyproject.toml tools/requirements.py $(TORCH_READY)
	$(call say,installing the $* tools into $(VENV))
	@$(VPYTHON) tools/requirements.py $* > $(VENV)/requirements-$*.txt
	$(PIP_INSTALL) --quiet '$(TORCH)' -r $(VENV)/requirements-$*.txt
	@touch $@

# Some of these libraries do not install everywhere; the benchmark runs with those that do.
$(VENV)/.has-tools-bench: pyproject.toml tools/requirements.py $(TORCH_READY)
	$(call say,installing the libraries to compare with into $(VENV))
	@$(VPYTHON) tools/requirements.py bench > $(VENV)/requirements-bench.txt
	@while read -r requirement; do \
	  $(PIP_INSTALL) --quiet '$(TORCH)' "$$requirement" </dev/null || echo "==> left out: $$requirement"; \
	done < $(VENV)/requirements-bench.txt
	@touch $@

# All environments build into the same torchao8/. If another environment built the file there, it is
# linked again. (Each environment keeps its objects, and ninja compiles only what changed.)
ifneq ($(shell test -f torchao8/_C.abi3.so && cat build/in-place 2>/dev/null),$(VENV))
$(EXTENSION_READY): FORCE
endif
$(EXTENSION_READY): $(TORCH_READY) $(call tools,build) setup.py $(CSRC)
	$(call say,building the extension for $(TORCH))
	@command -v $${CXX:-c++} >/dev/null || { echo 'no C++ compiler found; install g++ or clang, or set CXX'; exit 1; }
	$(IN_VENV) $(VPYTHON) setup.py build_ext --inplace --build-temp $(BUILD)/temp --build-lib $(BUILD)/lib
	@echo $(VENV) > build/in-place
	@touch $@
