"""The sweep: what it refuses, that a kill changes nothing, that a collapse ends nothing, and one real run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evals_support import question, write_wmdp

from unlearn.errors import UserError
from unlearn.evals.judge.targets import parse_target
from unlearn.evals.judge.verdict import judge
from unlearn.launch.search import classify
from unlearn.launch.sweep import read_records, run_sweep
from unlearn.launch.sweep_config import Sweep, read_sweep
from unlearn.launch.sweep_table import best, draw_frontier
from unlearn.launch.trials import MARK, CommandFailed, Record, Trial, clear, run

ROOT = Path(__file__).parent.parent
TARGETS = ["--target", "wmdp_bio<=0.27", "--target", "mmlu_stem>=0.34"]
GRID = "--grid remove-coef=2,5,20 retain-coef=1,10".split()


def numbers(acc: float, check: str = "chance") -> dict[str, Any]:
    return {
        "acc": acc,
        "interval": [acc - 0.02, acc + 0.02],
        "questions": 1000,
        "letters": list("ABCD"),
        "predicted": [0.25] * 4,
        "debiased": acc,
        "debiased_interval": [acc - 0.02, acc + 0.02],
        "letter_check": check,
        "p_more": 0.5,
        "p_fewer": 0.5,
        "independent": 0.25,
    }


def simulated(sweep: Sweep, trial: Trial, collapse: bool = False) -> Record:
    """A trial on a made-up model: pushed hard it loses the hazard, harder everything; retaining parts the two."""
    values = dict(trial.values)
    push, retain = float(values["remove-coef"]), float(values.get("retain-coef", 10))
    hazard, general = (0.25 if push > 4 else 0.43), (0.37 if push < 2 * retain else 0.26)
    record = {
        "trial": trial.name,
        "number": trial.number,
        "values": values,
        "seed": trial.seed,
        "settings": dict.fromkeys(("batch", "examples", "remove_coef", "retain_coef", "adam_lr", "muon_lr"), 1.0),
        "commands": [f"python train.py --output {trial.name}"],
        "seconds": 1.0,
    }
    if push > 15 and retain < 5:
        return record | {"state": "failed", "reason": "found NaN at step 3"}
    summary = {"wmdp_bio": numbers(hazard, "collapse" if collapse else "chance"), "mmlu_stem": numbers(general)}
    verdict = judge(summary, map(parse_target, sweep.config.target))
    (sweep.folder / "trials" / trial.name / "run" / "model").mkdir(parents=True)
    measured = {"steps": 3, "losses": {"forget_loss": 1.0, "retain_loss": 0.1}, "questions": "all"}
    return record | measured | {"accuracies": summary, "verdict": verdict, "state": classify(verdict)}


def before(sweep: Sweep) -> dict[str, Any]:
    return {"wmdp_bio": numbers(0.43), "mmlu_stem": numbers(0.37)}


def test_a_trial_of_another_model_is_left_out(tmp_path: Path) -> None:
    """The files behind the flags were replaced between two starts."""
    digests = iter(["one", "one", "another"])

    def trial(sweep: Sweep, trial: Trial) -> Record:
        return simulated(sweep, trial) | {"inputs": {"model": next(digests), "questions of wmdp_bio": "same"}}

    with pytest.raises(UserError, match="expected the model that this sweep began with; found that trial 003-"):
        run_sweep(sweep_of(tmp_path / "s"), trial, before)
    assert len(read_records(tmp_path / "s" / "trials.jsonl")) == 2


def sweep_of(folder: Path, *flags: str, grid: list[str] = GRID, train: tuple[str, ...] = ()) -> Sweep:
    return read_sweep(["--output", str(folder), *grid, *TARGETS, *flags, "--", *train])


def results(folder: Path) -> tuple[str, str, str]:
    return tuple((folder / name).read_text() for name in ("table.md", "best.json", "trials.jsonl"))  # type: ignore


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--grid nope=1", "found 'nope'"),
        ("--grid output=a,b", "the sweep sets that one itself"),
        ("--grid muon-lr=1e-3", "--muon-lr has no effect without --optimizer muon"),
        ("--grid lora-dropout=0.1", "--lora-dropout has no effect without --lora-rank"),
        ("--grid remove-coef=2,x", "found 'x'"),
        ("--grid remove-coef=2,-1", "--remove-coef -1 refused"),
        ("--grid remove-coef=2,2", "repeating one"),
        ("--grid remove-coef", "expected --grid as FLAG=VALUE,VALUE"),
        ("--grid remove-coef=2,3 --tasks mmlu_stem", "found 'wmdp_bio'"),
        ("--grid remove-coef=2,3 --trials 0", "expected --trials above 0"),
        ("--grid remove-coef=2,3 --search boundary", "one with >="),
        ("--grid remove-coef=2,3 --search boundary --all-points --target mmlu_stem>=0.3", "--all-points has no effect"),
        ("--grid retain-coef=2,3 --search boundary --target mmlu_stem>=0.3", "expected two values of remove-coef"),
        ("--grid remove-coef=0,3 --search boundary --target mmlu_stem>=0.3", "above 0"),
        ("--grid remove-coef=2,3 -- --remove_coef 3", "set by --grid too"),
        ("--grid remove-coef=2,3 -- --seed=3", "set by the sweep itself too"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, flags: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        read_sweep(["--output", str(tmp_path / "new"), "--target", "wmdp_bio<=0.25", *flags.split()])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_another_sweeps_folder_is_refused_by_the_difference(tmp_path: Path) -> None:
    run_sweep(sweep_of(tmp_path / "s"), simulated, before)
    changes = {
        "--seeds 3, as in": sweep_of(tmp_path / "s", "--seeds", "2"),
        "--grid remove-coef=2,5,20 retain-coef=1,10, as in": sweep_of(tmp_path / "s", grid=["--grid", "remove-coef=2"]),
        "train.py flags nothing, as in": sweep_of(tmp_path / "s", train=("--batch", "8")),
    }
    for words, sweep in changes.items():
        with pytest.raises(UserError, match="choose another --output") as error:
            run_sweep(sweep, simulated, before)
        assert words in str(error.value)
    run_sweep(sweep_of(tmp_path / "s", "--trials", "99", "--hours", "5"), simulated, before)  # a budget may change
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").touch()
    with pytest.raises(UserError, match="found other files"):
        run_sweep(sweep_of(tmp_path / "thesis"), simulated, before)


class Killed(BaseException):
    """What stands for a kill at any moment."""


@pytest.mark.parametrize("search", ["grid", "boundary"])
@pytest.mark.parametrize("chance", [0.2, 0.6])
def test_killed_at_random_moments_it_ends_with_the_same_table(tmp_path: Path, search: str, chance: float) -> None:
    rng, measured = random.Random(7), []

    def dying(sweep: Sweep, trial: Trial) -> Record:
        if rng.random() < chance:  # inside a trial: what it has written so far stays behind
            (sweep.folder / "trials" / trial.name / "run").mkdir(parents=True, exist_ok=True)
            raise Killed
        clear(sweep.folder / "trials" / trial.name)
        record = simulated(sweep, trial)
        measured.append(trial.name)
        return record

    place = tmp_path / "s"
    sweep = sweep_of(place, "--search", search)
    whole = run_sweep(sweep, simulated, before)
    expected = results(place)
    shutil.rmtree(place)
    kills = 0
    while True:
        try:
            assert run_sweep(sweep, dying, before) == whole
            break
        except Killed:
            kills += 1
            if rng.random() < 0.5 and measured:  # in the middle of writing the next line
                with (place / "trials.jsonl").open("a") as stream:
                    stream.write('{"trial": "00')
    assert kills > 0 and len(measured) == len(set(measured))
    assert results(place) == expected


def test_table_best_and_picture(tmp_path: Path) -> None:
    outcome = run_sweep(sweep_of(tmp_path, "--all-points", grid=[*GRID, "weight-decay=0.01"]), simulated, before)
    table, chosen, _ = results(tmp_path)
    records = read_records(tmp_path / "trials.jsonl")
    assert "target is met" in outcome and outcome in table
    assert len(records) == 6 + 2 and len({record["number"] for record in records}) == 8
    found = json.loads(chosen)["best"]
    assert [one["state"] for one in json.loads(chosen)["seeds"]] == ["met"] * 3 and found["seed"] == 0
    assert "seed 1: met; seed 2: met" in table
    assert found["state"] == "met" and found["values"]["remove-coef"] == "5" and found["values"]["retain-coef"] == "10"
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 + 8 and all(row.count("|") == rows[0].count("|") for row in rows)
    for title in ("steps", "remove coef", "forget loss", "WMDP-Bio, % [95 %]", "MMLU-STEM, % [95 %]", "weight-decay"):
        assert title in rows[0]
    assert "43.00 [41.0, 45.0]" in rows[2] and "before" in rows[2]
    (failed,) = [row for row in rows if "failed: found NaN at step 3" in row]
    assert "25.00" not in failed and failed.count("—") >= 4  # a reason, and no measured number
    assert all(record["commands"][0] in table for record in records)
    kept = [path.parent.parent.name for path in tmp_path.glob("trials/*/run/model")]
    assert kept == [found["trial"]]
    pytest.importorskip("matplotlib")
    sweep = sweep_of(tmp_path)
    assert draw_frontier(sweep, records, before(sweep), tmp_path / "again.png")
    assert (tmp_path / "frontier.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.parametrize("search", ["grid", "boundary"])
def test_collapse_never_ends_a_sweep(tmp_path: Path, search: str) -> None:
    sweep = sweep_of(tmp_path, "--search", search)
    outcome = run_sweep(sweep, lambda sweep, trial: simulated(sweep, trial, collapse=True), before)
    records = read_records(tmp_path / "trials.jsonl")
    low = [one for one in records if "verdict" in one and one["verdict"]["by_point"] == "met only by collapse"]
    assert low and "The target is not met" in outcome
    assert not any(record["state"] == "met" for record in records)
    best_found = best(records, sweep.config.targets())
    assert best_found is not None and best_found not in low


def test_budget_ends_a_sweep_and_is_named(tmp_path: Path) -> None:
    assert "budget of 2 trials" in run_sweep(sweep_of(tmp_path / "a", "--trials", "2"), simulated, before)
    assert len(read_records(tmp_path / "a" / "trials.jsonl")) == 2
    assert "met, with 3 of 3 seeds" in run_sweep(sweep_of(tmp_path / "a"), simulated, before)
    assert "budget of 0.0005 hours" in run_sweep(sweep_of(tmp_path / "b", "--hours", "0.0005"), simulated, before)
    assert len(read_records(tmp_path / "b" / "trials.jsonl")) == 2


def test_a_seed_that_misses_takes_the_win_back(tmp_path: Path) -> None:
    def lucky(sweep: Sweep, trial: Trial) -> Record:
        record = simulated(sweep, trial)
        return record if record["state"] != "met" or trial.seed == 0 else record | {"state": "push harder"}

    outcome = run_sweep(sweep_of(tmp_path), lucky, before)
    assert "not met: all points are tried" in outcome
    assert "seed 1: not met" in (tmp_path / "table.md").read_text()
    assert [record["seed"] for record in read_records(tmp_path / "trials.jsonl")].count(1) == 1


def test_failures_alike_from_the_start_are_a_mistake(tmp_path: Path) -> None:
    def failing(sweep: Sweep, trial: Trial) -> Record:
        return {
            key: value for key, value in simulated(sweep, trial).items() if key not in ("verdict", "accuracies")
        } | {
            "state": "failed",
            "reason": "no such corpus",
        }

    with pytest.raises(UserError, match="no such corpus"):
        run_sweep(sweep_of(tmp_path), failing, before)
    assert len(read_records(tmp_path / "trials.jsonl")) == 3


def test_a_damaged_line_and_a_second_start_are_refused(tmp_path: Path) -> None:
    def nested(sweep: Sweep, trial: Trial) -> Record:
        run_sweep(sweep, simulated, before)
        raise AssertionError

    with pytest.raises(UserError, match="expected no sweep at work"):
        run_sweep(sweep_of(tmp_path), nested, before)
    (tmp_path / "trials.jsonl").write_text('{"trial"\n{}\n')
    with pytest.raises(UserError, match="damaged"):
        run_sweep(sweep_of(tmp_path), simulated, before)


def test_what_a_killed_sweep_left_running_is_ended(tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    folder.mkdir()
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    left, other = (
        subprocess.Popen(words, env=os.environ | {MARK: str(place)}) for place in (folder, tmp_path / "trial2")
    )
    try:
        time.sleep(0.3)
        clear(folder)
        assert left.wait(timeout=10) == -signal.SIGKILL and other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.exit('train.py: error: found NaN or infinity at step 3')", "found NaN or infinity at step 3"),
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("raise SystemExit(7)", "exit code 7"),
    ],
)
def test_a_failed_command_says_why(tmp_path: Path, program: str, reason: str) -> None:
    (tmp_path / "program.py").write_text(program)
    with pytest.raises(CommandFailed, match=reason):
        run([str(tmp_path / "program.py")], 1, tmp_path / "log")


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 15)", "sys.exit(143)", "os.mknod('run/PREEMPTED'); sys.exit(1)"])
def test_a_command_told_to_stop_is_no_result(tmp_path: Path, end: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "program.py").write_text(f"import os, sys; os.chdir({str(tmp_path)!r}); {end}")
    with pytest.raises(UserError, match="start again to go on"):
        run([str(tmp_path / "program.py")], 1, tmp_path / "log")


@pytest.fixture
def real(home: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command of a sweep on the tiny random model."""
    write_wmdp(tmp_path / "data", [question(index, answer=index % 4, said=None) for index in range(12)])
    train = "--layers 1 3 4 --seq-len 24 --batch 6 --examples 6 --dtype fp32 --lora-rank 2"
    corpora = [f"--{name}={home / name}" for name in ("model", "lens")]
    corpora += [f"--{name}={home / name}.jsonl" for name in ("forget", "retain")]

    def command(output: Path, grid: str, *flags: str) -> list[str]:
        words = [sys.executable, str(ROOT / "launch/sweep.py"), "--output", str(output), "--grid", grid]
        words += ["--target", "wmdp_bio<=0", "--tasks", "wmdp_bio", "--data-dir", str(tmp_path / "data"), *flags]
        return [*words, "--", *train.split(), *corpora]

    return command


