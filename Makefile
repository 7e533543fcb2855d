# make demo   two model servers sharing one store, on a small trained model
# make test   the whole test suite
# make lint   ruff, mypy, import-linter, and that the generated wire code is what protos/ says
# make proto  regenerate kvstore/wire/v1
#
# Each makes what it needs from nothing: Python 3.11 or newer with venv, and the network for the first install.

VENV := .venv
VENV_PROTO := .venv-proto
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_PROTO := $(VENV_PROTO)/.installed

# The oldest toolchain whose code the supported runtimes read: newer generated code does not load in older runtimes.
GRPCIO_TOOLS := 1.76.0

# The first interpreter that starts, is new enough and can make an environment (a pyenv shim may exist and do none of it).
FIND_PYTHON = for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; p=; done; \
	test -n "$$p" || { echo "kvstore needs Python 3.11 or newer with the venv module; set PYTHON=/path/to/python3" >&2; exit 1; }
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet
PROTOC = $(VENV_PROTO)/bin/python -m grpc_tools.protoc -Ikvstore/wire/v1=protos protos/kvstore.proto

.PHONY: demo test lint proto proto-check venv clean

demo: $(INSTALLED)
	@$(BIN)/python tests/e2e/demo.py

test: $(INSTALLED)
	@$(BIN)/python -m pytest -n 2 --dist loadfile

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

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { $(FIND_PYTHON); echo "making $(VENV) with $$p" >&2; "$$p" -m venv $(VENV); }
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[test,lint]'
	@touch $@

$(INSTALLED_PROTO): Makefile
	@test -x $(VENV_PROTO)/bin/python || { $(FIND_PYTHON); "$$p" -m venv $(VENV_PROTO); }
	@$(VENV_PROTO)/bin/python $(PIP_INSTALL) grpcio-tools==$(GRPCIO_TOOLS)
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_PROTO) build dist .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
