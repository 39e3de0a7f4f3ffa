"""One trial of a sweep: train, evaluate, read what they wrote; every command in a process group of its own."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from unlearn.errors import UserError
from unlearn.files import writing
from unlearn.launch import jobs
from unlearn.launch.jobs import Slurm
from unlearn.launch.search import Values, classify
from unlearn.launch.sweep_config import Sweep
from unlearn.run.command_line import runnable

MARK = "UNLEARN_TRIAL"  # in the environment of a trial's processes: by it a later start finds those a kill has left
SETTINGS = ("batch", "examples", "epochs", "remove_coef", "retain_coef", "adam_lr", "muon_lr")
NUMBERS = ("acc", "interval", "questions", "debiased", "debiased_interval", "predicted", "letter_check")
STOPPED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Record = dict[str, Any]


class Where(Protocol):
    """Flags that say where commands run: on so many ranks here, or as Slurm jobs."""

    @property
    def ranks(self) -> int | None: ...
    @property
    def slurm(self) -> Slurm | None: ...


class Commands(Protocol):
    """What has commands to run: a sweep, a comparison."""

    @property
    def config(self) -> Where: ...


class CommandFailed(Exception):
    """A command of a trial ended with an error; the message is its reason."""


@dataclass(frozen=True)
class Trial:
    """The `number`th trial of a sweep, from 1."""

    number: int
    values: Values
    seed: int

    @property
    def name(self) -> str:
        """A folder's name: the number makes it unique, the values are for people."""
        parts = [f"{flag}{value}" for flag, value in (*self.values, ("seed", self.seed))]
        return f"{self.number:03d}-" + re.sub(r"[^\w.+-]", "_", "-".join(parts))[:120]


def measure(sweep: Sweep, trial: Trial) -> Record:
    """Run one trial from its beginning; what an earlier start left of it is ended and removed.

    Returns:
        {"trial", "number", "values", "seed", "settings": of train.py, "commands", "seconds", "state"}, and for a trial
        that failed "reason" and no measured number; else "steps", "losses" (of the last step), "questions": "all" or
        "subsample", "accuracies": {task: its summary's numbers}, "verdict", and "inputs": digests of what it read.
    """
    folder = sweep.folder / "trials" / trial.name
    if sweep.config.slurm is None or not jobs.submitted(folder):
        clear(folder)
    started, config = time.monotonic(), sweep.settings(trial.values, trial.seed)
    train = ["train.py", *sweep.train_words(trial.values, trial.seed), "--output", str(folder / "run")]
    looks = (["subsample"] if sweep.config.subsample else []) + ["all"]
    commands = [command_line(sweep, train)]
    try:
        execute(sweep, train, folder / "train.log")
        found = read_training(folder / "run")
        for look in looks:
            evaluation = evaluation_words(sweep, folder / "run" / "model", folder / look, subsample=look != "all")
            commands.append(command_line(sweep, evaluation))
            execute(sweep, evaluation, folder / f"{look}.log")
            measured = read_evaluation(folder / look)
            inputs = found.get("inputs", {}) | measured.pop("inputs", {})
            found |= measured | {"questions": look, "inputs": inputs}
            if any(one["by_interval"] == "not met" for one in found["verdict"]["targets"]):
                break  # no number of further questions will change that
        found["state"] = classify(found["verdict"])
    except CommandFailed as failure:
        found = {"state": "failed", "reason": str(failure)}
    return {
        "trial": trial.name,
        "number": trial.number,
        "values": dict(trial.values),
        "seed": trial.seed,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "commands": commands,
        "seconds": round(time.monotonic() - started, 1),
    } | found


def measure_before(sweep: Sweep) -> dict[str, Any]:
    """Accuracies of the model before any trial: a wrong model, task or data folder shows here, and costs no training.

    Raises:
        UserError: the evaluation failed, or a task has no accuracy.
    """
    folder = sweep.folder / "before"
    if not list(folder.rglob("results_*.json")):
        if sweep.config.slurm is None or not jobs.submitted(folder):
            clear(folder)
        config = sweep.settings(sweep.space.points()[0], sweep.config.seed)
        words = evaluation_words(sweep, Path(config.model), folder)
        words += [] if config.revision is None else ["--revision", config.revision]
        try:
            execute(sweep, words, folder / "all.log")
        except CommandFailed as failure:
            jobs.forget(folder / "all.log")
            raise UserError(f"expected to evaluate the model before the first trial; found {str(failure)!r}") from None
    accuracies: dict[str, Any] = read_evaluation(folder)["accuracies"]
    missing = [task for task in sweep.config.tasks if task not in accuracies]
    if missing:
        raise UserError(
            f"expected --tasks with an accuracy of their own; found {missing[0]!r} with none: these results have "
            f"{', '.join(list(accuracies)[:6])}"
        )
    return accuracies


def evaluation_words(sweep: Sweep, model: Path, out: Path, subsample: bool = False) -> list[str]:
    """The command that evaluates `model`, in the dtype and on the device of the training."""
    config = sweep.config
    training = sweep.settings(sweep.space.points()[0], config.seed)
    words = ["evals/run.py", "--model", str(model), "--tasks", *config.tasks, "--dtype", training.dtype]
    words += ["--out", str(out)] + ([] if training.device is None else ["--device", training.device])
    for target in config.target:
        words += ["--target", target]
    for flag, value in (("--data-dir", config.data_dir), ("--include-path", config.include_path)):
        words += [] if value is None else [flag, str(value)]
    return words + (["--subsample", str(config.subsample)] if subsample else [])


