"""A sweep as its files show it: the trials that ended, the best of them, the one at work."""

import math
from dataclasses import dataclass
from pathlib import Path

from unlearn.launch.report.sweep_record import NOT_ENDED
from unlearn.launch.watch.attack import AttackView
from unlearn.launch.watch.files import Objects, evaluated, items, latest, names, table, written
from unlearn.launch.watch.run import RunReader, RunView
from unlearn.launch.watch.state import State, held, state_of
from unlearn.run.tail import Object, Tail


@dataclass(frozen=True)
class Job:
    """A command at work, or that was at work when everything stopped.

    Attributes:
        place: whose it is, e.g. a trial's name. what: it does, e.g. "training".
        view: of its run or attack; None where it has none. written: when its log was last written.
    """

    place: str
    what: str
    view: RunView | AttackView | None = None
    written: float | None = None


@dataclass(frozen=True)
class SweepView:
    """What a sweep shows at one moment.

    Attributes:
        flags: sweep.json. trials: those that ended, as in trials.jsonl. best: one of them, {} so far.
        points: of the grid. outcome: why it ended, "" before that. job: the trial at work.
    """

    folder: Path
    flags: Object
    state: State
    trials: list[Object]
    best: Object
    points: int
    outcome: str
    job: Job | None


class SweepReader:
    """Reads a sweep's folder again and again."""

    def __init__(self, folder: Path, objects: Objects):
        self._folder, self._objects = folder, objects
        self._tail, self._trials = Tail(folder / "trials.jsonl"), list[Object]()
        self._run: tuple[str, RunReader] | None = None

    def look(self, now: float) -> SweepView:
        """The sweep as it is now."""
        for line in self._tail.lines():
            self._trials = [] if line is None else [*self._trials, line]
        flags = self._objects.read(self._folder / "sweep.json")
        chosen = self._objects.read(self._folder / "best.json")
        outcome = str(chosen.get("outcome") or NOT_ENDED)
        job = self._job(now)
        state = self._state(outcome != NOT_ENDED and not held(self._folder), job, now)
        ended = state.word == "finished"
        values = [len(str(part).partition("=")[2].split(",")) for part in items(flags.get("grid"))]
        return SweepView(
            self._folder, flags, state, self._trials, table(chosen.get("best")), math.prod(values),
            outcome if ended else "", None if ended else job,
        )  # fmt: skip

    def _state(self, finished: bool, job: Job | None, now: float) -> State:
        times = [written(self._folder / "trials.jsonl"), None if job is None else job.written]
        return state_of(self._folder, finished, latest(times), now)

    def _job(self, now: float) -> Job | None:
        """The trial that was begun last, if it has no line yet."""
        ended = {str(trial.get("trial")) for trial in self._trials}
        begun = [name for name in names(self._folder / "trials") if name not in ended]
        if not begun:
            before = evaluated(self._folder / "before")
            log = written(self._folder / "before" / "all.log")
            return None if before or self._trials else Job("before any trial", "evaluating the model", None, log)
        name = begun[-1]
        folder = self._folder / "trials" / name
        if self._run is None or self._run[0] != name:
            self._run = name, RunReader(folder / "run", self._objects)
        view = self._run[1].look(now)
        trained = view.recorded.get("finished") is True
        logs = latest(written(folder / log) for log in names(folder) if log.endswith(".log"))
        return Job(name, "evaluating" if trained else "training", view, latest([logs, view.state.written]))
