"""Short forms of `make chaos`, each a process of its own: its ranks are forked from one that has done nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest

CHAOS = Path(__file__).parent / "chaos.py"


@pytest.mark.parametrize("cases", ["short", pytest.param("two-nodes", marks=pytest.mark.slow)])
def test_disturbed_runs_end_in_the_same_bits(tmp_path: Path, cases: str) -> None:
    words = [sys.executable, str(CHAOS), "--set", cases, "--folder", str(tmp_path)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
