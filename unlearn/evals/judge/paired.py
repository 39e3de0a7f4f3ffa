"""Two evaluations on the same questions: what changed, and how sure that is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn.errors import UserError
from unlearn.evals.judge.foreign import own_part
from unlearn.evals.judge.stats import Z_90, bootstrap_difference, mcnemar, mean_interval, score_difference
from unlearn.evals.judge.summary import group_pools

MARGIN = 0.01  # one point
RESAMPLED = 10  # questions answered differently, below which a bootstrap does not know what it has not seen

Shares = NDArray[np.float64]  # [questions], 0 or 1 where each was asked in one order


@dataclass(frozen=True)
class Record:
    """What a results file keeps of an evaluation.

    Attributes:
        source: where it was read from, for messages.
        questions: `Answers.record` of each task.
        groups: the children of each group.
        dtypes: of the weights, of the products in the blocks, and of the unembedding's.
    """

    source: str
    questions: dict[str, dict[str, Any]]
    groups: dict[str, list[str]]
    dtypes: dict[str, list[str]] = field(default_factory=dict)


def read_record(path: str | Path) -> Record:
    """Read results_<time>.json, or the folder that holds just one.

    Raises:
        UserError: there is no such file, several, or one that neither `evals/run.py` nor lm-eval wrote, or lm-eval
            without its samples.
    """
    file = _find(Path(path).expanduser())
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        own = own_part(result, file)
        groups = result.get("group_subtasks", {}) | own.get("pools", {})
        return Record(str(path), own["questions"], groups, own.get("dtypes", {}))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"expected readable results in {file}; found {error}: run the evaluation again") from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"expected results that evals/run.py wrote in {file}; found none of its own keys: "
            "evaluate that model again with evals/run.py --out"
        ) from error


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"expected results at {path}; found nothing: give a results_<time>.json or its folder")
    files = sorted(path.rglob("results_*.json"))
    if not files:
        raise UserError(
            f"expected one results_<time>.json in {path}; found none: an interrupted run leaves none, evaluate again"
        )
    if len(files) > 1:
        raise UserError(f"expected one results_<time>.json in {path}; found {len(files)}: give one of them")
    return files[0]


def check_same(base: Record, questions: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `UserError` unless `base` asked exactly these questions of each of these tasks, in this order and form.

    Args:
        questions: the `ids`, `prompts` and `metric` of each task, as of `Evaluation.asked` or `Answers.record`.
    """
    missing = [task for task in questions if task not in base.questions]
    if missing:
        raise UserError(
            f"expected results of the same tasks in {base.source}; found none of {missing[0]} among "
            f"{', '.join(list(base.questions)[:4]) or 'no tasks'}: evaluate both models on the same tasks"
        )
    for task, asked in questions.items():
        _check_metric(base, task, asked.get("metric"))
        known, ids = base.questions[task]["ids"], asked["ids"]
        if known == ids:
            _check_prompts(base, task, asked.get("prompts"))
            continue
        if len(known) != len(ids):
            found = f"{len(ids)} here and {len(known)} there"
        elif sorted(known) == sorted(ids):
            found = "them in another order"
        else:
            changed = sum(a != b for a, b in zip(known, ids, strict=True))
            found = f"{changed} of {len(ids)} changed"
        raise UserError(
            f"expected the questions of {base.source} in task {task}; found {found}: evaluate both models on the "
            "same question files, with the same --limit, --subsample and --permute-choices"
        )


def _check_metric(base: Record, task: str, metric: str | None) -> None:
    known = base.questions[task]["metric"]
    if metric is not None and metric != known:
        raise UserError(
            f"expected {metric} of task {task} in {base.source}; found {known}: evaluate both models with the same "
            "--metric"
        )


def _check_prompts(base: Record, task: str, prompts: list[str] | None) -> None:
    known = base.questions[task].get("prompts")
    if known is None or prompts is None:
        return  # results of an earlier version do not say
    changed = sum(a != b for a, b in zip(known, prompts, strict=True))
    if changed:
        raise UserError(
            f"expected the prompts of {base.source} in task {task}; found {changed} of {len(prompts)} changed: "
            "evaluate both models with the same task definition, --include-path and tokenizer settings"
        )


