"""Unlearn a model by a method, then evaluate and export it. By default: push what a tuned lens reads off its target
layers towards uniform on forget text, and hold it to its original on retain text.

One process:   python train.py --optimizer muon
Four GPUs:     torchrun --nproc_per_node 4 train.py --optimizer muon
LoRA:          torchrun --nproc_per_node 4 train.py --lora-rank 16
Another way:   torchrun --nproc_per_node 4 train.py --method rmu
All flags:     python train.py --help, python train.py --method rmu --help
"""

from unlearn.errors import run_command
from unlearn.evals.train import main

if __name__ == "__main__":
    run_command("train.py", main)
