"""The loop of tuning on the embedded world, by the commands that a user types: sweep until the target is met, attack
the best trial's model, report.

    python launch/demo_sweep.py
    python launch/demo_sweep.py --ranks 2

It prints each command and runs it. Stopped or killed, the same command goes on where it was.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from unlearn.config import parse_flags
from unlearn.errors import UserError
from unlearn.launch.demo import PROMPTS, TASKS, attack_command, report, run

# The cloze forms are judged: they have no letters, of which the tiny model makes a habit long before it has forgotten.
SEARCH = (
    "--search boundary --trials 8 --grid remove-coef=0.5,50 retain-coef=5,10,20 "
    "--target 'world_hazard_cloze<=0.35' --target 'world_general_cloze>=0.95' --subsample 120"
)
TRAIN = (
    "--lora-rank 16 --lora-dropout 0 --adam-lr 2e-2 --layers 3 4 --retain-loss kl --retain-start 1 --examples 1700 "
    "--epochs 3 --batch 16 --micro-batch 8 --seq-len 96 --dtype fp32"
)


@dataclass(frozen=True)
class DemoSweepConfig:
    """Tune unlearning on the embedded world until the target is met, attack the best, report. Goes on where it was."""

    output: str = "runs/demo-sweep"
    """Folder for everything the demo makes."""
    ranks: int = 1
    """Processes; above 1 the commands run through torchrun."""

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UserError(f"expected --ranks of 1 or more; found {self.ranks}")


def main() -> None:
    config = parse_flags(DemoSweepConfig)
    folder, place = Path(config.output), shlex.quote(config.output)
    tune(config, folder, place)
    best = json.loads((folder / "sweep" / "best.json").read_text(encoding="utf-8"))
    if best["model"] is not None:
        output = f"{place}/attack-{best['best']['number']:03d}"
        model, before = shlex.quote(best["model"]), f"{place}/sweep/before"
        run(config.ranks, attack_command(f"{place}/world", model, output, before, seed=0, questions="development"))
    report(f"{place}/sweep")
    print("\n" + (folder / "sweep" / "table.md").read_text(encoding="utf-8").partition("\n## Commands")[0])
    page = folder / "sweep" / "report.html"
    print(f"What to read next: {f'{page} in a browser, ' if page.is_file() else ''}then launch/search.py.")


def tune(config: DemoSweepConfig, folder: Path, place: str) -> None:
    """The world, its lens, and the sweep, each as far as it is not there."""
    model, data = f"{place}/world/model", f"--data-dir {place}/world/development"
    corpora = f"--forget {place}/world/corpora/forget.jsonl --retain {place}/world/corpora/retain.jsonl"
    if not (folder / "world").is_dir():
        run(1, f"-m unlearn world --output {place}/world")
    run(
        config.ranks,
        f"-m unlearn fit-lens --model {model} {corpora} --output {place}/lens --steps 100 --lr 3e-3 --batch 32 "
        "--micro-batch 16 --seq-len 96 --dtype fp32",
    )
    run(
        1,
        f"launch/sweep.py --output {place}/sweep --ranks {config.ranks} {SEARCH} --tasks {' '.join(TASKS.values())} "
        f"{data} -- --model {model} --lens {place}/lens {corpora} {TRAIN} --prompts {shlex.join(PROMPTS)}",
    )
