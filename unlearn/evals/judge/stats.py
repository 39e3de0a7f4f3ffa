"""Statistics of accuracies: intervals, paired tests, and how much the answers have to do with the questions.

A *stratum* is one subject (one lm-eval task): what is drawn at random is drawn within it, because subjects differ.
Random draws are seeded: the same answers give the same numbers. Shuffles of strata that are added up need seeds of
their own, or they are correlated and their sum varies too much. Nothing here needs scipy.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
Z_90 = 1.6448536269514722  # the 95 % quantile
DRAWS = 10_000  # of a bootstrap
SHUFFLES = 2_000  # of a permutation test, which every evaluation during training repeats: p = 0.05 is known to 0.005
SEED = 0
ROUNDING = 1e-9  # shares closer than that differ by the order in which they were added up
SMALL = 10  # values of a stratum, below which it is not resampled by itself

Interval = tuple[float, float]


def wilson_interval(right: float, total: float, z: float = Z_95) -> Interval:
    """The Wilson score interval of a proportion, as fractions (95 % by default).

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; unlike p +- z s it stays inside 0..1 and is not empty
    at 0 of n or n of n.

    Args:
        right, total: counts; fractional where `effective_size` replaced the number of questions.

    Raises:
        ValueError: there are no trials, or more successes than trials.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"expected 0 <= right <= total and a total above 0; found {right} of {total}")
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    # At the ends the exact bound is 0 or 1; rounding would leave 1e-17 of it.
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of a mean, with n - 1 as lm-eval computes it; 0 for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def effective_size(means: Sequence[float]) -> float:
    """How many independent right-or-wrong answers are worth as much as questions that were each asked several times.

    The share right of each question is one value of `means`; orders of one question are not independent. This is the
    size at which a proportion's variance p (1 - p) / n is the variance between questions (Kish's design effect).
    """
    share, error = float(np.mean(means)), standard_error(means)
    alike = max(means) - min(means) < ROUNDING
    return float(len(means)) if alike else share * (1 - share) / error**2


def mean_interval(values: Sequence[float]) -> Interval:
    """A 95 % interval of the mean of values from 0 to 1: Wilson's, at the size that they are worth.

    Rights and wrongs are worth their number. Shares (of several orders of a question, or of partial credit) are worth
    more or less, by how much they differ (see `effective_size`).
    """
    share = float(np.mean(values))
    size = len(values) if set(values) <= {0, 1} else effective_size(values)
    return wilson_interval(share * size, size)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test, two-sided: do two models, asked the same questions, differ in accuracy?

    Under the null hypothesis each question that just one of them got right is a fair coin.
    McNemar 1947, https://doi.org/10.1007/BF02295996.

    Args:
        only_first, only_second: how many questions just the one, or just the other, answered right.

    Returns:
        The p-value; 1.0 where no question was answered differently.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    tail = math.fsum(math.exp(log - total * math.log(2.0)) for log in logs)
    return min(1.0, 2.0 * tail)


def holm(chances: Sequence[float]) -> list[float]:
    """p-values of several tests, so corrected that any one below 0.05 is wrong in at most 5 % of all families.

    Holm 1979, https://www.jstor.org/stable/4615733: the smallest times the number of tests, the next times one less,
    and so on; none smaller than one before it.
    """
    order, corrected, least = sorted(range(len(chances)), key=lambda index: chances[index]), [1.0] * len(chances), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(chances) - place) * chances[index]))
        corrected[index] = least
    return corrected


