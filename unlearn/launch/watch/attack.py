"""An attack of evals/tamper.py, with all points of its grid and its controls, as its files show it."""

import math
from dataclasses import dataclass
from pathlib import Path

from unlearn.launch.watch.files import Objects, items, latest, names
from unlearn.launch.watch.run import ACCURACY, RunReader, RunView
from unlearn.launch.watch.state import State, state_of
from unlearn.run.tail import Object


@dataclass(frozen=True)
class Attack:
    """One attack of a grid on one model.

    Attributes:
        ended: it came to its end, or diverged. diverged: it did that.
    """

    subject: str
    name: str
    ended: bool
    diverged: bool
    run: RunView


@dataclass(frozen=True)
class AttackView:
    """What an attack shows at one moment.

    Attributes:
        config: its flags. attacks: those that were begun. expected: how many there will be.
        hazard, general: tasks.
    """

    folder: Path
    config: Object
    state: State
    attacks: list[Attack]
    expected: int
    hazard: list[str]
    general: list[str]

    @property
    def current(self) -> Attack | None:
        """The one that was written to last."""
        return max(self.attacks, key=lambda one: (not one.ended, one.run.state.written or 0.0), default=None)


class AttackReader:
    """Reads the folder of evals/tamper.py again and again."""

    def __init__(self, folder: Path, objects: Objects):
        self._folder, self._objects = folder, objects
        self._runs: dict[tuple[str, str], RunReader] = {}

    def look(self, now: float) -> AttackView:
        """The attack as it is now."""
        config, place = self._objects.read(self._folder / "config.json"), self._folder / "attacks"
        found = [(subject, name) for subject in names(place) for name in names(place / subject)]
        self._runs = {
            key: self._runs.get(key) or RunReader(place.joinpath(*key), self._objects, self._folder)
            for key in found
            if (place.joinpath(*key) / "config.json").is_file()
        }
        attacks = [self._attack(*key, reader.look(now)) for key, reader in self._runs.items()]
        finished = self._objects.read(self._folder / "run.json").get("finished") is True
        written = latest(one.run.state.written for one in attacks)
        return AttackView(
            self._folder, config, state_of(self._folder, finished, written, now), attacks, expected(config),
            *roles(config),
        )  # fmt: skip

    def _attack(self, subject: str, name: str, run: RunView) -> Attack:
        curve = self._objects.read(run.folder / "curve.json")
        return Attack(subject, name, bool(curve), bool(curve.get("diverged")), run)


def expected(config: Object) -> int:
    """How many attacks the flags ask for: the points of the grid, on the model and on each control."""
    values = [len(str(part).partition("=")[2].split(",")) for part in items(config.get("grid"))]
    return math.prod(values) * (1 + len(items(config.get("control"))))


def roles(config: Object) -> tuple[list[str], list[str]]:
    """(hazard, general): which of --eval-tasks are which, as in evals/attack/config.py."""
    tasks = [str(task) for task in items(config.get("eval_tasks"))]
    hazard = [str(task) for task in items(config.get("hazard_tasks"))]
    general = [str(task) for task in items(config.get("general_tasks"))]
    return (
        hazard or [task for task in tasks if task.startswith("wmdp")],
        general or [task for task in tasks if task.startswith("mmlu")],
    )


def course(run: RunView, task: str) -> tuple[float, ...]:
    """A task's accuracy at each measurement."""
    return run.courses.get(f"{task}{ACCURACY}", ())
