"""A grid of attacks on a page: the best attacker at each step beside its controls, and what it takes to recover."""

from collections.abc import Iterator
from typing import Any

from unlearn.launch.report.record import Attack

UNLEARNED = "unlearned"  # the subject that is no control


def pictures(attack: Attack, tasks: list[str]) -> Iterator[tuple[str, str]]:
    """(caption, SVG) of an attack: accuracies of the strongest one, envelopes of the models, each attack's curve."""
    from unlearn.launch.report import figures  # imports matplotlib, which the tables do not need

    grid, name = attack.grid, attack.folder.name
    strongest = f", of its {_count(grid)} the strongest, {grid['points_of']}" if _count(grid) > 1 else ""
    yield f"{name}{strongest}: accuracy as fine-tuning goes on", figures.attack_course(attack, tasks)
    subjects = grid.get("subjects", {})
    if len(subjects) == 1 and _count(grid) == 1:
        return
    for task in grid.get("hazard", ()):
        yield (
            f"{name}, {task}: at each step the best attack that keeps general accuracy; beside the controls",
            figures.envelope(subjects, task),
        )
    for task in grid.get("hazard", ()):
        if _count(grid) > 1 and "/" not in task:
            curves = {one: found["points"] for one, found in subjects[UNLEARNED]["attacks"].items()}
            yield f"{name}, {task}: each attack on the unlearned model", figures.attack_curves(curves, task)


def recoveries(attack: Attack) -> Iterator[dict[str, Any]]:
    """A table for each hazard task: every model before, at its envelope's highest point, and what recovery took."""
    grid = attack.grid
    for task in grid.get("hazard", ()):
        gap = grid.get("gap", {}).get(task, {})
        fractions = list(gap.get("bounds", {}))
        yield {
            "task": task,
            "attack": attack.folder.name,
            "gap": gap,
            "fractions": [f"{float(fraction):.0%}" for fraction in fractions],
            "rows": [_row(name, subject, task, fractions) for name, subject in grid["subjects"].items()],
        }


def _row(name: str, subject: dict[str, Any], task: str, fractions: list[str]) -> dict[str, Any]:
    first = next(iter(subject["attacks"].values()))
    reached = [best for best in subject["envelope"][task] if best["acc"] is not None]
    if len(subject["envelope"][task]) > 1 and all(best["step"] == 0 for best in reached):
        reached = []  # of the model before any attack alone
    found = subject.get("recovery", {}).get(task, {})
    return {
        "name": name,
        "attacks": len(subject["attacks"]),
        "before": first["points"][0]["tasks"][task],
        "best": max(reached, key=lambda best: best["acc"], default=None),
        "costs": [_cost(found.get(fraction)) for fraction in fractions],
    }


def _cost(found: dict[str, Any] | None) -> str:
    """Fewest steps and fewest tokens until a share of the gap was recovered, or what is known instead."""
    if found is None:
        return "–"
    if found["steps"] is None:
        return str(found.get("censored", "not recovered"))
    return f"{found['steps']:,} steps, {found['tokens']:,} tokens"


def _count(grid: dict[str, Any]) -> int:
    """How many attacks there were on the unlearned model."""
    return len(grid.get("subjects", {}).get(UNLEARNED, {}).get("attacks", ()))
