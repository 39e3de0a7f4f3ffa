"""Unlearn a model by a method, then evaluate and export it. By default: push what a tuned lens reads off its target
layers towards uniform on forget text, and hold it to its original on retain text.

One process:   python train.py --optimizer muon
Four GPUs:     torchrun --nproc_per_node 4 train.py --optimizer muon
LoRA:          torchrun --nproc_per_node 4 train.py --lora-rank 16
Another way:   torchrun --nproc_per_node 4 train.py --method rmu
All flags:     python train.py --help, python train.py --method rmu --help
"""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from unlearn.config import TrainConfig, parse_method_flags
from unlearn.errors import run_command
from unlearn.signals import EarlyStop

if TYPE_CHECKING:
    from evals.evaluation import Evaluation
    from unlearn.attempt import Attempt
    from unlearn.metrics import MetricsLog
    from unlearn.unlearning import Unlearning


def main() -> None:
    config = parse_method_flags(TrainConfig)
    with EarlyStop(config.output):
        run(config)


def run(config: TrainConfig) -> None:
    """The whole run, or what an earlier attempt left of it."""
    from unlearn.distributed import is_main, process_group  # torch is imported after the flags were found to be right

    with process_group(config.device) as device:
        from unlearn.attempt import attempt
        from unlearn.run_folder import RUN
        from unlearn.unlearning import assemble, export_bytes, fill_models

        inputs = (config.model, getattr(config, "lens", None), config.forget, config.retain)
        with attempt(config, str(config.output), RUN, inputs, device) as this:
            found = assemble(config, device)
            evaluation = _prepare(found)
            identity = found.identity | ({} if evaluation is None else {"questions": evaluation.sha256()})
            finished = this.stands(identity)
            if not finished:
                fill_models(found)
                this.claim(identity, found.optimizers, export_bytes(found))
                unlearn(found, this, evaluation)
            if is_main():
                print(f"{'finished before: ' if finished else ''}unlearned model: {this.folder / 'model'}")


def unlearn(run: "Unlearning", this: "Attempt", evaluation: "Evaluation | None") -> None:
    """Train from where an earlier attempt came to, export, evaluate what was exported."""
    from unlearn.metrics import MetricsLog
    from unlearn.optim.build import linear_schedule
    from unlearn.trainer import train
    from unlearn.unlearning import announce, finish, read_lens

    config, folder = run.config, this.folder
    announce(run)
    with MetricsLog(folder / "metrics.jsonl", run.steps, "unlearning") as log:
        checkpoints = this.checkpoints(run.model, run.optimizers, log, run.steps)
        first = checkpoints.resume().step
        if first == 0:
            read_lens(run, folder, "before")
        train(
            run.model,
            run.loss,
            run.optimizers,
            steps=run.steps,
            schedule=linear_schedule(run.steps, config.warmup_ratio),
            log=log,
            clip=config.clip,
            log_every=config.log_every,
            evaluate=lambda step: _evaluate(run, evaluation, folder, step, log),
            eval_every=config.eval_every,
            first=first,
            checkpoints=checkpoints,
            timeout=timedelta(seconds=config.step_timeout),
        )
        finish(run, folder)
        _evaluate(run, evaluation, folder, run.steps, log)
    this.finish()


def _prepare(found: "Unlearning") -> "Evaluation | None":
    """Read the questions before the first step, so that a wrong task name costs no training."""
    config = found.config
    if not config.eval_tasks:
        return None
    from evals.evaluation import Evaluation
    from unlearn.model import load_config

    return Evaluation.of(config, found.tokenizer, load_config(config.model, revision=config.revision))


def _evaluate(run: "Unlearning", evaluation: "Evaluation | None", folder: Path, step: int, log: "MetricsLog") -> None:
    """Measure the live model; write evals/step-N.json and a line of the log."""
    if evaluation is None:
        return
    from evals.summary import write_summary

    with run.loss.precision():
        result = evaluation.run(run.model, name=f"{run.config.model} after {step} steps")
    log.write({"step": step, **write_summary(result, folder / "evals" / f"step-{step:06d}.json")})


if __name__ == "__main__":
    run_command("train.py", main)
