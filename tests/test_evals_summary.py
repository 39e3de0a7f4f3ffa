"""Condensed results: groups, splits, letters, orders, and collapse made visible."""

import math
import random
from typing import Any

import numpy as np
import pytest
from evals_samples import ABCD, answering, gather, keys_of, sample, summary_of

from unlearn.errors import UserError
from unlearn.evals.judge.answers import Letters, collect, debias_small
from unlearn.evals.judge.letters import describe_letters
from unlearn.evals.judge.stats import wilson_interval
from unlearn.evals.judge.summary import summarise


def result_of(samples: dict[str, list[dict[str, Any]]], **more: Any) -> dict[str, Any]:
    return {"samples": samples, "answers": {task: gather(found) for task, found in samples.items()}, **more}


def test_groups_are_micro_averages_and_splits_are_apart() -> None:
    samples = {
        "one": [sample([0, -1, -1, -1], 0, attacked=True)] * 3,
        "two": [sample([0, -1, -1, -1], 1, attacked=False)],
    }
    result = result_of(samples, group_subtasks={"inner": ["one", "two"], "outer": ["inner"], "empty": []})
    summary = summarise(result, split_by="attacked")
    assert summary["outer"]["acc"] == summary["inner"]["acc"] == 0.75 and summary["outer"]["questions"] == 4
    assert summary["outer/attacked=True"]["acc"] == 1.0 and summary["outer/attacked=False"]["acc"] == 0.0
    assert "empty" not in summary and summary["two"]["predicted"] == [1.0, 0.0, 0.0, 0.0]
    assert summary["one"]["interval"] == list(wilson_interval(3, 3))


def test_split_by_an_unknown_column_is_an_error() -> None:
    with pytest.raises(UserError, match="'typo'.*attacked"):
        summarise(result_of({"task": [sample([0, -1, -2, -3], 0, attacked=True)]}), split_by="typo")


def test_tasks_without_accuracy_are_left_out() -> None:
    other = sample([0, -1, -2, -3], 0)
    other |= {"metrics": ["word_perplexity"], "word_perplexity": (-20.0, 5)}
    assert collect([other], "word_perplexity") is None
    assert collect([sample([0, -1, -2, -3], 0)], "acc_norm") is None


def test_accuracy_without_numbered_answers_has_an_interval_and_nothing_of_letters() -> None:
    named = [sample([0, -1, -2, -3], 0), sample([0, -1, -2, -3], 1)]
    for one in named:
        one["target"] = [one["target"], one["target"]]  # several right choices
    numbers = summary_of(named, None)
    assert numbers["acc"] == 0.5 and numbers["interval"] == list(wilson_interval(1, 2))
    assert not {"debiased", "predicted", "tie_rate", "letter_check"} & set(numbers)


def test_right_answers_may_be_given_by_their_text() -> None:
    """Also where that text is itself a number: it is no place."""
    row = sample([0.0, -1.0], 0) | {"target": "1", "arguments": [("q", " 1"), ("q", " 2")]}
    found = gather([row], None)
    assert found.targets == [0] and found.answers == [0] and found.right == [1]


def test_full_answers_are_scored_as_the_metric_says() -> None:
    """acc_norm divides by characters; the probability of the right answer by tokens."""
    row = sample([-4.0, -5.0], 1) | {"metrics": ["acc_norm"], "acc_norm": 1.0}
    row["arguments"] = [("q", " ab"), ("q", " abcd")]
    found = collect([row], "acc_norm", keys=keys_of([row]), tokens={("q", " ab"): 1, ("q", " abcd"): 2})
    assert found is not None and found.answers == [1] and found.right == [1] and found.letters == []
    assert found.answer_probability == [pytest.approx(math.exp(-5.0 / 2))]
    assert found.probability == [pytest.approx(1 / (1 + math.e))]


