"""Files that another program writes, read without a mistake: what is missing, damaged or half-written is nothing."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlearn.run.tail import Object, parsed

MOST = 1e100


def number(value: object) -> float | None:
    """A number that one can count with, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -MOST <= value <= MOST else None  # which NaN is not


def count(value: object) -> int | None:
    """A whole number of 0 or more, None for anything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def table(value: object) -> Object:
    """An object, {} for anything else."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """A list, [] for anything else."""
    return value if isinstance(value, list) else []


def names(folder: Path) -> list[str]:
    """What is in a folder, sorted; [] where there is none."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def evaluated(folder: Path) -> bool:
    """Whether evals/run.py has written its results to a folder."""
    places = [folder, *(folder / name for name in names(folder))]
    return any(name.startswith("results_") for place in places for name in names(place))


def written(file: Path) -> float | None:
    """When a file was last written, in seconds; None where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def latest(times: Iterable[float | None]) -> float | None:
    """The last of those that are known."""
    return max((time for time in times if time is not None), default=None)


class Objects:
    """Objects in JSON files, each parsed again only after it was written anew."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[int, ...], Object]] = {}

    def read(self, file: Path) -> Object:
        """The object in a file; {} where there is none, and where another program has just begun to write it."""
        try:
            found = file.stat()
            stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
            if file in self._known and self._known[file][0] == stamp:
                return self._known[file][1]
            value = parsed(file.read_bytes()) or {}
        except OSError:
            self._known.pop(file, None)
            return {}
        self._known[file] = (stamp, value)
        return value
