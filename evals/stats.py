"""Statistics of accuracies."""

import math

Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


def wilson_interval(right: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, as fractions (95 % by default).

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953; unlike p +- z s it stays inside 0..1 and is not empty
    at 0 of n or n of n.

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
