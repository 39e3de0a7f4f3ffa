"""A sweep's commands as Slurm jobs, with a stand-in for Slurm: submitted once, found again, and every end a result."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unlearn.errors import UserError
from unlearn.launch import jobs, trials
from unlearn.launch.jobs import Slurm
from unlearn.launch.search import Values
from unlearn.launch.sweep_config import Sweep, read_sweep
from unlearn.launch.trials import CommandFailed, Trial, execute, measure, measure_before

ROOT = Path(__file__).parent.parent
VALUES: Values = (("remove-coef", "2"),)

# Each job runs to its end, or as far as the file `hold` lets it, inside sbatch; states and numbers are files.
SBATCH = """#!/usr/bin/env bash
set -uo pipefail
place=$(dirname "$0")
printf '%s\\n' "$*" >>"$place/submitted"
[[ "$*" != *--partition=nowhere* ]] || { echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1; }
job=$(wc -l <"$place/submitted") log=''
while [[ $1 == -* ]]; do
    [[ $1 != --output=* ]] || log=${1#*=}
    [[ $1 != --job-name=* ]] || echo "${1#*=}" >"$place/name-$job"
    shift
done
if [[ -e $place/hold ]]; then
    echo "$*" >"$place/held-$job"
    echo RUNNING >"$place/state-$job"
else
    export SLURM_JOB_ID=$job
    bash "$@" >>"$log" 2>&1 && echo COMPLETED >"$place/state-$job" || echo FAILED >"$place/state-$job"
fi
echo "$job;cluster"
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
place=$(dirname "$0") job=${*: -1}
[[ -e $place/state-$job ]] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }
echo "JobId=$job JobState=$(cat "$place/state-$job") Reason=None"
"""
SQUEUE = """#!/usr/bin/env bash
place=$(dirname "$0")
for word in "$@"; do [[ $word != --name=* ]] || name=${word#*=}; done
for file in "$place"/name-*; do [[ $(cat "$file") != "$name" ]] || echo "${file##*-}"; done
"""


class Killed(BaseException):
    """What stands for a kill at any moment."""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for Slurm, which is first on the path."""
    place = tmp_path / "slurm"
    place.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jobs, "POLL", 0.01)
    monkeypatch.setattr(jobs, "LATE", 0.05)
    return place


def submissions(slurm: Path) -> list[str]:
    return (slurm / "submitted").read_text().splitlines() if (slurm / "submitted").exists() else []


def sweep_of(folder: Path, *flags: str) -> Sweep:
    words = ["--output", str(folder), "--grid", "remove-coef=2,5", "--target", "wmdp_bio<=0.27", "--tasks", "wmdp_bio"]
    return read_sweep([*words, *flags])


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], list[str]]:
    """Writes a program, and gives the command that runs it."""

    def write(text: str) -> list[str]:
        (tmp_path / "program.py").write_text(text)
        return [str(tmp_path / "program.py")]

    return write


def test_a_command_becomes_a_job_of_slurm_sh(slurm: Path, tmp_path: Path, program: Any) -> None:
    sweep = sweep_of(tmp_path / "s", "--submit=--time=2:00:00 --nodes=1", "--ranks", "1")
    log = tmp_path / "train.log"
    execute(sweep, program("import sys; print('ran with', sys.argv[1:])") + ["--x", "a b"], log)
    assert "ran with ['--x', 'a b']" in log.read_text()
    (words,) = submissions(slurm)
    assert f"--output={log} --time=2:00:00 --nodes=1 launch/slurm.sh --exit-code {tmp_path}/train.code" in words
    assert "--ranks 1" in words and json.loads((tmp_path / "train.job").read_text()) == {"job": "1"}
    execute(sweep, program("raise SystemExit(5)"), log)
    assert len(submissions(slurm)) == 1, "what has ended is not run again"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import sys; sys.exit('train.py: error: found NaN or infinity at step 3')", "found NaN or infinity at step 3"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("raise SystemExit(7)", "exit code 7"),
    ],
)
def test_a_job_that_fails_says_why(slurm: Path, tmp_path: Path, program: Any, text: str, reason: str) -> None:
    with pytest.raises(CommandFailed, match=reason):
        execute(sweep_of(tmp_path / "s", "--submit="), program(text), tmp_path / "train.log")


@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"])
def test_a_job_that_slurm_ends_is_a_result(slurm: Path, tmp_path: Path, program: Any, state: str) -> None:
    (slurm / "hold").touch()
    sweep, log = sweep_of(tmp_path / "s", "--submit="), tmp_path / "train.log"
    start_and_kill(sweep, program("1"), log)
    (slurm / "state-1").write_text(state)
    with pytest.raises(CommandFailed, match=f"job 1: {state}"):
        execute(sweep, program("1"), log)


def test_a_job_that_left_nothing_is_a_result(slurm: Path, tmp_path: Path, program: Any) -> None:
    (slurm / "hold").touch()
    sweep, log = sweep_of(tmp_path / "s", "--submit="), tmp_path / "train.log"
    start_and_kill(sweep, program("1"), log)
    (slurm / "state-1").unlink()  # Slurm forgets a job a few minutes after its end
    with pytest.raises(CommandFailed, match="job 1: gone without an exit code"):
        execute(sweep, program("1"), log)


def start_and_kill(sweep: Sweep, words: list[str], log: Path) -> None:
    """Submit, and be killed while the job goes on."""
    with pytest.MonkeyPatch.context() as patch:

        def killed(_seconds: float) -> None:
            raise Killed

        patch.setattr(time, "sleep", killed)
        with pytest.raises(Killed):
            execute(sweep, words, log)


