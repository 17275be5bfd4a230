# On a fresh machine `make demo` and `make test` do everything, including the set-up of .venv (once).

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
PEER := .venv-peer
PEER_READY := $(PEER)/.ready
OLDEST := .venv-oldest
OLDEST_READY := $(OLDEST)/.ready
FUSION := .venv-fusion
FUSION_READY := $(FUSION)/.ready
CORES := $(shell nproc 2>/dev/null || echo 2)

.PHONY: setup demo demo-quick demo-seeds test test-slow test-oldest peer peer-goldens lint

setup: $(READY)

# --no-compile halves the time: what is imported gets compiled at its first import.
$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e ".[dev]"
	touch $@

# The main job: train, merge, fine-tune, write, reload; one seed, on the CPU.
demo: $(READY)
	OMP_NUM_THREADS=$(CORES) $(VENV)/bin/hf-vlmerge demo --out demo_out --seed 0

demo-quick: $(READY)
	OMP_NUM_THREADS=$(CORES) $(VENV)/bin/hf-vlmerge demo --out runs/demo_quick --seed 0 --quick

# Three seeds, for the table in README.md.
demo-seeds: $(READY)
	OMP_NUM_THREADS=$(CORES) $(VENV)/bin/hf-vlmerge demo --out runs/demo_seeds --seed 0 --seed 1 --seed 2

# Tiny tensors: one thread is fastest, and leaves the other cores to subprocesses.
test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m "" --timeout 3600

# The oldest versions that pyproject.toml allows of the two packages whose interfaces change most.
test-oldest: $(OLDEST_READY)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q

$(OLDEST_READY): pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]" "transformers==5.17.0" "huggingface_hub==1.31.*"
	touch $@

# The tools that benchmarks and recorded results compare with have environments of their own.
peer: $(PEER_READY) $(FUSION_READY)

$(PEER_READY): constraints.txt
	test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet -c constraints.txt "mergekit==0.1.5"
	touch $@

$(FUSION_READY): constraints.txt
	test -x $(FUSION)/bin/python || $(PYTHON) -m venv $(FUSION)
	$(FUSION)/bin/python -m pip install --quiet -c constraints.txt "fusion_bench==0.2.33"
	touch $@

peer-goldens: $(PEER_READY) $(FUSION_READY)
	OMP_NUM_THREADS=1 $(PEER)/bin/python tests/peer/record.py tests/golden
	OMP_NUM_THREADS=1 $(FUSION)/bin/python tests/peer/record_fusion.py tests/golden

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
