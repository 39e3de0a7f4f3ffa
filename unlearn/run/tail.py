"""The lines of a JSONL file that another process is writing."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Object = dict[str, Any]

LONGEST = 1 << 20  # bytes of a line
KNOWN = 256  # bytes at the end of the last line read, by which the same file is known again


def parsed(content: bytes) -> Object | None:
    """The object that JSON says, None for anything else."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return found if isinstance(found, dict) else None


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
