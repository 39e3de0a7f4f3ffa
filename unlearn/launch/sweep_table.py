"""What a sweep found, for people and programs: table.md, best.json and the frontier as a picture."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.evals.judge.targets import Target
from unlearn.files import write_json, writing
from unlearn.launch.report.sweep_record import bounds, trial_notes
from unlearn.launch.sweep_config import Sweep

Record = dict[str, Any]
COLUMNS = ("steps", "batch", "examples", "remove_coef", "retain_coef", "adam_lr", "muon_lr")
TITLES = {"wmdp_bio": "WMDP-Bio", "wmdp_bio_robust": "WMDP-Bio robust", "mmlu_stem": "MMLU-STEM"}
NONE = "—"


def write_results(sweep: Sweep, records: Sequence[Record], before: Mapping[str, Any], outcome: str) -> None:
    """Write table.md and best.json, each whole or not at all."""
    found = best(records, sweep.config.targets())
    folder, temporary = sweep.folder, sweep.folder / "table.md.tmp"
    with writing(folder):
        temporary.write_text(table(sweep, records, before, outcome), encoding="utf-8")
        temporary.replace(folder / "table.md")
    model = None if found is None else folder / "trials" / found["trial"] / "run" / "model"
    chosen = {"outcome": outcome, "trials": len(records), "best": found, "seeds": seeds_of(found, records)}
    write_json(folder / "best.json", chosen | {"model": str(model) if model is not None and model.is_dir() else None})


def best(records: Sequence[Record], targets: Sequence[Target]) -> Record | None:
    """The trial to name: of the point that met the target most often, else the least short of it; None if all failed.

    A collapse counts as further off than anything that is none; of those equally short, the one measured on all
    questions and then the earliest leads: choosing the luckiest of several seeds would flatter the numbers.
    """
    measured = [record for record in records if record["state"] != "failed"]
    points = [record["values"] for record in measured]
    missed = [record["values"] for record in measured if record["state"] != "met"]

    def rank(record: Record) -> tuple[Any, ...]:
        clean = record["state"] == "met" and record["values"] not in missed
        collapse = any(one["collapse"] for one in record["verdict"]["targets"])
        return (
            -points.count(record["values"]) if clean else 0,
            record["state"] != "met",
            collapse,
            shortfall(record, targets),
            record["questions"] != "all",
            record["number"],
        )

    return min(measured, key=rank, default=None)


def seeds_of(found: Record | None, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every seed that was run at the best trial's point, with how it ended and its accuracies."""
    return [
        {
            "seed": record["seed"],
            "state": record["state"],
            "accuracies": {task: numbers["acc"] for task, numbers in record.get("accuracies", {}).items()},
        }
        for record in records
        if found is not None and record["values"] == found["values"]
    ]


def shortfall(record: Record, targets: Sequence[Target]) -> float:
    """How far the accuracies are beyond the bounds, summed, as a fraction."""
    gaps = [
        (record["accuracies"][target.task]["acc"] - target.value) * (1 if target.operator == "<=" else -1)
        for target in targets
    ]
    return sum(max(0.0, gap) for gap in gaps)


def table(sweep: Sweep, records: Sequence[Record], before: Mapping[str, Any], outcome: str) -> str:
    """Markdown: the outcome, the best configuration, a row a trial, the exact commands."""
    tasks = sweep.config.tasks
    extra = [flag for flag in sweep.space.flags if flag.replace("-", "_") not in COLUMNS]
    titles = ["trial", *(name.replace("_", " ") for name in COLUMNS), *extra, "seed", "forget loss", "retain loss"]
    titles += [f"{TITLES.get(task, task)}, % [95 %]" for task in tasks] + ["notes"]
    original = ["before", *[NONE] * (len(titles) - len(tasks) - 2), *(_accuracy(before[task]) for task in tasks), ""]
    rows = [titles, ["---"] * len(titles), original, *(_row(record, extra, tasks) for record in records)]
    found = best(records, sweep.config.targets())
    parts = [
        f"# Sweep\n\nTarget: {', '.join(map(str, sweep.config.targets()))}. {outcome}",
        f"**Best configuration:** {_describe(found, records)}",
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
        "## Commands",
        *(f"{record['number']}:\n\n```\n" + "\n".join(record["commands"]) + "\n```" for record in records),
    ]
    return "\n\n".join(parts) + "\n"


def _describe(found: Record | None, records: Sequence[Record]) -> str:
    """The best trial in a line, with what became of its point with other seeds."""
    if found is None:
        return "none, as no trial was measured"
    values = " ".join(f"--{flag} {value}" for flag, value in found["values"].items())
    others = [one for one in seeds_of(found, records) if one["seed"] != found["seed"]]
    seeds = "".join(f"; seed {one['seed']}: {'met' if one['state'] == 'met' else 'not met'}" for one in others)
    return f"trial {found['number']}, `{values} --seed {found['seed']}`: {trial_notes(found)}{seeds}"


def _row(record: Record, extra: Sequence[str], tasks: Sequence[str]) -> list[str]:
    settings = record["settings"] | {"steps": record.get("steps")}
    row = [str(record["number"]), *(_number(settings[name]) for name in COLUMNS)]
    row += [record["values"][flag] for flag in extra] + [str(record["seed"])]
    row += [_number(record.get("losses", {}).get(name), ".4g") for name in ("forget_loss", "retain_loss")]
    accuracies = record.get("accuracies", {})
    return [*row, *(_accuracy(accuracies[task]) if accuracies else NONE for task in tasks), trial_notes(record)]


def _number(value: float | None, form: str = "g") -> str:
    return NONE if value is None else format(value, form)


def _accuracy(numbers: Mapping[str, Any]) -> str:
    low, high = numbers["interval"]
    return f"{100 * numbers['acc']:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def draw_frontier(sweep: Sweep, records: Sequence[Record], before: Mapping[str, Any], path: Path) -> bool:
    """Draw hazard against general accuracy, a point a trial; False without matplotlib or two kinds of target."""
    limits = bounds({"target": sweep.config.target})
    if importlib.util.find_spec("matplotlib") is None or len(limits) < 2:
        return False
    from unlearn.launch.report.figures import save_frontier

    with writing(path):
        save_frontier(records, before, limits["<="], limits[">="], path)
    return True
