"""Condensed results: intervals against published values, groups, splits, and collapse made visible."""

import pytest

from evals.stats import wilson_interval
from evals.summary import summarise
from unlearn.errors import UserError


def sample(likelihoods: list[float], target: int, **doc: object) -> dict[str, object]:
    right = float(likelihoods.index(max(likelihoods)) == target)
    return {"doc": doc, "target": target, "acc": right, "filtered_resps": [(value, False) for value in likelihoods]}


def test_wilson_interval() -> None:
    # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(29, 29)[1] == 1.0
    for right, total in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="0 <= right <= total"):
            wilson_interval(right, total)


def test_groups_are_micro_averages_and_splits_are_apart() -> None:
    samples = {
        "one": [sample([0, -1, -1, -1], 0, attacked=True)] * 3,
        "two": [sample([0, -1, -1, -1], 1, attacked=False)],
    }
    result = {"samples": samples, "group_subtasks": {"inner": ["one", "two"], "outer": ["inner"], "empty": []}}
    summary = summarise(result, split_by="attacked")
    assert summary["outer"]["acc"] == summary["inner"]["acc"] == 0.75 and summary["outer"]["questions"] == 4
    assert summary["outer/attacked=True"]["acc"] == 1.0 and summary["outer/attacked=False"]["acc"] == 0.0
    assert "empty" not in summary and summary["two"]["predicted"] == [1.0]
    assert summary["one"]["interval"] == list(wilson_interval(3, 3))


def test_split_by_an_unknown_column_is_an_error() -> None:
    with pytest.raises(UserError, match="'typo'.*attacked"):
        summarise({"samples": {"task": [sample([0, -1], 0, attacked=True)]}}, split_by="typo")


def test_tasks_without_accuracy_or_numbered_answers() -> None:
    named = sample([0, -1], 0)
    named["target"] = "yes"
    other = sample([0, -1], 0)
    del other["acc"]
    summary = summarise({"samples": {"named": [named], "other": [other]}})
    assert set(summary) == {"named"} and "debiased" not in summary["named"]


def test_groups_are_debiased_task_by_task() -> None:
    """Two tasks with opposite habits, each seen through: pooled, their habits would hide each other."""
    first = [sample([1.0, 0.1 * (index % 2)], index % 2) for index in range(10)]
    second = [sample([0.1 * (1 - index % 2), 1.0], index % 2) for index in range(10)]
    summary = summarise({"samples": {"a": first, "b": second}, "group_subtasks": {"both": ["a", "b"]}})
    assert summary["a"]["debiased"] == summary["b"]["debiased"] == summary["both"]["debiased"] == 1.0
    assert summary["both"]["acc"] == 0.5


def test_a_collapsed_model_that_still_knows_is_seen_through() -> None:
    """It says "A" to everything and scores chance; freed of that habit, it is right every time."""
    targets = [index % 4 for index in range(40)]
    rows = [[(5.0 if place == 0 else 0.0) + (0.1 if place == t else 0.0) for place in range(4)] for t in targets]
    measured = summarise({"samples": {"task": [sample(r, t) for r, t in zip(rows, targets, strict=True)]}})["task"]
    assert measured["acc"] == 0.25 and measured["predicted"] == [1.0]
    assert measured["debiased"] == 1.0


def test_a_model_without_a_habit_is_left_as_it_is() -> None:
    targets = [index % 4 for index in range(40)]
    rows = [[1.0 if place == (t + (index >= 20)) % 4 else 0.0 for place in range(4)] for index, t in enumerate(targets)]
    measured = summarise({"samples": {"task": [sample(r, t) for r, t in zip(rows, targets, strict=True)]}})["task"]
    assert measured["acc"] == measured["debiased"] == 0.5
