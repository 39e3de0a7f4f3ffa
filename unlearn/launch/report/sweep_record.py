"""What a sweep left behind, read from its files: flags, trials, why it ended, the best trial's run."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn.errors import UserError
from unlearn.launch.report.record import Record, Tasks, read_json, read_lines, read_record

NOT_ENDED = "The sweep is not at its end."
TRIAL = {"trial", "number", "values", "seed", "state", "commands"}  # what every line of trials.jsonl has


@dataclass(frozen=True)
class SweepRecord:
    """Everything that a report shows of a sweep.

    Attributes:
        flags: sweep.json.
        trials: the lines of trials.jsonl.
        outcome: why the sweep ended, in a sentence.
        best: the best trial's line; None if none was measured.
        run: the best trial's run with its evaluations and attacks; None if its folder is not there.
        before: accuracies of the model before any trial.
        unfinished: trials that were begun and have no line.
    """

    folder: Path
    flags: dict[str, Any]
    trials: list[dict[str, Any]]
    outcome: str
    best: dict[str, Any] | None
    run: Record | None
    before: Tasks
    unfinished: list[str]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """The trials that have a reason and no number."""
        return [trial for trial in self.trials if trial["state"] == "failed"]


def is_sweep(folder: Path) -> bool:
    """Whether launch/sweep.py made the folder."""
    return (folder / "sweep.json").is_file()


def read_sweep(folder: Path, evals: Iterable[str] = (), attacks: Iterable[str] = ()) -> SweepRecord:
    """Read a sweep's folder.

    Args:
        evals, attacks: as for `read_record`, of the best trial's run.

    Raises:
        UserError: a file is damaged, or there are `evals` or `attacks` and no run that they could belong to.
    """
    flags, trials = read_json(folder / "sweep.json"), read_lines(folder / "trials.jsonl")
    for number, trial in enumerate(trials, start=1):
        if not isinstance(trial, dict) or not trial.keys() >= TRIAL:
            raise UserError(f"expected a trial on every line of {folder / 'trials.jsonl'}; found none on line {number}")
    chosen = read_json(folder / "best.json") if (folder / "best.json").is_file() else {}
    whole = chosen.get("trials") == len(trials)  # a sweep that was killed may have had no time to write it anew
    best = chosen.get("best")
    run = None if best is None else _best_run(folder, best, evals, attacks)
    if run is None and (*evals, *attacks):
        raise UserError(f"--evals and --attacks have no effect on {folder}, a sweep without a run: leave them out")
    begun = sorted(place.name for place in (folder / "trials").glob("*") if place.is_dir())
    named = {trial["trial"] for trial in trials}
    return SweepRecord(
        folder=folder,
        flags=flags,
        trials=trials,
        outcome=str(chosen["outcome"]) if whole and "outcome" in chosen else NOT_ENDED,
        best=best,
        run=run,
        before=_before(folder),
        unfinished=[name for name in begun if name not in named],
    )


def bounds(flags: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """{"<=" or ">=": (task, share)} of the first target of either kind."""
    found: dict[str, tuple[str, float]] = {}
    for text in flags.get("target", ()):
        match = re.fullmatch(r"\s*([^<>=\s]+)\s*(<=|>=)\s*(\S+)\s*", text)
        if match is not None:
            found.setdefault(match[2], (match[1], float(match[3])))
    return found


def trial_notes(trial: Mapping[str, Any]) -> str:
    """How a trial ended, and what to know about its numbers."""
    if trial["state"] == "failed":
        return f"failed: {trial['reason']}"
    notes = [trial["verdict"]["by_point"]]
    if trial["state"] == "met":
        notes.append(f"{trial['verdict']['by_interval']} by interval")
    if trial["questions"] != "all":
        notes.append("a subsample of the questions")
    return "; ".join([*notes, *(one["collapse"] for one in trial["verdict"]["targets"] if one["collapse"])])


def _best_run(folder: Path, best: Mapping[str, Any], evals: Iterable[str], attacks: Iterable[str]) -> Record | None:
    """The best trial's run, with what the sweep measured and the attacks in or beside the sweep's folder on it."""
    place = folder / "trials" / best["trial"]
    if not (place / "run" / "config.json").is_file():
        return None
    measured = [str(path) for path in (folder / "before", place / best["questions"]) if path.is_dir()]
    near = [*folder.glob("*/attack.json"), *folder.resolve().parent.glob("*/attack.json")]
    found = {file.parent.resolve(): str(file.parent) for file in sorted(near) if _attacks(file, best["trial"])}
    given = {Path(path).expanduser().resolve(): path for path in attacks}
    return read_record(place / "run", (*measured, *evals), (found | given).values())


def _attacks(file: Path, trial: str) -> bool:
    """Whether an attack.json is of an attack on the trial's model."""
    return trial in Path(str(read_json(file).get("config", {}).get("model"))).parts


def _before(folder: Path) -> Tasks:
    """The accuracies in before/, {} if that evaluation did not come to its end."""
    tasks: Tasks = {}
    for file in sorted((folder / "before").rglob("results_*.json")):
        summary = read_json(file).get("unlearn", {}).get("summary", {})
        tasks |= {name: value for name, value in summary.items() if isinstance(value, dict) and "acc" in value}
    return tasks
