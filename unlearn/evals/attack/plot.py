"""The picture of a grid of attacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from unlearn.evals.attack.config import UNLEARNED
from unlearn.evals.attack.results import Curves
from unlearn.evals.judge.envelope import envelope

CHANCE = 0.25  # of four choices
COLUMNS = 3


def plot_attack(points: Sequence[dict[str, Any]], shown: Sequence[str], path: Path) -> None:
    """One attack: accuracy (with its 95 % interval) against optimizer steps, one line a task of `shown`."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in points]
    for task in shown:
        series = [point["tasks"][task] for point in points]
        _line(axes, steps, [v["acc"] for v in series], [v["interval"] for v in series], label=task)
    _finish(axes, "accuracy")
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=150)


def plot_grid(curves: Curves, path: Path) -> None:
    """Many attacks: for each hazard task every attack on the unlearned model (thin) and the envelope of each model with
    its 95 % interval; for each general task every attack on every model, and the floors."""
    hazard, general = curves.hazard, curves.config.roles()[1]
    rows = max(1, -(-(len(hazard) + len(general)) // COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 3.2 * rows), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes in panels[len(hazard) + len(general) :]:
        axes.set_axis_off()
    for axes, task in zip(panels, hazard, strict=False):
        _hazard(axes, curves, task)
    for axes, task in zip(panels[len(hazard) :], general, strict=False):
        _general(axes, curves, task)
    if hazard:
        panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _hazard(axes: Axes, curves: Curves, task: str) -> None:
    for points in curves.attackers(UNLEARNED, task).values():
        axes.plot([p.step for p in points], [p.hazard for p in points], color="grey", linewidth=0.6, alpha=0.6)
    for number, subject in enumerate(curves.of):
        found = envelope(curves.attackers(subject, task), curves.floor(subject))
        reached = [(best.step, best.point) for best in found if best.point is not None]
        if reached:
            steps = [step for step, _ in reached]
            accuracies = [point.hazard for _, point in reached]
            label = f"{subject}, best of {len(curves.of[subject])}"
            _line(axes, steps, accuracies, [point.interval for _, point in reached], label=label, color=f"C{number}")
    axes.set_title(task, fontsize="small")
    _finish(axes, "hazard accuracy")


def _general(axes: Axes, curves: Curves, task: str) -> None:
    for number, (subject, of_one) in enumerate(curves.of.items()):
        for curve in of_one.values():
            steps = [point["step"] for point in curve["points"]]
            axes.plot(steps, [p["tasks"][task]["acc"] for p in curve["points"]], color=f"C{number}", linewidth=0.6)
        axes.axhline(curves.floor(subject)[task], color=f"C{number}", linewidth=1, linestyle="--")
    axes.set_title(f"{task}; dashed: floor", fontsize="small")
    _finish(axes, "general accuracy")


def _line(
    axes: Axes,
    steps: Sequence[int],
    accuracies: Sequence[float],
    intervals: Sequence[Sequence[float]],
    *,
    label: str,
    color: str | None = None,
) -> None:
    (line,) = axes.plot(steps, accuracies, marker="o", markersize=3, label=label, color=color)
    low, high = zip(*intervals, strict=True)
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _finish(axes: Axes, label: str) -> None:
    axes.axhline(CHANCE, color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="optimizer steps of the attack", ylabel=label, ylim=(0, 1))
