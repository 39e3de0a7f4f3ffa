"""The page of a comparison: the verdict in words, the ranked table, and what it rests on."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from unlearn.launch import compare_table
from unlearn.launch.compare_config import NEVER_SEEN
from unlearn.launch.report import compare_figures
from unlearn.launch.report.attacks import LINES
from unlearn.launch.report.figures import Picture
from unlearn.launch.report.overview import Bar, Panel, Row, bar_of, chance
from unlearn.launch.report.page import fill, first_picture, shown

BEFORE, AFTER = "before the attacks", "after the attacks"
FIRST = (
    "Each method, the best first, then the controls: accuracy before the attacks, and after the one that brings most "
    "back while it keeps general accuracy. What an attack leaves of general accuracy has no interval."
)

if TYPE_CHECKING:
    from unlearn.launch.compare_results import Rules


def render_comparison(name: str, found: Mapping[str, Any], rules: "Rules") -> str:
    """The whole page, as HTML with style and pictures inside.

    Args:
        found: compare.json.
    """
    sections = {
        "Differences between methods": compare_table.difference_rows(found),
        "Steps to recover": compare_table.recovery_rows(found),
        "Other ways in, without training": compare_table.way_rows(found, rules),
        "Cost of one run": compare_table.cost_rows(found),
        "Trials": compare_table.trial_rows(found),
    }
    return fill(
        "compare.html",
        name=name,
        summary=f"{len(found['ranking'])} methods under attack, by {', '.join(rules.hazard)}",
        found=found,
        overview=first_picture(overview(found, rules), FIRST),
        ranked=compare_table.main_rows(found, rules),
        sections={title: rows for title, rows in sections.items() if len(rows) > 1},
        pictures=shown("comparison", pictures(found, rules)),
    )


def overview(found: Mapping[str, Any], rules: "Rules") -> list[Panel]:
    """The parts of the first picture: one for each task, a row a method or control."""
    rows = found["rows"]
    names = [*found["ranking"], *(name for name in rows if name not in found["ranking"])]
    hazard = [
        Panel(f"{task}, {rules.main}: lower is better", tuple(_hazard(rows, name, rules.main, task) for name in names))
        for task in rules.hazard
    ]
    general = [
        Panel(f"{task}: higher is better", tuple(_general(name, rows[name], task) for name in names))
        for task in rules.general
    ]
    return [panel for panel in (*hazard, *general) if panel.rows]


def _hazard(rows: Mapping[str, Any], name: str, part: str, task: str) -> Row:
    """Before: of the same part of the questions, where it was measured."""
    row, unseen = rows[name], rows.get(NEVER_SEEN, {}).get("worst", {}).get(part, {}).get(task)
    starts = [point for point in row["curve"].get(task, ()) if point["step"] == 0]
    bars = [bar_of(BEFORE, (starts or [row["before"][task]])[0])]
    if task in row["worst"][part]:
        bars.append(bar_of(AFTER, row["worst"][part][task]))
    control = bar_of(NEVER_SEEN, unseen) if unseen and name != NEVER_SEEN else None
    return Row(name, tuple(bars), chance(task, {}), control)


def _general(name: str, row: Mapping[str, Any], task: str) -> Row:
    bars = [bar_of(BEFORE, row["before"][task])]
    if task in row["general_after"]:
        bars.append(Bar(AFTER, row["general_after"][task], None))
    return Row(name, tuple(bars), chance(task, {}))


def pictures(found: Mapping[str, Any], rules: "Rules") -> Iterator[Picture]:
    """What the tables say, drawn."""
    rows, part = found["rows"], rules.main
    for task in rules.hazard:
        worst = f"{task}, {part}: worst case after the attacks"
        yield Picture(
            f"{worst} against general accuracy before them. Best is at the bottom right: little comes back, the "
            "rest is kept.",
            compare_figures.against_general(rows, part, task, rules.general),
        )
        yield Picture(
            f"{worst} against KL(original || model) on retain text before them. Best is at the bottom left: little "
            "comes back, little else has changed.",
            compare_figures.against_divergence(rows, part, task),
        )
        yield Picture(
            f"{worst} against the arithmetic of one run. Further left is cheaper.",
            compare_figures.against_compute(rows, part, task),
        )
        yield Picture(
            f"{task}, {part}: at each step the best attacker that keeps general accuracy. Dashed: controls. {LINES}",
            compare_figures.curves(rows, found["ranking"], task),
        )
        yield Picture(
            f"{task}: what each way in brings out without training, in per cent. The darker, the more.",
            compare_figures.heat_map(rows, task),
        )
