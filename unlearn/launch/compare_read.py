"""What a comparison's runs have left on the disk, read for the statistics: a row for each method and each control."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn.errors import UserError
from unlearn.launch.compare_config import Comparison
from unlearn.launch.compare_runs import control_names, cost_of, divergence_of, is_done, seed_folders

Tasks = dict[str, dict[str, Any]]
NO_ATTACK = "no attack"
MEASUREMENTS = Path("attacks", "unlearned", "attack")  # of one attack, in its folder


@dataclass(frozen=True)
class Point:
    """One measurement of an attack.

    Attributes:
        step: optimizer steps done. tokens: trained on so far.
        tasks: `summarise`d numbers. earned: what each question earned, of `summary.write_earned`.
    """

    step: int
    tokens: int
    tasks: Tasks
    earned: dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class Seed:
    """One model with its attacks.

    Attributes:
        attacks: by attacker, those that came to an end; the points with rising steps.
        cost: of its training. files: run.json of the training and of each attack, as far as they are there.
        ways: elicit.json, None where nobody looked. kl: see `divergence_of`.
    """

    attacks: dict[str, list[Point]]
    cost: dict[str, Any]
    files: dict[str, dict[str, Any]]
    ways: dict[str, Any] | None
    kl: float | None = None

    @property
    def start(self) -> Tasks:
        """What the model scores before any attack."""
        return next(iter(self.attacks.values()))[0].tasks


@dataclass(frozen=True)
class Row:
    """A method's chosen setting with its seeds, or a control.

    Attributes:
        seeds: those with an attack at least. notes: sentences about what is missing.
        chosen: chosen.json of a method, None of a control.
    """

    name: str
    seeds: list[Seed]
    notes: list[str] = field(default_factory=list)
    chosen: dict[str, Any] | None = None

    @property
    def candidates(self) -> list[tuple[str, int]]:
        """(attacker, step) of every measurement that there is of all seeds; before the attack there is one."""
        per_seed = [
            {(name, point.step) for name, points in seed.attacks.items() for point in points if point.step}
            for seed in self.seeds
        ]
        shared = set.intersection(*per_seed) if per_seed else set()
        order = list(self.seeds[0].attacks) if self.seeds else []
        return [(NO_ATTACK, 0), *sorted(shared, key=lambda pair: (order.index(pair[0]), pair[1]))]

    def points(self, candidate: tuple[str, int]) -> list[Point]:
        """The measurement of each seed."""
        name, step = candidate
        return [
            next(point for point in seed.attacks.get(name, next(iter(seed.attacks.values()))) if point.step == step)
            for seed in self.seeds
        ]

    def accuracy(self, candidate: tuple[str, int], task: str) -> float:
        """The mean over the seeds."""
        return float(np.mean([point.tasks[task]["acc"] for point in self.points(candidate)]))

    def counts(self, candidate: tuple[str, int], general: Sequence[str], drop: float) -> bool:
        """Whether every general accuracy, as a mean over the seeds, is at most `drop` below that before the attack."""
        start = (NO_ATTACK, 0)
        return all(self.accuracy(candidate, task) >= self.accuracy(start, task) - drop - 1e-9 for task in general)

    def earned(self, candidates: Sequence[tuple[str, int]], task: str, part: str | None) -> NDArray[np.float64]:
        """What each question of one part of a task earned: [candidates, seeds, questions]; all parts with None.

        Raises:
            UserError: the measurements are of different questions.
        """
        found, asked = [], None
        for candidate in candidates:
            for point in self.points(candidate):
                of_task = point.earned[task]
                chosen = [i for i, value in enumerate(of_task["parts"]) if part is None or value == part]
                ids = [of_task["ids"][i] for i in chosen]
                if asked is not None and ids != asked:
                    raise UserError(
                        f"expected the same questions of {task} in all attacks on {self.name}; found others in "
                        f"{candidate[0]}: the question files were changed, start anew in another --output"
                    )
                asked = ids
                found.append([of_task["earned"][i] for i in chosen])
        return np.asarray(found, dtype=float).reshape(len(candidates), len(self.seeds), -1)

    def questions(self, task: str, part: str | None) -> list[str]:
        """Their ids."""
        of_task = self.points((NO_ATTACK, 0))[0].earned[task]
        pairs = zip(of_task["ids"], of_task["parts"], strict=True)
        return [one for one, value in pairs if part is None or value == part]


def read_rows(comparison: Comparison) -> tuple[list[Row], list[Row]]:
    """(methods, controls), each with what has come to its end so far."""
    methods, controls = [], []
    for method in comparison.config.methods:
        file = comparison.folder / "methods" / method / "chosen.json"
        if file.is_file():
            chosen = json.loads(file.read_text(encoding="utf-8"))
            folders = seed_folders(comparison, method, chosen)
            methods.append(_row(comparison, method, folders, chosen))
    for name in control_names(comparison):
        folder = comparison.folder / "controls" / name
        if folder.is_dir():
            controls.append(_row(comparison, name, [folder]))
    return methods, controls


def _row(comparison: Comparison, name: str, folders: Sequence[Path], chosen: dict[str, Any] | None = None) -> Row:
    notes = [note for folder in folders for note in _failures(folder)]
    seeds = [seed for folder in folders if (seed := _seed(comparison, folder)).attacks]
    if chosen is not None and len(seeds) < comparison.config.seeds:
        notes.append(f"{len(seeds)} of {comparison.config.seeds} seeds have been attacked")
    return Row(name, seeds, notes, chosen)


def _failures(folder: Path) -> Iterator[str]:
    """What has failed in a folder, and why."""
    for file in sorted(folder.glob("*.failed")):
        yield f"{file.stem} failed: {file.read_text(encoding='utf-8').strip()}"


def _seed(comparison: Comparison, folder: Path) -> Seed:
    places = {name: folder / "attacks" / name for name in comparison.attackers}
    ended = {name: place for name, place in places.items() if is_done(place / "attack.json")}
    files = {"train": folder / "run"} | {name: place / MEASUREMENTS for name, place in ended.items()}
    ways = folder / "ways" / "elicit.json"
    return Seed(
        {name: _points(place / MEASUREMENTS) for name, place in ended.items()},
        cost_of(folder / "run") if is_done(folder / "run" / "run.json") else {},
        {name: _read(place / "run.json") for name, place in files.items() if (place / "run.json").is_file()},
        _read(ways) if ways.is_file() else None,
        divergence_of(folder / "run") if is_done(folder / "run" / "run.json") else None,
    )


def _points(attack: Path) -> list[Point]:
    found = []
    for point in _read(attack / "curve.json")["points"]:
        earned = _read(attack / "evals" / f"answers-{point['step']:06d}.json")
        found.append(Point(point["step"], point["tokens"], point["tasks"], earned))
    return found


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
