"""Signals that stop a run, from its first second on. Nothing here imports torch.

A thread reads the signals from a pipe, because a Python handler would not run while the main thread waits in C++.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

MARKER = "PREEMPTED"  # left in the folder of a run that was told to stop, for launch/slurm.sh
LINGER = 3.0  # seconds that ranks above 0 leave rank 0 to see that they were alive
PROC = Path("/proc")


class Listener:
    """A context in which a thread hears signals; it listens no more once another one has taken over."""

    signals: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._listening = False

    def __enter__(self) -> Any:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self.signals:
            self._before[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._listening = True
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listening:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self.end()

    def take_over(self, other: "Listener") -> None:
        """Hear in place of `other` from now on, and leave at the end what was there before it."""
        if other._listening:
            self._wakeup, self._before = other._wakeup, self._before | other._before
            other.end()

    def end(self) -> None:
        """End the thread."""
        self._listening = False
        os.write(self._write, b"\0")  # no signal's number
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def heard(self, number: int) -> None:
        """Called in the thread with each signal's number."""
        raise NotImplementedError

    def patience(self) -> float | None:
        """Seconds without a signal after which `idle` is called; None: never."""
        return None

    def idle(self) -> None:
        """See `patience`."""

    def _watch(self) -> None:
        while True:
            if not select.select([self._read], [], [], self.patience())[0]:
                self.idle()
                continue
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number in self.signals:
                    self.heard(number)


class EarlyStop(Listener):
    """Hears SIGTERM and SIGUSR1 from the command line on until the run itself does: rank 0 leaves the marker in
    `folder`, and the process ends; nothing is to be saved yet.

    SIGTERM is also what torchrun sends to the ranks that are left when one has failed: it is taken for an order to stop
    only while every rank of this node is alive. Ranks of other nodes are not seen before all have met.
    """

    current: "EarlyStop | None" = None

    def __init__(self, folder: str | None):
        super().__init__()
        self._folder = Path(folder or ".").expanduser().absolute()

    def __enter__(self) -> Any:
        EarlyStop.current = self
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        EarlyStop.current = None
        super().__exit__(kind, value, trace)

    def heard(self, number: int) -> None:
        """End the process."""
        if os.environ.get("RANK", "0") != "0":
            time.sleep(LINGER)
            leave(128 + number, "")
        if number == signal.SIGTERM and not _whole_node():
            leave(1, "another rank has failed: ending")
        with contextlib.suppress(OSError):  # a folder that cannot be written is a mistake, and no run's
            self._mark()
        leave(128 + number, f"{signal.Signals(number).name}: nothing to save yet; the same command starts anew")

    def _mark(self) -> None:
        """Leave the marker, but in no folder that holds anything else than a run."""
        found = {entry.name for entry in self._folder.iterdir()} if self._folder.is_dir() else set()
        if found <= {MARKER, "lock"} or "run.json" in found or "fitting" in found:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / MARKER).touch()


def leave(code: int, said: str) -> NoReturn:
    """End the process now, whatever its threads do."""
    if said:
        print(said, file=sys.stderr, flush=True)
    os._exit(code)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked after yet does not."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _whole_node() -> bool:
    """Whether as many processes as torchrun has started on this node are alive, as far as /proc tells."""
    children: list[int] = []
    for file in PROC.glob(f"{os.getppid()}/task/*/children"):
        with contextlib.suppress(OSError):
            children += map(int, file.read_text().split())
    return not children or sum(map(alive, children)) >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
