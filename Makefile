# One virtual environment for everything. Override: make run PYTHON=python3.12 UCX=cu13
# (another PYTHON or TORCH than last time needs a `make clean` first)
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
UCX ?= cu12
PACKAGES = cli router client engine models triton_kernels transport bench deploy
BIN = $(VENV)/bin

SYSTEM_UCX ?= /usr/lib/x86_64-linux-gnu/libucp.so.0

.PHONY: run test test-long test-system-ucx lint binary clean

run: $(VENV)/installed-run-$(UCX)
	$(BIN)/pdengine demo

test: lint
	$(BIN)/python -m pytest

# What takes too long for every change: minutes of workers that come and go, thousands of requests.
test-long: $(VENV)/installed-test-$(UCX)
	$(BIN)/python -m pytest -m long -s

# The tests of the UCX binding once more, with the system's library instead of the wheel's.
test-system-ucx: $(VENV)/installed-test-$(UCX)
	PDENGINE_UCX_LIB=$(SYSTEM_UCX) $(BIN)/python -m pytest tests/transport/test_ucx_*.py

lint: $(VENV)/installed-test-$(UCX)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/pdengine
	MYPYPATH=$(VENV)/typing $(BIN)/mypy $(PACKAGES:%=-p pdengine.%)

# One executable file that plays every role, for machines without this tree. WITH_TORCH=1 puts torch in.
binary: $(VENV)/installed-binary-$(UCX)
	$(BIN)/python deploy/build_binary.py --ucx $(UCX) $(if $(WITH_TORCH),--with-torch)

# torch goes first and by its exact version: a range would take the newest build, which may be gigabytes larger.
# The two libucx have the same files, so the one of another UCX goes before.
$(VENV)/installed-run-$(UCX): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/installed-*
	$(BIN)/pip uninstall -qqy libucx-cu12 libucx-cu13
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[$(UCX)]"
	touch $@

$(VENV)/installed-test-$(UCX): $(VENV)/installed-run-$(UCX)
	$(BIN)/pip install -e ".[$(UCX),test]"
	touch $@

$(VENV)/installed-binary-$(UCX): $(VENV)/installed-run-$(UCX)
	$(BIN)/pip install -e ".[$(UCX),binary]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
