# kvmpy: set up, run, test. Each target does its own set-up, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

SHIM_SOURCES := $(wildcard csrc/*) $(wildcard csrc/cdef/*) guests/abi.h setup.py pyproject.toml

.PHONY: all run test check guests linux-guest debian-guest benchmark clean
.PHONY: campaign-images campaign-chains campaign-disks campaign-crash campaign-assists campaign-linux

all: guests

run: guests
	$(BIN)/python -m kvmpy run guest.img --cores 2 --mem 3.5G

test: guests $(VENV)/test-tools
	$(BIN)/python -m pytest

check: $(VENV)/test-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py tests/test_style.py tests/guests/test_lesson_headers.py
	@lines=$$(cat csrc/*.c csrc/*.h csrc/*.py csrc/cdef/*.cdef | wc -l); \
	 echo "csrc/ has $$lines of at most 2500 lines"; test $$lines -le 2500

benchmark: guests $(VENV)/test-tools
	$(BIN)/python -m pytest benchmarks -q -s

# Ten thousand damaged images through every loader; make test runs a fiftieth.
campaign-images: $(VENV)/test-tools
	KVMPY_CAMPAIGN=1 $(BIN)/python -m pytest -q -s tests/machine/boot/test_mutations.py --timeout 3600

# A million chains of requests through both block engines.
campaign-chains: $(VENV)/test-tools
	KVMPY_CAMPAIGN=1 $(BIN)/python -m pytest -q -s tests/devices/test_block_differential.py --timeout 3600

# Ten thousand damaged VHDs, and as many page blobs.
campaign-disks: $(VENV)/test-tools
	KVMPY_CAMPAIGN=1 $(BIN)/python -m pytest -q -s tests/storage/test_vhd_mutations.py tests/storage/test_blob_mutations.py \
		tests/storage/test_blob_model.py --timeout 3600

# A hundred thousand byte strings through the decoder, objdump beside it; every instruction in thousands of states, beside
# the processor.
campaign-assists: $(VENV)/test-tools
	KVMPY_CAMPAIGN=1 $(BIN)/python -m pytest -q -s tests/machine/assist --timeout 3600

# Far more power cuts, each planted defect wherever it can be, 3000 kills, 40,000 increments in storms of writers.
campaign-crash: guests $(VENV)/test-tools
	KVMPY_CAMPAIGN=1 $(BIN)/python -m pytest -q -s tests/crash tests/pc/test_disk_kill.py --timeout 7200

# Twenty guests killed while they write to ext4, every way to reboot on every kernel, two thousand races for the assists.
campaign-linux: $(VENV)/test-tools
	KVMPY_CAMPAIGN=1 $(BIN)/python -m pytest -q -s tests/linux tests/machine/assist/test_assist_races.py --timeout 7200

# Each time: build.py makes only what is missing or older than its sources.
guests: $(VENV)/kvmpy
	@$(BIN)/python guests/build.py

# Linux guests in build/linux, from Debian's source: see guests/linux/README.md. Nothing else here needs them.
linux-guest:
	@$(PYTHON) guests/linux/build.py

# Debian's stock kernel, as it is: takes it from its package, boots it, and says how far it came and when.
# DEBIAN="--shell" gives a shell, "--words" the kernel's command line with reasons, "--timeout 3000" more time.
debian-guest: $(VENV)/kvmpy
	@$(BIN)/python guests/linux/debian_boot.py $(DEBIAN)

# kvmpy itself, editable: what changes in Python needs no new set-up, what changes in C does.
$(VENV)/kvmpy: $(SHIM_SOURCES)
	@sh csrc/prerequisites.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --editable . --config-settings editable_mode=compat
	$(BIN)/python -m compileall -q kvmpy
	@touch $@

$(VENV)/test-tools: $(VENV)/kvmpy
	$(PIP) install --editable '.[test]' --config-settings editable_mode=compat
	@touch $@

clean:
	rm -rf $(VENV) build guest.img kvmpy/*.so kvmpy/_shim.c *.egg-info
