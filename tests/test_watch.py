"""The live view: what it says is what the files say, and no file can break it."""

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from report_support import write
from watch_support import (
    CONFIG,
    SIZES,
    append,
    lock,
    make_attack,
    make_comparison,
    make_run,
    make_sweep,
    measure,
    picture,
    step_line,
)

from unlearn.errors import UserError
from unlearn.evals.attack.config import read_attacks
from unlearn.evals.tamper import attack_folder
from unlearn.launch.watch import files
from unlearn.launch.watch.attack import expected, roles
from unlearn.launch.watch.draw import draw
from unlearn.launch.watch.files import Objects, number
from unlearn.launch.watch.look import Nothing, Watcher
from unlearn.launch.watch.run import RunReader, RunView, planned_steps
from unlearn.launch.watch.series import Series
from unlearn.launch.watch.text import bar, cell, line, span, sparkline
from unlearn.run import tail
from unlearn.run.tail import Tail


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return make_sweep(tmp_path)


@pytest.fixture
def attack(tmp_path: Path) -> Path:
    return make_attack(tmp_path)


@pytest.fixture
def comparison(tmp_path: Path, attack: Path) -> Path:
    return make_comparison(tmp_path, attack)


def test_a_run_at_work(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=10)
    measure(folder, 10, wmdp_bio=0.375)
    lock(folder)
    text = picture(folder, now=(folder / "metrics.jsonl").stat().st_mtime + 65)
    for words in (
        "simnpo", "base/model · LoRA of rank 4 · adamw · bf16 · 4 ranks · 4 x H100", "at work", "1 min 05 s ago",
        f"process {os.getpid()}", "step 10 of 40", "25 %", "1 min 00 s left · 1,000 tokens a second · 2 s a step",
        "learning rate adamw 0.0001", "322 TFLOP/s a rank", "accuracy after step 10", "37.5 %  [27.5, 47.5] of 40",
    ):  # fmt: skip
        assert words in text, text
    assert re.search(r"^loss +2.91 +█.*▁$", text, re.M) and re.search(r"^gradient norm +0.5 +▄+$", text, re.M)


@pytest.mark.parametrize(
    ("process", "host", "age", "words"),
    [
        (None, None, 5000, "at work"),  # a long evaluation, but its process is alive
        (2**22 + 1, None, 3, "stopped · .* has ended without a word"),
        (7, "node3", 3, "at work · .* process 7 on node3"),
        (7, "node3", 700, "silent · .* process 7 on node3 may have ended"),
    ],
)
def test_states_of_a_lock(tmp_path: Path, process: int | None, host: str | None, age: int, words: str) -> None:
    folder = make_run(tmp_path / "run")
    lock(folder, process, host)
    text = picture(folder, now=(folder / "metrics.jsonl").stat().st_mtime + age)
    assert re.search(words, text), text
    assert (" left" in text) is ("at work" in text)


def test_states_without_a_lock(tmp_path: Path) -> None:
    stopped = make_run(tmp_path / "stopped")
    assert "stopped · last line" in picture(stopped)
    (stopped / "PREEMPTED").touch()
    assert "told to; the same command goes on" in picture(stopped)
    finished = make_run(tmp_path / "finished", finished=True)
    text = picture(finished)
    assert "finished" in text and "step 10 of 10" in text, "a budget of damage may have ended it early"


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    """The lock comes first, then run.json and config.json, then the log; run.json alone is no run's."""
    lock(tmp_path)
    assert "no step yet" in picture(tmp_path) and "at work · no last line yet" in picture(tmp_path)
    write(tmp_path / "config.json", CONFIG)
    assert "step 0 of 40" in picture(tmp_path)
    append(tmp_path)
    assert "no step yet" in picture(tmp_path)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"steps": 40}, (40, False)),
        ({"steps": None}, (8, True)),
        ({"steps": None, "epochs": 3, "batch": 100}, (3, True)),
        ({"steps": 40, "repair_steps": 10}, (50, False)),
        ({"steps": 40, "layers_order": "back-to-front", "layers": [1, 2, 3]}, (120, False)),
        ({"steps": 40, "layers_order": "together", "layers": [1, 2, 3]}, (40, False)),
        ({"method": "reset"}, (0, False)),
        ({"steps": None, "batch": 0}, (None, False)),
        ({"steps": "many", "examples": None}, (None, False)),
    ],
)
def test_steps_that_are_planned(config: dict[str, Any], steps: tuple[int | None, bool]) -> None:
    assert planned_steps(CONFIG | config) == steps