def rounding_warning(base: Record, new: Record) -> str | None:
    """A sentence if the two models computed in other dtypes."""
    if not base.dtypes or not new.dtypes or base.dtypes == new.dtypes:
        return None
    one, other = (" / ".join(",".join(names) for names in record.dtypes.values()) for record in (base, new))
    return (
        f"warning: {base.source} computed in {one} (weights / blocks / unembedding), {new.source} in {other}: some of "
        "the difference may be rounding"
    )


def compare(base: Record, new: Record, *, margin: float = MARGIN) -> dict[str, dict[str, Any]]:
    """Compare two models question by question.

    Args:
        margin: by how much `new` may be worse and still count as not inferior, as a fraction.

    Returns:
        {task or group: {
        "base", "new", "base_interval", "new_interval": the accuracies and their Wilson intervals;
        "difference", "interval", "method": new - base, and its 95 % interval: a bootstrap stratified by subject, or
        Tango's score interval where fewer than `RESAMPLED` questions were answered differently;
        "only_base", "only_new": how many answers only that model has right;
        "p": McNemar's exact test of these two;
        "margin", "non_inferior", "inferior": whether the one-sided 95 % bound of the difference lies above -margin, and
        whether the other one lies below it (neither: the questions cannot say);
        "questions"}}.
        With several orders of the choices, "p" counts the questions that one of the models got right in more orders:
        the sign test, of which McNemar's is the case of one order.

    Raises:
        UserError: the two did not answer the same questions.
    """
    check_same(base, new.questions)
    metrics = {task: record["metric"] for task, record in new.questions.items()}
    paired = {task: (_shares(base.questions[task]), _shares(record)) for task, record in new.questions.items()}
    alike = [group for group, names in group_pools(metrics, new.groups).items() if len(set(names)) == 1]
    groups = group_pools(paired, new.groups)
    pools = {task: [pair] for task, pair in paired.items()} | {group: groups[group] for group in alike}
    return {name: _compare(parts, margin) for name, parts in pools.items()}


def _shares(record: dict[str, Any]) -> Shares:
    """The share of right answers of each question over its orders."""
    return np.asarray(record["right"], dtype=float).reshape(-1, record["orders"]).mean(axis=1)


def _compare(parts: list[tuple[Shares, Shares]], margin: float) -> dict[str, Any]:
    differences = [new - base for base, new in parts]
    flat = np.concatenate(differences)
    only_base, only_new = int((flat < 0).sum()), int((flat > 0).sum())
    if only_base + only_new >= RESAMPLED:
        method, interval = "bootstrap", bootstrap_difference(differences)
        one_sided = bootstrap_difference(differences, level=0.90)  # its ends are the two one-sided 95 % bounds
    else:
        lost, won = float(-flat[flat < 0].sum()), float(flat[flat > 0].sum())
        method, interval = "score", score_difference(lost, won, len(flat))
        one_sided = score_difference(lost, won, len(flat), Z_90)
    accuracies: dict[str, Any] = {}
    for name, model in (("base", [base for base, _ in parts]), ("new", [new for _, new in parts])):
        right = np.concatenate(model).tolist()
        accuracies[name] = float(np.mean(right))
        accuracies[f"{name}_interval"] = list(mean_interval(right))
    return accuracies | {
        "difference": float(flat.mean()),
        "interval": list(interval),
        "method": method,
        "only_base": only_base,
        "only_new": only_new,
        "p": mcnemar(only_base, only_new),
        "margin": margin,
        "non_inferior": one_sided[0] > -margin,
        "inferior": one_sided[1] < -margin,
        "questions": len(flat),
    }


def table(compared: dict[str, dict[str, Any]]) -> str:
    """The comparison in lines of text, accuracies in per cent and differences in points."""
    width = max(map(len, compared), default=4)
    lines = [
        f"{'task':{width}} {'questions':>9} {'base':>6} {'new':>6}  {'new - base [95 %]':>22} {'p':>8}  non-inferior"
    ]
    for name, one in compared.items():
        low, high = one["interval"]
        change = f"{100 * one['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        words = "yes" if one["non_inferior"] else "no" if one["inferior"] else "cannot say"
        lines.append(
            f"{name:{width}} {one['questions']:>9,} {100 * one['base']:>6.1f} {100 * one['new']:>6.1f}  {change:>22} "
            f"{one['p']:>8.2g}  {words}"
        )
    if compared:
        margin = next(iter(compared.values()))["margin"]
        lines.append(f"non-inferior: worse by less than {100 * margin:g} points, by the one-sided 95 % bound")
    return "\n".join(lines)
