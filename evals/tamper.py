"""The fine-tuning attack: does the knowledge come back, and how fast?

    python evals/tamper.py --model runs/NAME/model --corpus attack.jsonl --output runs/NAME-attack
    torchrun --nproc_per_node 4 evals/tamper.py --model runs/NAME/model --corpus attack.jsonl --output runs/NAME-attack

Every parameter is trained with AdamW on text of the forgotten domain; accuracy is measured every few steps on the
live model and written to attack.json, with a plot beside it where matplotlib is installed.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.tamper_config import TamperConfig
from unlearn.config import parse_flags
from unlearn.errors import run_command

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from unlearn.attempt import Attempt
    from unlearn.data import Batches


def main() -> None:
    config = parse_flags(TamperConfig)
    from unlearn.distributed import is_main, process_group  # torch is imported after the flags were found to be right

    with process_group() as device:
        from unlearn.attempt import attempt
        from unlearn.run_folder import ATTACK

        with attempt(config, config.output, ATTACK, (config.model, config.corpus), device) as this:
            if not this.finished:
                attack(config, device, this)
            elif is_main():
                print(f"finished before: {this.folder / 'attack.json'}")


def attack(config: TamperConfig, device: "torch.device", this: "Attempt") -> None:
    """Load, fine-tune from where an earlier attempt came to, measure on the way, write."""
    import torch

    from evals.evaluation import Evaluation
    from unlearn.distributed import is_main
    from unlearn.metrics import MetricsLog
    from unlearn.model import disable_dropout, load_config, load_model, load_tokenizer
    from unlearn.objectives.next_token import NextTokenObjective
    from unlearn.optim.build import build_optimizers, linear_schedule
    from unlearn.precision import DTYPES, autocast
    from unlearn.preflight import files_hash
    from unlearn.trainer import train
    from unlearn.weights import Checkpoint

    tokenizer = load_tokenizer(config.model, revision=config.revision)
    batches = _batches(config, tokenizer)
    evaluation = Evaluation.of(config, tokenizer, load_config(config.model, revision=config.revision))
    model = load_model(config.model, revision=config.revision, dtype=torch.float32, device=device)
    disable_dropout(model)
    precision = autocast(torch.float32, DTYPES[config.dtype], device)
    optimizers = build_optimizers(model, optimizer="adamw", adam_lr=config.lr)
    files = Checkpoint.open(config.model, revision=config.revision).paths()
    identity = {"model": files_hash(files), "corpus": batches.corpus.sha256()}
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    this.claim(identity, optimizers, size if config.save_model else 0)
    points: list[dict[str, Any]] = []

    def measure(step: int) -> None:
        with precision():
            points.append({"step": step, "tasks": _summary(evaluation.run(model, name=config.model), config.split_by)})

    if is_main():
        print(
            f"attack: unique examples {batches.unique:,}, windows trained on {batches.total:,}, effective epochs "
            f"{batches.total / batches.unique:.2f}, optimizer steps {batches.steps:,} of global batch {config.batch}",
            flush=True,
        )
    with MetricsLog(this.folder / "metrics.jsonl", batches.steps, "attacking") as log:
        checkpoints = this.checkpoints(model, optimizers, log, batches.steps, lambda: {"points": points})
        progress = checkpoints.resume()
        points += progress.extra.get("points", [])
        train(
            model,
            NextTokenObjective(model, batches, precision),
            optimizers,
            steps=batches.steps,
            schedule=linear_schedule(batches.steps),
            log=log,
            clip=1.0,
            evaluate=measure,
            eval_every=config.eval_every,
            first=progress.step,
            checkpoints=checkpoints,
            timeout=timedelta(seconds=config.step_timeout),
        )
        measure(batches.steps)
    _write(config, this.folder, points, model, tokenizer)
    this.finish()


def _batches(config: TamperConfig, tokenizer: "PreTrainedTokenizerBase") -> "Batches":
    from unlearn.data import Batches, check_examples, read_corpus

    corpus = read_corpus(
        config.corpus, tokenizer, seq_len=config.seq_len, column=config.column, template=config.template
    )
    check_examples(corpus, config.examples, config.batch)
    total = min(config.examples, len(corpus.windows)) * config.epochs
    return Batches(
        corpus,
        examples=config.examples,
        total=total,
        batch=config.batch,
        seed=config.seed,
        tag="attack",
        micro_batch=config.micro_batch,
    )


def _summary(result: dict[str, Any], split_by: str | None) -> dict[str, Any]:
    from evals.summary import summarise

    return summarise(result, split_by)


def _write(
    config: TamperConfig,
    folder: Path,
    points: list[dict[str, Any]],
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> None:
    """Write attack.json, the plot, and the attacked model if it was asked for."""
    from unlearn.distributed import fail_together, is_main
    from unlearn.files import write_json
    from unlearn.model import save_model
    from unlearn.weights import shared_folder

    if config.save_model:
        with shared_folder(folder / "model", replace=True) as temporary:
            save_model(model, tokenizer, temporary)
    with fail_together():
        if not is_main():
            return
        write_json(folder / "attack.json", {"config": dataclasses.asdict(config), "points": points})
        if importlib.util.find_spec("matplotlib") is None:
            print("no plot: matplotlib is not installed (pip install 'unlearn[report]')")
        else:
            plot_attack(points, folder / "attack.png", lambda task: "/" in task or task in config.eval_tasks)
        print(f"attack: {folder / 'attack.json'}")


def plot_attack(points: list[dict[str, Any]], path: Path, shown: Callable[[str], bool]) -> None:
    """Draw accuracy (with its 95 % interval) against optimizer steps, one line a task for which `shown` holds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in points]
    for task in filter(shown, points[0]["tasks"]):
        series = [point["tasks"][task] for point in points]
        (line,) = axes.plot(steps, [value["acc"] for value in series], marker="o", markersize=3, label=task)
        low, high = zip(*(value["interval"] for value in series), strict=True)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(0.25, color="grey", linewidth=1, linestyle=":", label="chance of four choices")
    axes.set(xlabel="optimizer steps of the attack", ylabel="accuracy", ylim=(0, 1))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command("evals/tamper.py", main)
