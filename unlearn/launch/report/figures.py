"""The pictures of a report: small SVGs that take the colour of the text around them, so that they suit dark and light.

matplotlib draws them; nothing in them refers to anything outside the page.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from unlearn.launch.report.record import Attack, Measurement, Tasks
from unlearn.launch.report.text import printable

INK = "#0a0b0c"  # stands for the text's colour, which the page knows
SIZE = (4.6, 3.0)  # inches: about a phone's width, so that the letters keep their size there
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "unlearn",  # the same data give the same file
    "text.parse_math": False,  # names may hold dollar signs
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
CHANCE = 0.25  # of four choices
KINDS = {"met": ("#2e9e5b", "o"), "not met": ("#7f8a99", "s"), "collapse": ("#d9534f", "X")}  # colour, mark of a trial

Bound = tuple[str, float]  # a task and the share that a target allows it


class Picture(NamedTuple):
    """A picture of a page.

    Attributes:
        caption: what it shows, in plain words. svg: "" where there was nothing to draw.
        kind: "part" (of a task's questions) and "detail" may be left out on paper.
    """

    caption: str
    svg: str
    kind: str = ""


def curve(lines: Sequence[dict[str, Any]], keys: Sequence[str], label: str, *, log: bool = False) -> str:
    """Numbers of the log against optimizer steps, a line for each key; "" if none of them was logged."""
    shown = [key for key in keys if any(key in line for line in lines)]
    if not shown:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes("optimizer step", label)
        for key in shown:
            pairs = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*pairs, strict=True), label=key, linewidth=1.2)
        if log and all(line[key] > 0 for line in lines for key in shown if key in line):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if len(shown) > 1:
            axes.legend()
        return as_svg(figure)


def entropy_map(lines: Sequence[dict[str, Any]]) -> str:
    """Entropy of the lens distribution on forget text: a row for each target layer, a column for each logged step."""
    logged = [line for line in lines if any(key.startswith("entropy/") for key in line)]
    if not logged:
        return ""
    layers = sorted(int(key.removeprefix("entropy/")) for key in logged[0] if key.startswith("entropy/"))
    values = np.array([[line[f"entropy/{layer}"] for line in logged] for layer in layers])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes("optimizer step", "layer")
        steps = [line["step"] for line in logged]
        extent = (steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(layers) - 0.5)
        image = axes.imshow(values, aspect="auto", origin="lower", interpolation="nearest", extent=extent)
        axes.set_yticks(range(len(layers)), list(map(str, layers)))
        figure.colorbar(image, ax=axes, label="nats")
        return as_svg(figure)


def course(points: Sequence[tuple[int, Tasks]], tasks: Sequence[str], label: str) -> str:
    """Accuracy against steps with its 95 % interval, a line for each task."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(label, "accuracy")
        for task in tasks:
            found = [(step, measured[task]) for step, measured in points if task in measured]
            if found:
                band(axes, found, task)
        return finished(figure, axes)


def band(axes: Axes, found: Sequence[tuple[int, dict[str, Any]]], label: str) -> None:
    """A line of accuracies by step, with its 95 % interval."""
    steps = [step for step, _ in found]
    (line,) = axes.plot(steps, [value["acc"] for _, value in found], "o-", markersize=3, label=short(label))
    low, high = zip(*(value["interval"] for _, value in found), strict=True)
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def finished(figure: Figure, axes: Axes, columns: int = 2) -> str:
    """A picture of accuracies against steps, with all that they share."""
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_chance(axes.axhline)
    figure.legend(loc="outside upper center", ncols=columns)
    return as_svg(figure)


def letters(stages: dict[str, Tasks], task: str) -> str:
    """How often each choice was answered in each stage, beside how often it was right where that is known."""
    found = {stage: measured[task] for stage, measured in stages.items() if "predicted" in measured.get(task, {})}
    bars = {stage: value["predicted"] for stage, value in found.items()}
    right = next((value["right"] for value in found.values() if "right" in value), None)
    bars |= {"right answers": right} if right is not None else {}
    if not found:
        return ""
    count = max(map(len, bars.values()))
    names = next((value["letters"] for value in found.values() if "letters" in value), range(1, count + 1))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes("choice", "share of answers")
        width = 0.8 / len(bars)
        for index, (stage, shares) in enumerate(bars.items()):
            places = np.arange(len(shares)) + (index - (len(bars) - 1) / 2) * width
            axes.bar(places, shares, width, label=short(stage))
        axes.set_xticks(range(count), [short(str(name)) for name in names][:count])
        axes.set_ylim(0, 1)
        figure.legend(loc="outside upper center", ncols=2)
        return as_svg(figure)


def attack_course(attack: Attack, tasks: Sequence[str]) -> str:
    """The recovery curve of an attack."""
    return course(attack.points, tasks, "optimizer steps of the attack")


def attack_curves(curves: dict[str, list[dict[str, Any]]], task: str) -> str:
    """One task's recovery under each of several attacks, given by name as the points of attack.json."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes("optimizer steps of the attack", short(task), height=SIZE[1] + 0.12 * len(curves))
        for name, points in curves.items():
            band(axes, [(point["step"], point["tasks"][task]) for point in points], name)
        return finished(figure, axes, columns=1)


def envelope(subjects: dict[str, Any], task: str) -> str:
    """The best attack at each step on every model, and in the background each attack on the unlearned one.

    Args:
        subjects: of attack.json, the unlearned model first.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes("optimizer steps of the attack", short(task))
        for attack in next(iter(subjects.values()))["attacks"].values():
            pairs = [(point["step"], point["tasks"][task]["acc"]) for point in attack["points"]]
            axes.plot(*zip(*pairs, strict=True), color="#7f8a99", linewidth=0.6, alpha=0.7)
        for name, subject in subjects.items():
            reached = [best for best in subject["envelope"][task] if best["acc"] is not None]
            if reached:
                band(axes, [(best["step"], best) for best in reached], f"{name}, best of {len(subject['attacks'])}")
        return finished(figure, axes)


def training_course(during: Sequence[tuple[int, Measurement]], tasks: Sequence[str]) -> str:
    """Accuracies measured during training; "" if there are fewer than three moments of it."""
    points = [(step, measurement.tasks) for step, measurement in during]
    return course(points, tasks, "optimizer steps of unlearning") if len(points) > 2 else ""


def frontier(trials: Sequence[dict[str, Any]], before: Mapping[str, Any], hazard: Bound, general: Bound) -> str:
    """The accuracies that two targets of a sweep bind against each other, a mark a trial."""
    with matplotlib.rc_context(STYLE):
        return as_svg(_frontier(trials, before, hazard, general))


def save_frontier(
    trials: Sequence[dict[str, Any]], before: Mapping[str, Any], hazard: Bound, general: Bound, path: Path
) -> None:
    """The same as a PNG."""
    with matplotlib.rc_context(STYLE):
        _frontier(trials, before, hazard, general).savefig(path, dpi=150)


def _frontier(trials: Sequence[dict[str, Any]], before: Mapping[str, Any], hazard: Bound, general: Bound) -> Figure:
    """Each trial by its number, with 95 % intervals; the line joins those that no other beats in both accuracies."""
    figure, axes = new_axes(
        f"{short(hazard[0])}: lower is better", f"{short(general[0])}: higher is better", height=3.6
    )
    places: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for trial in trials:
        if trial["state"] != "failed":
            across, up = (trial["accuracies"][task] for task, _ in (hazard, general))
            kind = _kind(trial)
            _mark_trial(axes, across, up, str(trial["number"]), kind)
            places[kind].append((across["acc"], up["acc"]))
    for kind, (color, form) in KINDS.items():
        if places[kind]:
            axes.plot([], [], form, color=color, label=kind)
    ahead = _unbeaten(places["met"] + places["not met"])
    axes.plot([x for x, _ in ahead], [y for _, y in ahead], color=INK, linewidth=0.8, alpha=0.6)
    if before:
        axes.plot(before[hazard[0]]["acc"], before[general[0]]["acc"], "x", color=INK, label="before", linestyle="")
    for draw, (_, share) in ((axes.axvline, hazard), (axes.axhline, general)):
        draw(share, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def _kind(trial: dict[str, Any]) -> str:
    """What the mark of a trial tells: a collapse is one, whatever else its verdict says."""
    verdict = trial["verdict"]
    if any(one["collapse"] for one in verdict["targets"]):
        return "collapse"
    return "met" if verdict["by_point"] == "met" else "not met"


def _mark_trial(axes: Axes, across: dict[str, Any], up: dict[str, Any], name: str, kind: str) -> None:
    """Draw one trial with its intervals."""
    color, form = KINDS[kind]
    x, y = across["acc"], up["acc"]
    (left, right), (down, top) = across["interval"], up["interval"]
    across_reach = [[max(0.0, x - left)], [max(0.0, right - x)]]
    up_reach = [[max(0.0, y - down)], [max(0.0, top - y)]]
    axes.errorbar([x], [y], up_reach, across_reach, fmt=form, color=color, markersize=5, elinewidth=0.5)
    axes.annotate(name, (x, y), (4, 3), textcoords="offset points", fontsize=8)


def _unbeaten(places: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those with no other of less (or equal) hazard and more (or equal) general accuracy, by hazard."""
    ahead: list[tuple[float, float]] = []
    for hazard, general in sorted(set(places), key=lambda place: (place[0], -place[1])):
        if not ahead or general > ahead[-1][1]:
            ahead.append((hazard, general))
    return ahead


def short(name: str) -> str:
    """A name that leaves room for the picture."""
    return name if len(name) <= 32 else f"{name[:31]}…"


def new_axes(across: str, up: str, height: float = SIZE[1]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(SIZE[0], height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=across, ylabel=up)
    return figure, axes


def _mark_chance(draw: Any) -> None:
    draw(CHANCE, color=INK, linewidth=0.8, linestyle=":", alpha=0.6)


def as_svg(figure: Figure) -> str:
    """The figure as an <svg> element for the inside of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text))
    return printable(text.replace(INK, "currentColor"))


def with_own_ids(svg: str, prefix: str) -> str:
    """The same picture with ids that no other picture of the page has."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    return re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
