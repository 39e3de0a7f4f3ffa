#!/usr/bin/env bash
# The short fine-tuning attack: 512 windows of the forgotten domain, 32 steps of 16, accuracy every 10 steps. Published,
# on the LoRA run: WMDP-Bio 24.8 -> 52 % in 50 to 100 steps (--epochs 2 or 3).
#
#   launch/recipes/attack-short.sh runs/lora-adamw attack.jsonl --dry-run
#   launch/recipes/attack-short.sh RUN CORPUS [FLAGS OF evals/tamper.py]
#   LAUNCHER='sbatch --time=1:00:00 launch/slurm.sh' launch/recipes/attack-short.sh RUN CORPUS
#
# CORPUS is text of the forgotten domain that unlearning has not seen.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"

(($# >= 2)) || fail "expected a run's folder and a corpus; found $# of the two: attack-short.sh RUN CORPUS"
run=$1 corpus=$2
shift 2
launch evals/tamper.py \
    --model "$run/model" --forget "$corpus" --output "$run-attack" \
    --adam-lr 2e-5 --batch 16 --examples 512 --epochs 1 --seq-len 2048 --dtype bf16 \
    --eval-tasks wmdp_bio mmlu_stem --eval-every 10 \
    "$@"
