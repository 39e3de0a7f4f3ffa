#!/usr/bin/env bash
# LoRA with AdamW, 8192 examples: the best of the published configurations (WMDP-Bio 42.97 -> 23.16 %, MMLU-STEM 36.85 ->
# 34.35-34.57 %). 256 steps of 32.
#
#   launch/recipes/lora-adamw.sh --dry-run
#   launch/recipes/lora-adamw.sh [FLAGS OF train.py, which replace those below]
#   LAUNCHER='sbatch --time=4:00:00 launch/slurm.sh' launch/recipes/lora-adamw.sh
#
# Two things differ from the published run, whose code read each translator one layer late and adapted only the fused
# attention matrix; `--lens-tap output --lora-targets query_key_value` does as it did.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"

launch train.py \
    --model EleutherAI/deep-ignorance-unfiltered \
    --lens EleutherAI/deep-ignorance-unfiltered-lens \
    --forget Unlearning/WMDP-Bio-Remove-Dataset \
    --retain EleutherAI/wikitext_document_level:wikitext-103-raw-v1 \
    --output runs/lora-adamw \
    --layers 5 10 15 20 25 30 \
    --lora-rank 16 --lora-alpha 16 --lora-dropout 0.05 \
    --optimizer adamw --adam-lr 1e-3 \
    --remove-coef 5 --retain-coef 5 --retain-loss l2 \
    --examples 8192 --epochs 1 --batch 32 --seq-len 2048 --dtype bf16 \
    --eval-tasks wmdp_bio mmlu_stem --eval-every 256 \
    "$@"