def bootstrap_difference(
    differences: Sequence[Sequence[float] | NDArray[np.float64]],
    *,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Interval:
    """Percentile bootstrap interval of the mean of paired differences, resampled within each stratum.

    A stratum of n values varies too little by (n - 1) / n when resampled, one of a single value not at all: strata of
    fewer than `SMALL` are taken as one.

    Efron and Tibshirani 1993, chapters 13 and 16. Resampling n values of which there are few different ones is a
    multinomial draw of how often each appears, which is what is drawn here.

    Args:
        differences: for each stratum, new minus base on each question.
        level: of the two-sided interval.
    """
    generator = np.random.default_rng(seed)
    total = sum(map(len, differences))
    sums = np.zeros(draws)
    small = [value for stratum in differences if len(stratum) < SMALL for value in stratum]
    for stratum in [*(stratum for stratum in differences if len(stratum) >= SMALL), *([small] if small else [])]:
        values, counts = np.unique(np.asarray(stratum, dtype=float), return_counts=True)
        sums += generator.multinomial(len(stratum), counts / len(stratum), size=draws) @ values
    low, high = np.quantile(sums / total, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def score_difference(only_first: float, only_second: float, total: int, z: float = Z_95) -> Interval:
    """Tango's score interval of the difference second - first between two paired proportions (95 % by default).

    Tango 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B. It keeps its width
    where hardly a question was answered differently, and a bootstrap has nothing to resample.

    Args:
        only_first, only_second: how many questions just that model answered right.
        total: all questions.
    """

    def score(difference: float) -> float:
        linear = -only_second - only_first + (2 * total - only_second + only_first) * difference
        constant = -only_first * difference * (1 - difference)
        lost = (math.sqrt(max(0.0, linear**2 - 8 * total * constant)) - linear) / (4 * total)
        variance = total * (2 * lost + difference * (1 - difference))
        distance = only_second - only_first - total * difference
        return distance / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, distance)

    observed = (only_second - only_first) / total

    def solve(inside: float, outside: float, wanted: float) -> float:
        for _ in range(60):  # halves of an interval of length 2: to the last bit
            middle = (inside + outside) / 2
            if abs(score(middle)) < wanted:
                inside = middle
            else:
                outside = middle
        return inside

    return solve(observed, -1.0, z), solve(observed, 1.0, z)


def shares(answers: Sequence[int], choices: int) -> list[float]:
    """How often each choice 0..choices-1 is among `answers`, as fractions."""
    counts = Counter(answers)
    return [counts[choice] / len(answers) for choice in range(choices)]


def independent_accuracy(answers: Sequence[int], targets: Sequence[int]) -> float:
    """The expected accuracy of giving these answers without looking at the questions.

    sum_l predicted_l x right_l over the letters l: 0.25 for four letters that are equally often right, whatever the
    habit of the model; with uneven right letters a habit earns or loses some points.
    """
    right = Counter(targets)
    return sum(count * right[letter] for letter, count in Counter(answers).items()) / len(answers) ** 2


def permuted_matches(
    answers: Sequence[int], targets: Sequence[int], *, draws: int = SHUFFLES, seed: int = SEED
) -> NDArray[np.int64]:
    """How many answers are right when the right answers are shuffled among the questions, for each of `draws` shuffles.

    Drawn from the table of answers by right answers, whose margins a shuffle keeps: each cell is hypergeometric given
    the earlier ones. That is the same distribution as shuffling, without touching every question `draws` times.

    Returns:
        int64 [draws].
    """
    generator = np.random.default_rng(seed)
    given, right = Counter(answers), Counter(targets)
    letters = sorted(right)
    left = {letter: np.full(draws, right[letter]) for letter in letters}  # right answers not yet handed out
    matches = np.zeros(draws, dtype=np.int64)
    for answer in sorted(given):
        wanted = np.full(draws, given[answer])
        others = sum(left.values())
        for letter in letters:
            others = others - left[letter]
            drawn = generator.hypergeometric(left[letter], others, wanted)
            wanted, left[letter] = wanted - drawn, left[letter] - drawn
            if letter == answer:
                matches += drawn
    return matches


def permuted_scores(
    table: NDArray[np.float64], targets: Sequence[int], *, draws: int = SHUFFLES, seed: int = SEED
) -> NDArray[np.int64]:
    """The same for questions asked in several orders of their choices, whose answers belong together.

    Args:
        table: [questions, choices], in how many orders a question was answered with a choice.
        targets: the right choice of each question, which is what is shuffled.

    Returns:
        int64 [draws], how many answers are right, over all orders.
    """
    generator = np.random.default_rng(seed)
    right, rows = np.asarray(targets), np.arange(len(targets))
    return np.array([table[rows, generator.permutation(right)].sum() for _ in range(draws)], dtype=np.int64)


def permutation_test(right: int, matches: NDArray[np.int64]) -> tuple[float, float]:
    """One-sided p-values of `right` right answers, if answers had nothing to do with the questions.

    Phipson and Smyth 2010, https://doi.org/10.2202/1544-6115.1585: the observed value counts as one of the draws.

    Args:
        matches: `permuted_matches`, summed over strata.

    Returns:
        (for more right answers than by chance, for fewer).
    """
    draws = len(matches)
    return (1 + int((matches >= right).sum())) / (draws + 1), (1 + int((matches <= right).sum())) / (draws + 1)
