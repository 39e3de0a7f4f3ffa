"""`--track` and `unlearn track`: what reaches a tracker, and that a tracker which fails changes nothing of a run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_commands import ROOT, flags, run

from unlearn.config import configure
from unlearn.errors import UserError
from unlearn.track_config import TrackConfig

# Stands for the module that it is named after: notes its calls in a file, and fails where it is told to.
FAKE = """
import json, os, pathlib, sys
def note(*call):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([__name__, *call]) + "\\n")
    if call[0] == os.environ.get("FAIL"):
        raise ConnectionError("the service is gone")
class Run:
    def log(self, numbers, step): note("log", step, numbers)
    def finish(self): note("finish")
def init(**words):
    note("init", words["project"], words["name"], words["resume"], words["config"]["method"])
    return Run()
log, finish = Run().log, Run().finish
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of both names, first on every process's path; the file with their calls."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.syspath_prepend(str(folder))
    return tmp_path / "calls"


def calls(file: Path) -> list[list[object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def a_run(folder: Path, lines: int, finished: bool = True) -> Path:
    """A run's files, without the run."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"method": "lens"}))
    (folder / "run.json").write_text(json.dumps({"finished": finished}))
    write_lines(folder, lines)
    return folder


def write_lines(folder: Path, lines: int) -> None:
    text = "".join(json.dumps({"step": step, "phase": "x", "loss": step / 2}) + "\n" for step in range(lines))
    (folder / "metrics.jsonl").write_text(text + '{"step": 9')  # half a line, as while it is being written


def track(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unlearn", "track", str(folder), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_whole_line_once(name: str, fakes: Path, tmp_path: Path) -> None:
    """A second process sends what is new alone, and so does one after the run went back to a checkpoint."""
    folder = a_run(tmp_path / "mine", 3)
    assert track(folder, "--to", name, "--project", "p").returncode == 0
    assert calls(fakes) == [
        [name, "init", "p", "mine", "allow", "lens"],
        *([name, "log", step, {"loss": step / 2}] for step in range(3)),
        [name, "finish"],
    ]
    fakes.unlink()
    for lines in (2, 4):
        write_lines(folder, lines)
        assert track(folder, "--to", name).returncode == 0
    assert [call[2:] for call in calls(fakes) if call[1] == "log"] == [[3, {"loss": 1.5}]]


def test_it_follows_until_the_run_is_finished(fakes: Path, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "mine", 1, finished=False)
    command = [sys.executable, "-m", "unlearn", "track", str(folder), "--to", "wandb"]
    process = subprocess.Popen(command, cwd=ROOT)
    while not fakes.exists() or len(calls(fakes)) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    a_run(folder, 2)
    assert process.wait(60) == 0
    assert [call[2] for call in calls(fakes) if call[1] == "log"] == [0, 1]


def test_a_run_is_tracked_and_the_numbers_are_the_logs(fakes: Path, home: Path, tmp_path: Path) -> None:
    result = run("train.py", *flags(home, tmp_path / "run"), "--track", "wandb", "--track-project", "ours", ranks=2)
    assert result.returncode == 0 and "tracker" not in result.stderr, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    sent = [call for call in calls(fakes) if call[1] == "log"]
    assert [call[2] for call in sent] == [line["step"] for line in lines]
    assert [call[3]["seconds"] for call in sent] == [line["seconds"] for line in lines]  # type: ignore[index]
    assert calls(fakes)[0][2] == "ours" and calls(fakes)[-1][1] == "finish"


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_dead_tracker_never_stops_a_run(
    where: str, fakes: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends as without it, says so in one line, and names the command that sends the rest."""
    monkeypatch.setenv("FAIL", where)
    result = run("train.py", *flags(home, tmp_path / "run"), "--track", "wandb")
    assert result.returncode == 0 and (tmp_path / "run/model").is_dir()
    (line,) = [line for line in result.stderr.splitlines() if "tracker ended with 1" in line]
    assert "the service is gone" in (tmp_path / "run/tracking/track.log").read_text()
    monkeypatch.delenv("FAIL")
    again = line.partition("to send the rest: unlearn ")[2].split()
    fakes.unlink()
    assert subprocess.run([sys.executable, "-m", "unlearn", *again], cwd=ROOT, timeout=120).returncode == 0
    assert calls(fakes)[-1][1] == "finish"
    assert "finished before" in run("train.py", *flags(home, tmp_path / "run")).stdout  # tracked or not is one run


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = a_run(tmp_path / "mine", 3)
    assert track(folder, "--to", "tensorboard", "--no-follow").returncode == 0
    found = reader.EventAccumulator(str(folder / "tracking/unlearn")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_mistakes_are_sentences(tmp_path: Path, fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = track(tmp_path, "--to", "wandb")
    assert result.returncode == 2 and "expected the folder of a run; found no config.json" in result.stderr
    with pytest.raises(UserError, match="--track-project has no effect without --track"):
        configure(track_project="x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for make in (lambda: configure(track="wandb"), lambda: TrackConfig(run="x", to="wandb")):
        with pytest.raises(UserError, match=r"pip install 'unlearn\[wandb\]'"):
            make()
