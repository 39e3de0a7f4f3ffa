"""Being told to stop: SIGTERM and SIGUSR1 (Slurm, torchrun) and SIGINT (Ctrl-C).

A thread reads the signals from a pipe, because a Python handler would not run while its rank waits in a collective.
While steps are taken, the first signal only sets a flag, on which all ranks agree at the end of a step; before and
after, all that can be saved is saved, and the process ends at once.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from unlearn.distributed import barrier, gather, is_main, world_size

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO = 1.0  # seconds: torchrun forwards what Slurm may have sent to every process already
GRACE = 5.0  # seconds that a rank has to fail by itself, with its own error, after another one has died
PROC = Path("/proc")


class StopSignals:
    """A context in which signals end the run so that it can go on later.

    Who ends a run that was told to stop leaves the file `marker`; `launch/slurm.sh` looks for it.

    Args:
        marker: the file to leave, by rank 0.
    """

    def __init__(self, marker: Path):
        self._marker, self._deferring = marker, False
        self._told, self._number = 0.0, 0
        self._peers: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._peers = _peers_on_this_machine()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")  # no signal's number: the thread ends
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first signal waits until `agreed` is asked; one still waiting at its end ends the run."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._number:
            self._end(saved=True)

    def agreed(self) -> int:
        """The number of the signal that some rank was sent, 0 if none was; the same on every rank, which all ask."""
        number = torch.tensor(self._number)
        if world_size() > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number.item())

    def leave(self, number: int, said: str) -> NoReturn:
        """End the run on every rank, as all agreed, once everything is saved; rank 0 says `said`."""
        if is_main():
            self._marker.touch()
            print(f"{signal.Signals(number).name}: {said}", file=sys.stderr, flush=True)
        barrier()
        raise SystemExit(128 + number)

    def _watch(self) -> None:
        lost = None
        while True:
            if select.select([self._read], [], [], 0.5 if self._number else None)[0]:
                for number in os.read(self._read, 64):
                    if number == 0:
                        return
                    if number in SIGNALS:
                        self._hear(number)
            elif not all(map(_alive, self._peers)):
                lost = lost or time.monotonic()
                if time.monotonic() > lost + GRACE:
                    _exit(1, "another rank has died: ending")

    def _hear(self, number: int) -> None:
        now = time.monotonic()
        if not self._number:
            self._told, self._number = now, number
            if not self._deferring:
                self._end(saved=True)
            if is_main():
                print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)
        elif now > self._told + ECHO:
            self._end(saved=False)

    def _end(self, *, saved: bool) -> NoReturn:
        """End this process now, wherever it is."""
        if saved and is_main() and (self._number != signal.SIGINT or self._marker.parent.is_dir()):
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.touch()
        _exit(128 + self._number, "interrupted" if is_main() else "")


def _exit(code: int, said: str) -> NoReturn:
    if said:
        print(said, file=sys.stderr, flush=True)
    os._exit(code)


def _peers_on_this_machine() -> list[int]:
    """Process ids of the other ranks that this one can see; none where there is no /proc to look at them."""
    if not (PROC / "self/ns/pid").exists():
        return []
    place = (socket.gethostname(), os.readlink(PROC / "self/ns/pid"))
    return [pid for there, pid in gather((place, os.getpid())) if there == place and pid != os.getpid()]


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked after yet does not."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
