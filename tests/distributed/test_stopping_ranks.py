"""An order to stop and the failure of another rank: both come as SIGTERM, and only one of them is a preemption."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from harness import run_ranks

from unlearn.distributed import barrier, rank
from unlearn.run import stopping
from unlearn.run.signals import alive
from unlearn.run.stopping import StopSignals

FAR_AWAY = 100.0  # seconds: nobody waits for their end


def busy() -> None:
    """Read weights, or wait in NCCL, which does not notice that a peer is gone."""
    time.sleep(FAR_AWAY)


def failure(folder: Path, seen: bool) -> None:
    """Rank 1 fails while rank 0 is busy, and torchrun tells the others to end.

    Args:
        seen: whether rank 0 sees the processes of the others, as on one node.
    """
    stopping.HEARD = 0.5
    if not seen:
        stopping._peers_on_this_machine = lambda: []
    pids = stopping._peers_on_this_machine() if seen else []
    with StopSignals(folder / "PREEMPTED"):
        barrier()
        if rank() == 1:
            os._exit(1)
        while any(map(alive, pids)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        busy()
    (folder / "went on").touch()


@pytest.mark.parametrize("seen", [True, False], ids=["one-node", "another-node"])
def test_a_failed_rank_is_no_preemption(tmp_path: Path, seen: bool) -> None:
    """SIGTERM outside the steps always left the marker, so that Slurm put a job that fails back into the queue."""
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] died without a word"):
        run_ranks(2, failure, tmp_path, seen)
    assert [path.name for path in tmp_path.iterdir()] == []


def preemption(folder: Path) -> None:
    """Every rank is told, one after the other."""
    with StopSignals(folder / "PREEMPTED"):
        barrier()
        time.sleep(0.2 * rank())
        os.kill(os.getpid(), signal.SIGTERM)
        busy()
    (folder / "went on").touch()


def test_an_order_to_all_ranks_leaves_the_marker(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="died without a word"):
        run_ranks(3, preemption, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["PREEMPTED"]


def error_in_a_step(folder: Path) -> str:
    """Torchrun's SIGTERM arrives while this rank fails because another one has died."""
    try:
        with StopSignals(folder / "PREEMPTED") as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop._number:
                time.sleep(0.01)
            raise ConnectionError("closed by peer")
    except ConnectionError as error:
        return str(error)


def test_an_error_while_steps_are_taken_is_no_order_to_stop(tmp_path: Path) -> None:
    """The signal that follows another rank's failure turned the error of this rank into a preemption."""
    assert run_ranks(1, error_in_a_step, tmp_path) == ["closed by peer"]
    assert list(tmp_path.iterdir()) == []


def second_signal(folder: Path) -> None:
    """Rank 1 never hears; rank 0 is told again while it waits for it."""
    stopping.HEARD = 50.0
    with StopSignals(folder / "PREEMPTED") as stop:
        barrier()
        if rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(1.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(60.0)
        while all(map(alive, stop._peers)):
            time.sleep(0.01)
    (folder / "outlived").touch()


def test_a_second_signal_ends_a_rank_that_waits_for_the_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[0\] died without a word"):
        run_ranks(2, second_signal, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["outlived"]
