"""How long until something comes back, where some were never seen to: survival curves and the log-rank test.

A *duration* is what one attack took until hazard accuracy reached a bound: optimizer steps, or tokens. An attack that
ended below the bound is *censored*: it took longer than it was watched. Leaving those out would make the methods that
resist best look like those that fall at once; taking the last step for the answer would do the same, only less.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Duration:
    """How long one attack took, or was watched.

    Attributes:
        amount: steps or tokens. ended: whether the bound was reached then; else it was not by then.
    """

    amount: float
    ended: bool


@dataclass(frozen=True)
class Drop:
    """A place at which a survival curve falls.

    Attributes:
        amount: steps or tokens. at_risk: how many were watched until then and had not ended.
        ended: how many of them ended there. survival: share that lasts longer than this.
    """

    amount: float
    at_risk: int
    ended: int
    survival: float


def kaplan_meier(durations: Sequence[Duration]) -> list[Drop]:
    """The product-limit estimate of the share that lasts longer than each amount (Kaplan and Meier 1958,
    https://doi.org/10.1080/01621459.1958.10501452).

    One that is censored where another ends counts as still watched there. [] if none has ended.
    """
    drops, survival = [], 1.0
    for amount in sorted({one.amount for one in durations if one.ended}):
        at_risk = sum(one.amount >= amount for one in durations)
        ended = sum(one.ended and one.amount == amount for one in durations)
        survival *= 1.0 - ended / at_risk
        drops.append(Drop(amount, at_risk, ended, survival))
    return drops


def median(durations: Sequence[Duration]) -> float | None:
    """The first amount at which at most half last longer; None where more than half do all the while."""
    return next((drop.amount for drop in kaplan_meier(durations) if drop.survival <= 0.5 + 1e-12), None)


@dataclass(frozen=True)
class LogRank:
    """Do two groups last equally long?

    Attributes:
        observed, expected: how many of the first group ended, and how many would if the groups were alike.
        statistic: chi-square of one degree of freedom. p: of one as large or larger; 1.0 where nothing can be told.
    """

    observed: int
    expected: float
    statistic: float
    p: float

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"observed": self.observed, "expected": self.expected, "statistic": self.statistic, "p": self.p}


def log_rank(first: Sequence[Duration], second: Sequence[Duration]) -> LogRank:
    """The log-rank test, two-sided, with the hypergeometric variance where several end at once (Mantel 1966).

    Formulas: Kleinbaum and Klein 2012, chapter 2. It knows the amounts by their order alone, and its p-value is a large
    sample's: of three or four durations a group it is rough.
    """
    both = [*first, *second]
    observed, expected, variance = sum(one.ended for one in first), 0.0, 0.0
    for drop in kaplan_meier(both):
        total, ended = drop.at_risk, drop.ended
        here = sum(one.amount >= drop.amount for one in first)
        expected += ended * here / total
        if total > 1:
            share = here / total
            variance += ended * share * (1.0 - share) * (total - ended) / (total - 1)
    if variance <= 0.0:
        return LogRank(observed, expected, 0.0, 1.0)
    statistic = (observed - expected) ** 2 / variance
    return LogRank(observed, expected, statistic, math.erfc(math.sqrt(statistic / 2.0)))
