"""Whether a run, a sweep or a comparison is at work: from its lock, its marker and when it last wrote."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unlearn.launch.watch.files import latest, written
from unlearn.run.lock import LOCK
from unlearn.run.signals import MARKER, PROC, alive

SILENT = 600.0  # seconds; ranks that wait longer for each other give up

Word = Literal["at work", "silent", "stopped", "finished"]


@dataclass(frozen=True)
class State:
    """What is known of who writes a folder.

    Attributes:
        word: silent: a process on another machine holds the folder and has written nothing for `SILENT` seconds.
        why: what more there is to say, "" for nothing.
        written: when the last line was written, in seconds; None before the first.
    """

    word: Word
    why: str = ""
    written: float | None = None


def state_of(folder: Path, finished: bool, last_line: float | None, now: float) -> State:
    """The state of what is in `folder`.

    Args:
        finished: whether it says of itself that it is. last_line: when it last wrote one.
    """
    holder = _holder(folder / LOCK)
    if finished:
        return State("finished", "", last_line)
    if holder is None:
        told = (folder / MARKER).exists()
        return State("stopped", "told to; the same command goes on" if told else "", last_line)
    if here(holder) is False:
        return State("stopped", f"{holder} has ended without a word", last_line)
    last = latest([last_line, written(folder / LOCK)])
    if here(holder) is None and last is not None and now - last > SILENT:
        return State("silent", f"{holder} may have ended", last_line)
    return State("at work", holder, last_line)


def held(folder: Path) -> bool:
    """Whether a process is at work in `folder`, as far as one sees: what has ended may have been begun again."""
    holder = _holder(folder / LOCK)
    return holder is not None and here(holder) is not False


def here(holder: str) -> bool | None:
    """Whether the process that holds a folder runs; None if it is not on this machine, or that cannot be seen."""
    found = re.fullmatch(r"process (\d{1,9}) on (.+)", holder)
    if found is None or found[2] != socket.gethostname() or not (PROC / "self").exists():
        return None
    try:
        return alive(int(found[1]))
    except OSError:
        return None


def _holder(lock: Path) -> str | None:
    """What a lock says of its holder; None without one."""
    try:
        with lock.open("rb") as stream:
            return stream.read(200).decode("utf-8", errors="replace") or "a process that has just started"
    except OSError:
        return None
