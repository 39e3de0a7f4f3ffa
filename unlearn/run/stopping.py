"""Being told to stop: SIGTERM and SIGUSR1 (Slurm, torchrun) and SIGINT (Ctrl-C).

While steps are taken, the first signal only sets a flag, on which all ranks agree at the end of a step; before and
after, all that can be saved is saved, and the process ends at once.

SIGTERM is also what torchrun, and `srun` on other nodes, send to the ranks that are left when one has failed. A rank
that failed hears nothing: so outside the steps rank 0 takes SIGTERM for an order to stop, and leaves its marker, only
once every rank has heard it.
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
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from unlearn.distributed import barrier, gather, is_main, rank, world_size
from unlearn.run.signals import PROC, EarlyStop, Listener, alive, leave

ECHO = 1.0  # seconds: torchrun forwards what Slurm may have sent to every process already
GRACE = 5.0  # seconds that a rank has to fail by itself, with its own error, after another one has died
HEARD = 10.0  # seconds within which every rank hears a signal that is meant for all of them
POLL = 0.05  # seconds


class StopSignals(Listener):
    """A context in which signals end the run so that it can go on later.

    Who ends a run that was told to stop leaves the file `marker`; `launch/slurm.sh` looks for it.

    Args:
        marker: the file to leave, by rank 0.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, marker: Path):
        super().__init__()
        self._marker, self._deferring = marker, False
        self._told, self._number = 0.0, 0
        self._lost: float | None = None
        self._peers: list[int] = []
        self._store: dist.Store | None = None

    def __enter__(self) -> Any:
        self._peers, self._store = _peers_on_this_machine(), _own_store()
        super().__enter__()
        if EarlyStop.current is not None:
            self.take_over(EarlyStop.current)
        return self

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block a first signal waits until `agreed` is asked; one still waiting at its end ends the run.

        An error in the block is no order to stop, whatever torchrun has sent meanwhile; who goes on after one calls
        `obey`.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.obey()

    def obey(self) -> None:
        """End the run if a signal came that nobody has acted on."""
        if self._number:
            self._stop()

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

    def patience(self) -> float | None:
        """While a signal waits for the end of a step, the other ranks are looked at."""
        return 0.5 if self._number else None

    def idle(self) -> None:
        """End this rank, which may wait for ever, some time after another one has died."""
        if not all(map(alive, self._peers)):
            self._lost = self._lost or time.monotonic()
            if time.monotonic() > self._lost + GRACE:
                leave(1, "another rank has died: ending")

    def heard(self, number: int) -> None:
        """Note a first signal, or end the run; a second one ends it at once."""
        if self._number:
            self._heard_again()
            return
        self._told, self._number = time.monotonic(), number
        if not self._deferring:
            self._stop()
        elif is_main():
            print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)

    def _heard_again(self) -> None:
        if time.monotonic() > self._told + ECHO:
            self._end()

    def _stop(self) -> NoReturn:
        """End this process, which was told to stop; rank 0 leaves the marker, before any other rank has ended."""
        if is_main() and not self._all_heard():
            leave(1, "another rank has failed: ending")
        try:
            if is_main() and (self._number != signal.SIGINT or self._marker.parent.is_dir()):
                self._marker.parent.mkdir(parents=True, exist_ok=True)
                self._marker.touch()
        except OSError as error:
            leave(1, f"stopped, and could not leave {self._marker}: {error.strerror}")
        self._await_marker()
        self._end()

    def _all_heard(self) -> bool:
        """Whether the signal is meant for the run, and not for what a failed rank has left of it.

        Only SIGTERM is sent to those.
        """
        if self._store is None or self._number != signal.SIGTERM:
            return True
        try:
            return self._wait_for([f"heard by {number}" for number in range(1, world_size())])
        except RuntimeError:  # whoever kept the store has ended
            return False

    def _await_marker(self) -> None:
        """On ranks above 0: tell rank 0 that this one has heard the signal, and wait until it has left its marker."""
        if self._store is None:
            return
        if is_main():
            self._store.set("marked", "")
            return
        try:
            self._store.set(f"heard by {rank()}", "")
            self._wait_for(["marked"])
        except RuntimeError:
            pass  # rank 0 kept the store, and has ended

    def _wait_for(self, keys: list[str]) -> bool:
        """Whether `keys` are in the store soon; no other rank of this machine may die meanwhile."""
        assert self._store is not None
        while not self._store.check(keys):
            if time.monotonic() > self._told + HEARD or not all(map(alive, self._peers)):
                return False
            if threading.current_thread() is not self._thread:
                time.sleep(POLL)
            elif select.select([self._read], [], [], POLL)[0] and os.read(self._read, 64) != b"\0":
                self._heard_again()
        return True

    def _end(self) -> NoReturn:
        """End this process now, wherever it is."""
        leave(128 + self._number, "interrupted" if is_main() else "")


def _peers_on_this_machine() -> list[int]:
    """Process ids of the other ranks that this one can see; none where there is no /proc to look at them."""
    if not (PROC / "self/ns/pid").exists():
        return []
    place = (socket.gethostname(), os.readlink(PROC / "self/ns/pid"))
    return [pid for there, pid in gather((place, os.getpid())) if there == place and pid != os.getpid()]


def _own_store() -> dist.Store | None:
    """A connection to the ranks' common store that no collective of the main thread holds; None on a single rank."""
    return dist.distributed_c10d._get_default_store().clone() if world_size() > 1 else None  # type: ignore[attr-defined]
