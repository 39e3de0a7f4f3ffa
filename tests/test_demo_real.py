"""The demo on a real model: its flags, its table, and that its commands are ones that the programs take."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from unlearn.config import config_of, named_method, parse_flags
from unlearn.errors import UserError
from unlearn.evals.attack.config import read_attacks
from unlearn.evals.eval_config import EvalConfig
from unlearn.fit_config import FitLensConfig
from unlearn.launch import demo_real
from unlearn.launch.demo_real import METHODS, PROSE, TASKS, DemoRealConfig, claim, table, unlearn

TASKS_FOLDER = Path(__file__).parent.parent / "unlearn/evals/tasks/real"


def test_wrong_methods_are_refused() -> None:
    for methods in (("rmu", "magic"), ("rmu", "rmu"), ()):
        with pytest.raises(UserError, match="expected --methods"):
            DemoRealConfig(methods=methods)
    for methods in (("distill",), ("distill", "rmu")):
        with pytest.raises(UserError, match="expected rmu before distill"):
            DemoRealConfig(methods=methods)


def test_numbers_of_other_flags_never_stand_beside_each_other(tmp_path: Path) -> None:
    claim(DemoRealConfig(), tmp_path / "demo")
    claim(DemoRealConfig(methods=("rmu",), ranks=2), tmp_path / "demo")
    with pytest.raises(UserError, match="expected the flags of the demo"):
        claim(DemoRealConfig(questions=50), tmp_path / "demo")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="found other files"):
        claim(DemoRealConfig(), tmp_path / "other")


def test_tasks_are_there() -> None:
    for task in (*TASKS, PROSE):
        assert f"task: {task}\n" in (TASKS_FOLDER / f"{task}.yaml").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_programs_take_the_commands(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(demo_real, "run", lambda _, command: commands.append(shlex.split(command)))
    unlearn(DemoRealConfig(output=str(tmp_path)), tmp_path, method)
    *fit, train, evaluate, attack = commands
    assert [words[0] for words in (train, evaluate, attack)] == ["train.py", "evals/run.py", "evals/tamper.py"]
    assert len(fit) == (method == "lens") and all(parse_flags(FitLensConfig, words[3:]).layers for words in fit)
    assert parse_flags(config_of(named_method(train[1:])), train[1:]).steps == 30
    assert parse_flags(EvalConfig, evaluate[1:]).subsample == 100
    assert read_attacks(attack[1:]).split_by == "stated"


def test_table_shows_stages_and_splits() -> None:
    measured = {"acc": 0.5, "interval": [0.4, 0.6]}
    tasks: dict[str, Any] = dict.fromkeys(TASKS, measured)
    attacked = {TASKS[0]: measured, f"{TASKS[0]}/stated=False": {"acc": 0.25, "interval": [0.2, 0.3]}}
    lines = table({"before": {"tasks": tasks, "bits_per_byte": 1.25}, "attacked": {"tasks": attacked}}).splitlines()
    assert lines[1].count("50.0 [40.0, 60.0]") == 4 and lines[1].endswith("1.250")
    assert lines[2].count("50.0 [40.0, 60.0]") == 1 and lines[2].count("25.0 [20.0, 30.0]") == 1
