"""An evaluation's result in a few numbers a task: accuracy, its interval, and what was answered."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evals.stats import wilson_interval
from unlearn.distributed import fail_together, is_main
from unlearn.files import write_json, writing


def summarise(result: dict[str, Any], split_by: str | None = None) -> dict[str, dict[str, Any]]:
    """Condense a result of `Evaluation.run`.

    Args:
        split_by: a column of the question data; tasks that have it are also reported for each of its values, under
            `<task>/<column>=<value>`.

    Returns:
        {task or group: {"acc", "interval" (Wilson, 95 %), "questions", "predicted" (share of each choice), "debiased"
        (see below), "debiased_interval"}}. A group is the micro-average of its tasks, as in lm-eval.

    "debiased" is the accuracy once each place (letter) is freed of its mean log-likelihood over the task. A model that
    answers "A" to everything scores 25 % although the other letters may still know: their order then shows here.
    """
    pools: dict[str, list[dict[str, Any]]] = dict(result["samples"])
    for group, tasks in result.get("group_subtasks", {}).items():
        members = [sample for task in _leaves(tasks, result) for sample in result["samples"][task]]
        if members:
            pools[group] = members
    if split_by is not None:
        for task, samples in dict(pools).items():
            pools |= {f"{task}/{split_by}={value}": part for value, part in _split(samples, split_by).items()}
    return {name: _measure(samples) for name, samples in pools.items()}


def _leaves(tasks: Iterable[str], result: dict[str, Any]) -> Iterable[str]:
    """The tasks with questions below some tasks and groups."""
    for task in tasks:
        if task in result["samples"]:
            yield task
        else:
            yield from _leaves(result["group_subtasks"].get(task, ()), result)


def _split(samples: list[dict[str, Any]], column: str) -> dict[str, list[dict[str, Any]]]:
    values = {str(sample["doc"][column]) for sample in samples if column in sample["doc"]}
    return {value: [s for s in samples if str(s["doc"].get(column)) == value] for value in sorted(values)}


def _measure(samples: list[dict[str, Any]]) -> dict[str, Any]:
    right, total = round(sum(sample["acc"] for sample in samples)), len(samples)
    choices = Counter(_likeliest(_likelihoods(sample)) for sample in samples)
    unbiased = _debiased_right(samples)
    return {
        "acc": right / total,
        "interval": list(wilson_interval(right, total)),
        "questions": total,
        "predicted": [choices[index] / total for index in range(max(choices) + 1)],
        "debiased": unbiased / total,
        "debiased_interval": list(wilson_interval(unbiased, total)),
    }


def _likelihoods(sample: dict[str, Any]) -> list[float]:
    """The log-likelihood of each choice."""
    return [response[0] for response in sample["filtered_resps"]]


def _likeliest(likelihoods: list[float]) -> int:
    """Which choice the model found likeliest; the first one among equals, as lm-eval counts it."""
    return likelihoods.index(max(likelihoods))


def _debiased_right(samples: list[dict[str, Any]]) -> int:
    """How many answers are right once each place has lost its mean log-likelihood over these questions."""
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
