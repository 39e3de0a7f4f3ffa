#!/usr/bin/env bash
# Full training with Muon, 1024 examples, 32 steps of 32. Published: WMDP-Bio 42.97 -> 24.67-32.91 %, MMLU-STEM
# 36.85 -> 24.99-34.51 %; it tends to unlearn too much. With --remove-coef 3: 25.14 and 27.15 %.
#
#   launch/recipes/full-muon.sh --dry-run
#   launch/recipes/full-muon.sh [FLAGS OF train.py, which replace those below]
#   LAUNCHER='sbatch --time=4:00:00 --nodes=2 launch/slurm.sh' launch/recipes/full-muon.sh --remove-coef 3
#
# The published code read each translator one layer late (--lens-tap output does as it did), and summed the retain
# divergence over a sequence, in bfloat16, where this project takes the mean over tokens in float32: its retain
# coefficient of 1 weighs as much as one of about the length of its sequences here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"

launch train.py \
    --model EleutherAI/deep-ignorance-unfiltered \
    --lens EleutherAI/deep-ignorance-unfiltered-lens \
    --forget Unlearning/WMDP-Bio-Remove-Dataset \
    --retain EleutherAI/wikitext_document_level:wikitext-103-raw-v1 \
    --output runs/full-muon \
    --layers 5 10 15 20 25 30 \
    --optimizer muon --muon-lr 1e-3 --momentum 0.95 --adam-lr 3e-4 \
    --remove-coef 2 --retain-coef 1 --retain-loss kl \
    --examples 1024 --epochs 1 --batch 32 --seq-len 2048 --dtype bf16 \
    --eval-tasks wmdp_bio mmlu_stem --eval-every 32 \
    "$@"
