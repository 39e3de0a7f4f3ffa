"""slurm.sh and chain.sh in a real Slurm of two fake nodes on this machine: `make test-slurm`.

It needs root and Debian's or Ubuntu's Slurm: apt-get install --no-install-recommends slurm-wlm munge. Each test runs
under both ways in which Slurm finds the processes to signal (see fakeslurm.sh).
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
FAKE = Path(__file__).parent / "fakeslurm.sh"
SLURM_SH, CHAIN_SH = "launch/slurm.sh", "launch/chain.sh"
WORKER = "tests/launch/preemptible.py"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif("TEST_SLURM" not in os.environ, reason="starts a Slurm: run `make test-slurm`"),
]


@pytest.fixture(scope="module", params=["linuxproc", "pgid"], autouse=True)
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.fail("expected root and Slurm: apt-get install --no-install-recommends slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    port = 17000 + os.getpid() % 500 * 4
    subprocess.run([FAKE, "up", folder, "2", str(port), request.param], check=True, timeout=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PYTHON", sys.executable)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("SBATCH_TIMELIMIT", "10")
        yield
    subprocess.run([FAKE, "down", folder], check=False, timeout=60)


def text_of(*command: object) -> str:
    words = list(map(str, command))
    result = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    return result.stdout.strip()


def submit(log: Path, *words: object) -> int:
    return int(text_of("sbatch", "--parsable", f"--output={log}", *words))


def shown(job: object, key: str) -> str:
    found = re.search(rf"\b{key}=(\S+)", text_of("scontrol", "--oneliner", "show", "job", job))
    assert found is not None
    return found[1]


def until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def ended(job: object) -> bool:
    return shown(job, "JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def lines(run: Path) -> list[dict[str, object]]:
    file = run / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def undisturbed(steps: int, ranks: int) -> int:
    """The value that preemptible.py ends in."""
    value = 1
    for _ in range(steps):
        value = (value * 31 + ranks * (ranks + 1) // 2) % 1_000_003
    return value


def start(tmp_path: Path, nodes: int, ranks: int, steps: int, *options: str) -> int:
    log = tmp_path / "log.txt"
    job = submit(
        *(log, f"--nodes={nodes}", *options, SLURM_SH, "--ranks", ranks),
        *(WORKER, "--output", tmp_path / "run", "--steps", steps),
    )
    until(lambda: len(lines(tmp_path / "run")) > 3 or ended(job))
    assert not ended(job), log.read_text()
    return job


def goes_on_to_the_end(job: int, run: Path, steps: int, world_size: int) -> None:
    """Wait for the requeue, do not wait its two minutes, and check that nothing shows of the interruption."""
    until(lambda: shown(job, "JobState") == "PENDING" and shown(job, "Restarts") == "1")
    time.sleep(3)  # a node refuses a job that it was told to end within the same second
    text_of("scontrol", "update", f"JobId={job}", "StartTime=now")
    until(lambda: ended(job))
    assert shown(job, "JobState") == "COMPLETED"
    assert [line["step"] for line in lines(run)] == list(range(1, steps + 1))
    assert lines(run)[-1]["value"] == undisturbed(steps, world_size)
    assert lines(run)[-1]["WORLD_SIZE"] == str(world_size)
    assert {line["SLURM_RESTART_COUNT"] for line in lines(run)} == {None, "1"}
    assert not (run / "PREEMPTED").exists()


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), (1, 2), (2, 1)])
def test_a_signalled_run_is_requeued_and_goes_on(tmp_path: Path, nodes: int, ranks: int) -> None:
    job = start(tmp_path, nodes, ranks, 100)
    text_of("scancel", "--signal=USR1", job)
    goes_on_to_the_end(job, tmp_path / "run", 100, nodes * ranks)
    assert "back into the queue" in (tmp_path / "log.txt").read_text()


def test_a_run_out_of_time_is_requeued(tmp_path: Path) -> None:
    """Slurm's own signal before the time limit: it may come up to a minute early, but not before the job listens."""
    job = start(tmp_path, 1, 2, 5000, "--time=2", "--signal=USR1@30")
    until(lambda: shown(job, "Restarts") == "1", 150.0)
    done = len(lines(tmp_path / "run"))
    text_of("scancel", job)
    assert 0 < done < 5000 and (tmp_path / "run/PREEMPTED").exists()


