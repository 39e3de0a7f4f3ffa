"""Files that another program writes, read without a mistake: what is missing, damaged or half-written is nothing."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Object = dict[str, Any]

LONGEST = 1 << 20  # bytes of a line
MOST = 1e100
KNOWN = 256  # bytes at the end of the last line read, by which the same file is known again


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


def parsed(content: bytes) -> Object | None:
    """The object that JSON says, None for anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return found if isinstance(found, dict) else None


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


class Tail:
    """The lines of a JSONL file, each read once.

    Attributes:
        damaged: whole lines that are no JSON object.
    """

    def __init__(self, file: Path):
        self.damaged, self._file = 0, file
        self._inode, self._offset, self._before = 0, 0, b""

    def lines(self) -> Iterator[Object | None]:
        """The whole lines that were added since the last call.

        None comes first where the file is another one by now, or was cut (a run that goes on from a checkpoint does
        that): what was read of it before no longer counts.
        """
        try:
            with self._file.open("rb") as stream:
                if not self._same(stream):
                    self._begin(os.fstat(stream.fileno()).st_ino)
                    yield None
                stream.seek(self._offset)
                yield from self._whole(stream)
        except OSError:
            if self._offset:
                self._begin(0)
                yield None

    def _same(self, stream: Any) -> bool:
        """Whether the file goes on from where it was read up to."""
        found = os.fstat(stream.fileno())
        if found.st_ino != self._inode or found.st_size < self._offset:
            return False
        stream.seek(self._offset - len(self._before))
        return bool(stream.read(len(self._before)) == self._before)

    def _begin(self, inode: int) -> None:
        self.damaged = 0
        self._inode, self._offset, self._before = inode, 0, b""

    def _whole(self, stream: Any) -> Iterator[Object]:
        while line := stream.readline(LONGEST):
            if not line.endswith(b"\n") and len(line) < LONGEST:
                return  # half-written
            self._offset += len(line)
            self._before = line[-KNOWN:]
            found = parsed(line)
            if found is not None:
                yield found
            elif line.strip():
                self.damaged += 1
