"""`unlearn track`: a process beside a run that sends the lines of its metrics.jsonl to a tracker.

It reads files and nothing else of the run, so a tracker that fails, hangs or is out of reach never touches the run. How
many lines were sent is kept in the run's folder: a run that goes on from a checkpoint writes the same lines again, and
they are not sent twice.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from unlearn.distributed import is_main
from unlearn.errors import UserError
from unlearn.files import write_json
from unlearn.run.tail import Object, Tail
from unlearn.run.trackers import Tracker, open_tracker
from unlearn.track_config import TrackConfig

POLL = 2.0  # seconds between looks at the file
PATIENCE = 60.0  # seconds that a finished run waits for its tracker to send the rest
FOLDER = "tracking"  # in a run's


def track(config: TrackConfig) -> None:
    """Send what a run has written and, with `follow`, writes.

    Raises:
        UserError: there is no run in the folder.
    """
    run = Path(config.run).expanduser()
    if not (run / "config.json").is_file():
        raise UserError(f"expected the folder of a run; found no config.json in {run}: name another")
    told, parent = _Told(), os.getppid()
    tracker = open_tracker(config.to, run, config.project)
    noted, tail, count = run / FOLDER / f"{config.to}.json", Tail(run / "metrics.jsonl"), 0
    try:
        while True:
            last = told.end or not config.follow or os.getppid() != parent or _finished(run)
            count = _send(tail.lines(), count, noted, tracker)
            if last:
                break
            told.wait(POLL)
    finally:
        tracker.close()


def _finished(run: Path) -> bool:
    """Whether run.json says that the run has come to its end."""
    file = run / "run.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("finished"))


class _Told:
    """Whether this process was told to end: it then sends what there is, and ends."""

    def __init__(self) -> None:
        self.end = False
        signal.signal(signal.SIGTERM, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # as `_start` blocked it

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.end = True

    def wait(self, seconds: float) -> None:
        """Wait, at most until told."""
        until = time.monotonic() + seconds
        while not self.end and time.monotonic() < until:
            time.sleep(0.05)


def _send(lines: Iterable[Object | None], count: int, noted: Path, tracker: Tracker) -> int:
    """Send those lines that no earlier process has sent, and note how many there were; the number of lines so far.

    Args:
        lines: of a `Tail`. count: lines before them.
    """
    sent = json.loads(noted.read_text(encoding="utf-8"))["lines"] if noted.is_file() else 0
    for line in lines:
        if line is None:  # cut off, as by a run that goes on from a checkpoint
            count = 0
            continue
        if count >= sent:
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
            tracker.log(int(numbers.pop("step")), numbers)
        count += 1
    if count > sent:
        write_json(noted, {"lines": count})
    return count


@contextmanager
def tracked(run: Path, tracker: str | None, project: str) -> Iterator[None]:
    """A context in which a process sends what the run in this folder writes; on rank 0, and for no tracker nothing.

    How the tracker ends is said, and changes nothing.
    """
    if tracker is None or not is_main():
        yield
        return
    log = run / FOLDER / "track.log"
    log.parent.mkdir(exist_ok=True)
    again = ["unlearn", "track", str(run), "--to", tracker, "--project", project]
    process = _start([sys.executable, "-m", *again], log)
    try:
        yield
    finally:
        _end(process, log, again)


def _start(command: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a process that inherits a blocked SIGTERM: one that comes while it still imports waits for its handler."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with log.open("ab") as stream:
            return subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(process: "subprocess.Popen[bytes]", log: Path, again: list[str]) -> None:
    """Tell the tracker that this was all, and say so if it did not send it."""
    process.terminate()
    try:
        code: int | str = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = f"nothing within {PATIENCE:g} s"
    if code != 0:
        print(f"the tracker ended with {code}, see {log}; to send the rest: {' '.join(again)}", file=sys.stderr)
