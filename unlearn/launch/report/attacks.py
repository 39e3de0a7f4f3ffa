"""A grid of attacks on a page: the best attacker at each step beside its controls, and what it takes to recover."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from unlearn.launch.report.overview import UNLEARNED
from unlearn.launch.report.record import Attack

if TYPE_CHECKING:
    from unlearn.launch.report.figures import Picture

UNKNOWN = "–"
RISES = "A line that rises is knowledge that comes back."
LINES = "Shaded: 95 % intervals; dotted: 25 %, chance of four choices."


def pictures(attack: Attack, tasks: list[str]) -> "Iterator[Picture]":
    """Of an attack: accuracies of the strongest one, envelopes of the models, each attack's curve."""
    from unlearn.launch.report import figures  # imports matplotlib, which the tables do not need
    from unlearn.launch.report.figures import Picture

    grid, name = attack.grid, attack.folder.name
    strongest = f", of its {_count(grid)} the strongest, {grid['points_of']}" if _count(grid) > 1 else ""
    yield Picture(
        f"{name}{strongest}: accuracy as fine-tuning goes on. {RISES} {LINES}", figures.attack_course(attack, tasks)
    )
    subjects = grid.get("subjects", {})
    if len(subjects) == 1 and _count(grid) == 1:
        return
    for task in grid.get("hazard", ()):
        yield Picture(
            f"{name}, {task}: at each step the best attack that keeps general accuracy, beside the controls. "
            f"Thin grey lines: each attack on the unlearned model. {LINES}",
            figures.envelope(subjects, task),
            "part" if "/" in task else "",
        )
    for task in grid.get("hazard", ()):
        if _count(grid) > 1 and "/" not in task:
            curves = {one: found["points"] for one, found in subjects[UNLEARNED]["attacks"].items()}
            yield Picture(
                f"{name}, {task}: each attack on the unlearned model, a line an attack. {RISES} {LINES}",
                figures.attack_curves(curves, task),
                "detail",
            )


def recoveries(attack: Attack) -> dict[str, Any] | None:
    """The table of an attack: by hazard task every model before, at its envelope's highest point, and what recovery
    took; None without such a task."""
    grid = attack.grid
    gaps = {task: grid.get("gap", {}).get(task, {}) for task in grid.get("hazard", ())}
    fractions = list(dict.fromkeys(fraction for gap in gaps.values() for fraction in gap.get("bounds", {})))
    groups = [
        {"task": task, "gap": gap, "rows": [_row(name, one, task, fractions) for name, one in grid["subjects"].items()]}
        for task, gap in gaps.items()
    ]
    titles = [f"{float(fraction):.0%}" for fraction in fractions]
    return {"attack": attack.folder.name, "fractions": titles, "groups": groups} if groups else None


def _row(name: str, subject: dict[str, Any], task: str, fractions: list[str]) -> dict[str, Any]:
    first = next(iter(subject["attacks"].values()))
    reached = [best for best in subject["envelope"][task] if best["acc"] is not None]
    if len(subject["envelope"][task]) > 1 and all(best["step"] == 0 for best in reached):
        reached = []  # of the model before any attack alone
    found = subject.get("recovery", {}).get(task, {})
    costs = [_cost(found.get(fraction)) for fraction in fractions]
    return {
        "name": name,
        "attacks": len(subject["attacks"]),
        "before": first["points"][0]["tasks"][task],
        "best": max(reached, key=lambda best: best["acc"], default=None),
        "costs": costs,
        "same": len(costs) > 1 and len(set(costs)) == 1 and costs[0] != UNKNOWN,  # said once
    }


def _cost(found: dict[str, Any] | None) -> str:
    """Fewest steps and fewest tokens until a share of the gap was recovered, or what is known instead."""
    if found is None:
        return UNKNOWN
    if found["steps"] is None:
        return str(found.get("censored", "not recovered"))
    return f"{found['steps']:,} steps, {found['tokens']:,} tokens"


def _count(grid: dict[str, Any]) -> int:
    """How many attacks there were on the unlearned model."""
    return len(grid.get("subjects", {}).get(UNLEARNED, {}).get("attacks", ()))
