"""What slurm.sh puts back into the queue, and what it does not, with stand-ins for Slurm's own commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STANDINS = {
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "scontrol": '#!/bin/bash\necho "scontrol $*"\n',
}


def job(folder: Path, body: str, *options: str, attempt: int = 0) -> tuple[int, str]:
    """Exit code and output of a job whose command does `body`; `run` is the folder that it gives as --output."""
    for name, text in STANDINS.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = folder / "command.py"
    script.write_text(f"import os, pathlib, sys\nrun = pathlib.Path({str(folder / 'run')!r})\n{body}\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "CUDA"))}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_RESTART_COUNT": str(attempt)}
    words = ["launch/slurm.sh", "--ranks", "1", *options, str(script), "--output", str(folder / "run")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


SAVED = "run.mkdir(exist_ok=True); (run / 'PREEMPTED').touch(); sys.exit(1)"


@pytest.mark.parametrize(
    "body", [SAVED, "os.kill(os.getpid(), 10)", "os.kill(os.getpid(), 15)"], ids=["saved", "USR1-early", "TERM-early"]
)
def test_what_was_told_to_stop_goes_back(tmp_path: Path, body: str) -> None:
    """A signal that came before a handler was there made the job fail."""
    code, said = job(tmp_path, body)
    assert code == 0 and "scontrol requeue 7" in said


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sys.exit(2)", 2),
        ("raise AssertionError('a bug')", 1),
        ("os.kill(os.getpid(), 9)", 137),
        (SAVED.replace("sys.exit(1)", "sys.exit(0)"), 0),
    ],
    ids=["mistake", "bug", "killed", "finished"],
)
def test_what_has_ended_does_not(tmp_path: Path, body: str, expected: int) -> None:
    """The exit code was not looked at where there was a marker."""
    code, said = job(tmp_path, body)
    assert code == expected and "requeue" not in said


def test_no_job_goes_back_for_ever(tmp_path: Path) -> None:
    """Nothing bounded how often, so that a job that never gets anywhere held its nodes until somebody saw it."""
    assert job(tmp_path, SAVED, attempt=19)[0] == 0
    code, said = job(tmp_path, SAVED, "--exit-code", str(tmp_path / "code"), attempt=20)
    assert code == 1 and "scontrol" not in said and "slurm.sh: error: expected job 7 to end within 20 requeues" in said
    assert (tmp_path / "code").read_text() == "1\n"
    assert job(tmp_path, SAVED, "--requeues", "30", attempt=20)[0] == 0
    assert job(tmp_path, SAVED, "--requeues", "0")[0] == 1