def command_line(sweep: Commands, words: Sequence[str]) -> str:
    """The command as a user types it, from the repository's folder."""
    ranks, slurm = sweep.config.ranks or 1, sweep.config.slurm
    if slurm is not None:
        return shlex.join(["sbatch", *slurm.words(words)])
    start = ["python"] if ranks == 1 else ["torchrun", "--standalone", "--nproc_per_node", str(ranks)]
    return shlex.join([*start, *words])


def execute(sweep: Commands, words: Sequence[str], log: Path) -> None:
    """Run one command, here or as a Slurm job, its output in `log`.

    Raises:
        CommandFailed: it ended with an error. UserError: it was told to stop.
    """
    slurm = sweep.config.slurm
    if slurm is None:
        return run(words, sweep.config.ranks or 1, log)
    ended = slurm.run(words, log)
    if isinstance(ended, str):
        raise CommandFailed(ended)
    if ended != 0:
        raise CommandFailed(_reason(log.read_text(encoding="utf-8", errors="replace"), ended))


def run(words: Sequence[str], ranks: int, log: Path) -> None:
    """Run one command, in this Python or under torchrun, its output in `log`.

    Raises:
        CommandFailed: it ended with an error, which the message repeats.
        UserError: it was told to stop, as this process then is too.
    """
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {MARK: str(log.parent.resolve())}
    with writing(log), log.open("wb") as stream:
        process = subprocess.Popen(
            [*start, *runnable(words)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    try:
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code != 0 and _told_to_stop(log.parent, code):
        raise UserError(f"expected a trial to run to its end; found it told to stop (see {log}): start again to go on")
    if code != 0:
        raise CommandFailed(_reason(log.read_text(encoding="utf-8", errors="replace"), code))


def _told_to_stop(folder: Path, code: int) -> bool:
    """Whether a command ended because it was told to; under torchrun only the run's marker says so."""
    from unlearn.run.folder import MARKER  # imports torch

    return (folder / "run" / MARKER).exists() or code in [sign for n in STOPPED for sign in (-n, 128 + n)]


def _reason(text: str, code: int) -> str:
    """The error in a command's output: its own sentence, else the last line of a traceback, else the exit code."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    sentences = [line.partition(": error: ")[2] for line in lines if re.search(r"(\.(py|sh)|-m [\w.]+): error: ", line)]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    if sentences or errors:
        return (sentences or errors[-1:])[0]
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def clear(folder: Path) -> None:
    """Make `folder` empty, after ending what still writes to it."""
    jobs.check_none_at_work(folder)
    end_leftovers(folder)
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def end_leftovers(folder: Path) -> None:
    """End the processes of this trial that outlived a killed sweep (where /proc shows them)."""
    mark = f"{MARK}={folder.resolve()}".encode()
    deadline = time.monotonic() + 30.0
    while left := [pid for pid, environment in _environments() if mark in environment]:
        if time.monotonic() > deadline:
            raise UserError(f"expected the processes of an earlier start to end; found {left} alive: end them")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def stop_within(folder: Path) -> None:
    """Tell the processes of all trials inside `folder` to stop (where /proc shows them)."""
    mark = f"{MARK}={folder.resolve()}/".encode()
    for pid, environment in _environments():
        if any(word.startswith(mark) for word in environment):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _environments() -> list[tuple[int, list[bytes]]]:
    """Process ids and environments of the processes that this user may look into."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found.append((int(path.parent.name), path.read_bytes().split(b"\0")))
    return found


def read_training(run_folder: Path) -> Record:
    """Steps and final losses from a run's metrics.jsonl, and digests of what it read."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    losses = {name: last[name] for name in ("forget_loss", "retain_loss") if name in last}
    identity = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))["identity"]
    return {"steps": last["step"] + 1, "losses": losses, "inputs": identity}


def read_evaluation(folder: Path) -> Record:
    """Accuracies and verdict from what evals/run.py wrote, and digests of the question files."""
    (file,) = folder.rglob("results_*.json")
    own = json.loads(file.read_text(encoding="utf-8"))["unlearn"]
    accuracies = {
        task: {name: numbers[name] for name in NUMBERS if name in numbers} for task, numbers in own["summary"].items()
    }
    files = {f"questions of {task}": json.dumps(digests) for task, digests in own["data"].items()}
    return {"accuracies": accuracies, "verdict": own["verdict"], "inputs": files}


def read_before(sweep: Sweep) -> dict[str, str]:
    """Digests of the model that the trials start from, and of the question files, as `measure_before` found them."""
    found: dict[str, str] = {}
    for file in (sweep.folder / "before").rglob("results_*.json"):
        own = json.loads(file.read_text(encoding="utf-8"))["unlearn"]
        found |= {"model": own["model_sha256"]} if "model_sha256" in own else {}
        found |= read_evaluation(sweep.folder / "before")["inputs"]
    return found