def test_a_preempted_run_is_requeued_and_goes_on(tmp_path: Path) -> None:
    job = start(tmp_path, 2, 1, 100)
    urgent = submit(
        *(tmp_path / "urgent.txt", "--partition=urgent", "--nodes=2", "--exclusive"),
        *("--ntasks-per-node=1", "--wrap", "sleep 2"),
    )
    until(lambda: ended(urgent))
    goes_on_to_the_end(job, tmp_path / "run", 100, 2)


def test_a_cancelled_run_stays_cancelled(tmp_path: Path) -> None:
    job = start(tmp_path, 1, 2, 10_000)
    text_of("scancel", job)
    until(lambda: ended(job) and shown(job, "EndTime") != "Unknown")
    time.sleep(5)
    assert (shown(job, "JobState"), shown(job, "Restarts")) == ("CANCELLED", "0")


def test_a_killed_worker_ends_the_job_on_both_nodes(tmp_path: Path) -> None:
    job = start(tmp_path, 2, 1, 10_000)
    found = text_of("pgrep", "-f", f"python.*{WORKER} --output {tmp_path}").split()
    workers = [pid for pid in map(int, found) if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    started = time.monotonic()
    os.kill(workers[0], signal.SIGKILL)
    until(lambda: ended(job), 30)
    assert time.monotonic() - started < 20
    assert (shown(job, "JobState"), shown(job, "Restarts")) == ("FAILED", "0")


def test_a_stale_marker_does_not_requeue(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/PREEMPTED").touch()
    job = submit(tmp_path / "log.txt", SLURM_SH, "--ranks", 1, "train.py", "--output", tmp_path / "run", "--batch", "x")
    until(lambda: ended(job))
    assert (shown(job, "JobState"), shown(job, "Restarts")) == ("FAILED", "0")


def test_an_array_runs_its_lines_and_one_fails(tmp_path: Path) -> None:
    steps = {"a": "5", "b": "x", "c": "7"}
    grid = tmp_path / "grid.txt"
    grid.write_text("".join(f"{WORKER} --output '{tmp_path}/{run}' --steps {n}\n" for run, n in steps.items()))
    array = submit(tmp_path / "%a.txt", "--array=1-3%2", SLURM_SH, "--ranks", 1, "--list", grid)
    after = submit(
        *(tmp_path / "after-%a.txt", "--array=1-3", f"--dependency=aftercorr:{array}", "--kill-on-invalid-dep=yes"),
        *("--wrap", f"touch {tmp_path}/after-$SLURM_ARRAY_TASK_ID"),
    )
    until(lambda: all(ended(f"{job}_{index}") for job in (array, after) for index in (1, 2, 3)))
    assert [shown(f"{array}_{index}", "JobState") for index in (1, 2, 3)] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [shown(f"{after}_{index}", "JobState") for index in (1, 2, 3)] == ["COMPLETED", "CANCELLED", "COMPLETED"]
    assert [len(lines(tmp_path / run)) for run in steps] == [5, 0, 7]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded world and a lens of it."""
    folder = tmp_path_factory.mktemp("world")
    node = ["launch/node.sh", "--ranks", "1", "-m", "unlearn"]
    subprocess.run([*node, "world", "--output", folder / "world"], cwd=ROOT, check=True, timeout=120)
    fit = ["--lr", "3e-3", "--seq-len", "96", "--steps", "4", "--micro-batch", "32", "--dtype", "fp32"]
    subprocess.run(
        [*node, "fit-lens", *model(folder), *fit, "--output", folder / "lens"], cwd=ROOT, check=True, timeout=300
    )
    return folder


def model(folder: Path) -> list[str]:
    corpora = [f"--{name}={folder}/world/corpora/{name}.jsonl" for name in ("forget", "retain")]
    return [f"--model={folder}/world/model", *corpora]


def training(folder: Path, run: Path) -> list[str]:
    flags = "--lora-rank 16 --layers 1 2 3 --seq-len 96 --batch 16 --micro-batch 8 --examples 48 --dtype fp32"
    return ["train.py", *model(folder), f"--lens={folder}/lens", *flags.split(), f"--output={run}"]


def test_one_node_and_two_train_the_same_model(tmp_path: Path, world: Path) -> None:
    """Two ranks on one node, and one rank on each of two, leave the same bits."""
    jobs = [
        submit(
            *(tmp_path / f"{nodes}.txt", f"--nodes={nodes}", SLURM_SH, "--ranks", ranks),
            *training(world, tmp_path / f"run-{nodes}"),
        )
        for nodes, ranks in ((1, 2), (2, 1))
    ]
    until(lambda: all(ended(job) for job in jobs), 240)
    assert [shown(job, "JobState") for job in jobs] == ["COMPLETED"] * 2, (tmp_path / "2.txt").read_text()
    one, two = (load_file(tmp_path / f"run-{nodes}/adapter/adapter_model.safetensors") for nodes in (1, 2))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_train_py_is_requeued_and_ends_in_the_same_bits(tmp_path: Path, world: Path) -> None:
    """The real run, told by USR1 on two nodes in the middle of its steps, against an undisturbed one."""
    longer = ["--examples", "640", "--save-every", "0"]
    runs = [tmp_path / "whole", tmp_path / "stopped"]
    whole, stopped = (
        submit(*(tmp_path / f"{run.name}.txt", "--nodes=2", SLURM_SH, "--ranks", 1), *training(world, run), *longer)
        for run in runs
    )
    until(lambda: ended(whole), 300)
    log = runs[1] / "metrics.jsonl"
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 3, 300)
    text_of("scancel", "--signal=USR1", stopped)
    until(lambda: shown(stopped, "JobState") == "PENDING" and shown(stopped, "Restarts") == "1")
    assert (runs[1] / "PREEMPTED").exists()
    time.sleep(3)
    text_of("scontrol", "update", f"JobId={stopped}", "StartTime=now")
    until(lambda: ended(stopped), 300)
    assert [shown(job, "JobState") for job in (whole, stopped)] == ["COMPLETED"] * 2
    assert not (runs[1] / "PREEMPTED").exists()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(40))
    one, two = ((run / "model/model.safetensors").read_bytes() for run in runs)
    assert one == two


@pytest.mark.parametrize("fails", [False, True], ids=["whole", "middle-fails"])
def test_a_chain_ends_in_a_report(tmp_path: Path, world: Path, fails: bool) -> None:
    data = f"--data-dir {world}/world/data --limit 8 --dtype fp32"
    attack = (
        f"--forget {world}/world/corpora/attack.jsonl --examples 16 --seq-len 96 --micro-batch 16 "
        f"--eval-tasks wmdp_bio --data-dir {world}/world/data --limit 8 --dtype fp32"
    )
    tasks = "no_such_task" if fails else "wmdp_bio"
    options = f"--sbatch=--output={tmp_path}/%x.txt"
    output = text_of(
        *(CHAIN_SH, *options.split("=", 1), "--ranks", 1, "--evaluate", f"--tasks {tasks} {data}"),
        *("--attack", attack, *training(world, tmp_path / "run")),
    )
    jobs = dict(line.split(": job ") for line in output.splitlines())
    until(lambda: all(ended(job) for job in jobs.values()), 300)
    states = {name: shown(job, "JobState") for name, job in jobs.items()}
    evaluated = "FAILED" if fails else "COMPLETED"
    assert states == {
        "original": evaluated,
        "train": "COMPLETED",
        "after": evaluated,
        "attack": "CANCELLED" if fails else "COMPLETED",
        "report": "COMPLETED",
    }
    page = (tmp_path / "run/report.html").read_text()
    assert ("not evaluated" in page) == fails


def test_a_killed_sweep_finds_its_jobs_again(tmp_path: Path, world: Path) -> None:
    """Killed twice, while a job waits or runs: each command is one job, and each trial a result, a failed one too."""
    flags = "--lora-rank 16 --seq-len 96 --batch 16 --micro-batch 8 --examples 48 --dtype fp32".split()
    command = [sys.executable, "launch/sweep.py", "--output", str(tmp_path / "s"), "--grid", "layers=2,9"]
    command += ["--submit=--nodes=1", "--ranks", "1", "--tasks", "wmdp_bio", "--target", "wmdp_bio<=0.0"]
    command += ["--data-dir", str(world / "world/data"), "--", *model(world), f"--lens={world}/lens", *flags]
    for seconds in (6.0, 20.0):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    assert "The target is not met: all points are tried, 2 trials." in result.stdout
    measured, failed = (json.loads(line) for line in (tmp_path / "s/trials.jsonl").read_text().splitlines())
    assert measured["state"] in ("push harder", "gentler") and measured["steps"] == 3
    assert failed["state"] == "failed" and "expected --layers in 0..4" in failed["reason"]
    notes = list((tmp_path / "s").rglob("*.job"))
    assert sorted(note.stem for note in notes) == ["all", "all", "train", "train"]
    numbers = {json.loads(note.read_text())["job"] for note in notes}
    listed = text_of("squeue", "--noheader", "--states=all", "--format=%A %j").splitlines()
    assert {line.split()[0] for line in listed if " sweep-" in line} == numbers and len(numbers) == 4