def test_groups_are_debiased_task_by_task() -> None:
    """Two tasks with opposite habits, each seen through: pooled, their habits would hide each other."""
    first = [sample([1.0, 0.1 * (index % 2), -9, -9], index % 2) for index in range(10)]
    second = [sample([0.1 * (1 - index % 2), 1.0, -9, -9], index % 2) for index in range(10)]
    summary = summarise(result_of({"a": first, "b": second}, group_subtasks={"both": ["a", "b"]}))
    assert summary["a"]["debiased"] == summary["b"]["debiased"] == summary["both"]["debiased"] == 1.0
    assert summary["both"]["acc"] == 0.5


@pytest.mark.parametrize("each", [1, 2, 5])
def test_few_questions_of_many_subjects_do_not_look_like_ignorance(each: int) -> None:
    """A model that knows everything: the letters' means over a few questions are the right answers themselves."""
    rng = random.Random(0)
    targets = [rng.randrange(4) for _ in range(57 * each)]
    rows = [[rng.uniform(2, 12) if place == target else 0.0 for place in range(4)] for target in targets]
    questions = [
        sample(row, target, str(number)) for number, (row, target) in enumerate(zip(rows, targets, strict=True))
    ]
    tasks = {f"s{index}": questions[index * each : (index + 1) * each] for index in range(57)}
    result = result_of(tasks, group_subtasks={"all": list(tasks)})
    assert summarise(result)["all"]["debiased"] < 0.97
    found = summarise(result | {"answers": debias_small(result["answers"])})["all"]
    assert found["debiased"] > 0.97 and found["letter_check"] == "informed"


def test_model_that_always_says_c_is_a_collapse() -> None:
    targets = [index % 4 for index in range(200)]
    numbers = summary_of(answering([2] * 200, targets))
    assert numbers["acc"] == numbers["independent"] == 0.25
    assert numbers["letter_check"] == "collapse" and numbers["predicted"] == [0.0, 0.0, 1.0, 0.0]
    assert numbers["p_more"] == numbers["p_fewer"] == 1.0, "no shuffle changes anything"
    assert "100% of all answers are C" in describe_letters(numbers)


def test_coin_flips_are_chance() -> None:
    rng = random.Random(0)
    targets = [rng.randrange(4) for _ in range(868)]
    numbers = summary_of(answering([rng.randrange(4) for _ in targets], targets))
    assert numbers["letter_check"] == "chance" and 0.2 < numbers["debiased"] < 0.3
    assert numbers["independent"] == pytest.approx(0.25, abs=0.005)


def test_collapsed_model_that_still_knows_is_seen_through() -> None:
    targets = [index % 4 for index in range(200)]
    numbers = summary_of(answering([2] * 200, targets, hidden=1.0))
    assert numbers["acc"] == 0.25 and numbers["letter_check"] == "collapse"
    assert numbers["debiased"] == 1.0


