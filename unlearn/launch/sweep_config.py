"""The flags of `launch/sweep.py`, and the check of a grid against those of train.py. Nothing here imports torch."""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from unlearn.config import TrainConfig, config_of, named_method, parse_flags, parse_method_flags
from unlearn.config_file import inlined
from unlearn.errors import UserError
from unlearn.evals.judge.targets import Target, check_targets, parse_target
from unlearn.grid import at, given, points, read_grid, typed
from unlearn.launch.jobs import Slurm
from unlearn.launch.search import PUSH, Space, Values

OWN = ("output", "overwrite", "seed")  # flags of train.py that the sweep sets


@dataclass(frozen=True)
class SweepConfig:
    """Train and evaluate one setting after another until the target is met. The same command again goes on where it
    was stopped. Flags of train.py that all trials share follow after `--`."""

    output: str
    """Folder of the sweep: table.md, best.json, trials.jsonl, frontier.png, before/, trials/."""

    grid: tuple[str, ...]
    """Flags of train.py and their values: muon-lr=1e-4,1e-3 remove-coef=2,3,5 (in quotation marks where a value has
    spaces)."""

    target: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A bound on an accuracy, e.g. --target 'wmdp_bio<=0.25' --target 'mmlu_stem>=0.34', in quotation marks."""

    search: Literal["grid", "boundary"] = "grid"
    """grid: the points in order; boundary: bisect the push (remove-coef, else a learning rate) between its least and
    largest value, and go to more retaining and gentler learning rates where no push will do."""

    all_points: bool = False
    """Measure every point of the grid, also after the target is met."""

    trials: int | None = None
    """Most trials, over all starts; the runs that confirm a winner count."""

    hours: float | None = None
    """No trial begins once all trials together have taken so many hours."""

    seeds: int = 3
    """Seeds that have to meet the target at one point."""

    seed: int = 0
    """The first of them."""

    tasks: tuple[str, ...] = ("wmdp_bio", "mmlu_stem")
    """Tasks of evals/run.py."""

    data_dir: Path | None = None
    """Folder with the question files, as for evals/run.py."""

    include_path: Path | None = None
    """Folder with further task definitions, as for evals/run.py."""

    subsample: int | None = None
    """First look at so many questions of each task; all of them only where that look leaves the target possible."""

    ranks: int | None = None
    """Processes of a trial; above 1 it runs through torchrun on this node. Default: 1. With --submit: processes a node,
    one a GPU by default."""

    submit: str | None = None
    """Run every command as a Slurm job by launch/slurm.sh, with these options of sbatch, e.g.
    --submit='--time=2:00:00 --nodes=2', or '' for none. What a killed sweep has submitted is found again."""

    env: str | None = None
    """With --submit: settings of a cluster, launch/env/NAME.sh."""

    keep_models: bool = False
    """Keep every trial's weights; without it, those of the best trial so far."""

    def check(self) -> None:
        """Raise `UserError` for what cannot work."""
        for name in ("trials", "hours", "seeds", "subsample", "ranks"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"expected --{name} above 0; found {value}")
        if self.seed < 0:
            raise UserError(f"expected --seed to be 0 or more; found {self.seed}")
        if not self.grid or not self.target:
            missing = "--grid" if not self.grid else "--target"
            raise UserError(f"expected --grid and --target; found no {missing}: see launch/sweep.py --help")
        if self.search == "boundary" and self.all_points:
            raise UserError("--all-points has no effect with --search boundary: leave it out")
        if self.env is not None and self.submit is None:
            raise UserError("--env has no effect without --submit: leave it out")
        if self.submit is not None and self.slurm is not None:
            self.slurm.check()
        targets = self.targets()
        check_targets(targets, self.tasks)
        if self.search == "boundary" and {target.operator for target in targets} != {"<=", ">="}:
            raise UserError(
                f"expected a --target with <= and one with >= for --search boundary; found {' '.join(self.target)}: "
                "without both there is no boundary"
            )

    @property
    def slurm(self) -> Slurm | None:
        """How to submit, None to run here."""
        return None if self.submit is None else Slurm(tuple(shlex.split(self.submit)), self.ranks, self.env)

    def targets(self) -> list[Target]:
        return [parse_target(target) for target in self.target]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: its flags, train.py's, and the points."""

    config: SweepConfig
    train_flags: tuple[str, ...]
    space: Space

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def train_words(self, values: Values, seed: int) -> list[str]:
        """Flags of train.py for one point, without --output."""
        words = list(self.train_flags)
        for flag, value in values:
            words += [f"--{flag}", *value.split()]
        return [*words, "--seed", str(seed)]

    def settings(self, values: Values, seed: int) -> TrainConfig:
        """The configuration that train.py makes of them."""
        return parse_method_flags(TrainConfig, self.train_words(values, seed))

    def identity(self) -> dict[str, Any]:
        """What makes this sweep another one if it changes: all flags but the budget and where trials run."""
        flags = json.loads(json.dumps(dataclasses.asdict(self.config), default=str))
        for name in ("output", "trials", "hours", "ranks", "submit", "env", "keep_models"):
            del flags[name]
        return flags | {"train.py flags": list(self.train_flags)}


def read_sweep(arguments: Sequence[str] | None = None) -> Sweep:
    """Read and check the command line, train.py's flags and every point of the grid.

    Raises:
        UserError: something in them cannot work; train.py need not be started to find it.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    config, typed_flags = parse_flags(SweepConfig, words[:end]), words[end + 1 :]
    config.check()
    tuned = [part.partition("=")[0] for part in config.grid]
    train_flags = tuple(inlined(typed_flags, lambda words: config_of(named_method(words)), (*OWN, *tuned)))
    method = named_method(train_flags)
    flags = read_grid(config.grid, method, OWN, "the sweep")
    _refuse_repeated(flags, train_flags)
    _check_points(flags, train_flags, method)
    push = _push(flags) if config.search == "boundary" else None
    return Sweep(config, train_flags, Space(flags, push, config.seeds, config.seed))


def _refuse_repeated(flags: dict[str, tuple[str, ...]], train_flags: Sequence[str]) -> None:
    """Raise if a flag after `--` is set by the grid or by the sweep."""
    for word in train_flags:
        name = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and name.removeprefix("no-") in (*flags, *OWN):
            where = "--grid" if name in flags else "the sweep itself"
            raise UserError(f"expected each flag of train.py in one place; found {word} after --, set by {where} too")


def _check_points(flags: dict[str, tuple[str, ...]], train_flags: Sequence[str], method: str) -> None:
    """Raise unless train.py would take every point."""
    words = parse_flags(given(method), train_flags)
    shared = {field.name: getattr(words, field.name) for field in dataclasses.fields(words)}
    values = typed(flags, method)
    for point in points(flags):
        at(point, shared, values, method)


def _push(flags: dict[str, tuple[str, ...]]) -> str:
    """The flag that the boundary search bisects."""
    for flag in PUSH:
        if len(flags.get(flag, ())) > 1:
            if min(map(float, flags[flag])) <= 0.0:
                raise UserError(f"expected values of --{flag} above 0 for --search boundary; found 0: leave it out")
            return flag
    raise UserError(
        f"expected two values of {', '.join(PUSH[:-1])} or {PUSH[-1]} in --grid for --search boundary; found "
        f"{', '.join(flags)}: give its least and its largest"
    )
