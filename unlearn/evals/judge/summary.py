"""An evaluation's result in a few numbers a task: accuracy, its interval, what was answered, and whether by habit."""

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from unlearn.distributed import fail_together, is_main
from unlearn.errors import UserError
from unlearn.evals.judge.answers import Answers, merged
from unlearn.evals.judge.letters import check_letters
from unlearn.evals.judge.stats import (
    independent_accuracy,
    mean_interval,
    permutation_test,
    shares,
    standard_error,
    wilson_interval,
)
from unlearn.files import write_json, writing

Summary = dict[str, dict[str, Any]]


def summarise(result: dict[str, Any], split_by: str | None = None) -> Summary:
    """Condense a result of `Evaluation.run`.

    Args:
        split_by: a column of the question data; tasks that have it are also reported for each of its values, under
            `<task>/<column>=<value>`.

    Returns:
        {task or group: numbers}. A group is the micro-average of its tasks, as in lm-eval. Tasks without an accuracy
        are left out, and groups with such tasks or with several metrics. Numbers, as fractions:

        metric: which metric of lm-eval `acc` is: acc, acc_norm, ...
        acc, interval, stderr, questions: the interval is Wilson's, 95 %, at the size that the standard error is worth
            where questions earn shares or were asked in several orders.
        tie_rate, probability: with choices: how often two were likeliest; mean probability of the right one among them.
        answer_probability: with full answers: the mean of P(right answer)^(1/tokens).
        letters, predicted, right: with letters: their names, how often each was answered, and how often right.
        independent: sum_l predicted_l x right_l, the accuracy of these answers if they ignored the questions.
        p_more, p_fewer: permutation tests of `acc` against that, within subjects (those of fewer than 20 questions
            are one).
        letter_check: "collapse", "avoidance", "informed" or "chance" (see `letters.check_letters`).
        debiased, debiased_interval: accuracy once each letter has lost its mean log-likelihood over its task, or over
            all tasks of fewer than 20 questions together. A model that answers "A" to everything scores 25 % although
            the other letters may still know: it shows here.
        orders, cyclic, cyclic_interval, consistent: with several orders of the choices: how many; accuracy of the
            choice that is likeliest on average over them; and the share of questions right in all of them.

    Raises:
        UserError: no question has the column `split_by`.
    """
    answers: Mapping[str, Answers] = result["answers"]
    pools = {task: [found] for task, found in answers.items()}
    groups = group_pools(answers, result.get("group_subtasks", {}) | result.get("unlearn", {}).get("pools", {}))
    pools |= {name: parts for name, parts in groups.items() if len({part.metric for part in parts}) == 1}
    if split_by is not None:
        pools |= _split(pools, answers, result["samples"], split_by)
    shuffled: dict[tuple[int, ...], Any] = {}  # by task: a subject's shuffles serve its groups too
    return {name: _measure(parts, shuffled) for name, parts in pools.items()}


def group_pools(tasks: Mapping[str, Any], groups: Mapping[str, Iterable[str]]) -> dict[str, list[Any]]:
    """What belongs to the tasks below each group, in order; groups that lack any of theirs are left out."""
    leaves = {group: list(dict.fromkeys(_leaves(children, groups))) for group, children in groups.items()}
    return {
        group: [tasks[leaf] for leaf in names]
        for group, names in leaves.items()
        if names and all(leaf in tasks for leaf in names)
    }


def _leaves(names: Iterable[str], groups: Mapping[str, Iterable[str]]) -> Iterable[str]:
    for name in names:
        if name in groups:
            yield from _leaves(groups[name], groups)
        else:
            yield name


def _split(
    pools: dict[str, list[Answers]], answers: Mapping[str, Answers], samples: Mapping[str, list[Any]], column: str
) -> dict[str, list[Answers]]:
    """The same pools, apart for each value of a column of the questions; `UserError` if no question has it."""
    documents = {id(found): [s["doc"] for s in samples[task][: len(found.ids)]] for task, found in answers.items()}
    apart: dict[str, list[Answers]] = {}
    for name, parts in pools.items():
        values = {str(doc[column]) for part in parts for doc in documents[id(part)] if column in doc}
        for value in sorted(values):
            indices = [[i for i, doc in enumerate(documents[id(p)]) if str(doc.get(column)) == value] for p in parts]
            apart[f"{name}/{column}={value}"] = [p.subset(i) for p, i in zip(parts, indices, strict=True) if i]
    if not apart:
        some = next(iter(documents.values()))[0]
        raise UserError(
            f"expected a column of the questions for --split-by; found {column!r}: they have {', '.join(some)}"
        )
    return apart


