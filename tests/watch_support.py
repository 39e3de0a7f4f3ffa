"""Folders of runs, attacks, sweeps and comparisons as their files show them, for the tests of `unlearn watch`."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from report_support import numbers, write

from unlearn.launch.watch.draw import draw
from unlearn.launch.watch.look import Watcher

CONFIG: dict[str, Any] = {
    "method": "simnpo", "model": "base/model", "forget": "f", "retain": "r", "lora_rank": 4, "optimizer": "adamw",
    "dtype": "bf16", "steps": 40, "examples": 64, "batch": 8, "epochs": 1, "eval_tasks": ["wmdp_bio"],
}  # fmt: skip
ATTEMPT = {"ranks": 4, "device": "4 x H100", "command": "python train.py"}
SIZES = ((80, 24), (200, 60), (30, 6))


def step_line(step: int, **more: Any) -> dict[str, Any]:
    line = {"step": step, "loss": 3.0 - step / 100, "forget_loss": 2.0, "retain_loss": 0.125, "gradient_norm": 0.5}
    rates = {"adamw_lr": 1e-4, "tokens_per_second": 1000.0, "tflops_per_rank": 321.5, "seconds": 10.0 + 2 * step}
    return line | rates | more


def append(folder: Path, *lines: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(one) + "\n" for one in lines))


def make_run(folder: Path, steps: int = 10, finished: bool = False, **config: Any) -> Path:
    write(folder / "config.json", CONFIG | config)
    write(folder / "run.json", {"identity": {}, "finished": finished, "attempts": [ATTEMPT]})
    append(folder, {"step": 0, "wmdp_bio/acc": 0.75, "seconds": 1.0}, *map(step_line, range(steps)))
    return folder


def measure(folder: Path, step: int, **accuracies: float) -> None:
    write(folder / f"evals/step-{step:06d}.json", {task: numbers(acc) for task, acc in accuracies.items()})
    append(folder, {"step": step, **{f"{task}/acc": acc for task, acc in accuracies.items()}, "seconds": 40.0})


def lock(folder: Path, process: int | None = None, host: str | None = None) -> None:
    (folder / "lock").write_text(f"process {process or os.getpid()} on {host or socket.gethostname()}")


def picture(folder: Path, width: int = 100, height: int = 1000, now: float | None = None) -> str:
    view = Watcher(folder).look(time.time() if now is None else now)
    return "\n".join(one.plain for one in draw(view, width, height, now))


def make_sweep(tmp_path: Path) -> Path:
    """Two trials ended, one of them with an error; the third is being trained."""
    folder = tmp_path / "sweep"
    grid = ["adam-lr=1e-4,1e-3", "remove-coef=2,3,5"]
    write(folder / "sweep.json", {"grid": grid, "target": ["wmdp_bio<=0.3"], "tasks": ["wmdp_bio"], "seeds": 3})
    values = {"adam-lr": "1e-4", "remove-coef": "2"}
    best = {"trial": "001-a", "number": 1, "values": values, "seed": 0, "state": "push harder"}
    best |= {"accuracies": {"wmdp_bio": numbers(0.4)}}
    lost = {"trial": "002-b", "number": 2, "values": values, "seed": 0, "state": "failed", "reason": "no memory"}
    (folder / "trials.jsonl").write_text(json.dumps(best) + "\n" + json.dumps(lost) + "\n")
    write(folder / "best.json", {"outcome": "The sweep is not at its end.", "best": best})
    for name in ("001-a", "002-b"):
        make_run(folder / f"trials/{name}/run", finished=True)
    make_run(folder / "trials/003-c/run", steps=20)
    lock(folder)
    lock(folder / "trials/003-c/run")
    return folder


def make_attack(tmp_path: Path) -> Path:
    """Two of four attacks ended, one of them diverged; the third is at work."""
    folder = tmp_path / "attack"
    grid = {"grid": ["adam-lr=1e-3,3e-3"], "control": ["random"], "hazard_tasks": [], "general_tasks": []}
    tasks = {"eval_tasks": ["wmdp_bio", "mmlu_stem"], "method": "next-token"}
    write(folder / "config.json", CONFIG | grid | tasks)
    for place in ("unlearned/adam-lr=1e-3", "unlearned/adam-lr=3e-3", "random/adam-lr=1e-3"):
        one = make_run(folder / "attacks" / place, steps=20, **tasks)
        measure(one, 10, wmdp_bio=0.3, mmlu_stem=0.5)
        measure(one, 20, wmdp_bio=0.625, mmlu_stem=0.4)
    write(folder / "attacks/unlearned/adam-lr=1e-3/curve.json", {"points": [], "diverged": None})
    write(folder / "attacks/unlearned/adam-lr=3e-3/curve.json", {"points": [], "diverged": "NaN"})
    lock(folder)
    return folder


def make_comparison(tmp_path: Path, attack: Path) -> Path:
    """lens: chosen, its first seed attacked once and under the second attack; rmu: in its second trial; a control."""
    folder = tmp_path / "compare"
    write(folder / "comparison.json", {"attackers": [], "attacker_set": "usual", "attack_steps": 160})
    write(folder / "before/x/results_1.json", {})
    lens, rmu, reset = folder / "methods/lens", folder / "methods/rmu", folder / "controls/reset"
    trials = [{"number": one, "values": {"adam-lr": "1e-3"}, "hazard": 0.3} for one in (1, 2)]
    write(lens / "chosen.json", {"values": {"adam-lr": "1e-3"}, "within": True, "trials": trials, "why": "least"})
    for trial in trials:
        write(lens / f"trials/0{trial['number']}-x/trial.json", trial)
    write(rmu / "trials/01-x/trial.json", {"number": 1, "failed": "no memory"})
    seed = lens / "seed-1-x"
    make_run(seed / "run", finished=True)
    write(seed / "attacks/full-1e-3/attack.json", {})
    attack.rename(seed / "attacks/lora-16")
    make_run(rmu / "trials/02-y/run", steps=5)
    for place, log in ((seed, "train"), (seed, "attack-full-1e-3"), (seed, "attack-lora-16"), (reset, "train")):
        write(place / f"{log}.log", "")
    write(rmu / "trials/02-y/train.log", "")
    (reset / "train.failed").write_text("nothing to reset\n")
    lock(folder)
    return folder
