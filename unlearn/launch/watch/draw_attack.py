"""An attack as lines: each attack of the grid with the accuracies that it has come to."""

from collections.abc import Sequence

from rich.text import Text

from unlearn.launch.watch.attack import Attack, AttackView, course
from unlearn.launch.watch.draw_run import about, evaluation, in_short, losses, progress, settings, state_line, title
from unlearn.launch.watch.files import items, table
from unlearn.launch.watch.text import NONE, cell, line, sparkline

COURSE, WIDEST, STEP = 24, 48, 10  # columns of one task, at the least and at the most; of the step


def draw_attack(view: AttackView, width: int, height: int, now: float) -> list[Text]:
    """The whole picture; the attacks that were begun last where not all fit."""
    ended = sum(one.ended for one in view.attacks)
    runs = [items(one.run.recorded.get("attempts")) for one in view.attacks]
    attempt = table(runs[-1][-1]) if runs and runs[-1] else {}
    lines = [title("attack", view.folder), line(about(view.config, attempt, 1)), state_line(view.state, now)]
    if view.expected == 1 and len(view.attacks) == 1:
        return [*lines, *alone(view.attacks[0], width)]
    lines += [line(f"attacks {ended} of {view.expected} ended"), line()]
    current = [] if view.current is None or view.current.ended else at_work(view.current, width)
    rows = max(1, height - len(lines) - len(current) - 2)
    return [*lines, *accuracies(view, width, rows), *([line(), *current] if current else [])]


def alone(attack: Attack, width: int) -> list[Text]:
    """The only attack of a grid, with everything that a run shows, its accuracies first."""
    run = attack.run
    said = [line(("diverged", "bold red"))] if attack.diverged else []
    return [*progress(run, width), *said, line(), *evaluation(run, width), line(), *losses(run, width), settings(run)]


def at_work(attack: Attack, width: int) -> list[Text]:
    """The attack at work, in short."""
    return [line((f"{attack.subject} {attack.name}", "bold")), *in_short(attack.run, width)]


def in_one_line(view: AttackView, width: int) -> Text:
    """The accuracies of the attack at work, as a part of something greater."""
    tasks = [*view.hazard[:1], *view.general[:1]]
    run = view.current.run if view.current is not None else None
    found = [
        f"{task} {change(course(run, task), min(48, width // 2 - len(task) - 2))}" for task in tasks if run is not None
    ]
    return line(" ".join(found))


def accuracies(view: AttackView, width: int, rows: int) -> list[Text]:
    """A line an attack: how far it is, and each task from the first measurement to the last."""
    label = max([12, *(len(f"{one.subject} {one.name}") + 1 for one in view.attacks)])
    label = min(label, max(12, width - 2 * COURSE - STEP))
    room = width - label - STEP
    tasks = [*view.hazard, *view.general][: max(1, room // COURSE)]
    wide = max(COURSE, min(WIDEST, room // max(1, len(tasks))))
    head = cell("accuracy, %", label) + cell("step", STEP) + "".join(cell(task, wide) for task in tasks)
    chosen = view.attacks if len(view.attacks) <= rows else latest(view.attacks, rows)
    return [line((head, "bold")), *(row(one, tasks, label, wide, view.hazard) for one in chosen)]


def latest(attacks: Sequence[Attack], rows: int) -> list[Attack]:
    """Those that are at work or ended last, in their order."""
    times = sorted(attacks, key=lambda one: (not one.ended, one.run.state.written or 0.0), reverse=True)[:rows]
    return [one for one in attacks if one in times]


def row(attack: Attack, tasks: Sequence[str], label: int, wide: int, hazard: Sequence[str]) -> Text:
    """One attack."""
    run = attack.run
    far = "diverged" if attack.diverged else str(run.done) if run.total is None else f"{run.done} of {run.total}"
    parts = [cell(f"{attack.subject} {attack.name}", label - 1), " ", cell(far, STEP)]
    styled = [(change(course(run, task), wide), "red" if task in hazard else "green") for task in tasks]
    return line(*parts, *styled)


def change(values: Sequence[float], width: int) -> str:
    """From the first to the last value, in per cent, with a sparkline from 0 to 1."""
    if not values:
        return cell(NONE, width)
    words = f"{100 * values[0]:.1f} → {100 * values[-1]:.1f} "
    return cell(words + sparkline(values, width - len(words) - 1, 0.0, 1.0), width)
