"""An evaluation's result in a few numbers a task: accuracy, its interval, and what was answered."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evals.stats import wilson_interval
from unlearn.distributed import fail_together, is_main
from unlearn.errors import UserError
from unlearn.files import write_json, writing

Samples = list[dict[str, Any]]


def summarise(result: dict[str, Any], split_by: str | None = None) -> dict[str, dict[str, Any]]:
    """Condense a result of `Evaluation.run`.

    Args:
        split_by: a column of the question data; tasks that have it are also reported for each of its values, under
            `<task>/<column>=<value>`.

    Returns:
        {task or group: {"acc", "interval" (Wilson, 95 %), "questions", "predicted" (share of each choice), "debiased"
        (see below), "debiased_interval"}}. A group is the micro-average of its tasks, as in lm-eval.

    "debiased" is the accuracy once each place (letter) is freed of its mean log-likelihood over its task. A model that
    answers "A" to everything scores 25 % although the other letters may still know: their order then shows here. It
    is left out where the right answer is not given as the number of a choice. Tasks without "acc" are left out.

    Raises:
        UserError: no question has the column `split_by`.
    """
    measured = {task: samples for task, samples in result["samples"].items() if "acc" in samples[0]}
    pools = {task: [samples] for task, samples in measured.items()}
    for group, tasks in result.get("group_subtasks", {}).items():
        members = [measured[task] for task in _leaves(tasks, result) if task in measured]
        if members:
            pools[group] = members
    if split_by is not None:
        pools |= _split(pools, split_by)
    return {name: _measure(parts) for name, parts in pools.items()}


def _leaves(tasks: Iterable[str], result: dict[str, Any]) -> Iterable[str]:
    """The tasks with questions below some tasks and groups."""
    for task in tasks:
        if task in result["samples"]:
            yield task
        else:
            yield from _leaves(result["group_subtasks"].get(task, ()), result)


def _split(pools: dict[str, list[Samples]], column: str) -> dict[str, list[Samples]]:
    """The same pools, apart for each value of a column of the questions; `UserError` if no question has it."""
    apart: dict[str, list[Samples]] = {}
    for name, parts in pools.items():
        values = {str(sample["doc"][column]) for part in parts for sample in part if column in sample["doc"]}
        for value in sorted(values):
            chosen = [[sample for sample in part if str(sample["doc"].get(column)) == value] for part in parts]
            apart[f"{name}/{column}={value}"] = [part for part in chosen if part]
    if not apart:
        some = next(iter(pools.values()))[0][0]["doc"]
        raise UserError(
            f"expected a column of the questions for --split-by; found {column!r}: they have {', '.join(some)}"
        )
    return apart


def _measure(parts: list[Samples]) -> dict[str, Any]:
    """The numbers of one pool, made of the questions of one task or of several."""
    samples = [sample for part in parts for sample in part]
    right, total = round(sum(sample["acc"] for sample in samples)), len(samples)
    choices = Counter(_likeliest(_likelihoods(sample)) for sample in samples)
    numbers: dict[str, Any] = {
        "acc": right / total,
        "interval": list(wilson_interval(right, total)),
        "questions": total,
        "predicted": [choices[index] / total for index in range(max(choices) + 1)],
    }
    if all(str(sample["target"]).isdigit() for sample in samples):
        unbiased = sum(map(_debiased_right, parts))
        numbers |= {"debiased": unbiased / total, "debiased_interval": list(wilson_interval(unbiased, total))}
    return numbers


def _likelihoods(sample: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice."""
    return [response[0] for response in sample["filtered_resps"]]


def _likeliest(likelihoods: list[float]) -> int:
    """Which choice the model found likeliest; the first one among equals, as lm-eval counts it."""
    return likelihoods.index(max(likelihoods))


def _debiased_right(samples: Samples) -> int:
    """How many answers are right once each place has lost its mean log-likelihood over these questions of one task."""
    rows = [_likelihoods(sample) for sample in samples]
    places = max(map(len, rows))
    columns = [[row[place] for row in rows if place < len(row)] for place in range(places)]
    means = [sum(column) / len(column) for column in columns]
    answers = [_likeliest([value - means[place] for place, value in enumerate(row)]) for row in rows]
    return sum(answer == int(sample["target"]) for answer, sample in zip(answers, samples, strict=True))


def write_summary(result: dict[str, Any], path: Path, split_by: str | None = None) -> dict[str, float]:
    """Write `summarise(result)` as JSON (rank 0); return {`<task>/acc`: accuracy} of every rank's result, for a log."""
    summary = summarise(result, split_by)
    with fail_together():
        if is_main():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, summary)
    return {f"{name}/acc": values["acc"] for name, values in summary.items()}
