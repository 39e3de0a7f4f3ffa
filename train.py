"""Unlearn a model by a method, then evaluate and export it. By default: push what a tuned lens reads off its target
layers towards uniform on forget text, and hold it to its original on retain text.

One process:   python train.py --optimizer muon
Four GPUs:     torchrun --nproc_per_node 4 train.py --optimizer muon
LoRA:          torchrun --nproc_per_node 4 train.py --lora-rank 16
Another way:   torchrun --nproc_per_node 4 train.py --method rmu
All flags:     python train.py --help, python train.py --method rmu --help
"""

from unlearn.config import TrainConfig, parse_method_flags
from unlearn.errors import run_command
from unlearn.run.signals import EarlyStop


def main() -> None:
    config = parse_method_flags(TrainConfig)
    with EarlyStop(config.output):
        run(config)


def run(config: TrainConfig) -> None:
    """The whole run, or what an earlier attempt left of it."""
    from unlearn.distributed import is_main, process_group  # torch is imported after the flags were found to be right

    with process_group(config.device) as device:
        from evals.training import opened

        with opened(config, device) as training:
            finished = training.finished()
            if not finished:
                training.train()
                training.finish()
            if is_main():
                what = f"unlearned model: {training.folder / 'model'}" if config.export else f"run: {training.folder}"
                print(f"{'finished before: ' if finished else ''}{what}")


if __name__ == "__main__":
    run_command("train.py", main)
