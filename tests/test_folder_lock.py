"""One command at a time in a folder, and what a second one says."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_commands import flags
from test_evals_tamper import words

from unlearn.__main__ import main as unlearn_main
from unlearn.errors import UserError
from unlearn.evals import tamper
from unlearn.run.lock import LOCK, locked

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from unlearn.run.lock import locked
with locked(Path(sys.argv[1]), "run"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_at_work(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    with another_at_work(tmp_path / LOCK) as process:
        said = rf"expected no run at work in {tmp_path}; found one \(process {process.pid} on "
        with pytest.raises(UserError, match=said), locked(tmp_path / LOCK, "run"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(tmp_path / LOCK, "run"):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), locked(tmp_path / LOCK, "run"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_made_for_a_lock_go_with_it(tmp_path: Path) -> None:
    with locked(tmp_path / "runs/a" / LOCK, "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "runs/a" / LOCK, "run"):
        (tmp_path / "runs/a/config.json").touch()
    assert [path.name for path in (tmp_path / "runs/a").iterdir()] == ["config.json"]


def test_another_ones_lock_stays(tmp_path: Path) -> None:
    """The folder was deleted under a run, and a new one began there."""
    with locked(tmp_path / "a" / LOCK, "run"):
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / LOCK).touch()
    assert (tmp_path / "a" / LOCK).exists()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("unlearn.run.lock.fcntl.flock", refuse)
    with locked(tmp_path / LOCK, "run"):
        pass
    assert "warning: expected a file system with locks" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--seed", 5, "--overwrite")], ids=str)
def test_a_second_run_in_a_folder_is_refused(
    home: Path, tmp_path: Path, attempt: Callable[..., str], more: tuple[object, ...]
) -> None:
    """A second start with other flags mislabelled the first one's weights; an equal one mixed their logs."""
    folder = tmp_path / "run"
    with another_at_work(folder / LOCK):
        assert f"expected no run at work in {folder}; found one" in attempt(*flags(home, folder), *more)
    assert not (folder / "config.json").exists()
    assert "unlearned model" in attempt(*flags(home, folder))
    assert not (folder / LOCK).exists()


def test_a_second_attack_lens_or_world_is_refused(
    home: Path,
    tmp_path: Path,
    run_here: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = ["fit-lens", "--model", home / "model", "--forget", home / "forget.jsonl", "--retain", home / "retain.jsonl"]
    commands = {
        "attack": (tamper.main, words(home, tmp_path, tmp_path / "attack")[1:], tmp_path / "attack" / LOCK),
        "lens": (unlearn_main, [*fit, "--output", tmp_path / "lens"], tmp_path / "lens" / LOCK),
        "world": (unlearn_main, ["world", "--output", tmp_path / "world"], tmp_path / ".world.lock"),
    }
    for main, command, lock in commands.values():
        with locked(lock, "run"):
            assert run_here(main, *command) == 2
            assert "at work in" in capsys.readouterr().err
