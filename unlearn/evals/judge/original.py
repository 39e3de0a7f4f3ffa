"""The accuracies that an attack may bring back: those of the original model, from results of `evals/run.py`."""

from collections.abc import Iterable, Mapping
from typing import Any

from unlearn.evals.evaluation import Evaluation
from unlearn.evals.judge.paired import Record, check_same, read_record
from unlearn.evals.judge.stats import mean_interval
from unlearn.evals.judge.summary import group_pools

Answered = list[tuple[Mapping[str, Any], float]]  # (question, what its answer earned, from 0 to 1)


def original_accuracies(
    path: str, tasks: Iterable[str], evaluation: Evaluation, split_by: str | None
) -> dict[str, dict[str, Any]]:
    """Accuracy, interval and questions of each of `tasks`, and of each part of it by the column `split_by`.

    Args:
        path: results_<time>.json, or its folder. tasks: tasks or groups.
        evaluation: asks the questions that the attack is measured by.

    Returns:
        {task or task/column=value: {"acc", "interval", "questions"}}, as in `summary.summarise`.

    Raises:
        UserError: the results are damaged, of other tasks, or of other questions.
    """
    record = read_record(path)
    asked = evaluation.asked()
    pools: dict[str, list[str]] = {task: [task] for task in asked}
    pools |= group_pools({task: task for task in asked}, record.groups)
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        check_same(record, {leaf: asked.get(leaf, {"ids": []}) for leaf in pools.get(task, [task])})
        answered = [pair for leaf in pools[task] for pair in _answered(record, leaf, evaluation)]
        found |= {name: _accuracy(part) for name, part in _parts(task, answered, split_by).items()}
    return found


def _answered(record: Record, task: str, evaluation: Evaluation) -> Answered:
    return list(zip(evaluation.tasks[task].eval_docs, record.questions[task]["right"], strict=True))


def _parts(task: str, answered: Answered, column: str | None) -> dict[str, Answered]:
    """All of a task, and each of its parts under the name that `summarise` gives it."""
    parts = {task: answered}
    if column is None:
        return parts
    values = {str(question[column]) for question, _ in answered if column in question}
    for value in sorted(values):
        parts[f"{task}/{column}={value}"] = [pair for pair in answered if str(pair[0].get(column)) == value]
    return parts


def _accuracy(answered: Answered) -> dict[str, Any]:
    earned = [right for _, right in answered]
    return {"acc": sum(earned) / len(earned), "interval": list(mean_interval(earned)), "questions": len(earned)}