@pytest.mark.parametrize("noted", [True, False])
def test_a_killed_sweep_finds_its_job_again(slurm: Path, tmp_path: Path, program: Any, noted: bool) -> None:
    """Running, and ended in the meantime; also where the kill came before the job's number was written down."""
    (slurm / "hold").touch()
    sweep, log = sweep_of(tmp_path / "s", "--submit="), tmp_path / "train.log"
    words = program("print('ran')")
    start_and_kill(sweep, words, log)
    if not noted:
        (tmp_path / "train.job").write_text('{"job": null}')
    start_and_kill(sweep, words, log)
    assert json.loads((tmp_path / "train.job").read_text()) == {"job": "1" if noted else None}
    (slurm / "state-1").write_text("COMPLETED")
    (tmp_path / "train.code").write_text("0\n")
    execute(sweep, words, log)
    (slurm / "state-1").unlink()
    (slurm / "name-1").unlink()
    execute(sweep, words, log)
    assert len(submissions(slurm)) == 1


@pytest.mark.parametrize("end", ["CANCELLED", "COMPLETED"])
def test_a_job_told_to_stop_is_no_result_and_is_submitted_anew(
    slurm: Path, tmp_path: Path, program: Any, end: str
) -> None:
    (slurm / "hold").touch()
    sweep, log = sweep_of(tmp_path / "s", "--submit="), tmp_path / "train.log"
    words = program("print('ran')")
    start_and_kill(sweep, words, log)
    (slurm / "state-1").write_text(end)
    if end == "COMPLETED":
        (tmp_path / "train.code").write_text("143\n")
    with pytest.raises(UserError, match="job 1 to run to its end; found it told to stop"):
        execute(sweep, words, log)
    (slurm / "hold").unlink()
    execute(sweep, words, log)
    assert len(submissions(slurm)) == 2 and "ran" in log.read_text()


def test_a_controller_that_does_not_answer_is_asked_again(slurm: Path, tmp_path: Path, program: Any) -> None:
    (slurm / "scontrol").rename(slurm / "real")
    text = f"""#!/usr/bin/env bash
[[ -e {slurm}/asked ]] && exec bash {slurm}/real "$@"
touch {slurm}/asked
echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2
exit 1
"""
    (slurm / "scontrol").write_text(text)
    (slurm / "scontrol").chmod(0o755)
    with pytest.raises(CommandFailed, match="exit code 3"):
        execute(sweep_of(tmp_path / "s", "--submit="), program("raise SystemExit(3)"), tmp_path / "train.log")


def test_a_trial_killed_between_its_jobs_goes_on_with_the_next(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the jobs wrote stays where it is, and no job is submitted twice."""
    sweep, done = sweep_of(tmp_path / "s", "--submit="), []
    folder = tmp_path / "s/trials" / Trial(1, VALUES, 0).name
    verdict = {"by_point": "not met", "targets": [{"target": "wmdp_bio<=0.27", "acc": 0.4, "by_interval": "not met"}]}

    def run(command: list[str], log: Path) -> int:
        if len(done) == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed
        if not log.with_suffix(".job").exists():
            log.with_suffix(".job").write_text('{"job": "1"}')
            log.with_suffix(".code").write_text("0")
            done.append(command[0])
        return 0

    monkeypatch.setattr(Slurm, "run", lambda _self, command, log: run(command, log))
    monkeypatch.setattr(trials, "read_training", lambda _folder: {"steps": 3, "losses": {}})
    monkeypatch.setattr(trials, "read_evaluation", lambda _folder: {"accuracies": {}, "verdict": verdict})
    with pytest.raises(Killed):
        measure(sweep, Trial(1, VALUES, 0))
    (folder / "run").mkdir()
    record = measure(sweep, Trial(1, VALUES, 0))
    assert done == ["train.py", "evals/run.py"] and (folder / "run").is_dir()
    assert record["state"] == "push harder" and record["commands"][0].startswith("sbatch launch/slurm.sh train.py")


def test_a_first_evaluation_that_fails_is_submitted_anew(
    slurm: Path, tmp_path: Path, program: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tmp_path / "s", "--submit=")
    sweep.folder.mkdir()
    monkeypatch.setattr(trials, "evaluation_words", lambda *_of: program("raise SystemExit(4)"))
    for count in (1, 2):
        with pytest.raises(UserError, match="expected to evaluate the model before the first trial"):
            measure_before(sweep)
        assert len(submissions(slurm)) == count


def test_without_submit_a_job_at_work_is_not_disturbed(slurm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s/trials" / Trial(1, VALUES, 0).name
    folder.mkdir(parents=True)
    (folder / "train.job").write_text('{"job": "1"}')
    with pytest.raises(UserError, match="go on with --submit"):
        measure(sweep_of(tmp_path / "s"), Trial(1, VALUES, 0))
    assert folder.is_dir()


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--env", "isambard"), "--env has no effect without --submit"),
        (("--submit=--partition=nowhere",), "invalid partition specified: nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(slurm: Path, tmp_path: Path, program: Any, flags: Any, found: str) -> None:
    with pytest.raises(UserError, match=found) as error:
        execute(sweep_of(tmp_path / "s", *flags), program("1"), tmp_path / "train.log")
    assert "\n" not in str(error.value) and not (tmp_path / "train.job").exists()


def test_no_slurm_or_another_folder_is_said_at_once(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(shutil.which("bash") or "").parent / "nowhere"))
    with pytest.raises(UserError, match="expected Slurm's sbatch"):
        sweep_of(tmp_path / "s", "--submit=")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected the repository's folder"):
        sweep_of(tmp_path / "s", "--submit=")


def test_where_trials_run_does_not_make_it_another_sweep(slurm: Path, tmp_path: Path) -> None:
    assert sweep_of(tmp_path / "s").identity() == sweep_of(tmp_path / "s", "--submit=", "--ranks", "4").identity()
