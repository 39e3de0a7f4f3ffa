"""Whether a run, a sweep or a comparison is at work: from its lock, its marker and when it last wrote."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


def state_of(folder: Path, finished: bool, written: float | None, now: float) -> State:
    """The state of what is in `folder`.

    Args:
        finished: whether it says of itself that it is. written: when it last wrote a line.
    """
    holder = _holder(folder / LOCK)
    if finished and not (holder is not None and here(holder)):
        return State("finished", "", written)
    if holder is None:
        told = (folder / MARKER).exists()
        return State("stopped", "told to; the same command goes on" if told else "", written)
    if here(holder) is False:
        return State("stopped", f"{holder} has ended without a word", written)
    last = written if written is not None else _made(folder / LOCK)
    if here(holder) is None and last is not None and now - last > SILENT:
        return State("silent", f"{holder} may have ended", written)
    return State("at work", holder, written)


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


def _made(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None
