"""The page of a report: what stands where. `page.html` is its form; everything that it prints is escaped there."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from unlearn.launch.report import attacks, figures, origins, overview, overview_figure
from unlearn.launch.report.figures import Picture
from unlearn.launch.report.record import Attack, Measurement, Record, Tasks, merged
from unlearn.launch.report.text import printable

# Shares of the answers above which a habit, and not knowledge, may decide an accuracy.
HABIT = 0.6
PICTURES = 10  # with more of them, details of training are left out on paper
# Below the pictures, in plain words.
FIRST = (
    "How many questions are answered rightly before unlearning, after it, and once fine-tuning has tried to bring the "
    "knowledge back."
)
FORGET = (
    "Forget loss at each step: it falls as the model unlearns. With a lens, at 1 it finds every next token of the text "
    "to forget equally likely."
)
RETAIN = "Retain loss at each step: what unlearning costs on text to keep. Lower is better."
NORM = "Gradient norm at each step, before clipping. A sudden jump is a step that went wrong."
RATES = "Learning rates at each step: how far a step may move the weights."
WEIGHTS = "Weights of the losses at each step: how much each counts."
DURING = "Accuracy during unlearning, a line a task. Shaded: 95 % intervals; dotted: 25 %, chance of four choices."
ENTROPY = (
    "Entropy of the lens's prediction on forget text, by layer and step. The brighter, the less the layer knows what "
    "comes next."
)
LETTERS = (
    "which choices were answered, and how often each was right where that is known. One bar far above the others is a "
    "habit, not knowledge."
)


def render(record: Record) -> str:
    """The whole page of a run, as HTML with style and pictures inside."""
    return fill("run.html", name=record.folder.resolve().name, summary=_summary(record), **parts(record))


def fill(template: str, **values: Any) -> str:
    """A template with `values` in it, all of them escaped but for those that are `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, interval=_interval, visible=_visible)
    return environment.get_template(template).render(versions=origins.versions(), **values)


def parts(record: Record) -> dict[str, Any]:
    """What run_body.html shows of a run."""
    stages = _stages(record)
    tasks = _in_order(stages.values())
    main = [task for task in tasks if task.partition("/")[0] not in record.members]
    whole = [task for task in main if "/" not in task]
    kinds = overview.by_kind(record, dict.fromkeys(task.partition("/")[0] for task in main))
    pictures = _pictures(record, stages, whole)
    return {
        "record": record,
        "verdicts": _verdicts(record.after),
        "stages": stages,
        "overview": first_picture(overview.overview(record, stages, kinds), FIRST),
        "tables": {title: list(_rows(stages, _with_parts(names, main))) for title, names in kinds.items()},
        "member_rows": list(_rows(stages, [task for task in tasks if task not in main])),
        "notes": list(_notes(record, stages)),
        "pictures": pictures,
        "crowded": sum(map(len, pictures.values())) > PICTURES,
        "recoveries": [table for attack in record.attacks if (table := attacks.recoveries(attack))],
        "commands": origins.commands(record),
        "flags": origins.given(record.config),
        "files": list(origins.files(record)),
    }


def first_picture(panels: Sequence[overview.Panel], what: str) -> dict[str, Any] | None:
    """The picture that a page opens with, in both its shapes; None where nothing was measured."""
    if not panels:
        return None
    narrow = enumerate(overview_figure.narrow(panels))
    return {
        "wide": Markup(figures.with_own_ids(overview_figure.wide(panels), "overview")),
        "narrow": [Markup(figures.with_own_ids(svg, f"overview-{index}")) for index, svg in narrow],
        "caption": overview.caption(panels, what),
    }


def _with_parts(names: Iterable[str], tasks: Sequence[str]) -> list[str]:
    """The tasks called `names` and the parts of each."""
    return [task for name in names for task in tasks if task == name or task.startswith(f"{name}/")]


def _stages(record: Record) -> dict[str, Tasks]:
    """The numbers of each stage that was measured: before, after, and the end of each attack."""
    stages = {"before": merged(record.before), "after": merged(record.after)}
    for attack in record.attacks:
        stages[_attack_name(attack, record)] = attack.points[-1][1]
    return {name: tasks for name, tasks in stages.items() if tasks}


def _attack_name(attack: Attack, record: Record) -> str:
    """What a column is called: the last measurement of the attack that brought most back."""
    name = "attacked" if len(record.attacks) == 1 else f"attacked: {attack.folder.name}"
    return f"{name}, step {attack.points[-1][0]}"


def _in_order(stages: Iterable[Tasks]) -> list[str]:
    """Every task once, each followed by its parts."""
    names = list(dict.fromkeys(name for tasks in stages for name in tasks))
    whole = [name for name in names if "/" not in name]
    parts = {name: [part for part in names if part.startswith(f"{name}/")] for name in whole}
    orphans = [name for name in names if "/" in name and name.partition("/")[0] not in whole]
    return [name for task in whole for name in (task, *parts[task])] + orphans


def _rows(stages: dict[str, Tasks], tasks: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of the table of accuracies: each task, and below it what shows a habit of one letter."""
    for task in tasks:
        found = [measured.get(task, {}) for measured in stages.values()]
        yield {
            "name": task.rpartition("/")[2],
            "part": "/" in task,
            "cells": [_cell(v, "acc", "interval") for v in found],
        }
        if "/" in task:
            continue
        if any("debiased" in value for value in found):
            cells = [_cell(v, "debiased", "debiased_interval") for v in found]
            yield {"name": "without each letter's mean (debiased)", "part": True, "cells": cells}
        if any("predicted" in value for value in found):
            shares = [{"commonest": max(v["predicted"])} if v.get("predicted") else {} for v in found]
            cells = [_cell(v, "commonest", "") for v in shares]
            yield {"name": "commonest choice answered", "part": True, "cells": cells}


def _cell(value: dict[str, Any], number: str, interval: str) -> dict[str, Any] | None:
    if number not in value:
        return None
    return {"value": value[number], "interval": value.get(interval), "questions": value.get("questions")}


def _verdicts(measurements: list[Measurement]) -> list[dict[str, Any]]:
    """What the evaluations of the result say of their targets."""
    verdicts = [measurement.verdict for measurement in measurements if measurement.verdict]
    keys = ("by_point", "by_interval", "words")
    return [
        {key: found.get(key) for key in keys} if isinstance(found, dict) else dict.fromkeys(keys) | {"words": found}
        for found in verdicts
    ]


def _notes(record: Record, stages: dict[str, Tasks]) -> Iterator[str]:
    """What a reader should know before believing the numbers."""
    if not record.finished:
        yield f"The run has not come to its end: {len(record.steps)} steps are logged and no model is exported."
    for place in record.empty:
        yield f"{place} holds no results: that evaluation has failed or not ended."
    for stage, tasks in stages.items():
        for task, value in tasks.items():
            share = max(value.get("predicted", ()), default=0.0)
            if "/" not in task and task not in record.members and share >= HABIT:
                yield (
                    f"{task}, {stage}: {_percent(share)} of the answers are the same choice. Its accuracy says little; "
                    "read the debiased one."
                )
    for attack in record.attacks:
        yield from (f"{attack.folder.name}: {warning}" for warning in attack.warnings)


def _pictures(record: Record, stages: dict[str, Tasks], tasks: list[str]) -> dict[str, list[dict[str, Any]]]:
    """The pictures of each section, with their captions; sections without any are left out."""
    lines = record.steps
    drawn = {
        "attacks": [picture for attack in record.attacks for picture in attacks.pictures(attack, tasks)],
        "training": [
            Picture(FORGET, figures.curve(lines, ["forget_loss"], "forget loss")),
            Picture(RETAIN, figures.curve(lines, ["retain_loss"], "retain loss")),
            Picture(NORM, figures.curve(lines, ["gradient_norm"], "norm", log=True), "detail"),
            Picture(RATES, figures.curve(lines, ["adamw_lr", "muon_lr"], "learning rate"), "detail"),
            Picture(WEIGHTS, figures.curve(lines, ["forget_weight", "retain_weight"], "weight"), "detail"),
            Picture(DURING, figures.training_course(record.during, tasks)),
            Picture(ENTROPY, figures.entropy_map(lines), "detail"),
        ],
        "letters": [Picture(f"{task}: {LETTERS}", figures.letters(stages, task)) for task in tasks],
    }
    return {section: shown(section, pictures) for section, pictures in drawn.items()}


def shown(section: str, pictures: Iterable[Picture]) -> list[dict[str, Any]]:
    """A section's pictures as the templates take them; those that were not drawn left out."""
    return [
        picture._asdict() | {"svg": Markup(figures.with_own_ids(picture.svg, f"{section}-{index}"))}
        for index, picture in enumerate(pictures)
        if picture.svg
    ]


def _summary(record: Record) -> str:
    """The run in one line."""
    config = record.config
    kind = f"LoRA rank {config['lora_rank']}" if config.get("lora_rank") else "full training"
    return f"{config['model']}: {kind}, {config.get('optimizer', 'adamw')}, {len(record.steps)} logged steps"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"


def _visible(token: str) -> str:
    """A token whose spaces and line ends can be seen."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _printable(value: Any) -> Any:
    """What jinja is about to escape and print, free of characters that HTML must not hold."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)
