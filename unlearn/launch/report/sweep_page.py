"""The page of a sweep: why it ended, its trials, its frontier, and the best trial's run below."""

from collections.abc import Iterator
from typing import Any

from unlearn.launch.report import figures
from unlearn.launch.report.page import fill, parts, shown
from unlearn.launch.report.sweep_record import NOT_ENDED, SweepRecord, bounds, trial_notes

LOSSES = {"forget_loss": "forget loss", "retain_loss": "retain loss"}


def render_sweep(sweep: SweepRecord) -> str:
    """The whole page, as HTML with style and pictures inside."""
    limits = bounds(sweep.flags)
    picture = figures.frontier(sweep.trials, sweep.before, limits["<="], limits[">="]) if len(limits) == 2 else ""
    caption = (
        "Each trial by its number, with 95 % intervals. Dotted: the targets. The line joins the trials that no other "
        "beats in both, collapses left out."
    )
    return fill(
        "sweep.html",
        name=sweep.folder.resolve().name,
        summary=_summary(sweep),
        sweep=sweep,
        state=_state(sweep.outcome),
        tasks=list(sweep.flags.get("tasks", ())),
        columns=[*_flags(sweep), "seed", *LOSSES.values()],
        trials=list(_rows(sweep)),
        sweep_notes=list(_notes(sweep)),
        frontier=shown("frontier", [figures.Picture(caption, picture)] if sweep.trials else []),
        seeds=[trial for trial in sweep.trials if sweep.best and trial["values"] == sweep.best["values"]],
        **({"record": None} if sweep.run is None else parts(sweep.run)),
    )


def _summary(sweep: SweepRecord) -> str:
    """The sweep in one line."""
    flags = sweep.flags
    return f"{flags.get('search')} search over {' '.join(flags.get('grid', ()))}; target {', '.join(flags['target'])}"


def _state(outcome: str) -> str:
    """The colour of what the sweep came to, as base.html names it."""
    if outcome == NOT_ENDED:
        return "unsure"
    return "met" if outcome.startswith("The target is met") else "not"


def _flags(sweep: SweepRecord) -> list[str]:
    """The flags of train.py that the trials differ in."""
    return list(dict.fromkeys(flag for trial in sweep.trials for flag in trial["values"]))


def _rows(sweep: SweepRecord) -> Iterator[dict[str, Any]]:
    """A row of the table for the model before, and for each trial."""
    yield _row(sweep, {"number": "before", "accuracies": sweep.before}, best=False, notes="")
    for trial in sweep.trials:
        best = sweep.best is not None and trial["number"] == sweep.best["number"]
        yield _row(sweep, trial, best=best, notes=trial_notes(trial))


def _row(sweep: SweepRecord, trial: dict[str, Any], *, best: bool, notes: str) -> dict[str, Any]:
    """One row; every value with its column's name, under which it stands where a page is narrow."""
    values = trial.get("values", {}) | {"seed": trial.get("seed", "")}
    return {
        "name": str(trial["number"]),
        "best": best,
        "values": [(flag, str(values.get(flag, ""))) for flag in (*_flags(sweep), "seed")],
        "losses": [(title, trial.get("losses", {}).get(name)) for name, title in LOSSES.items()],
        "numbers": trial.get("accuracies", {}),
        "notes": notes,
    }


def _notes(sweep: SweepRecord) -> Iterator[str]:
    """What a reader should know before believing the table."""
    if not sweep.trials:
        yield "No trial has ended: there is nothing to choose from yet."
    for name in sweep.unfinished:
        yield f"trials/{name} was begun and has not come to its end: the table does not have it."
    if sweep.best is not None and sweep.run is None:
        yield f"trials/{sweep.best['trial']}/run, the best trial's run, is not there: its pictures are missing below."