@pytest.mark.slow
def test_a_real_trial(real: Callable[..., list[str]], tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = real(tmp_path / "s", "remove-coef=2", "--trials", "1")
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert result.returncode == 0, result.stderr
    assert "The target is not met: the budget of 1 trials is spent." in result.stdout
    (record,) = read_records(tmp_path / "s" / "trials.jsonl")
    assert record["state"] in ("gentler", "push harder") and record["steps"] == 1
    assert record["losses"].keys() == {"forget_loss", "retain_loss"} and record["settings"]["remove_coef"] == 2.0
    assert record["verdict"]["by_point"] in ("not met", "met only by collapse")
    assert [words.split()[1] for words in record["commands"]] == ["train.py", "evals/run.py"]


@pytest.mark.slow
def test_a_real_sweep_killed_inside_trials_ends_the_same(real: Callable[..., list[str]], tmp_path: Path) -> None:
    environment, tables = os.environ | {"OMP_NUM_THREADS": "1"}, []
    for delays in ((), (14.0, 9.0)):
        for delay in delays:
            process = subprocess.Popen(real(tmp_path / "s", "remove-coef=2,5"), env=environment)
            time.sleep(delay)
            process.kill()
            process.wait()
        result = subprocess.run(
            real(tmp_path / "s", "remove-coef=2,5"), capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
        tables.append((tmp_path / "s" / "table.md").read_text())
        shutil.rmtree(tmp_path / "s")
    assert tables[0] == tables[1]
