"""What the first picture of a report shows: each task before, after and attacked, beside chance and a control."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.launch.report.record import Attack, Record, Tasks

CHANCE = 0.25  # of four choices
CLAIM = 0.5  # of true or false
UNLEARNED = "unlearned"  # the subject of an attack that is no control
CONTROLS = ("never-seen", "reset", "oracle", "random")  # which control says most of a model that never knew
HAZARD, GENERAL, OTHER = "Hazard: lower is better", "General: higher is better", "Other tasks"


@dataclass(frozen=True)
class Bar:
    """An accuracy.

    Attributes:
        name: of its stage, or of the control. interval: 95 %; None where it is not known.
    """

    name: str
    acc: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Row:
    """One task, or one method of a comparison.

    Attributes:
        bars: its stages in their order. chance: what guessing earns; None where that is not known.
        control: a control after the same attack. peak: the most that any attack reached, where it is above every bar
            of an attack.
    """

    name: str
    bars: tuple[Bar, ...]
    chance: float | None = None
    control: Bar | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Panel:
    """The tasks of one kind."""

    title: str
    rows: tuple[Row, ...]


def by_kind(record: Record, tasks: Iterable[str]) -> dict[str, list[str]]:
    """Tasks under what is to be wished of them: as the attacks tell, else by the names of the tasks; none is empty."""
    hazard, general = (
        {task for one in record.attacks for task in one.grid.get(key, ())} for key in ("hazard", "general")
    )
    kinds: dict[str, list[str]] = {HAZARD: [], GENERAL: [], OTHER: []}
    for task in tasks:
        if task in hazard or (task not in general and (task.startswith("wmdp") or "hazard" in task)):
            kinds[HAZARD].append(task)
        elif task in general or task.startswith("mmlu") or "general" in task:
            kinds[GENERAL].append(task)
        else:
            kinds[OTHER].append(task)
    return {title: names for title, names in kinds.items() if names}


def overview(record: Record, stages: Mapping[str, Tasks], kinds: Mapping[str, Sequence[str]]) -> list[Panel]:
    """The parts of the first picture: one for each kind of `by_kind` of which a task was measured as a whole."""
    measured = {task for tasks in stages.values() for task in tasks}
    panels = [
        Panel(title, tuple(_row(record.attacks, stages, task) for task in tasks if task in measured))
        for title, tasks in kinds.items()
    ]
    return [panel for panel in panels if panel.rows]


def stage_names(panels: Iterable[Panel]) -> list[str]:
    """The stages of all bars, each once."""
    return list(dict.fromkeys(bar.name for panel in panels for row in panel.rows for bar in row.bars))


def caption(panels: Sequence[Panel], what: str) -> str:
    """Plain words below the picture: what a bar is, and the lines that there are."""
    rows = [row for panel in panels for row in panel.rows]
    sentences = [what, "Thin lines are 95 % intervals."]
    if any(row.chance is not None for row in rows):
        sentences.append("Dotted: what guessing earns.")
    for name in dict.fromkeys(row.control.name for row in rows if row.control):
        sentences.append(f"Dashed: {name}, the control, after an attack; shaded: its interval.")
    if any(row.peak is not None for row in rows):
        sentences.append("Diamond: the highest that an attack reached at any step while it kept general accuracy.")
    return " ".join(sentences)


def chance(task: str, numbers: Mapping[str, Any]) -> float | None:
    """What guessing earns in a task; None for written answers, where nobody knows."""
    choices = len(numbers.get("letters", ())) or len(numbers.get("predicted", ()))
    if choices:
        return 1 / choices
    if task.endswith("_open") or not str(numbers.get("metric", "acc")).startswith("acc"):
        return None
    return CLAIM if task.endswith("_claims") else CHANCE


def bar_of(name: str, numbers: Mapping[str, Any]) -> Bar:
    """An accuracy as a file has it."""
    interval = numbers.get("interval")
    return Bar(name, numbers["acc"], None if interval is None else (interval[0], interval[1]))


def _row(attacks: Sequence[Attack], stages: Mapping[str, Tasks], task: str) -> Row:
    bars = tuple(bar_of(stage, tasks[task]) for stage, tasks in stages.items() if task in tasks)
    numbers = next(tasks[task] for tasks in stages.values() if task in tasks)
    control = next((found for attack in attacks if (found := _control(attack, task))), None)
    return Row(task, bars, chance(task, numbers), control, _peak(attacks, task))


def _control(attack: Attack, task: str) -> Bar | None:
    """The control at the end of the attack that was strongest on the unlearned model; None if none was attacked."""
    subjects = {name: one for name, one in attack.grid.get("subjects", {}).items() if name != UNLEARNED}
    order = [name for name in CONTROLS if name in subjects] + [name for name in subjects if name not in CONTROLS]
    for name in order:
        curves = subjects[name]["attacks"]
        curve = curves.get(attack.grid["points_of"]) or next(iter(curves.values()), None)
        tasks = curve["points"][-1]["tasks"] if curve and curve["points"] else {}
        if task in tasks:
            return bar_of(name, tasks[task])
    return None


def _peak(attacks: Sequence[Attack], task: str) -> float | None:
    """The highest point of all attacks on the unlearned model, if it is above each of their ends."""
    ends = [attack.points[-1][1][task]["acc"] for attack in attacks if task in attack.points[-1][1]]
    subjects = [attack.grid.get("subjects", {}).get(UNLEARNED, {}) for attack in attacks]
    best = [one["acc"] for subject in subjects for one in subject.get("envelope", {}).get(task, ()) if one["step"]]
    highest = max((acc for acc in best if acc is not None), default=None)
    return highest if highest is not None and ends and highest > max(ends) else None
