"""`unlearn watch` as a command: folders, flags, a terminal, a real run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from evals_support import question, write_wmdp
from report_support import write
from test_commands import ROOT, flags, run
from watch_support import ATTEMPT, append, make_run, make_sweep, picture, step_line

from unlearn.assemble import build
from unlearn.config import TrainConfig, parse_method_flags
from unlearn.errors import UserError
from unlearn.evals.train import run as train
from unlearn.launch.watch import watch
from unlearn.launch.watch.config import WatchConfig
from unlearn.launch.watch.run import planned_steps


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return make_sweep(tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda place: None, "found nothing at"),
        (lambda place: place.symlink_to(place), "found nothing at"),
        (lambda place: place.write_text(""), "found the file"),
        (lambda place: place.mkdir(), "found nothing in"),
        (lambda place: write(place / "config.json", {"model_type": "gpt_neox"}), "found 'config.json'"),
        (lambda place: (place / "x").mkdir(parents=True), "found 'x'"),
        (lambda place: make_run(place / "run"), "found a trial's"),
    ],
)
def test_folders_that_are_not_ours(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "place")
    with pytest.raises(UserError, match=words):
        watch(WatchConfig(str(tmp_path / "place")))


def test_flags_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="found no home folder"):
        watch(WatchConfig("~nobody-of-this-name/run"))
    for every in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(UserError, match="--every"):
            WatchConfig("x", every=every)
    with pytest.raises(UserError, match="--every has no effect beside --once"):
        WatchConfig("x", every=2.0, once=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'unlearn\[watch\]'"):
        watch(WatchConfig(str(make_run(tmp_path / "run"))))


def test_one_picture_without_a_terminal(tmp_path: Path) -> None:
    """100 columns, no escape sequences; a terminal that knows ASCII alone gets that."""
    folder = make_run(tmp_path / "run", model="modèle")
    result = run("-m", "unlearn", "watch", folder)
    assert result.returncode == 0 and "step 10 of 40 █" in result.stdout and "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    result = run("-m", "unlearn", "watch", folder, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "mod?le" in result.stdout and "step 10 of 40 =" in result.stdout
    wrong = run("-m", "unlearn", "watch", tmp_path / "none")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "found nothing at" in wrong.stderr


def in_terminal(folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], int]:
    """The command in a terminal of its own, and the other end of that."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "unlearn", "watch", str(folder), *words]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    os.close(theirs)
    return process, ours


def shown(terminal: int, words: str = "", seconds: float = 30.0) -> str:
    """What came until `words`, or the end."""
    found, end = "", time.monotonic() + seconds
    while time.monotonic() < end and not (words and words in found):
        try:
            found += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            break
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_leaving_a_live_view(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process, terminal = in_terminal(make_run(tmp_path / "run"), "--every", "0.2")
    assert "stopped" in shown(terminal, "gradient norm")
    process.send_signal(number)
    rest = shown(terminal)
    assert process.wait(10) == code and "Traceback" not in rest and "\x1b[?1049l" in rest, "the terminal is as before"


def test_a_live_view_ends_with_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=10)
    process, terminal = in_terminal(folder, "--every", "0.2")
    shown(terminal, "step 10 of 40")
    append(folder, *map(step_line, range(10, 40)))
    shown(terminal, "step 40 of 40")
    assert process.poll() is None
    write(folder / "run.json", {"finished": True, "attempts": [ATTEMPT]})
    rest = shown(terminal)
    assert process.wait(10) == 0 and "finished" in rest[rest.index("\x1b[?1049l") :], "its last picture stays"


def test_a_real_run(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What train.py writes is what is read."""
    write_wmdp(tmp_path / "data", [question(index, answer=index % 4, said=None) for index in range(12)])
    changes = {"eval-tasks": "wmdp_bio", "eval-every": 2, "data-dir": tmp_path / "data", "device": "cpu"}
    words = list(map(str, flags(home, tmp_path / "run", **changes)))
    train(parse_method_flags(TrainConfig, words))
    capsys.readouterr()
    watch(WatchConfig(str(tmp_path / "run")))
    text = capsys.readouterr().out
    log = [json.loads(one) for one in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [one for one in log if "loss" in one][-1]
    acc = json.loads((tmp_path / "run/evals/step-000003.json").read_text())["wmdp_bio"]["acc"]
    for found in (
        "finished",
        "step 3 of 3",
        f"{last['loss']:.4g}",
        "accuracy after step 3",
        f"{100 * acc:.1f} %",
        "GiB",
    ):
        assert found in text, text
    config = parse_method_flags(TrainConfig, words)
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert planned_steps(stored) == (build(config, torch.device("cpu")).steps, True)


def test_nothing_is_written(sweep: Path) -> None:
    """The folder may be another user's."""
    before = {file: file.stat().st_mtime_ns for file in (sweep, *sweep.rglob("*"))}
    picture(sweep)
    assert {file: file.stat().st_mtime_ns for file in (sweep, *sweep.rglob("*"))} == before