def test_lines_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-written line counts once it is whole; a run of 100,000 steps costs no more a look than one of ten."""
    folder = make_run(tmp_path / "run", steps=200)
    reader, parsed = RunReader(folder, Objects()), []
    for module in (files, tail):
        monkeypatch.setattr(module, "parsed", lambda content: parsed.append(content) or json.loads(content))
    assert reader.look(0.0).done == 200 and len(parsed) == 201 + 2
    parsed.clear()
    whole = json.dumps(step_line(200)) + "\n"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(whole[:30])
        file.flush()
        assert reader.look(0.0).done == 200
        file.write(whole[30:])
    assert reader.look(0.0).done == 201 and len(parsed) == 1


def test_a_log_that_was_cut_or_replaced(tmp_path: Path) -> None:
    """A run goes on from its checkpoint: the log is cut there, and may be longer than before at the next look."""
    folder = make_run(tmp_path / "run", steps=30)
    reader, log = RunReader(folder, Objects()), folder / "metrics.jsonl"
    assert reader.look(0.0).done == 30
    os.truncate(log, len("".join(log.read_text().splitlines(keepends=True)[:21])))
    append(folder, *(step_line(step, phase="again") for step in range(20, 33)))
    view = reader.look(0.0)
    assert view.done == 33 and len(view.courses["loss"]) == 33 and view.damaged == 0
    log.unlink()
    assert reader.look(0.0).done == 0
    append(folder, step_line(0))
    assert reader.look(0.0).done == 1


def test_a_tail_of_nonsense(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    tail = Tail(file)
    assert list(tail.lines()) == []
    file.write_bytes(b'{"step": 1}\n\xff\xfe\x00{\n[1]\n\n{"a": ' + b"[" * 100_000 + b'\n{"step": 2}\n{"step"')
    assert list(tail.lines()) == [None, {"step": 1}, {"step": 2}] and tail.damaged == 3
    assert list(tail.lines()) == []
    file.unlink()
    file.mkdir()
    assert list(tail.lines()) == [None]


def test_series_stay_short_and_keep_their_mean() -> None:
    series = Series(most=8)
    for value in range(1000):
        series.add(float(value))
        assert len(series.values()) <= 9
    values = series.values()
    assert values == tuple(sorted(values)) and values[0] < 200 and values[-1] > 800


def test_drawing() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█" and sparkline([5.0] * 3, 8) == "▄▄▄"
    assert sparkline([0.0] * 50 + [1.0] * 50, 2) == "▁█" and sparkline([], 5) == "" == sparkline([1.0], 0)
    assert (
        bar(0.5, 4) == "██░░" and bar(7.0, 2) == "██" and cell("日本語", 5) == "日本…" and cell("ab", 4, True) == "  ab"
    )
    assert [span(s) for s in (-3, 59.9, 61, 3700, 90000)] == ["0 s", "59 s", "1 min 01 s", "1 h 01 min", "1 d 1 h"]
    assert "\x1b" not in line("a\x1b[2Jb\nc").plain and "\n" not in line("a\nb\r").plain
    assert [number(one) for one in (float("nan"), True, "1", 10**400, 1e300, None)] == [None] * 6


def test_an_attack(attack: Path) -> None:
    text = picture(attack)
    assert "attacks 2 of 4 ended" in text and "at work" in text
    assert re.search(r"unlearned adam-lr=3e-3 +diverged", text)
    assert re.search(r"random adam-lr=1e-3 +20 of 40 +75.0 → 62.5 ▇▃▆ +50.0 → 40.0 ▅▄", text), text
    assert "\nrandom adam-lr=1e-3\nstep 20 of 40" in text
    inner = picture(attack / "attacks/random/adam-lr=1e-3")
    assert "at work" in inner, "the grid's lock is held, a single attack has none"


def test_attacks_that_are_expected() -> None:
    """As many, and of the roles, that evals/tamper.py itself reads off the same flags."""
    words = ["--model", "m/m", "--forget", "f", "--retain", "r", "--output", "o", "--control", "random"]
    words += ["--control", "other=a/b", "--grid", "adam-lr=1e-3,3e-3", "data=forget,mix,retain"]
    config = read_attacks(words)
    flags = json.loads(json.dumps({name: getattr(config, name) for name in config.__dataclass_fields__}))
    assert expected(flags) == len(config.attacks) * len(config.subjects()) == 18
    assert roles(flags) == config.roles()
    assert attack_folder(Path("o"), "random", "x") == Path("o/attacks/random/x")


def test_a_sweep(sweep: Path) -> None:
    text = picture(sweep)
    assert "trials 2 done · 1 failed · 1 running · 6 points of the grid\ntarget wmdp_bio<=0.3" in text
    best = r"best so far --adam-lr 1e-4 --remove-coef 2 --seed 0\n1: 1e-4 2 0 +40.0 % \[30.0, 50.0\] +push harder"
    assert re.search(best, text), text
    assert "failed: no memory" in text and "now 003-c · training\nstep 20 of 40" in text
    write(sweep / "trials/003-c/run/run.json", {"finished": True})
    assert "003-c · evaluating" in picture(sweep)
    write(sweep / "best.json", {"outcome": "The target is met."})
    assert "at work" in picture(sweep), "begun again with a greater budget"
    (sweep / "lock").unlink()
    assert "finished" in picture(sweep) and "The target is met." in picture(sweep)


def test_a_comparison(comparison: Path) -> None:
    text = picture(comparison)
    assert "at work · last sign" in text and "trials 3 of 4 · attacks 1 · 4 attackers" in text
    assert re.search(r"^lens +2 of 2 +1 of 1 +1 of 4 +attack lora-16$", text, re.M), text
    assert re.search(r"^rmu +1 of 2 +– +0 +1 +training$", text, re.M)
    assert re.search(r"^reset +0 of 4 +1 +train failed: nothing to reset$", text, re.M)
    assert "now rmu 02-y · training\nstep 5 of 40" in text
    assert "now lens seed-1-x · attack lora-16\nstep 20 of 40" in text and "wmdp_bio 75.0 → 62.5 ▇▃▆" in text
    found = {"comparison": {"seeds": 2, "trials": 2}, "verdict": ["lens removes most."]}
    write(comparison / "compare.json", found)
    (comparison / "lock").unlink()
    text = picture(comparison)
    assert "finished" in text and "verdict lens removes most." in text and "chosen adam-lr 1e-3" in text
    assert "attacks 1 of 20 · 2 seeds a method" in text


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_picture_fits(sweep: Path, comparison: Path, tmp_path: Path, width: int, height: int) -> None:
    """What it is, its state, and how far it is, are seen in any terminal."""
    tasks = [f"task_{index}" for index in range(40)]
    wide = make_run(tmp_path / "run", eval_tasks=tasks, model="m" * 300)
    measure(wide, 10, **dict.fromkeys(tasks, 0.5))
    deep = comparison / "methods/lens/seed-1-x/attacks/lora-16"
    for folder in (sweep, comparison, deep, deep / "attacks/random/adam-lr=1e-3", wide):
        lines = draw(Watcher(folder).look(time.time()), width, height)
        assert len(lines) <= height and all(one.cell_len <= width for one in lines)
        text = "\n".join(one.plain for one in lines)
        assert re.search("at work|stopped", text) and re.search("step|trials|attacks", text), text


def test_what_files_say_cannot_break_it(sweep: Path, comparison: Path, tmp_path: Path) -> None:
    """Every value of every file in turn is something else, and every file is cut in half."""
    rng, odd = random.Random(0), [None, True, -1, 1e308, 10**400, "\x1b[2J\n", [], {}, [[1]], {"a": None}, 0, "x" * 999]
    run = make_run(tmp_path / "run")
    measure(run, 10, wmdp_bio=0.5)
    for folder in (sweep, comparison, run):
        for file in folder.rglob("*.json*"):
            original = file.read_text()
            for _ in range(4):
                objects = [
                    json.loads(one) for one in (original.splitlines() if file.suffix == ".jsonl" else [original])
                ]
                for one in objects:
                    one |= {key: rng.choice(odd) for key in rng.sample(sorted(one), (len(one) + 2) // 3)}
                file.write_text("".join(json.dumps(one) + "\n" for one in objects))
                check_drawn(folder)
            file.write_text(original[: len(original) // 2])
            check_drawn(folder)
            file.write_text(original)


def check_drawn(folder: Path) -> None:
    try:
        watcher = Watcher(folder)
    except UserError:
        return
    for width, height in SIZES:
        text = "".join(one.plain for one in draw(watcher.look(time.time()), width, height))
        assert "\x1b" not in text and "\n" not in text


def test_files_that_vanish(sweep: Path, comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the files and folders that are looked at, three of ten have just gone."""
    rng = random.Random(0)

    def flaky(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if rng.random() < 0.3:
                raise FileNotFoundError(2, "gone")
            return function(*args, **kwargs)

        return called

    for folder in (sweep, comparison):
        watcher = Watcher(folder)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", flaky(Path.open))
            patch.setattr(Path, "read_bytes", flaky(Path.read_bytes))
            patch.setattr(Path, "stat", flaky(Path.stat))
            patch.setattr(os, "listdir", flaky(os.listdir))
            for _ in range(20):
                draw(watcher.look(time.time()), 80, 24)


def test_a_folder_that_becomes_another(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    watcher = Watcher(folder)
    assert isinstance(watcher.look(0.0), RunView)
    folder.rename(tmp_path / "old")
    view = watcher.look(0.0)
    assert isinstance(view, Nothing) and "waiting" in draw(view, 80, 24)[1].plain
    write(folder / "sweep.json", {})
    assert "sweep" in draw(watcher.look(0.0), 80, 24)[0].plain
