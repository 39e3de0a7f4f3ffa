#!/usr/bin/env bash
# The tuning grid of full training with Muon: 54 runs, a command a line, for a job array.
#
#   launch/recipes/tuning-grid.sh [FLAGS OF train.py, for all of them] > grid.txt
#   sbatch --time=2:00:00 --array=1-54%8 launch/slurm.sh --list grid.txt
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../arguments.sh"

for examples in 512 1024; do
    for muon_lr in 1e-4 1e-3 0.02; do
        for remove in 2 3 5; do
            for retain in 0 0.5 1; do
                show train.py --optimizer muon --muon-lr "$muon_lr" --remove-coef "$remove" --retain-coef "$retain" \
                    --examples "$examples" --eval-tasks wmdp_bio mmlu_stem \
                    --output "runs/grid/examples$examples-lr$muon_lr-remove$remove-retain$retain" "$@"
            done
        done
    done
done
