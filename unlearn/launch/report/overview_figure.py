"""The first picture of a page: bars with intervals, as one wide picture and as narrow parts for phones and paper."""

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from unlearn.launch.report.figures import INK, SIZE, STYLE, as_svg, short
from unlearn.launch.report.overview import Panel, Row, stage_names

WIDE = 13.5  # inches
BAR, GAP = 0.19, 0.13  # inches: of a bar, and of the space between two rows
FRAME = 1.05  # inches above and below the rows
COLOURS = ("#8792a2", "#2f6fb3", "#d9622b", "#e39a3b", "#a4508b", "#4a9a8a", "#b5a642")  # of the stages
DOTTED: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": ":"}
DASHED: dict[str, Any] = {"color": INK, "linewidth": 1.3, "linestyle": "--"}
DIAMOND: dict[str, Any] = {"color": INK, "marker": "D", "markersize": 4, "markerfacecolor": "none", "linestyle": ""}
ABREAST = 4  # parts in a line of the wide picture
TITLE = 34  # letters in a line of a title
NUMBERS, END = 1.02, 1.13  # of the axis: where the numbers stand, right of all bars and lines, and its end


def wide(panels: Sequence[Panel]) -> str:
    """All parts beside each other, at most four in a line."""
    stages, columns = stage_names(panels), min(len(panels), ABREAST)
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(map(_height, line)) for line in lines]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDE, sum(heights)), layout="constrained")
        grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights).flatten()
        for axes, panel in zip(grid[: len(panels)], panels, strict=True):
            _draw(axes, panel, stages)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.legend(handles=_legend(panels, stages), loc="outside upper center", ncols=8)
        return as_svg(figure)


def narrow(panels: Sequence[Panel]) -> list[str]:
    """Each part a picture of its own."""
    stages = stage_names(panels)
    with matplotlib.rc_context(STYLE):
        return [_alone(panel, stages) for panel in panels]


def _alone(panel: Panel, stages: Sequence[str]) -> str:
    handles = _legend([panel], stages)
    columns = 4 if len(handles) <= 4 and sum(len(str(one.get_label())) for one in handles) < 45 else 2
    figure = Figure(figsize=(SIZE[0], _height(panel) + 0.17 * ((len(handles) - 1) // columns)), layout="constrained")
    _draw(figure.subplots(), panel, stages)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, columnspacing=1.2)
    return as_svg(figure)


def _height(panel: Panel) -> float:
    return FRAME + sum(BAR * len(row.bars) + GAP for row in panel.rows)


def _draw(axes: Axes, panel: Panel, stages: Sequence[str]) -> None:
    """The rows of a part from above, each a group of bars with its lines."""
    top, middles = 0.0, []
    for row in panel.rows:
        end = top + BAR * len(row.bars)
        _draw_bars(axes, row, stages, top)
        _draw_lines(axes, row, top - GAP / 3, end + GAP / 3)
        if row.peak is not None:
            axes.plot([row.peak], [end - BAR / 2], **DIAMOND)
        middles.append((top + end) / 2)
        top = end + GAP
    axes.set_yticks(middles, [short(row.name) for row in panel.rows])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set(xlim=(0, END), ylim=(top, -GAP), xlabel="accuracy")
    axes.set_title(_title(panel.title), fontsize=10, loc="left")
    axes.spines["bottom"].set_bounds(0, 1)
    axes.tick_params(axis="y", length=0)


def _title(text: str) -> str:
    """A title in lines that fit, cut before what is to be wished."""
    lines = [text] if len(text) <= TITLE else text.split(": ", 1)
    return ":\n".join(textwrap.fill(line, TITLE) for line in lines)


def _draw_bars(axes: Axes, row: Row, stages: Sequence[str], top: float) -> None:
    for number, bar in enumerate(row.bars):
        place = top + BAR * (number + 0.5)
        axes.barh(place, bar.acc, BAR * 0.86, color=_colour(stages, bar.name), alpha=0.85)
        low, high = bar.interval or (bar.acc, bar.acc)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
        axes.text(NUMBERS, place, f"{100 * bar.acc:.0f} %", va="center", fontsize=8)


def _draw_lines(axes: Axes, row: Row, top: float, bottom: float) -> None:
    """Chance, and the control with its interval, over the bars of a row."""
    if row.chance is not None:
        axes.plot([row.chance] * 2, [top, bottom], **DOTTED)
    if row.control is not None:
        axes.plot([row.control.acc] * 2, [top, bottom], **DASHED)
        low, high = row.control.interval or (row.control.acc, row.control.acc)
        axes.fill_betweenx([top, bottom], low, high, color=INK, alpha=0.12, linewidth=0)


def _legend(panels: Sequence[Panel], stages: Sequence[str]) -> list[Patch | Line2D]:
    """The marks that there are."""
    rows = [row for panel in panels for row in panel.rows]
    handles: list[Patch | Line2D] = [Patch(color=_colour(stages, name), label=short(name)) for name in stages]
    if any(row.chance is not None for row in rows):
        handles.append(Line2D([], [], label="chance", **DOTTED))
    controls = dict.fromkeys(row.control.name for row in rows if row.control)
    handles += [Line2D([], [], label=short(f"{name}, attacked"), **DASHED) for name in controls]
    if any(row.peak is not None for row in rows):
        handles.append(Line2D([], [], label="highest at any step", **DIAMOND))
    return handles


def _colour(stages: Sequence[str], name: str) -> str:
    return COLOURS[stages.index(name) % len(COLOURS)]