def test_knowledge_is_informed_and_avoiding_the_right_letter_is_found() -> None:
    targets = [index % 4 for index in range(200)]
    knows = [target if index % 3 else (target + 1) % 4 for index, target in enumerate(targets)]
    assert summary_of(answering(knows, targets))["letter_check"] == "informed"
    avoids = [(target + 1 + index // 4 % 3) % 4 for index, target in enumerate(targets)]
    assert summary_of(answering(avoids, targets))["letter_check"] == "avoidance"


def test_model_without_a_habit_is_left_as_it_is() -> None:
    targets = [index % 4 for index in range(40)]
    answers = [(target + (index >= 20)) % 4 for index, target in enumerate(targets)]
    rows = [[1.0 if place == answer else 0.0 for place in range(4)] for answer in answers]
    numbers = summary_of([sample(row, target) for row, target in zip(rows, targets, strict=True)])
    assert numbers["acc"] == numbers["debiased"] == 0.5


def test_ties_go_to_the_first_and_are_counted() -> None:
    numbers = summary_of([sample([0.0, 0.0, -1.0, -1.0], 1), sample([1.0, 0.0, 0.0, 0.0], 0)])
    assert numbers["tie_rate"] == 0.5 and numbers["predicted"][0] == 1.0


def orders(favourite: float, knowledge: float, targets: list[int]) -> list[dict[str, Any]]:
    """Questions in four cyclic orders, answered by a liking for place C and a liking for the right choice."""
    found = []
    for number, target in enumerate(targets):
        for shift in range(4):
            row = [0.01 * ((7 * number + place + shift) % 5) for place in range(4)]
            row[2] += favourite
            row[(target - shift) % 4] += knowledge
            found.append(sample(row, (target - shift) % 4, str(number)))
    return found


def test_orders_of_one_question_count_once_and_cancel_habits() -> None:
    letters = Letters(ABCD.names, orders=4)
    targets = [(index * index + index) % 4 for index in range(100)]
    habit = summary_of(orders(5.0, 1.0, targets), letters)
    assert habit["questions"] == 100 and habit["orders"] == 4
    assert habit["acc"] == 0.25 and habit["stderr"] == 0.0, "always C is right in one order of each question"
    assert habit["cyclic"] == 1.0 and habit["consistent"] == 0.0 and habit["letter_check"] == "collapse"
    knows = summary_of(orders(0.0, 1.0, targets), letters)
    assert knows["acc"] == knows["cyclic"] == knows["consistent"] == 1.0 and knows["letter_check"] == "informed"


def test_interval_of_orders_is_by_question() -> None:
    """The same answers in all orders are worth the questions, not four times as many."""
    letters = Letters(ABCD.names, orders=4)
    targets = [index % 4 for index in range(80)]
    wrong = [(target + 1) % 4 if index % 2 else target for index, target in enumerate(targets)]
    samples = []
    for number, (target, answer) in enumerate(zip(targets, wrong, strict=True)):
        for shift in range(4):
            row = [float(place == (answer - shift) % 4) for place in range(4)]
            samples.append(sample(row, (target - shift) % 4, str(number)))
    assert summary_of(samples, letters)["interval"] == pytest.approx(wilson_interval(40, 80), abs=0.002)


def test_subset_keeps_questions_together() -> None:
    found = gather(orders(0.0, 1.0, [0, 1, 2]), Letters(ABCD.names, orders=4))
    half = found.subset(range(4, 12))
    assert half.cyclic == [1, 1] and len(half.ids) == 8 and half.shares_right() == [1.0, 1.0]


def shuffle_moments(tables: list[np.ndarray], targets: list[np.ndarray]) -> tuple[float, float]:
    """Exact mean and standard deviation of the right answers summed over strata, each shuffled by itself.

    Hoeffding 1951, https://doi.org/10.1214/aoms/1177729545: of sum_i a[i, perm(i)] they are the mean of a times n, and
    the squares of a without its row and column means, summed and divided by n - 1.

    Args:
        tables: of each stratum, [questions, letters]: how often a question was answered with a letter.
        targets: of each stratum, [questions].
    """
    mean = variance = 0.0
    for table, right in zip(tables, targets, strict=True):
        scores = table[:, right]
        centred = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
        mean += scores.mean() * len(right)
        variance += (centred**2).sum() / (len(right) - 1)
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("orders", [1, 4])
def test_shuffles_of_a_group_vary_as_the_closed_form_says(orders: int) -> None:
    """Every subject was shuffled with the same random bits: the sum over 57 subjects varied 1.2 times too much, and
    groups whose answers depend on the questions were called chance."""
    rng = np.random.default_rng(0)
    parts, tables, targets = [], [], []
    for subject in range(57):
        right = rng.integers(0, 4, 100)
        answers = rng.choice(4, size=(100, orders), p=[0.1, 0.2, 0.5, 0.2])
        rows = [
            sample(
                [float(place == answers[number, shift]) for place in range(4)],
                int(right[number] - shift) % 4,
                f"{subject} {number}",
            )
            for number in range(100)
            for shift in range(orders)
        ]
        parts.append(gather(rows, Letters(ABCD.names, orders)))
        chosen = (answers + np.arange(orders)) % 4  # as places of the first order
        tables.append((chosen[:, :, None] == np.arange(4)).sum(axis=1).astype(float))
        targets.append(right)
    shuffles = sum(part.shuffled_matches() for part in parts)
    mean, deviation = shuffle_moments(tables, targets)
    draws = len(shuffles)
    assert abs(shuffles.mean() - mean) < 4 * deviation / math.sqrt(draws)
    assert shuffles.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * draws))
