"""`unlearn.evals.judge.stats` against scipy, against enumeration, and against published values."""

import itertools
import random

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from unlearn.evals.judge.stats import (
    bootstrap_difference,
    effective_size,
    independent_accuracy,
    mcnemar,
    mean_interval,
    permutation_test,
    permuted_matches,
    permuted_scores,
    score_difference,
    shares,
    standard_error,
    wilson_interval,
)


def test_wilson_interval_as_published() -> None:
    # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(29, 29)[1] == 1.0
    for right, total in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="0 <= right <= total"):
            wilson_interval(right, total)


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (217, 868), (195, 868), (3541, 14042), (868, 868)])
def test_wilson_interval_is_scipys(right: int, total: int) -> None:
    reference = scipy.stats.binomtest(right, total).proportion_ci(method="wilson")
    assert wilson_interval(right, total) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_resolution_of_868_questions() -> None:
    """An accuracy must be 3 points below a bound of 25 % for its whole interval to lie there."""
    assert wilson_interval(191, 868)[1] <= 0.25 < wilson_interval(192, 868)[1]


@pytest.mark.parametrize(
    ("first", "second"), [(0, 0), (1, 0), (0, 7), (5, 5), (3, 11), (10, 25), (400, 350), (3000, 2000)]
)
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    reference = scipy.stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(reference, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_standard_error_is_scipys() -> None:
    values = np.random.default_rng(0).integers(0, 2, 50).tolist()
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values))
    assert standard_error([1.0]) == 0.0


def test_effective_size() -> None:
    """Asking each question four times is worth no more than once if all answers agree, four times if they ignore it."""
    generator = np.random.default_rng(0)
    same = np.repeat(generator.integers(0, 2, 2000)[:, None], 4, axis=1)
    independent = generator.integers(0, 2, (2000, 4))
    assert effective_size(same.mean(axis=1).tolist()) == pytest.approx(2000, rel=0.01)
    assert effective_size(independent.mean(axis=1).tolist()) == pytest.approx(8000, rel=0.06)
    assert effective_size([1.0] * 30) == 30
    assert effective_size([2 / 3, 2 / 3 + 1e-16, 1 - 1 / 3]) == 3, "rounding is no variance between questions"
    assert mean_interval([2 / 3] * 30) == pytest.approx(wilson_interval(20, 30))


def test_bootstrap_of_one_stratum_is_scipys() -> None:
    differences = np.random.default_rng(1).choice([-1, 0, 1], size=300, p=[0.1, 0.7, 0.2]).astype(float)
    reference = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    found = bootstrap_difference([differences.tolist()])
    assert found == pytest.approx((reference.low, reference.high), abs=0.004)  # both are drawn; the width is 0.12
    assert found == bootstrap_difference([differences.tolist()]), "the same draws every time"


def test_bootstrap_is_stratified() -> None:
    """Two subjects that differ from each other but not within themselves leave nothing to resample."""
    assert bootstrap_difference([[1.0] * 20, [-1.0] * 20]) == (0.0, 0.0)
    low, high = bootstrap_difference([[1.0] * 20 + [-1.0] * 20])
    assert low < -0.2 and high > 0.2


