"""Signals in the first seconds of a command, before the run itself listens."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = """
import time
from unlearn.run.signals import EarlyStop
with EarlyStop({folder!r}):
    print("ready", flush=True)
    time.sleep(30)
"""


def told(folder: Path, number: int, **environment: str) -> tuple[int, str]:
    """Exit code and words of a command that a signal meets while it still imports."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(COMMAND.format(folder=str(folder)))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_the_first_seconds_leaves_the_marker(tmp_path: Path, number: int) -> None:
    """It ended the process without a word, and the job was taken for a failed one."""
    code, said = told(tmp_path / "run", number)
    assert code == 128 + number and "nothing to save yet" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["PREEMPTED"]


def test_the_first_seconds_of_a_rank_whose_peer_has_failed(tmp_path: Path) -> None:
    """Torchrun has started two ranks here, and one is left: its SIGTERM is no preemption, USR1 is one."""
    two = {"RANK": "0", "LOCAL_WORLD_SIZE": "1000", "WORLD_SIZE": "1000"}
    assert told(tmp_path / "run", signal.SIGTERM, **two) == (1, "another rank has failed: ending\n")
    assert not (tmp_path / "run").exists()
    assert told(tmp_path / "run", signal.SIGUSR1, **two)[0] == 128 + signal.SIGUSR1
    assert (tmp_path / "run/PREEMPTED").exists()


def test_a_marker_is_left_in_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert told(tmp_path, signal.SIGUSR1)[0] == 128 + signal.SIGUSR1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
