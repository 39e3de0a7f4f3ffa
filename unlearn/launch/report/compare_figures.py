"""The pictures of a comparison."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from unlearn.launch.report.figures import INK, SIZE, STYLE, as_svg, finished, new_axes, short

Rows = Mapping[str, Mapping[str, Any]]  # of compare.json, by name


def against_general(rows: Rows, part: str, task: str, general: Sequence[str]) -> str:
    """Hazard after the attacks against the lowest general accuracy before them, a mark a row."""
    places = [
        (name, min(row["before"][one]["acc"] for one in general), row["worst"][part][task])
        for name, row in rows.items()
        if task in row["worst"][part]
    ]
    return _marks(places, "general accuracy: higher is better", f"{short(task)} after attack")


def against_divergence(rows: Rows, part: str, task: str) -> str:
    """The same against KL(original || model) before the attacks, where it was measured; "" if nowhere."""
    places = [
        (name, row["kl"], row["worst"][part][task])
        for name, row in rows.items()
        if task in row["worst"][part] and row["kl"] is not None
    ]
    across = "KL from the original, nats a token: lower is better"
    return _marks(places, across, f"{short(task)} after attack") if places else ""


def against_compute(rows: Rows, part: str, task: str) -> str:
    """The same against the arithmetic of one run, for what was trained; "" if nothing was."""
    places = [
        (name, float(np.mean([cost["flops"] for cost in row["cost"]])) / 1e12, row["worst"][part][task])
        for name, row in rows.items()
        if task in row["worst"][part] and row["cost"] and all(cost.get("flops") for cost in row["cost"])
    ]
    return _marks(places, "TFLOP of one run", f"{short(task)} after attack") if places else ""


def _marks(places: Sequence[tuple[str, float, Mapping[str, Any]]], across: str, up: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes(across, up, height=3.4)
        for name, x, case in places:
            low, high = case["interval"]
            reach = [[max(0.0, case["acc"] - low)], [max(0.0, high - case["acc"])]]
            axes.errorbar([x], [case["acc"]], reach, fmt="o", markersize=5, elinewidth=0.6)
            axes.annotate(name, (x, case["acc"]), (4, 3), textcoords="offset points", fontsize=8)
        axes.set_ylim(0, 1.02)
        return as_svg(figure)


def curves(rows: Rows, methods: Sequence[str], task: str) -> str:
    """Attack steps against hazard, a line a method; controls dashed; "" if nothing was measured."""
    drawn = {name: row["curve"][task] for name, row in rows.items() if row["curve"].get(task)}
    if not drawn:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes("optimizer steps of the attack", short(task), height=SIZE[1] + 0.1 * len(drawn))
        for name, points in drawn.items():
            steps = [point["step"] for point in points]
            style = "o-" if name in methods else "--"
            (line,) = axes.plot(steps, [point["acc"] for point in points], style, markersize=3, label=name)
            low, high = zip(*(point["interval"] for point in points), strict=True)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        return finished(figure, axes)


def heat_map(rows: Rows, task: str) -> str:
    """Accuracy by method and way; "" if nobody looked."""
    looked = {name: dict(_by_way(row, task)) for name, row in rows.items() if row["ways"] is not None}
    ways = list(dict.fromkeys(way for found in looked.values() for way in found))
    if not ways:
        return ""
    values = np.array([[100 * found.get(way, np.nan) for way in ways] for found in looked.values()])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_axes("", "", height=1.6 + 0.28 * len(looked))
        axes.imshow(values, aspect="auto", vmin=0, vmax=100, cmap="Blues", alpha=0.45)
        for row, column in np.argwhere(np.isfinite(values)):
            value = values[row, column]
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=INK)
        axes.set_xticks(range(len(ways)), ways, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(looked)), list(looked))
        return as_svg(figure)


def _by_way(row: Mapping[str, Any], task: str) -> Iterator[tuple[str, float]]:
    for way, found in row["ways"]["ways"].items():
        if task in found["tasks"]:
            yield way, found["tasks"][task]["acc"]
    layers = row["ways"]["probe"].get(task, {}).values()
    if layers:
        yield "best probe", max(layer["acc"] for layer in layers)
