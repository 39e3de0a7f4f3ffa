"""A number over a whole run, in a bounded number of means."""


class Series:
    """Values of a number, one after the other; neighbours are averaged once there are `most` of them."""

    def __init__(self, most: int = 512):
        self._means: list[float] = []
        self._most, self._each = most, 1  # values of a mean
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """The next value."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == self._most:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._each *= 2

    def values(self) -> tuple[float, ...]:
        """The means, the newest being of fewer values."""
        return (*self._means, *([self._sum / self._count] if self._count else ()))
