"""The page of a comparison: the verdict in words, the ranked table, and what it rests on."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from unlearn.launch import compare_table
from unlearn.launch.report import compare_figures
from unlearn.launch.report.page import fill, shown

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
        ranked=compare_table.main_rows(found, rules),
        sections={title: rows for title, rows in sections.items() if len(rows) > 1},
        pictures=shown("comparison", pictures(found, rules)),
    )


def pictures(found: Mapping[str, Any], rules: "Rules") -> Iterator[tuple[str, str]]:
    """(caption, SVG) of each picture."""
    rows, part = found["rows"], rules.main
    for task in rules.hazard:
        yield (
            f"{task}, {part}: worst case after the attacks against general accuracy before them",
            compare_figures.against_general(rows, part, task, rules.general),
        )
        yield (
            f"{task}, {part}: worst case after the attacks against the divergence from the original before them",
            compare_figures.against_divergence(rows, part, task),
        )
        yield (
            f"{task}, {part}: worst case after the attacks against the arithmetic of one run",
            compare_figures.against_compute(rows, part, task),
        )
        yield (
            f"{task}, {part}: at each step the best attacker that keeps general accuracy; dashed: controls",
            compare_figures.curves(rows, found["ranking"], task),
        )
        yield f"{task}: what each way brings out, in %", compare_figures.heat_map(rows, task)
