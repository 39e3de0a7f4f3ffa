"""The whole of `train.py`: a run trained, measured and exported, or what an earlier attempt left of it."""

from unlearn.config import TrainConfig, parse_method_flags
from unlearn.run.signals import EarlyStop


def main() -> None:
    config = parse_method_flags(TrainConfig)
    with EarlyStop(config.output):
        run(config)


def run(config: TrainConfig) -> None:
    """The whole run, or what an earlier attempt left of it."""
    from unlearn.distributed import is_main, process_group  # torch is imported after the flags were found to be right

    with process_group(config.device) as device:
        from unlearn.evals.training import opened

        with opened(config, device) as training:
            finished = training.finished()
            if not finished:
                training.train()
                training.finish()
            if is_main():
                what = f"unlearned model: {training.folder / 'model'}" if config.export else f"run: {training.folder}"
                print(f"{'finished before: ' if finished else ''}{what}")