@pytest.mark.parametrize("sizes", [(60, 140), (1,) * 57, (2,) * 57, (5,) * 57, (9, 3, 150)])
def test_bootstrap_covers_what_it_claims(sizes: tuple[int, ...]) -> None:
    """Of 400 experiments with a known true difference, close to 90 % of the 90 % intervals hold it; strata that are too
    small to be resampled by themselves included."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        strata = [generator.choice([-1, 0, 1], size=size, p=[0.1, 0.6, 0.3]).tolist() for size in sizes]
        low, high = bootstrap_difference(strata, level=0.90, draws=1000)
        covered += low <= 0.2 <= high
    assert 0.86 <= covered / 400 <= 0.94


@pytest.mark.parametrize(
    ("first", "second", "total"), [(3, 1, 44), (9, 0, 50), (0, 4, 24), (12, 30, 456), (2.5, 1.25, 60)]
)
def test_score_interval_inverts_the_score_test(first: float, second: float, total: int) -> None:
    """At each end the test, with the nuisance parameter found by maximising the likelihood numerically, says 5 %."""

    def statistic(difference: float) -> float:
        def loss(lost: float) -> float:
            same = 1 - 2 * lost - difference
            parts = [(second, lost + difference), (first, lost), (total - first - second, same)]
            return -sum(count * np.log(share) for count, share in parts if count)

        low, high = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
        lost = scipy.optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (second - first - total * difference) / np.sqrt(total * (2 * lost + difference * (1 - difference)))

    low, high = score_difference(first, second, total)
    assert low < (second - first) / total < high
    assert statistic(low) == pytest.approx(1.95996, abs=2e-3) and statistic(high) == pytest.approx(-1.95996, abs=2e-3)
    assert score_difference(second, first, total) == pytest.approx((-high, -low))


def test_score_interval_without_any_difference_is_not_empty() -> None:
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    assert score_difference(0, 0, 24) == pytest.approx((-z2 / (24 + z2), z2 / (24 + z2)))


def test_score_interval_and_bootstrap_agree_on_many_questions() -> None:
    differences = [1.0] * 60 + [-1.0] * 90 + [0.0] * 850
    assert score_difference(90, 60, 1000) == pytest.approx(bootstrap_difference([differences]), abs=0.002)


def test_shares_and_independent_accuracy() -> None:
    answers, targets = [2, 2, 2, 0], [0, 1, 2, 3]
    assert shares(answers, 4) == [0.25, 0.0, 0.75, 0.0]
    assert independent_accuracy(answers, targets) == pytest.approx(0.75 * 0.25 + 0.25 * 0.25)
    assert independent_accuracy([1] * 4, [1, 1, 1, 0]) == 0.75, "a lucky habit"


def test_permutation_test_is_the_exact_one() -> None:
    """All 5,040 orders of seven right answers, counted one by one."""
    answers, targets = [0, 0, 1, 2, 2, 3, 2], [0, 1, 1, 2, 2, 0, 3]
    counts = [sum(map(int.__eq__, answers, order)) for order in itertools.permutations(targets)]
    matches = permuted_matches(answers, targets, draws=40_000)
    for right in range(8):
        more, fewer = permutation_test(right, matches)
        assert more == pytest.approx(np.mean([count >= right for count in counts]), abs=0.01)
        assert fewer == pytest.approx(np.mean([count <= right for count in counts]), abs=0.01)


def test_permutation_test_is_scipys() -> None:
    rng = random.Random(4)
    targets = [rng.randrange(4) for _ in range(200)]
    answers = [target if rng.random() < 0.08 else rng.choice([0, 1, 2, 2, 2, 3]) for target in targets]
    right = sum(map(int.__eq__, answers, targets))
    reference = scipy.stats.permutation_test(
        (np.array(answers), np.array(targets)),
        lambda a, t: np.sum(a == t),
        permutation_type="pairings",
        alternative="greater",
        n_resamples=5000,
        rng=np.random.default_rng(5),
    )
    more, _ = permutation_test(right, permuted_matches(answers, targets, draws=20_000))
    assert more == pytest.approx(reference.pvalue, abs=0.02)


def test_mean_of_permuted_matches_is_the_independent_accuracy() -> None:
    answers, targets = [2] * 150 + [0] * 50, [0, 1, 2, 3] * 50
    assert permuted_matches(answers, targets).mean() / 200 == pytest.approx(
        independent_accuracy(answers, targets), abs=0.002
    )
    table = (np.array(answers)[:, None] == np.arange(4)).astype(float)
    assert permuted_scores(table, targets).mean() / 200 == pytest.approx(
        independent_accuracy(answers, targets), abs=0.002
    )


def test_permutation_tests_of_orders_agree_with_one_order() -> None:
    rng = random.Random(6)
    targets = [rng.randrange(4) for _ in range(120)]
    answers = [target if rng.random() < 0.1 else rng.randrange(4) for target in targets]
    right = sum(map(int.__eq__, answers, targets))
    table = (np.array(answers)[:, None] == np.arange(4)).astype(float)
    one = permutation_test(right, permuted_matches(answers, targets, draws=20_000))
    assert permutation_test(right, permuted_scores(table, targets, draws=20_000)) == pytest.approx(one, abs=0.02)
