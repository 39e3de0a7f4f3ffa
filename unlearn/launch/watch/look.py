"""What a folder is, looked at again and again: a run, an attack, a sweep, a comparison."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unlearn.errors import UserError
from unlearn.files import kind_of
from unlearn.launch.watch.attack import AttackReader, AttackView
from unlearn.launch.watch.comparison import ComparisonReader, ComparisonView
from unlearn.launch.watch.files import Objects, names
from unlearn.launch.watch.run import RunReader, RunView
from unlearn.launch.watch.sweep import SweepReader, SweepView
from unlearn.run.lock import LOCK
from unlearn.run.signals import MARKER

Kind = Literal["run", "attack", "sweep", "comparison"]

READERS = {"run": RunReader, "attack": AttackReader, "sweep": SweepReader, "comparison": ComparisonReader}


@dataclass(frozen=True)
class Nothing:
    """A folder without a run, where there was one: it was removed, or is about to be replaced."""

    folder: Path


View = Nothing | RunView | AttackView | SweepView | ComparisonView


class Watcher:
    """Looks at a folder again and again.

    Raises:
        UserError: there is no such folder, or none that this project writes while it works.
    """

    def __init__(self, folder: Path):
        self._folder, self._objects = folder, Objects()
        self._kind = kind_there(folder, self._objects)
        if self._kind is None:
            raise _not_ours(folder)
        self._reader = READERS[self._kind](folder, self._objects)

    def look(self, now: float) -> View:
        """The folder as it is now; it may have become another one."""
        kind = kind_there(self._folder, self._objects)
        if kind is None:
            return Nothing(self._folder)
        if kind != self._kind:
            self._kind, self._reader = kind, READERS[kind](self._folder, self._objects)
        view: View = self._reader.look(now)
        return view


def kind_there(folder: Path, objects: Objects) -> Kind | None:
    """What a folder is by its files; a run that has only taken it so far is a run."""
    found = set(names(folder))
    if "comparison.json" in found:
        return "comparison"
    if "sweep.json" in found:
        return "sweep"
    config = objects.read(folder / "config.json")
    if {"model", "forget", "retain", "method"} <= config.keys():
        return "attack" if "hazard_tasks" in config else "run"
    begun = {LOCK, MARKER, "run.json", "config.json", "config.json.tmp", "run.json.tmp"}
    return "run" if found & {LOCK, MARKER} and found <= begun else None


def _not_ours(folder: Path) -> UserError:
    what = "the folder of a run, an attack, a sweep or a comparison"
    kind = kind_of(folder, "run")
    if kind is None:
        return UserError(f"expected {what}; found nothing at {folder}: check the path")
    if kind == "file":
        return UserError(f"expected {what}; found the file {folder}: give its folder")
    if (folder / "run" / "config.json").is_file():
        return UserError(f"expected {what}; found a trial's at {folder}: give {folder / 'run'}")
    found = names(folder)
    inside = f"{found[0]!r} and {len(found) - 1} more" if found else "nothing"
    return UserError(
        f"expected {what}, with config.json, sweep.json or comparison.json; found {inside} in {folder}: give another"
    )