def _measure(parts: list[Answers], shuffled: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    """The numbers of one pool, made of the questions of one task or of several."""
    orders = parts[0].orders
    means = [share for part in parts for share in part.shares_right()]
    numbers: dict[str, Any] = {
        "metric": parts[0].metric,
        "acc": _mean(means),
        "interval": list(mean_interval(means)),
        "stderr": standard_error(means),
        "questions": len(means),
    }
    if all(part.answers for part in parts):
        numbers |= {"tie_rate": _mean(_all(parts, "ties")), "probability": _mean(_all(parts, "probability"))}
    if all(part.answer_probability for part in parts):
        numbers["answer_probability"] = _mean(_all(parts, "answer_probability"))
    if all(part.letters == parts[0].letters != [] for part in parts):
        numbers |= _letters(parts, numbers, shuffled)
    if all(part.cyclic for part in parts):
        cyclic = _all(parts, "cyclic")
        numbers |= {
            "orders": orders,
            "cyclic": _mean(cyclic),
            "cyclic_interval": list(wilson_interval(sum(cyclic), len(cyclic))),
            "consistent": _mean([share == 1.0 for share in means]),
        }
    return numbers


def _letters(parts: list[Answers], numbers: dict[str, Any], shuffled: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    """What the letters say about the answers."""
    letters, total = parts[0].letters, sum(len(part.right) for part in parts)
    strata = _strata(parts)
    for key, stratum in strata.items():
        if key not in shuffled:
            shuffled[key] = stratum.shuffled_matches()
    matches = reduce(add, (shuffled[key] for key in strata))
    more, fewer = permutation_test(sum(_all(parts, "right")), matches)
    unbiased = [int(a == t) for a, t in zip(_all(parts, "debiased"), _all(parts, "targets"), strict=True)]
    found = {
        "letters": letters,
        "predicted": shares(_all(parts, "answers"), len(letters)),
        "right": shares(_all(parts, "targets"), len(letters)),
        "independent": sum(independent_accuracy(s.answers, s.targets) * len(s.right) for s in strata.values()) / total,
        "p_more": more,
        "p_fewer": fewer,
        "debiased": _mean(unbiased),
        "debiased_interval": list(wilson_interval(_mean(unbiased) * numbers["questions"], numbers["questions"])),
    }
    return found | {"letter_check": check_letters(numbers | found)}


def _strata(parts: list[Answers]) -> dict[tuple[int, ...], Answers]:
    """Subjects, with those of too few questions to be shuffled by themselves as one."""
    small = [part for part in parts if part.small]
    strata = {(id(part),): part for part in parts if not part.small}
    return strata | ({tuple(map(id, small)): merged(small)} if small else {})


def _all(parts: list[Answers], name: str) -> list[Any]:
    return [value for part in parts for value in getattr(part, name)]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def summary_table(summary: Summary) -> str:
    """Accuracies in per cent with their intervals, and the letter check, in lines of text."""
    labels = {name: label(name, numbers) for name, numbers in summary.items()}
    width = max(map(len, labels.values()))
    lines = [
        f"{'task':{width}} {'questions':>9}  {'accuracy [95 %]':>20} {'debiased [95 %]':>20} {'commonest':>9}  answers"
    ]
    for name, numbers in summary.items():
        line = f"{labels[name]:{width}} {numbers['questions']:>9,}  {_cell(numbers['acc'], numbers['interval']):>20}"
        if "letters" in numbers:
            share = max(numbers["predicted"])
            letter = numbers["letters"][numbers["predicted"].index(share)]
            line += f" {_cell(numbers['debiased'], numbers['debiased_interval']):>20}"
            line += f" {f'{100 * share:.0f} % {letter}':>9}  {numbers['letter_check']}"
        lines.append(line)
        if "orders" in numbers:
            cyclic = _cell(numbers["cyclic"], numbers["cyclic_interval"])
            lines.append(f"{'  averaged over orders':{width + 11}} {cyclic:>20}")
    return "\n".join(lines)


def label(name: str, numbers: Mapping[str, Any]) -> str:
    """A task's name, with its metric if that is not plain accuracy."""
    return name if numbers["metric"] == "acc" else f"{name} ({numbers['metric']})"


def _cell(share: float, interval: list[float]) -> str:
    low, high = interval
    return f"{100 * share:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def write_summary(result: dict[str, Any], path: Path, split_by: str | None = None) -> dict[str, float]:
    """Write `summarise(result)` as JSON (rank 0); return {`<task>/acc`: accuracy} of every rank's result, for a log."""
    summary = summarise(result, split_by)
    with fail_together():
        if is_main():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, summary)
    return {f"{name}/acc": values["acc"] for name, values in summary.items()}


def write_earned(result: dict[str, Any], path: Path, split_by: str | None = None) -> None:
    """Write what each question earned, as JSON (rank 0), for pairing two models question by question.

    {task or group: {"ids": of the questions, "earned": 0 to 1 each, "parts": the column `split_by` of each, or None}}.
    """
    answers: Mapping[str, Answers] = result["answers"]
    tasks = {task: _earned(found, result["samples"][task], split_by) for task, found in answers.items()}
    groups = group_pools(tasks, result.get("group_subtasks", {}))
    joined = {
        name: {key: [value for part in parts for value in part[key]] for key in ("ids", "earned", "parts")}
        for name, parts in groups.items()
    }
    with fail_together():
        if is_main():
            write_json(path, tasks | joined)


def _earned(found: Answers, samples: list[Any], split_by: str | None) -> dict[str, list[Any]]:
    documents = [sample["doc"] for sample in samples[: len(found.ids) : found.orders]]
    parts = [str(one[split_by]) if split_by in one else None for one in documents]
    return {"ids": found.ids[:: found.orders], "earned": found.shares_right(), "parts": parts}
