"""A run of train.py, or one attack, as its files show it."""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from unlearn.launch.watch.files import Objects, count, items, number, table, written
from unlearn.launch.watch.series import Series
from unlearn.launch.watch.state import State, state_of
from unlearn.run.tail import Object, Tail

RECENT = 32  # lines that the rate is read from
ACCURACY = "/acc"  # how the names of accuracies end in metrics.jsonl
DRAWN = ("loss", "gradient_norm", ACCURACY)  # and of what is drawn over the whole run


@dataclass(frozen=True)
class RunView:
    """What a run shows at one moment.

    Attributes:
        config: its flags. recorded: run.json. last: the newest line of a step, {} before the first.
        done: optimizer steps. total: of the whole run, None if it is not known. at_most: there may be fewer.
        tokens: a second. seconds: of a step. left: seconds until the last step; all None where they are not known.
        courses: losses, gradient norm and accuracies, from the first step on, in a bounded number of means.
        measured: steps done at the last evaluation. tasks: what it found.
        damaged: lines that are no JSON.
    """

    folder: Path
    config: Object
    recorded: Object
    state: State
    last: Object
    done: int
    total: int | None
    at_most: bool
    tokens: float | None
    seconds: float | None
    left: float | None
    courses: dict[str, tuple[float, ...]]
    measured: int | None
    tasks: Object
    damaged: int

    @property
    def losses(self) -> list[str]:
        """Names of the losses, their sum first."""
        found = [name for name in self.courses if name.endswith("_loss")]
        return [name for name in ("loss", *found) if name in self.courses]

    @property
    def exporting(self) -> bool:
        """Whether all steps are done, and the run is not."""
        return self.done == self.total and not self.at_most and self.state.word == "at work"


class RunReader:
    """Reads a run's folder again and again, and of metrics.jsonl only what is new.

    Args:
        lock: folder whose lock is held while this run is at work. Default: its own; an attack's is the grid's.
    """

    def __init__(self, folder: Path, objects: Objects, lock: Path | None = None):
        self._folder, self._objects = folder, objects
        self._lock = lock or holding_folder(folder)
        self._tail = Tail(folder / "metrics.jsonl")
        self._forget()

    def _forget(self) -> None:
        self._last: Object = {}
        self._courses: dict[str, Series] = {}
        self._recent: deque[tuple[int, float, float | None]] = deque(maxlen=RECENT)
        self._measured: int | None = None

    def look(self, now: float) -> RunView:
        """The run as it is now."""
        for line in self._tail.lines():
            self._forget() if line is None else self._take(line)
        config = self._objects.read(self._folder / "config.json")
        recorded = self._objects.read(self._folder / "run.json")
        finished, done = recorded.get("finished") is True, self._done()
        total, at_most = planned_steps(config)
        if finished or (total is not None and done > total):
            total, at_most = done, False
        last = written(self._folder / "metrics.jsonl")
        state = state_of(self._lock, finished, last, now)
        tokens, seconds = self._pace()
        left = None if seconds is None or total is None or state.word != "at work" else seconds * (total - done)
        courses = {name: series.values() for name, series in self._courses.items()}
        measured, tasks = self._evaluation()
        return RunView(
            self._folder, config, recorded, state, self._last, done, total, at_most, tokens, seconds, left, courses,
            measured, tasks, self._tail.damaged,
        )  # fmt: skip

    def _take(self, line: Object) -> None:
        """A line of metrics.jsonl: of an optimizer step, or of a measurement."""
        step = count(line.get("step"))
        if step is None:
            return
        if "loss" in line:
            self._last = line
            seconds = number(line.get("seconds"))
            if seconds is not None:
                self._recent.append((step, seconds, number(line.get("tokens_per_second"))))
        for name in line:
            if name.endswith(DRAWN) and (found := number(line[name])) is not None:
                self._courses.setdefault(name, Series()).add(found)
                if name.endswith(ACCURACY):
                    self._measured = step

    def _done(self) -> int:
        step = count(self._last.get("step"))
        return 0 if step is None else step + 1

    def _pace(self) -> tuple[float | None, float | None]:
        """(tokens a second, seconds of a step with what lies between), over the recent lines."""
        rates = [rate for _, _, rate in self._recent if rate is not None and rate > 0]
        tokens = len(rates) / sum(1 / rate for rate in rates) if rates else None
        if len(self._recent) < 2:
            return tokens, None
        (first, start, _), (last, end, _) = self._recent[0], self._recent[-1]
        return tokens, (end - start) / (last - first) if last > first and end > start else None

    def _evaluation(self) -> tuple[int | None, Object]:
        """(steps done, the tasks) of the last evaluation."""
        if self._measured is None:
            return None, {}
        found = self._objects.read(self._folder / "evals" / f"step-{self._measured:06d}.json")
        return self._measured, table(found.get("summary", found))


def holding_folder(folder: Path) -> Path:
    """The folder whose lock is held while the run in `folder` is at work: of an attack, the one above attacks/."""
    parts = folder.absolute().parts
    grid = Path(*parts[:-3]) if len(parts) > 3 and parts[-3] == "attacks" else folder
    return grid if (grid / "config.json").is_file() else folder


def planned_steps(config: Object) -> tuple[int | None, bool]:
    """(optimizer steps that the flags ask for, whether there may be fewer, as where a corpus is short)."""
    examples, batch, steps = (count(config.get(name)) for name in ("examples", "batch", "steps"))
    if config.get("method") == "reset":
        return 0, False
    at_most = steps is None
    if steps is None:
        if not examples or not batch:
            return None, False
        steps = math.ceil(examples * (count(config.get("epochs")) or 1) / min(batch, examples))
    if config.get("layers_order") not in (None, "together"):
        steps *= max(1, len(items(config.get("layers"))))
    return steps + (count(config.get("repair_steps")) or 0), at_most
