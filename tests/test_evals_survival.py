"""Survival curves, the log-rank test, intervals over seeds and questions, and the luck of the best attacker."""

import math

import numpy as np
import pytest
from numpy.typing import ArrayLike

from unlearn.evals.judge.resample import (
    accuracy_interval,
    difference,
    read_elsewhere,
    read_on_the_other_half,
    resampled_means,
    sign_flips,
)
from unlearn.evals.judge.stats import mcnemar, wilson_interval
from unlearn.evals.judge.survival import Duration, kaplan_meier, log_rank, median

# Weeks of remission of 42 leukaemia patients (Freireich et al. 1963), as in Kleinbaum and Klein, chapter 2.
TREATED = [
    (6, 1),
    (6, 1),
    (6, 1),
    (7, 1),
    (10, 1),
    (13, 1),
    (16, 1),
    (22, 1),
    (23, 1),
    (6, 0),
    (9, 0),
    (10, 0),
    (11, 0),
]
TREATED += [(17, 0), (19, 0), (20, 0), (25, 0), (32, 0), (32, 0), (34, 0), (35, 0)]
PLACEBO = [(weeks, 1) for weeks in (1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23)]


def durations(pairs: list[tuple[int, int]]) -> list[Duration]:
    return [Duration(amount, bool(ended)) for amount, ended in pairs]


def test_the_textbooks_survival_curve_and_log_rank() -> None:
    """The book: S = .8571 .8067 .7529 .6902 .6275 .5378 .4482; expected 19.25 of 9 observed; chi-square 16.79."""
    curve = kaplan_meier(durations(TREATED))
    assert [round(drop.survival, 4) for drop in curve] == [0.8571, 0.8067, 0.7529, 0.6902, 0.6275, 0.5378, 0.4482]
    assert [drop.at_risk for drop in curve] == [21, 17, 15, 12, 11, 7, 6]
    assert median(durations(TREATED)) == 23 and median(durations(PLACEBO)) == 8
    found = log_rank(durations(TREATED), durations(PLACEBO))
    assert found.observed == 9 and found.expected == pytest.approx(19.25, abs=0.005)
    assert found.statistic == pytest.approx(16.79, abs=0.005)


def test_by_hand_with_a_tie() -> None:
    """First group ends at 2 and 4, second at 2 and is censored at 5. At 2: 4 watched, 2 end, expected 1, variance
    2 (1/2)(1/2)(2/3) = 1/3; at 4: 2 watched, expected 1/2, variance 1/4: (2 - 3/2)^2 / (7/12) = 3/7."""
    found = log_rank([Duration(2, True), Duration(4, True)], [Duration(2, True), Duration(5, False)])
    assert found.expected == pytest.approx(1.5) and found.statistic == pytest.approx(3 / 7)


def test_scipy_agrees() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for _ in range(30):
        groups = [
            [(int(rng.integers(1, 9)), int(rng.integers(0, 2))) for _ in range(rng.integers(2, 15))] for _ in "ab"
        ]
        if not sum(ended for group in groups for _, ended in group):
            continue
        censored = [
            stats.CensoredData(uncensored=[a for a, e in g if e], right=[a for a, e in g if not e]) for g in groups
        ]
        found, theirs = log_rank(*map(durations, groups)), stats.logrank(*censored)
        if math.isfinite(theirs.pvalue):
            assert found.p == pytest.approx(theirs.pvalue, abs=1e-9)
            assert found.statistic == pytest.approx(theirs.statistic**2)
        curve = stats.ecdf(censored[0]).sf
        for drop in kaplan_meier(durations(groups[0])):
            place = list(curve.quantiles).index(drop.amount)
            assert drop.survival == pytest.approx(curve.probabilities[place])


def test_nothing_ended_tells_nothing() -> None:
    never = [Duration(160, False)] * 4
    assert kaplan_meier(never) == [] and median(never) is None and log_rank(never, never).p == 1.0


def test_the_variance_over_seeds_and_questions_is_the_exact_one() -> None:
    """Of multinomial counts w, v: E[(w' A v)^2] = tr(A' M_S A M_Q), M_n = I + (1 - 1/n) 11'."""
    rng = np.random.default_rng(2)
    table = (rng.random((4, 30)) < rng.random((4, 1))).astype(float)
    centre = table.mean(axis=0)
    stretched = centre + (table - centre) * math.sqrt(4 / 3)
    seeds, questions = (np.eye(n) + (1 - 1 / n) for n in table.shape)
    exact = np.trace(stretched.T @ seeds @ stretched @ questions) / table.size**2 - table.mean() ** 2
    means = resampled_means(table, draws=100_000)
    assert means.mean() == pytest.approx(table.mean(), abs=4 * math.sqrt(exact / 100_000))
    assert means.var() == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize("questions", [2, 7, 9, 30, 57])
def test_attackers_that_are_all_right_leave_no_rounding(questions: int) -> None:
    """Shares of a mean over splits add up to 1 but for rounding; above 1 there is no interval."""
    for count in range(1, 12):
        for earned in (0.0, 1.0):
            found = read_elsewhere(np.full((count, 2, questions), earned))
            assert (found == earned).all() and found.shape == (2, questions)
            assert accuracy_interval(found) == wilson_interval(earned * questions, questions)


