"""A command of a sweep as a Slurm job: submitted once, waited for, and found again by a later start."""

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearn.errors import UserError
from unlearn.files import write_json

POLL = 10.0  # seconds between questions to Slurm
LATE = 60.0  # seconds within which what a job wrote on its node is seen here
SCRIPT = "launch/slurm.sh"
STOPPED = (130, 138, 143)  # exit codes after INT, USR1, TERM
ENDED = {"CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"}


@dataclass(frozen=True)
class Slurm:
    """How the commands of a sweep are submitted.

    Attributes:
        options: of sbatch. ranks: processes a node, None for one a GPU. environment: a name in launch/env.
    """

    options: tuple[str, ...] = ()
    ranks: int | None = None
    environment: str | None = None

    def check(self) -> None:
        """Raise `UserError` where nothing can be submitted."""
        if not Path(SCRIPT).is_file():
            raise UserError(f"expected the repository's folder as working folder for --submit; found {Path.cwd()}")
        if shutil.which("sbatch") is None:
            raise UserError(
                "expected Slurm's sbatch for --submit; found none: leave --submit out, or run on a login node"
            )

    def words(self, command: Sequence[str]) -> list[str]:
        """What follows `sbatch` and our own options, as a user types it."""
        own = [] if self.environment is None else ["--env", self.environment]
        own += [] if self.ranks is None else ["--ranks", str(self.ranks)]
        return [*self.options, SCRIPT, *own, *command]

    def run(self, command: Sequence[str], log: Path) -> int | str:
        """Run a command as a job, or wait for the one that an earlier start submitted; its output is in `log`.

        Returns:
            the command's exit code; Slurm's word where Slurm ended it, e.g. "job 7: TIMEOUT".

        Raises:
            UserError: Slurm refuses the job, or it was told to stop: the next start submits it again.
        """
        job = _known(log)
        if job is None and _exit_code(log) is None:
            job = self._submit(command, log)
        state = None if job is None else _wait(job, log)
        code = 1 if state == "FAILED" and _exit_code(log) is None else _exit_code(log)
        if state == "CANCELLED" or code in STOPPED:
            forget(log)
            raise UserError(
                f"expected job {job} to run to its end; found it told to stop (see {log}): start again to go on"
            )
        return code if code is not None else f"job {job}: {state or 'gone without an exit code'}"

    def _submit(self, command: Sequence[str], log: Path) -> str:
        """Submit a command, and note the job's number; that it is about to be submitted is noted before."""
        words = self.words(command)
        words[words.index(SCRIPT) + 1 :] = ["--exit-code", str(_code_file(log)), *words[words.index(SCRIPT) + 1 :]]
        write_json(_job_file(log), {"job": None})
        result = _call("sbatch", "--parsable", f"--job-name={_name(log)}", f"--output={log}", *words)
        if result.returncode != 0:
            forget(log)
            raise UserError(f"expected Slurm to take the job; found {_last_line(result.stderr)!r}: mend --submit")
        job = result.stdout.strip().partition(";")[0]
        write_json(_job_file(log), {"job": job})
        print(f"  job {job}: {command[0]}", flush=True)
        return job


def submitted(folder: Path) -> list[Path]:
    """Logs of the commands of a trial that an earlier start has submitted."""
    return sorted(file.with_suffix(".log") for file in folder.glob("*.job"))


def check_none_at_work(folder: Path) -> None:
    """Raise where a job may still write to a trial's folder, which is about to be emptied."""
    for log in submitted(folder):
        if _exit_code(log) is None:
            raise UserError(
                f"expected no job at work in {folder}; found one that --submit has begun: go on with --submit, or "
                f"cancel it and remove {_job_file(log).name}"
            )


def forget(log: Path) -> None:
    """Let the next start submit the command anew."""
    for file in (_job_file(log), _code_file(log)):
        file.unlink(missing_ok=True)


def _job_file(log: Path) -> Path:
    return log.with_suffix(".job")


def _code_file(log: Path) -> Path:
    return log.with_suffix(".code")


def _name(log: Path) -> str:
    """The job's name, by which it is found where a start was killed between sbatch and its note of the number."""
    return f"sweep-{hashlib.sha256(str(log.resolve()).encode()).hexdigest()[:16]}"


def _known(log: Path) -> str | None:
    """The number of the job that an earlier start submitted for this command."""
    if not _job_file(log).is_file():
        return None
    job = json.loads(_job_file(log).read_text(encoding="utf-8"))["job"]
    if job is None:  # killed before the number was noted
        names = _call("squeue", "--me", "--noheader", f"--name={_name(log)}", "--format=%A").stdout.split()
        job = names[0] if names else None
    return job


def _wait(job: str, log: Path) -> str | None:
    """Wait for the job's end; its last state in Slurm's word, None if Slurm does not know it any more."""
    late = None
    while True:
        state, code = _state(job), _exit_code(log)
        written = state in (None, "COMPLETED", "FAILED")  # then its exit code is there, or soon seen from here
        if code == 0 or state in ENDED or (written and code is not None):
            return state
        if written:
            late = late or time.monotonic() + LATE
            if time.monotonic() > late:
                return state
        time.sleep(POLL)


def _state(job: str) -> str | None:
    """The job's state; None if Slurm does not know it. A controller that does not answer is asked again later."""
    result = _call("scontrol", "--oneliner", "show", "job", job)
    found = re.search(r"\bJobState=(\w+)", result.stdout)
    if found is not None:
        return found[1]
    return None if "Invalid job id" in result.stderr else "UNKNOWN"


def _exit_code(log: Path) -> int | None:
    """What the job left at its end; None before that."""
    file = _code_file(log)
    return int(file.read_text(encoding="utf-8")) if file.is_file() else None


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1]
