"""Accuracies over seeds and questions together, and the best of several attackers without the luck of the best.

Every model answers the same questions, so seeds and questions are crossed: a table [seeds, questions] of what was
earned, 0 to 1. Both are a sample, of runs and of questions, and both are resampled. Draws are seeded.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unlearn.evals.judge.stats import DRAWS, SEED, Interval, mean_interval

SPLITS = 200  # of the questions into halves
DECIMALS = 12  # beyond which a mean over splits is rounding: 1 from every attacker has to be 1, and not more
CHUNK = 1_000  # draws at once: 1,000 x 2,000 questions of 8 bytes are 16 MB

Table = NDArray[np.float64]


def accuracy_interval(earned: ArrayLike, *, draws: int = DRAWS, seed: int = SEED) -> Interval:
    """A 95 % interval of a mean accuracy over seeds and questions.

    Percentiles of `resampled_means`, and at least as wide as `stats.mean_interval` over the questions alone: where all
    are right or all wrong there is nothing to resample. Of one seed it is that one, and says nothing of other seeds.

    Args:
        earned: [seeds, questions], 0 to 1.

    Raises:
        ValueError: it is empty, or no table.
    """
    table = _table(earned)
    low, high = mean_interval(table.mean(axis=0).tolist())
    if len(table) > 1:
        ends = np.clip(np.quantile(resampled_means(table, draws=draws, seed=seed), [0.025, 0.975]), 0.0, 1.0)
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    return low, high


def resampled_means(earned: ArrayLike, *, draws: int = DRAWS, seed: int = SEED) -> Table:
    """The mean accuracy of `draws` samples of as many seeds and as many questions, both with replacement: [draws].

    The pigeonhole bootstrap of a crossed table (Owen 2007, https://doi.org/10.1214/07-AOAS122), whose variance is never
    too small in the limit. Of S seeds it would be by (S - 1) / S: seeds' deviations are first stretched by
    sqrt(S / (S - 1)) (Davison and Hinkley 1997, section 2.3). Of three seeds it still is a rough guess.
    """
    generator = np.random.default_rng(seed)
    return _means(_stretched(_table(earned)), _question_counts(_table(earned).shape[1], draws, generator), generator)


def difference(
    first: ArrayLike, second: ArrayLike, *, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, Interval, float]:
    """How much more two models, or two methods with several seeds each, earn on the same questions.

    Questions are resampled together, the seeds of either by themselves.

    Args:
        first, second: [seeds, questions]; they may differ in the number of seeds.

    Returns:
        (second - first, its 95 % interval, p): p two-sided, the greater of the bootstrap's and of `sign_flips` over the
        questions, which is exact where few questions differ and the bootstrap is too sure. Of one seed each, nothing in
        it knows what another seed would change.

    Raises:
        ValueError: they are not about as many questions.
    """
    one, other = _table(first), _table(second)
    if one.shape[1] != other.shape[1]:
        raise ValueError(f"expected as many questions of both; found {one.shape[1]} and {other.shape[1]}")
    generator = np.random.default_rng(seed)
    questions = _question_counts(one.shape[1], draws, generator)
    drawn = _means(_stretched(other), questions, generator) - _means(_stretched(one), questions, generator)
    low, high = np.quantile(drawn, [0.025, 0.975])
    rest = 1e-12  # what adding the same numbers in another order leaves
    tail = min(int((drawn <= rest).sum()), int((drawn >= -rest).sum()))
    paired = other.mean(axis=0) - one.mean(axis=0)
    p = max(min(1.0, 2 * (1 + tail) / (draws + 1)), sign_flips(paired, draws=draws, seed=seed))
    return float(paired.mean()), (float(low), float(high)), p


def sign_flips(differences: ArrayLike, *, draws: int = DRAWS, seed: int = SEED) -> float:
    """p of a mean as far from 0 as that of these paired differences, if each could as well have the other sign.

    Fisher's randomisation test, by `draws` random signs; with differences of -1, 0, 1 it is McNemar's exact test.
    """
    found = np.asarray(differences, dtype=float)
    found = found[found != 0.0]
    generator, reached, total = np.random.default_rng(seed), 0, abs(found.sum())
    for first in range(0, draws, CHUNK):
        signs = generator.integers(0, 2, size=(min(CHUNK, draws - first), len(found))) * 2 - 1
        reached += int((np.abs(signs @ found) >= total - 1e-9).sum())
    return (1 + reached) / (draws + 1)


def read_elsewhere(earned: ArrayLike, *, splits: int = SPLITS, seed: int = SEED) -> Table:
    """What the best of several attackers earns on questions that it was not chosen by.

    The questions are split into halves, `splits` times. By each half the attacker with the highest accuracy over all
    seeds is chosen (of several equal ones their mean), and read on the other half.

    Args:
        earned: [attackers, seeds, questions], 0 to 1, at least two questions.

    Returns:
        [seeds, questions], each entry the mean over the splits. Its mean has not the bias of a maximum; it is no higher
        than the best attacker's true accuracy in expectation, since half of the questions choose less well than all.

    Raises:
        ValueError: there is no attacker, or only one question.
    """
    table = _attackers(earned)
    by_question, questions = table.mean(axis=1), table.shape[2]  # [attackers, questions]
    ranks = np.random.default_rng(seed).random((splits, questions)).argsort(axis=1).argsort(axis=1)
    first = ranks < questions // 2  # [splits, questions]
    weights = np.zeros(by_question.shape)  # of each attacker on each question, over all splits
    for chosen_by in (first, ~first):
        scores = chosen_by @ by_question.T / chosen_by.sum(axis=1, keepdims=True)  # [splits, attackers]
        best = scores >= scores.max(axis=1, keepdims=True) - 1e-9
        weights += (best / best.sum(axis=1, keepdims=True)).T @ ~chosen_by
    return np.round(np.einsum("aq,asq->sq", weights, table) / splits, DECIMALS)


def read_on_the_other_half(earned: ArrayLike, *, seed: int = SEED) -> Table:
    """What the best attacker by one half of the questions earns on the other half: for tests.

    The questions that are read had no say, so a test on them keeps its level. Reading both halves crosswise, let alone
    the mean over many splits, would not: their sum varies more than the questions tell.

    Args:
        earned: see `read_elsewhere`. seed: of the split, which is the same for tables of as many questions.

    Returns:
        [seeds, questions of the other half].
    """
    table = _attackers(earned)
    order = np.random.default_rng(seed).permutation(table.shape[2])
    half = len(order) // 2
    scores = table[:, :, order[:half]].mean(axis=(1, 2))
    return table[scores >= scores.max() - 1e-9][:, :, order[half:]].mean(axis=0)


def _attackers(earned: ArrayLike) -> Table:
    table = np.asarray(earned, dtype=float)
    if table.ndim != 3 or 0 in table.shape or table.shape[2] < 2:
        raise ValueError(f"expected [attackers, seeds, questions] with two questions or more; found {table.shape}")
    return table


def _table(earned: ArrayLike) -> Table:
    table = np.asarray(earned, dtype=float)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"expected a table [seeds, questions]; found the shape {table.shape}")
    return table


def _stretched(table: Table) -> Table:
    """With every seed further from the mean over seeds, so that resampling few of them does not vary too little."""
    if len(table) == 1:
        return table
    centre = table.mean(axis=0)
    return centre + (table - centre) * (len(table) / (len(table) - 1)) ** 0.5


def _question_counts(questions: int, draws: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each question is drawn: [draws, questions]."""
    return generator.multinomial(questions, np.full(questions, 1.0 / questions), size=draws)


def _means(table: Table, questions: NDArray[np.int64], generator: np.random.Generator) -> Table:
    """The mean over drawn seeds and the drawn questions: [draws]."""
    seeds, count = table.shape
    drawn = generator.multinomial(seeds, np.full(seeds, 1.0 / seeds), size=len(questions))
    parts: Sequence[Table] = [
        np.einsum("dq,dq->d", drawn[first : first + CHUNK] @ table, questions[first : first + CHUNK])
        for first in range(0, len(questions), CHUNK)
    ]
    return np.concatenate(parts) / (seeds * count)