def test_an_interval_knows_of_seeds_that_differ_and_is_never_empty() -> None:
    assert accuracy_interval([[1, 1, 1, 0]]) == wilson_interval(3, 4)
    assert accuracy_interval(np.ones((3, 50))) == wilson_interval(50, 50)
    apart, alike = np.vstack([np.ones((1, 400)), np.zeros((1, 400))]), np.tile([[0.0, 1.0]], (2, 200))
    low, high = accuracy_interval(apart)
    assert high - low > 0.9, "one seed knows all, one nothing: the mean of other seeds may be anything"
    low, high = accuracy_interval(alike)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.05)
    with pytest.raises(ValueError, match="expected a table"):
        accuracy_interval([1, 0])


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 3), (2, 9), (40, 60)])
def test_sign_flips_are_mcnemars_test(lost: int, won: int) -> None:
    values = [-1.0] * lost + [1.0] * won + [0.0] * 100
    assert sign_flips(values, draws=40_000) == pytest.approx(mcnemar(lost, won), abs=0.01)


def test_a_difference_between_methods_is_seen_and_none_is_not() -> None:
    rng = np.random.default_rng(3)
    easy = rng.random(400)
    first, second = (rng.random((3, 400)) < easy for _ in "ab")
    change, (low, high), p = difference(first, second)
    assert low < 0.0 < high and p > 0.05 and change == pytest.approx(second.mean() - first.mean())
    change, (low, high), p = difference(first, np.maximum(second, rng.random((3, 400)) < 0.5))
    assert low > 0.1 and p < 0.001
    assert difference(first, first[:, ::1])[0] == 0.0 and difference([[1, 0]], [[1, 0]])[2] == 1.0
    with pytest.raises(ValueError, match="as many questions"):
        difference([[1.0]], [[1.0, 0.0]])


def test_seeds_that_differ_leave_a_difference_unsure() -> None:
    """Methods whose seeds score 0.2, 0.5, 0.8 and 0.3, 0.6, 0.9 do not differ, however many questions there are."""
    rows = [[(np.arange(1000) < 1000 * share) for share in shares] for shares in ((0.2, 0.5, 0.8), (0.3, 0.6, 0.9))]
    assert difference(*rows)[2] > 0.2


def test_the_share_of_false_alarms_is_kept() -> None:
    """Two methods alike, three seeds each whose accuracies vary: p below 0.05 in little more than 5 of 100."""
    rng, alarms = np.random.default_rng(4), 0
    for _ in range(200):
        shares = np.clip(0.5 + 0.1 * rng.standard_normal((2, 3, 1)), 0, 1)
        first, second = rng.random((2, 3, 200)) < shares
        alarms += difference(first, second, draws=400)[2] < 0.05
    assert alarms / 200 < 0.15, "a t-test of 4 degrees of freedom would have 0.05; of three seeds a normal one has 0.12"


def luck_of_the_best(earned: ArrayLike) -> float:
    """By how much the highest accuracy of several attackers is above what choosing so earns on other questions."""
    return float(np.asarray(earned, dtype=float).mean(axis=(1, 2)).max() - read_elsewhere(earned).mean())


def test_the_luck_of_the_best_is_found_and_taken_away() -> None:
    """Twenty attackers of true accuracy 0.5: the best of them shows more; nine of 0.3 and one of 0.9: no luck."""
    rng = np.random.default_rng(5)
    alike = (rng.random((20, 1, 200)) < 0.5).astype(float)
    naive = alike.mean(axis=(1, 2)).max()
    luck = luck_of_the_best(alike)
    assert naive > 0.55 and luck > 0.03 and naive - luck == pytest.approx(0.5, abs=0.05)
    apart = (rng.random((10, 2, 200)) < np.array([0.9] + [0.3] * 9)[:, None, None]).astype(float)
    assert luck_of_the_best(apart) == pytest.approx(0.0, abs=1e-12)
    assert read_elsewhere(apart) == pytest.approx(apart[0]), "always the same attacker is chosen"


def test_reading_elsewhere_by_hand() -> None:
    """Two attackers, each right on one of two questions: each half chooses the one that is wrong on the other."""
    assert read_elsewhere([[[1, 0]], [[0, 1]]]).tolist() == [[0.0, 0.0]]
    assert luck_of_the_best([[[1, 0]], [[0, 1]]]) == 0.5
    with pytest.raises(ValueError, match="two questions or more"):
        read_elsewhere([[[1]]])


def test_reading_elsewhere_is_what_a_loop_over_the_splits_gives() -> None:
    """Chosen by one half, read on the other, split by split; attackers that tie there share the reading."""
    rng = np.random.default_rng(6)
    table = (rng.random((5, 2, 9)) < 0.5).astype(float)
    order = np.random.default_rng(0).random((40, 9)).argsort(axis=1)
    total = np.zeros((2, 9))
    for row in order:
        for chosen_by, read in ((row[:4], row[4:]), (row[4:], row[:4])):
            scores = table[:, :, chosen_by].mean(axis=(1, 2))
            best = [place for place in range(5) if math.isclose(scores[place], scores.max())]
            total[:, read] += np.mean([table[place][:, read] for place in best], axis=0)
    assert read_elsewhere(table, splits=40, seed=0) == pytest.approx(total / 40)


def test_false_alarms_between_methods_read_by_their_best_attackers() -> None:
    """Twelve attackers of two methods that are alike, on 300 questions: p below 0.05 in about 5 of 100. By the mean of
    many splits it was 17, by both halves read crosswise 10."""
    rng, alarms = np.random.default_rng(7), 0
    for _ in range(200):
        easy = rng.random((1, 1, 300))
        tables = [(rng.random((12, 1, 300)) < easy).astype(float) for _ in "ab"]
        alarms += difference(*map(read_on_the_other_half, tables), draws=400)[2] < 0.05
    assert alarms / 200 < 0.08, alarms / 200
