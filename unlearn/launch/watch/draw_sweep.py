"""A sweep and a comparison as lines: what has ended, what is best, what runs now."""

from collections.abc import Sequence

from rich.text import Text

from unlearn.launch.watch.attack import AttackView
from unlearn.launch.watch.comparison import ComparisonView, Row
from unlearn.launch.watch.draw_attack import in_one_line
from unlearn.launch.watch.draw_run import in_short, interval, state_line, title
from unlearn.launch.watch.files import items, number, table
from unlearn.launch.watch.sweep import Job, SweepView
from unlearn.launch.watch.text import NONE, cell, joined, line, percent
from unlearn.run.tail import Object

TASK = 22  # columns of an accuracy with its interval
NAME, NARROW = 20, 9  # columns of a comparison's table


def draw_sweep(view: SweepView, width: int, height: int, now: float) -> list[Text]:
    """The whole picture: the last trials where not all fit."""
    works = view.state.word == "at work"
    lines = [title("sweep", view.folder), state_line(view.state, now, "last sign"), line(counts(view, works))]
    lines.append(line(f"target {', '.join(map(str, items(view.flags.get('target'))))}"))
    lines += [line((view.outcome, "bold"))] if view.outcome else []
    tasks = [str(task) for task in items(view.flags.get("tasks"))][: max(1, (width - 33) // TASK)]
    if view.best:
        lines += [line(("best so far ", "bold"), setting(view.best)), trial_line(view.best, tasks, width)]
    below = draw_job(view.job, width, works)
    rows = max(1, height - len(lines) - len(below) - 3)
    lines += [line(), heading(view, tasks, width), *(trial_line(one, tasks, width) for one in view.trials[-rows:])]
    return [*lines, *([line(), *below] if below else [])]


def counts(view: SweepView, works: bool) -> str:
    """Trials that ended, failed, run; points of the grid."""
    failed = sum(trial.get("state") == "failed" for trial in view.trials)
    running = int(view.job is not None and works)
    return f"trials {len(view.trials)} done · {failed} failed · {running} running · {view.points} points of the grid"


def setting(trial: Object) -> str:
    """The flags of a trial."""
    values = (f"--{flag} {value}" for flag, value in table(trial.get("values")).items())
    return " ".join([*values, f"--seed {trial.get('seed', NONE)}"])


def heading(view: SweepView, tasks: Sequence[str], width: int) -> Text:
    """Of the table of trials."""
    flags = " ".join(str(part).partition("=")[0] for part in items(view.flags.get("grid")))
    start = cell(f"trial: {flags} seed", _label(tasks, width) - 1) + " "
    return line((start + "".join(cell(task, TASK) for task in tasks) + "state", "bold"))


def trial_line(trial: Object, tasks: Sequence[str], width: int) -> Text:
    """One trial that ended: its values, its accuracies, what it calls for."""
    values = " ".join([*map(str, table(trial.get("values")).values()), str(trial.get("seed", NONE))])
    start = cell(f"{trial.get('number', NONE)}: {values}", _label(tasks, width) - 1) + " "
    state, found = str(trial.get("state", NONE)), table(trial.get("accuracies"))
    if state == "failed":
        return line(start, (f"failed: {trial.get('reason', '')}", "red"))
    cells = "".join(cell(_accuracy(table(found.get(task))), TASK) for task in tasks)
    return line(start, cells, (state, "green" if state == "met" else ""))


def _label(tasks: Sequence[str], width: int) -> int:
    """Columns of a trial's number and values."""
    return max(16, min(48, width - TASK * len(tasks) - 13))


def _accuracy(numbers: Object) -> str:
    return f"{percent(number(numbers.get('acc')))} {interval(numbers)}"


def draw_job(job: Job | None, width: int, works: bool) -> list[Text]:
    """A command at work in a few lines."""
    if job is None:
        return []
    head = line(("now " if works else "stopped at ", "bold"), (job.place, "bold"), f" · {job.what}")
    if isinstance(job.view, AttackView):
        current = job.view.current
        return [head, *([*in_short(current.run, width)[:1], in_one_line(job.view, width)] if current else [])]
    return [head, *(in_short(job.view, width) if job.view is not None else [])]


def draw_comparison(view: ComparisonView, width: int, height: int, now: float) -> list[Text]:
    """The whole picture: what runs now in at most half of it, then the table."""
    lines = [title("comparison", view.folder), state_line(view.state, now, "last sign"), line(overall(view))]
    lines += [line(("verdict ", "bold"), one) for one in view.verdict[:2]]
    if not view.before:
        lines.append(line("no run yet: the original is evaluated first"))
    works = view.state.word == "at work"
    jobs = [one for job in view.jobs if view.state.word != "finished" for one in draw_job(job, width, works)]
    lines += [line(), *jobs[: max(3, height // 2 - 4)]] if jobs else []
    lines += [line(), line((_columns("method"), "bold"))]
    lines += [row_line(view, row, False) for row in view.methods]
    return [*lines, line(("control", "bold")), *(row_line(view, row, True) for row in view.controls)]


def overall(view: ComparisonView) -> str:
    """Trials, models, attacks so far, and of how many as far as that is known."""
    attackers = len(view.attackers)
    trials = sum(row.trials for row in view.methods)
    expected = view.trials * len(view.methods) if view.trials else None
    attacks = sum(row.attacks for row in (*view.methods, *view.controls))
    most = None
    if view.seeds is not None and attackers:
        most = attackers * (view.seeds * len(view.methods) + len(view.controls))
    seeds = "" if view.seeds is None else f"{view.seeds} seeds a method"
    return joined([f"trials {of(trials, expected)}", f"attacks {of(attacks, most)}", seeds, f"{attackers} attackers"])


def of(done: int, expected: int | None) -> str:
    """A count, and of how many if that is known."""
    return str(done) if expected is None else f"{done} of {expected}"


def _columns(first: str) -> str:
    cells = [cell("trials", NARROW), cell("models", NARROW), cell("attacks", NARROW), cell("failed", NARROW)]
    return cell(first, NAME) + "".join(cells) + "now"


def row_line(view: ComparisonView, row: Row, control: bool) -> Text:
    """One method or one control."""
    expected = max(row.models, view.seeds or 0) if not control else 1
    trials = "" if control else of(row.trials, view.trials)
    models = "" if control else of(row.trained, expected) if expected else NONE
    attacks = of(row.attacks, len(view.attackers) * expected) if expected and view.attackers else str(row.attacks)
    lost = row.failed + len(row.lost)
    cells = [cell(trials, NARROW), cell(models, NARROW), cell(attacks, NARROW)]
    return line(cell(row.name, NAME), *cells, (cell(str(lost or ""), NARROW), "red"), doing(view, row, control))


def doing(view: ComparisonView, row: Row, control: bool) -> str:
    """What a row is at, or what its trials chose."""
    if row.jobs and view.state.word != "finished":
        return row.jobs[0].what
    if row.lost:
        return row.lost[0]
    values = table(row.chosen.get("values"))
    if values:
        chosen = " ".join(f"{flag} {value}" for flag, value in values.items())
        return ("chosen " if row.chosen.get("within") else "chosen, over the budget: ") + chosen
    return str(row.chosen.get("why", "")) if row.chosen else "" if control or row.trials else "not begun"
